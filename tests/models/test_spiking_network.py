"""Encoders and decoders by hand; the network in pieces, at one step, and what it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.evaluation import costs
from lissom.models.registry import construct
from lissom.models.spiking import DECODERS, ENCODERS
from lissom.models.spiking.layers import SpikingLayer
from lissom.models.spiking.network import SpikingNet
from lissom.models.variables import split
from lissom.training.building import build_network
from lissom.training.config import load_recipe
from lissom.training.stages import final_config, plan

SMALL = {"input_shape": (9, 8, 2), "classes": 5, "widths": (4, 6), "strides": (1, 2)}
DENSE = {"input_shape": (7, 3), "classes": 5, "widths": (), "strides": (), "hidden": (6, 6), "time_steps": 0}


def network(**settings):
    return SpikingNet(**{**SMALL, **settings}, rngs=nnx.Rngs(0))


def pictures(count=3):
    return jax.random.uniform(jax.random.key(1), (count, 9, 8, 2))


def encoder(name, **settings):
    return construct(ENCODERS, name, {name: settings}, "encoding", rngs=nnx.Rngs(0))


def decoder(name, **settings):
    return construct(DECODERS, name, {name: settings}, "decoding", rngs=nnx.Rngs(0))


def test_latency_by_hand():
    x = jnp.array([[1.0, 0.5, 0.2, 0.0, 2.0]])
    found = encoder("latency")(x, 5, None)
    assert found[:, 0].argmax(0).tolist() == [0, 2, 3, 0, 0]
    assert found[:, 0].sum(0).tolist() == [1, 1, 1, 0, 1]
    assert encoder("latency", floor=0.3)(x, 5, None)[:, 0].sum(0).tolist() == [1, 1, 0, 0, 1]
    assert encoder("latency")(x, 1, None)[0, 0].tolist() == [1, 1, 1, 0, 1]


def test_phase_gives_the_digits():
    x = jnp.array([[0.625, 1.0, 0.0, 0.51]])
    found = encoder("phase", bits=3)(x, 6, None)
    assert found[:3, 0, 0].tolist() == [0.5, 0, 0.125]  # 0.101
    np.testing.assert_array_equal(found[:3], found[3:])
    np.testing.assert_allclose(found[:3].sum(0)[0], [0.625, 0.875, 0, 0.5])


def test_rate_fires_as_often_as_the_value():
    x = jnp.array([[0.0, 0.3, 1.0, 1.7, -1.0]])
    found = encoder("rate")(x, 4000, jax.random.key(3))
    np.testing.assert_allclose(found.mean(0)[0], [0, 0.3, 1, 1, 0], atol=0.03)
    assert set(np.unique(found)) == {0, 1}
    half = encoder("rate", gain=0.5)(x, 4000, jax.random.key(3)).mean(0)[0]
    np.testing.assert_allclose(half, [0, 0.15, 0.5, 0.85, 0], atol=0.03)
    # Two keys are two draws; without one they are those of always.
    assert (found != encoder("rate")(x, 4000, jax.random.key(4))).any()
    np.testing.assert_array_equal(encoder("rate")(x, 9, None), encoder("rate")(x, 9, None))


def test_delta_by_hand():
    x = jnp.array([0.0, 0.3, 0.3, 0.9, 0.1])[None, :, None]
    found = encoder("delta", threshold=0.25)(x, 0, None)
    # The reference is 0, 0.25, 0.25, 0.75, 0.25.
    assert found[:, 0].tolist() == [[0, 0], [1, 0], [0, 0], [1, 0], [0, 1]]
    assert encoder("delta").channels(3, 7) == 6


def test_decoders_by_hand():
    outputs = jnp.array([[0, 1], [1, 0], [1, 1]], jnp.float32)[:, None]
    read = lambda name, **settings: decoder(name, **settings)(outputs, decoder(name).start(1, 2))[0][:, 0]
    np.testing.assert_allclose(read("mean"), [[0, 1], [0.5, 0.5], [2 / 3, 2 / 3]], rtol=1e-6)
    np.testing.assert_allclose(read("count"), [[0, 1], [1, 1], [2, 2]])
    np.testing.assert_allclose(read("max_membrane", decay=0.5), [[0, 1], [1, 1], [1.5, 1.25]])
    early = read("first_spike", tau=2.0, scale=3.0)
    np.testing.assert_allclose(early, [[0, 3], [3 * np.exp(-0.5), 3], [3 * np.exp(-0.5), 3]], rtol=1e-6)


def test_the_first_spike_is_pulled_by_all_up_to_it():
    outputs = jnp.array([0.0, 1.0, 1.0])[:, None, None]
    score = lambda outputs: decoder("first_spike")(outputs, decoder("first_spike").start(1, 1))[0][-1].sum()
    slope = jax.grad(score)(outputs)[:, 0, 0]
    scale, tau = 8.0, 4.0
    # A spike wins what it is worth and takes what the next one would be; those behind the first say nothing.
    worth = scale * np.exp(-np.arange(3) / tau)
    np.testing.assert_allclose(slope, [worth[0] - worth[1], worth[1] - worth[2], 0], rtol=1e-5)


VARIANTS = {
    "lif": {},
    "soft": {"neuron_kwargs": {"lif": {"reset": "soft"}}},
    "cuba": {"neuron": "cuba", "batch_norm": False},
    "alif": {"neuron": "alif", "decoding": "max_membrane"},
    "membrane_norm": {"neuron_kwargs": {"lif": {"membrane_norm": "element"}}},
    "rate": {"encoding": "rate", "decoding": "count"},
    "phase": {"encoding": "phase", "decoding": "first_spike", "neuron_kwargs": {"lif": {"threshold": 0.1}}},
    "recurrent": {"hidden": (7,), "recurrent": True, "neuron_kwargs": {"lif": {"threshold": 0.1}}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_in_pieces_it_is_the_whole(name):
    net = network(time_steps=6, **VARIANTS[name])
    x = pictures() * 3
    encoded = net.encoder(x, net.steps, None)
    whole = net.running(x)
    np.testing.assert_allclose(net(x)[0], whole[-1])
    carry, parts = net.start(len(x)), []
    for start, steps in ((0, 1), (1, 3), (4, 2)):
        piece = encoded if net.encoder.repeats else encoded[start : start + steps]
        scores, carry, _ = net.advance(piece, steps, carry)
        parts.append(scores)
    np.testing.assert_allclose(jnp.concatenate(parts), whole, atol=1e-5)
    assert np.abs(whole).max() > 0


def test_at_one_step_it_is_a_network_of_binary_activations():
    """Neither leak nor reset has a part (IIR-SNN's last stage and its control)."""
    net = network(time_steps=1)
    other = network(time_steps=1, neuron="if", neuron_kwargs={"if": {"reset": "soft"}})
    x = pictures() * 3
    np.testing.assert_array_equal(net(x)[0], other(x)[0])
    y = x
    for layer in net.layers:
        y = (layer.norm(layer.weights(y), train=False) >= 1).astype(jnp.float32)
    np.testing.assert_allclose(net(x)[0], net.head(y.mean((1, 2))), atol=1e-6)


def test_signals_and_frames_have_their_own_time():
    signals = jax.random.normal(jax.random.key(0), (4, 7, 3)) * 3
    net = SpikingNet(**DENSE, encoding="frames", rngs=nnx.Rngs(0))
    assert net.running(signals).shape == (7, 4, 5)
    # What comes later is not known earlier.
    later = signals.at[:, 4:].set(0.0)
    np.testing.assert_array_equal(net.running(later)[:4], net.running(signals)[:4])
    assert (net.running(later)[4:] != net.running(signals)[4:]).any()
    changes = SpikingNet(**DENSE, encoding="delta", rngs=nnx.Rngs(0))
    assert changes.layers[0].weights.kernel.shape == (6, 6)  # three channels up and three down
    frames = SpikingNet(**{**SMALL, "input_shape": (5, 9, 8, 2)}, time_steps=0, encoding="frames", rngs=nnx.Rngs(0))
    assert frames.running(jnp.ones((2, 5, 9, 8, 2))).shape == (5, 2, 5)


def test_stacked_frames_are_channels():
    """Channel t C + c is channel c of frame t, and there is one step, whose work is counted once."""
    inputs = jax.random.normal(jax.random.key(0), (2, 5, 9, 8, 3))
    x = encoder("stacked")(inputs, 0, None)
    assert x.shape == (1, 2, 9, 8, 15)
    np.testing.assert_array_equal(x[0, 1, 4, 6, 3 * 2 + 1], inputs[1, 2, 4, 6, 1])
    settings = {**SMALL, "input_shape": (5, 9, 8, 3), "time_steps": 0, "neuron": "relu"}
    net = SpikingNet(**settings, encoding="stacked", rngs=nnx.Rngs(0))
    assert net.running(inputs).shape == (1, 2, 5) and net.layers[0].inputs == 15
    assert [layer.passes for layer in net.work()] == [1] * len(net.work())
    # In another order it is another example.
    assert (net(inputs)[0] != net(inputs[:, ::-1])[0]).any()


@pytest.mark.parametrize("space", [(), (6,), (7, 5)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 3), (2, 2)])
def test_synaptic_operations_by_brute_force(space, kernel, stride):
    layer = SpikingLayer(2, 3, space, kernel=kernel, stride=stride, rngs=nnx.Rngs(0))
    x = jax.random.bernoulli(jax.random.key(0), 0.3, (2, 4, *space, 2)).astype(jnp.float32)
    layer.weights.kernel[...] = jnp.ones_like(layer.weights.kernel[...])
    # With weights of 1 each output is the number of spikes that came to it.
    came = layer.weights(x.reshape(-1, *x.shape[2:])).sum()
    y, _ = layer(x, 2, train=False)
    assert float(layer.synapses(x, y)) == pytest.approx(float(came))
    work = layer.work(2, once=False, binary=True)
    ones = jnp.ones_like(x[0])
    assert work.products == pytest.approx(2 * float(layer.weights(ones[:1]).sum()))
    assert (work.inputs, work.outputs) == (x[0, 0].size, y[0, 0].size)


