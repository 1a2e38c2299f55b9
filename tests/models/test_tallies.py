"""What is read off counts of many batches; the mixture's use by domain against counting by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.models import tallies
from lissom.models.context import Context
from lissom.models.language import LanguageModel
from lissom.models.moe.layer import MoE
from lissom.models.moe.routing import Choices, Everyone, Picks, Slots, used
from lissom.training.objectives.language_modelling import LanguageModelling


def information(*layers):
    return tallies.domain_information(np.array(layers, float))["domain_information"]


def test_domain_information_by_hand():
    assert information([[5, 5], [50, 50]]) == 0  # both domains half and half
    assert information([[5, 0], [0, 70]]) == pytest.approx(1)  # one expert each: a bit, though one is seen more
    assert information([[5, 5], [5, 5]], [[5, 0], [0, 5]]) == pytest.approx(0.5)  # mean over layers
    # p(e | d) = (3/4, 1/4) and (1/4, 3/4), p(e) = (1/2, 1/2): 3/4 log2 3/2 + 1/4 log2 1/2
    assert information([[3, 1], [10, 30]]) == pytest.approx(0.75 * np.log2(1.5) - 0.25)
    # A domain that was not seen has no part.
    assert information([[5, 0], [0, 5], [0, 0]]) == pytest.approx(1)
    assert tallies.domain_information(np.zeros((1, 2, 2))) == {}


def test_firing_by_hand():
    """Two layers of neurons and the weights behind them, of 5 examples: spikes, places for them, operations."""
    activity = np.array([[30.0, 100, 400, 5], [10, 300, 150, 5], [0, 0, 50, 5]])
    assert tallies.firing(activity) == {
        "firing_rate": pytest.approx(0.1),
        "synaptic_operations": pytest.approx(120),
        "firing_rate/0": pytest.approx(0.3),
        "firing_rate/1": pytest.approx(10 / 300),
    }
    assert tallies.firing(np.array([[0.0, 0, 400, 5]])) == {}  # no neurons: the dense twin


def test_tallies_are_summed_before_they_are_read():
    totals = {}
    # Each batch alone has no information (one domain is seen), both together have a bit.
    for use in ([[4.0, 0], [0, 0]], [[0.0, 0], [0, 4]]):
        tallies.add(totals, {"loss": (jnp.array(6.0), jnp.array(2.0)), "domain_use": (jnp.array([use]), 3.0)})
    assert tallies.means(totals) == {"loss": (3.0, 4.0), "domain_information": (1.0, 6.0)}
    assert tallies.means({"loss": (np.array(0.0), 0.0)}) == {}


def test_purity_by_hand():
    # Experts of 8 + 1, of 2 + 3 and of 4 trajectories: (8 + 3 + 4) / 18 are of their expert's most frequent family.
    assert tallies.purity(np.array([[8.0, 2, 0], [1, 3, 4]])) == {"purity": pytest.approx(15 / 18)}
    assert tallies.purity(np.array([[6.0], [2.0]])) == {"purity": 0.75}  # one expert: the largest family
    assert tallies.purity(np.zeros((2, 2))) == {}


def test_use_of_every_form():
    # Two sequences of two tokens, three experts.
    chosen = Choices(jnp.array([[[0, 1], [1, 2]], [[2, 3], [-1, 2]]]), jnp.ones((2, 2, 2)))
    np.testing.assert_array_equal(used(chosen, (2, 2), 3), [[1, 2, 1], [0, 0, 2]])
    weights = jax.random.uniform(jax.random.key(0), (2, 2, 3))
    np.testing.assert_allclose(used(Everyone(weights), (2, 2), 3), weights.sum(1))
    picks = Picks(jnp.array([[0, 1], [0, 3], [2, 3]]), jnp.ones((3, 2)))  # tokens 0, 1 are of sequence 0
    np.testing.assert_array_equal(used(picks, (2, 2), 3), [[2, 1, 0], [0, 1, 2]])
    # Groups across the sequences: token 0 with 2, token 1 with 3.
    combine = jax.random.uniform(jax.random.key(1), (2, 2, 3, 4))
    slots = Slots(jnp.array([[0, 2], [1, 3]]), combine, combine)
    np.testing.assert_allclose(used(slots, (2, 2), 3), combine.sum((0, 3)), rtol=1e-6)


def test_a_layer_counts_by_domain_and_a_judged_network_reports_it():
    layer = MoE(8, gate="hash", experts=4, k=1, rngs=nnx.Rngs(0))
    x, tokens = jnp.zeros((3, 5, 8)), jnp.arange(15).reshape(3, 5)
    domains = jnp.array([[1.0, 0], [0, 1.0], [0, 0]])  # the third row only fills the batch up
    routing, _ = layer.gate(x, Context(tokens=tokens), None)
    by_hand = [np.bincount(np.ravel(routing.experts[d]), minlength=4) for d in (0, 1)]
    _, aux = layer(x, Context(tokens=tokens, domains=domains))
    np.testing.assert_array_equal(aux["metrics"]["domain_use"], by_hand)
    assert "domain_use" not in layer(x, Context(tokens=tokens))[1]["metrics"]

    network = LanguageModel(vocab_size=16, width=8, depth=2, heads=2, ffn="moe", rngs=nnx.Rngs(0))
    batch = {"inputs": tokens, "labels": tokens, "weights": jnp.ones((3, 5)), "mask": jnp.array([1.0, 1, 0])}
    sums = LanguageModelling().judge(network, {**batch, "domains": jnp.eye(3)}, None)
    use, count = sums["domain_use"]
    assert use.shape == (2, 3, 8) and count == 10
    np.testing.assert_array_equal(use.sum(-1), [[10, 10, 0]] * 2)  # five tokens with two experts each, twice
    assert "domain_use" not in LanguageModelling().judge(network, batch, None)
