"""Permutation-based local search: soft mixtures and fixed orders against sums by hand, for every gate."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.models.context import Context
from lissom.models.moe import GATES
from lissom.models.moe.layer import MoE
from lissom.models.moe.local_search import balanced, nearest
from lissom.models.variables import merge, split
from lissom.ops.attention import masks
from tests.cases import some

WIDTH, EXPERTS = 12, 4
X = jax.random.normal(jax.random.key(0), (4, 6, WIDTH))
CONTEXT = functools.partial(Context, mask=masks.Full(), tokens=jax.random.randint(jax.random.key(1), (4, 6), 0, 50))
KEY = jax.random.key(5)


def layer(gate, **settings):
    return MoE(WIDTH, gate=gate, experts=EXPERTS, **settings, rngs=nnx.Rngs(3))


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_sinkhorn():
    p = balanced(jax.random.normal(jax.random.key(0), (5, 5)), 100)
    close(p.sum(0), np.ones(5))
    close(p.sum(1), np.ones(5))
    close(balanced(jnp.zeros((4, 4))), np.full((4, 4), 0.25))
    # Two: exp of (a, b; c, d) becomes (q, 1 - q; 1 - q, q) with q / (1 - q) = exp((a + d - b - c) / 2).
    odds = np.exp((1.0 + 0.5 - 0.2 - 0.3) / 2)
    close(balanced(jnp.array([[1.0, 0.2], [0.3, 0.5]]), 100)[0, 0], odds / (1 + odds))
    cold = balanced(jnp.array([[1.0, 0.2], [0.3, 0.5]]) / 0.01)
    close(cold, np.eye(2), 1e-4)


def test_nearest_is_the_best_of_all():
    weights = jax.random.normal(jax.random.key(3), (5, 5))
    best = max(itertools.permutations(range(5)), key=lambda s: sum(weights[i, e] for i, e in enumerate(s)))
    assert nearest(weights).tolist() == list(best)


@pytest.mark.parametrize("name", some(GATES, ["top_k", "expert_choice", "soft"]))
def test_every_gate_searches_and_then_keeps_the_order(name):
    """With P an exact permutation s the layer is that whose expert s(i) stands at i, searching or not."""
    order = [2, 0, 3, 1]
    plain, moe = layer(name), layer(name, search=2, search_temperatures=(0.01, 0.01))
    for kernel in (plain.experts.inner.kernel, plain.experts.down.kernel):
        kernel[...] = kernel[...][jnp.array(order)]
    moe.search.weights[...] = jax.nn.one_hot(jnp.array(order), EXPERTS)
    for train in (True, True, True, False):  # two batches of search, one after it, one at inference
        assert bool(moe.search.searching) == (moe.search.done[...] < 2)
        right, _ = plain(X, CONTEXT(train=train), KEY)
        y, aux = moe(X, CONTEXT(train=train), KEY)
        close(y, right, 1e-4)
        assert aux["metrics"].keys() == plain(X, CONTEXT(train=False), KEY)[1]["metrics"].keys()
        assert moe.search.order[...].tolist() == order
    assert moe.search.done[...] == 3


def test_while_it_searches_an_output_is_a_mixture_and_has_a_gradient():
    moe = layer("top_k", search=3, search_temperatures=(1.0, 0.1), search_entropy=0.5)
    moe.search.weights[...] = jax.random.normal(jax.random.key(2), (EXPERTS, EXPERTS))
    parts = split(moe)

    def run(params, done):
        stats = {**parts.stats, "search": {**parts.stats["search"], "done": jnp.float32(done)}}
        module = merge(parts._replace(params=params, stats=stats))
        p = module.search.mixture
        y, aux = module(X, CONTEXT(train=True), KEY)
        return (y**2).sum(), (y, aux["losses"]["search_entropy"], p)

    for done, searching in ((0, True), (1, True), (2, True), (3, False), (10_000, False)):
        grads, (y, entropy, p) = jax.grad(run, has_aux=True)(parts.params, done)
        # t = 1, 1 / sqrt 10, 1 / 10
        if searching:
            close(p, balanced(moe.search.weights[...] * 10 ** (done / 2)))
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
        assert bool((grads["search"]["weights"] != 0).any()) == searching
        close(entropy, 0.5 * float(-(p * jnp.log(p)).sum(-1).mean()) if searching else 0.0, 1e-4)
    # By hand, at t = 1: expert e in place of output i with P_ie.
    _, (y, _, p) = run(parts.params, 0)
    routing, _ = moe.gate(X, CONTEXT(train=True), KEY)
    weights = (jax.nn.one_hot(routing.experts, EXPERTS) * routing.weights[..., None]).sum(2) @ p
    inner, down = moe.experts.kernels[:2]
    alone = lambda e: (jax.nn.silu(X @ inner[e, :, 0]) * (X @ inner[e, :, 1])) @ down[e]
    close(y, sum(weights[..., e, None] * alone(e) for e in range(EXPERTS)), 1e-4)


def test_bad_settings():
    with pytest.raises(ValueError, match="search=-1 must be at least 0"):
        layer("top_k", search=-1)
    for wrong in ((0.1, 0.2), (0.1, 0.0)):
        with pytest.raises(ValueError, match=r"search_temperatures=.* the second not above"):
            layer("top_k", search=1, search_temperatures=wrong)
    with pytest.raises(ValueError, match=r"search_entropy=-1\.0"):
        layer("top_k", search=1, search_entropy=-1.0)