def test_recurrent_spikes_are_counted():
    net = SpikingNet(**{**DENSE, "hidden": (6,)}, recurrent=True, encoding="frames", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 7, 3)) * 3
    y, _ = net.layers[0](x.swapaxes(0, 1), 7, train=False)
    activity = net(x)[1]["metrics"]["layer_activity"]
    fed = 6 * (float((x != 0).sum()) + float(y[:-1].sum()))
    assert activity.tolist() == [[float(y.sum()), y.size, fed, 4], [0, 0, float(y.sum()) * 5, 4]]
    assert net.layers[0].work(7, once=False, binary=False).weights == 3 * 6 + 6 * 6


def test_work_of_the_dense_twin_is_that_of_the_program():
    net = network(neuron="relu", time_steps=1, hidden=(7,))
    counted = costs.count(lambda x: net(x)[0], pictures(1)).flops
    assert sum(work.products for work in net.work()) == counted / 2
    dense = SpikingNet(**DENSE, encoding="frames", neuron="relu", rngs=nnx.Rngs(0))
    counted = costs.count(lambda x: dense(x)[0], jnp.ones((1, 7, 3))).flops
    assert sum(work.products for work in dense.work()) == counted / 2


def test_what_is_reported():
    net = network()
    assert net(pictures(), train=True)[1]["metrics"].keys() == {"firing_rate"}
    assert network(neuron="relu", time_steps=1)(pictures(), train=True)[1]["metrics"] == {}
    silent = network(neuron_kwargs={"lif": {"threshold": 1e9}})
    activity = silent(pictures())[1]["metrics"]["layer_activity"]
    assert activity[:, 0].tolist() == [0, 0, 0]
    assert np.isfinite(silent(pictures())[0]).all()
    loud = network(neuron_kwargs={"lif": {"threshold": 1e-9}}, batch_norm=False)
    for layer in loud.layers:
        layer.weights.kernel[...] = jnp.abs(layer.weights.kernel[...])
    activity = loud(pictures())[1]["metrics"]["layer_activity"]
    np.testing.assert_array_equal(activity[:2, 0], activity[:2, 1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"time_steps": 0}, "model.time_steps=0 must be at least 1 with model.encoding='direct'"),
        ({"encoding": "frames"}, "model.encoding='frames' reads the time of the examples: set model.time_steps to 0"),
        ({"strides": (1,)}, "model.widths (4, 6) and model.strides (1,) must be as long"),
        ({"widths": (4, 0)}, "model.widths=(4, 0) must hold one number or more, each at least 1"),
        ({"widths": (), "strides": ()}, "model.widths is empty, and examples [9, 8, 2] have space to convolve over"),
        ({"input_shape": (9,)}, "are convolutions over space, and examples [9] have none"),
        ({"recurrent": True}, "model.recurrent is of dense layers, and model.hidden is empty"),
        ({"neuron": "relu"}, "model.neuron='relu' has no memory, and model.time_steps=4 would compute the same"),
        ({"neuron": "relu", "time_steps": 1, "decoding": "count"}, "model.decoding='count' reads spikes"),
        (
            {"neuron": "relu", "time_steps": 1, "hidden": (3,), "recurrent": True},
            "model.recurrent goes with neurons that spike, not 'relu'",
        ),
        (
            {"hidden": (3,), "recurrent": True, "neuron_kwargs": {"lif": {"membrane_norm": "channel"}}},
            "model.recurrent does not go with a membrane_norm",
        ),
        ({"kernel": 0}, "model.kernel=0 must be at least 1"),
        ({"encoding": "rate", "encoding_kwargs": {"rate": {"gain": 0.0}}}, "encoding.gain=0.0 must be above 0"),
        ({"decoding_kwargs": {"max_membrane": {"steps": 3}}}, "decoding 'max_membrane' has no setting 'steps'"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError) as error:
        network(**settings)
    assert words in str(error.value)


def test_the_staged_recipe_goes_down_to_one_step():
    """A fifth of the run each, with the same parameters; at last it is the network of its control."""
    staged, single = (load_recipe(f"configs/vision/digits_snn.py:{name}") for name in ("staged", "single"))
    stages = plan(staged, 50)
    assert [(s.stop - s.start, s.config.model.time_steps, s.optimizer) for s in stages] == [
        (10, steps, "reset") for steps in (5, 4, 3, 2, 1)
    ]
    assert final_config(staged).model == single.model
    facts = {"input_shape": (8, 8, 1), "classes": 10}
    shapes = [
        jax.tree.map(jnp.shape, split(nnx.eval_shape(lambda s=s: build_network(s.config, facts, nnx.Rngs(0)))).params)
        for s in stages
    ]
    assert all(shape == shapes[0] for shape in shapes)
    # What the paper trains besides the weights: leak and threshold of every layer.
    assert {"decay", "threshold"} <= set(shapes[0]["layers"][0]["neuron"])
