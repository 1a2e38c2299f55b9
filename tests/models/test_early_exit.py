"""A batch that stops early says what the whole run says step by step, in batches that shrink."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.evaluation.early_exit import exit_steps
from lissom.models.spiking.early_exit import batch_sizes, carry_axes, confidence, run
from lissom.models.spiking.network import SpikingNet
from lissom.models.spiking.spike_maps import NormedConv
from lissom.models.spiking.spikeformer import Spikeformer

SHAPE = (8, 4, 2)
SETTINGS = {"input_shape": SHAPE, "classes": 4, "widths": (4, 6), "strides": (1, 2), "time_steps": 6}


def exact(**settings):
    """A network whose sums float32 holds without rounding, whatever their order: weights and inputs are multiples of
    powers of 2, and nothing is normed."""
    network = SpikingNet(**{**SETTINGS, "batch_norm": False, **settings}, rngs=nnx.Rngs(0))
    for _, node in nnx.iter_graph(network):
        if isinstance(getattr(node, "kernel", None), nnx.Param):
            node.kernel[...] = jnp.round(node.kernel[...] * 32) / 16
    return network


def pictures(count, seed=1):
    # From dark to bright, so that some fire early and some late.
    bright = jnp.linspace(0.2, 2.0, count).reshape(-1, 1, 1, 1)
    return jnp.round(jax.random.uniform(jax.random.key(seed), (count, *SHAPE)) * bright * 8) / 8


def stopped(network, inputs, temperature, threshold, smallest=2):
    return jax.jit(lambda x, a, b: run(network, x, a, b, smallest=smallest))(inputs, temperature, threshold)


def expected(network, inputs, temperature, threshold):
    scores = jax.jit(network.running)(inputs)
    steps = exit_steps(confidence(scores, temperature), threshold)
    return np.asarray(scores)[steps - 1, np.arange(len(steps))], steps


VARIANTS = {
    "lif": {},
    "soft": {"neuron_kwargs": {"lif": {"reset": "soft"}}},
    "cuba": {"neuron": "cuba"},
    "alif": {"neuron": "alif", "decoding": "max_membrane", "decoding_kwargs": {"max_membrane": {"decay": 0.5}},
             "neuron_kwargs": {"alif": {"adaptation_decay": 0.5, "adaptation_step": 0.25}}},
    "rate": {"encoding": "rate", "decoding": "count"},
    "first_spike": {"encoding": "latency", "decoding": "first_spike", "neuron_kwargs": {"lif": {"threshold": 0.25}}},
    "recurrent": {"hidden": (7,), "recurrent": True},
    "one_step": {"time_steps": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_the_whole_run_cut_off(name):
    network, inputs = exact(**VARIANTS[name]), pictures(13)
    sure = np.unique(confidence(jax.jit(network.running)(inputs), 0.5))
    middle = float(sure[len(sure) // 2] + sure[len(sure) // 2 - 1]) / 2
    for threshold in (middle, 1.0):
        found = stopped(network, inputs, 0.5, threshold, smallest=4)
        scores, steps = expected(network, inputs, 0.5, threshold)
        np.testing.assert_array_equal(found.steps, steps)
        np.testing.assert_allclose(found.scores, scores, rtol=1e-6, atol=1e-6)
        if name not in ("alif", "first_spike"):  # those multiply by what is no power of 2
            np.testing.assert_array_equal(found.scores, scores)
        assert int(found.passes.sum()) == steps.max()
    assert name == "one_step" or len(set(expected(network, inputs, 0.5, middle)[1])) > 1


@pytest.mark.parametrize("norm", ["none", "element"])
def test_with_norms(norm):
    """Sums of another order round otherwise, and a spike that stands on the edge may flip: none does here."""
    settings = {"batch_norm": True, "neuron_kwargs": {"lif": {"membrane_norm": norm, "threshold": 0.5}}}
    network, inputs = SpikingNet(**{**SETTINGS, **settings}, rngs=nnx.Rngs(0)), pictures(9)
    threshold = float(np.median(confidence(jax.jit(network.running)(inputs), 0.1))) + 1e-4
    found, (scores, steps) = stopped(network, inputs, 0.1, threshold), expected(network, inputs, 0.1, threshold)
    np.testing.assert_array_equal(found.steps, steps)
    np.testing.assert_allclose(found.scores, scores, atol=1e-5)
    assert len(set(steps)) > 1


def test_examples_with_a_time_axis():
    network = exact(input_shape=(7, *SHAPE), encoding="frames", time_steps=0)
    inputs = jnp.stack([pictures(12, seed) for seed in range(7)], 1)
    found, (scores, steps) = stopped(network, inputs, 0.5, 0.6), expected(network, inputs, 0.5, 0.6)
    np.testing.assert_array_equal(found.steps, steps)
    np.testing.assert_array_equal(found.scores, scores)
    assert len(set(steps)) > 1 and max(steps) == 7
    # As many frames as the examples have, not as many as the network was built for.
    assert int(stopped(network, inputs[:, :3], 0.5, 1.0).steps.max()) == 3


def test_a_temperature_for_each_step():
    network, inputs = exact(), pictures(12)
    temperatures = jnp.array([4.0, 2.0, 1.0, 0.5, 0.25, 0.125])
    scores = jax.jit(network.running)(inputs)
    steps = exit_steps(confidence(scores, temperatures[:, None, None]), 0.5)
    np.testing.assert_array_equal(stopped(network, inputs, temperatures, 0.5).steps, steps)
    assert len(set(steps)) > 1


def test_an_example_does_not_know_the_others():
    network, inputs = exact(), pictures(16)
    whole = stopped(network, inputs, 0.5, 0.5)
    for rows in (np.arange(16)[::-1], np.array([3, 3, 15, 0, 7])):
        part = stopped(network, inputs[rows], 0.5, 0.5)
        np.testing.assert_array_equal(part.steps, whole.steps[rows])
        np.testing.assert_array_equal(part.scores, whole.scores[rows])


def test_the_batch_shrinks_as_examples_stop():
    network, inputs = exact(), pictures(16)
    # Confidence is 1 / 4 where nothing has fired: black pictures never stop before the end.
    mixed = jnp.where(jnp.arange(16).reshape(-1, 1, 1, 1) < 3, 0.0, inputs + 2)
    found = stopped(network, mixed, 0.01, 0.26, smallest=2)
    steps = np.asarray(found.steps)
    assert batch_sizes(16, 2) == (16, 8, 4, 2)
    assert (steps[:3] == 6).all() and (steps[3:] < 6).all()
    # Of each step the batch that it is computed with: the smallest that holds all that were running before it.
    running = [(steps > t).sum() for t in range(6)]
    size = [16] + [min(s for s in (16, 8, 4, 2) if s >= n) for n in running[1:]]
    assert found.passes.tolist() == [size.count(s) for s in (16, 8, 4, 2)]
    assert found.passes[2] > 0 and found.passes[3] == 0
    never = stopped(network, mixed, 0.01, 1.0)
    assert never.passes.tolist() == [6, 0, 0, 0] and (never.steps == 6).all()


def test_all_are_sure_at_once():
    network, inputs = exact(), pictures(8)
    found = stopped(network, inputs, 1.0, 0.0)
    assert found.passes.tolist() == [1, 0, 0] and (found.steps == 1).all()
    np.testing.assert_array_equal(found.scores, jax.jit(network.running)(inputs)[0])


def test_the_first_product_of_what_repeats_is_taken_once():
    network, inputs = exact(), pictures(8)
    program = jax.make_jaxpr(lambda x: run(network, x, 1.0, 0.5, smallest=8))(inputs).jaxpr
    (loop,) = (equation for equation in program.eqns if equation.primitive.name == "while")
    inside = str(loop.params["body_jaxpr"])
    assert inside.count("conv_general_dilated[") == 1 and len(network.layers) == 2


def test_which_axis_is_that_of_the_examples():
    axes = carry_axes(exact(), pictures(2))
    (first, second), (total, count) = axes
    assert first.v == second.v == total == 0 and count == -1

    class Strange(SpikingNet):
        def advance(self, x, steps, carry, *, train=False):
            scores, carry, activity = super().advance(x, steps, carry, train=train)
            return scores, jnp.zeros(x.shape[1] * 2), activity

    strange = Strange(**SETTINGS, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="has no axis of examples"):
        carry_axes(strange, pictures(2))


def test_sizes():
    assert batch_sizes(256) == (256, 128, 64, 32, 16)
    assert batch_sizes(13, 2) == (13, 6, 3)
    assert batch_sizes(5) == (5,) and batch_sizes(1, 1) == (1,)
    with pytest.raises(ValueError, match=r"early_exit\.smallest=0 must be at least 1"):
        batch_sizes(8, 0)


def test_confidence_by_hand():
    scores = jnp.array([[0.0, 0.0], [jnp.log(3.0), 0.0], [100.0, 0.0]])
    np.testing.assert_allclose(confidence(scores), [0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(confidence(scores, 0.5), [0.5, 0.9, 1.0], rtol=1e-6)
    assert float(confidence(scores).max()) <= 1


def test_a_spikeformer_stops_too(monkeypatch):
    """And what its stem makes of pictures that are the same at every step is computed once."""
    sizes = {"widths": (4, 8), "depths": (1, 1), "strides": (2, 1), "convolutional": 1, "heads": 2, "stem": 3}
    network = Spikeformer(input_shape=SHAPE, classes=4, kernel=3, time_steps=6, **sizes, rngs=nnx.Rngs(0))
    inputs, seen, stem = pictures(13), [], network.entries[0]
    original = NormedConv.__call__
    monkeypatch.setattr(
        NormedConv, "__call__", lambda self, x, **kw: seen.append((self is stem, len(x))) or original(self, x, **kw)
    )
    sure = np.unique(confidence(jax.jit(network.running)(inputs), 0.5))
    middle = float(sure[len(sure) // 2] + sure[len(sure) // 2 - 1]) / 2
    scores, steps = expected(network, inputs, 0.5, middle)
    assert len(set(steps)) > 1
    # Traced without jit, the network is this object.
    seen.clear()
    found = run(network, inputs, 0.5, middle, smallest=2)
    np.testing.assert_array_equal(found.steps, steps)
    np.testing.assert_allclose(found.scores, scores, atol=1e-5)
    # 2 and 3: for the shapes of the carry.
    assert [batch for of_stem, batch in seen if of_stem] == [2, 3, 13] and len(seen) > 20
