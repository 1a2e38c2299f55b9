"""Networks that are written as NIR and read back spike as they did; neurons by NIR's own equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.compression.folding import FoldNorms
from lissom.models.spiking.network import SpikingNet
from lissom.models.spiking.nir_graphs import from_nir, to_nir

nir = pytest.importorskip("nir")
IMAGES = {"input_shape": (8, 8, 2), "classes": 5, "widths": (4, 6), "strides": (1, 2), "time_steps": 5}
CASES = {
    "lif": {"neuron_kwargs": {"lif": {"decay": 0.9, "threshold": 0.7}}},
    "if_hidden": {"neuron": "if", "hidden": (7,)},
    "cuba": {"neuron": "cuba", "neuron_kwargs": {"cuba": {"decay": 0.8, "current_decay": 0.3}}},
    "plif": {"neuron": "plif", "neuron_kwargs": {"plif": {"learn_threshold": True}}},
    "counted": {"decoding": "count", "neuron_kwargs": {"lif": {"threshold": 0.5}}},
    "signal": {"input_shape": (9, 2), "strides": (2, 2), "kernel": 4},
    "dense": {
        "input_shape": (6,),
        "widths": (),
        "strides": (),
        "hidden": (9, 7),
        "neuron_kwargs": {"lif": {"threshold": 0.2}},
    },
}


def network(**settings):
    net = SpikingNet(**{**IMAGES, **settings}, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for layer in net.layers:
        if layer.norm is not None:  # a norm that does something
            for name, values in (("mean", rng.normal(size=layer.outputs)), ("var", rng.uniform(0.5, 2, layer.outputs))):
                getattr(layer.norm, name)[...] = jnp.asarray(values, jnp.float32)
    return net


def examples(net):
    return 3 * jax.random.uniform(jax.random.key(0), (4, *net.layers[0].before, net.layers[0].inputs))


def read_back(net, path, dt=1.0, **settings):
    nir.write(path, to_nir(net, dt=dt))
    return from_nir(nir.read(path), dt=dt, time_steps=net.steps, **settings)


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tmp_path):
    settings = CASES[case]
    # Without a norm the weights are those that were: all that is said is the same.
    net = network(**settings, batch_norm=False)
    decoding = {"decoding": settings["decoding"]} if "decoding" in settings else {}
    back, x = read_back(net, tmp_path / "plain.nir", dt=0.5, **decoding), examples(net)
    whole = jax.jit(net.running)(x)
    np.testing.assert_array_equal(jax.jit(back.running)(x), whole)
    assert np.abs(whole).max() > 0
    # With one they are those that it was folded into: there and back again they stay.
    normed = network(**settings)
    folded = read_back(normed, tmp_path / "folded.nir", **decoding)
    np.testing.assert_allclose(jax.jit(folded.running)(x), jax.jit(normed.running)(x), atol=1e-4)
    again = read_back(folded, tmp_path / "again.nir", **decoding)
    np.testing.assert_array_equal(jax.jit(again.running)(x), jax.jit(folded.running)(x))


def test_layers_keep_their_own_leaks(tmp_path):
    """What is learned differs between layers."""
    net = network(batch_norm=False, neuron="plif", neuron_kwargs={"plif": {"learn_threshold": True}})
    for number, layer in enumerate(net.layers):
        layer.neuron.decay[...] += 0.7 * number
        layer.neuron.threshold[...] -= 0.5 * number
    back, x = read_back(net, tmp_path / "learned.nir"), examples(net)
    assert len({layer.neuron.decay for layer in back.layers}) == len(back.layers) > 1
    np.testing.assert_allclose(jax.jit(back.running)(x), jax.jit(net.running)(x), atol=1e-5)


def test_examples_with_a_time_axis(tmp_path):
    settings = {"input_shape": (5, 8, 8, 1), "encoding": "delta", "time_steps": 0}
    net = network(**settings, batch_norm=False)
    nir.write(tmp_path / "changes.nir", to_nir(net))
    back = from_nir(nir.read(tmp_path / "changes.nir"), **settings)
    x = 3 * jax.random.uniform(jax.random.key(0), (4, 5, 8, 8, 1))
    np.testing.assert_array_equal(jax.jit(back.running)(x), jax.jit(net.running)(x))


@pytest.mark.parametrize("kind", ["channel", "element"])
def test_folded_thresholds_are_those_of_each_neuron(kind, tmp_path):
    """Norms of membranes that were folded are a threshold a channel or neuron, which NIR has: there and back."""
    net = network(batch_norm=False, neuron_kwargs={"lif": {"membrane_norm": kind}})
    for layer in net.layers:
        layer.neuron.norm.bias[...] = jnp.linspace(-1.5, 1.5, layer.neuron.norm.bias.size)  # some are below 0
    net = FoldNorms().structure(net)
    told = to_nir(net).nodes["lif"].v_threshold
    limits = np.broadcast_to(net.layers[0].neuron.limit(), (8, 8, 4))
    np.testing.assert_allclose(np.moveaxis(told, 0, -1), limits, rtol=1e-6, atol=1e-6)
    assert told.min() < 0 < told.max() and (np.ptp(told, (1, 2)) == 0).all() == (kind == "channel")
    back, x = read_back(net, tmp_path / "folded.nir"), examples(net)
    assert back.layers[0].neuron.limit().shape == net.layers[0].neuron.limit().shape
    whole = jax.jit(net.running)(x)
    np.testing.assert_array_equal(jax.jit(back.running)(x), whole)
    assert np.abs(whole).max() > 0


def test_a_threshold_of_0_does_not_fire_at_rest():
    """NIR compares with >, and the next number above 0 is one that XLA takes for 0."""
    net = network(batch_norm=False)
    graph = to_nir(net)
    for node in graph.nodes.values():
        if hasattr(node, "v_threshold"):
            node.v_threshold = np.zeros_like(node.v_threshold)
        if hasattr(node, "bias"):
            node.bias = np.zeros_like(node.bias)
    back = from_nir(graph, time_steps=3)
    silent = jax.jit(back.running)(jnp.zeros((2, 8, 8, 2)))
    assert not np.asarray(silent).any()


def euler(node, current, dt):
    """Spikes [T, N] of a NIR neuron that is given currents [T, N], as its equations say."""
    v = i = np.zeros(current.shape[1])
    spikes = []
    for now in current:
        if isinstance(node, nir.CubaLIF):
            i = i + dt / node.tau_syn * (-i + node.w_in * now)
            v = v + dt / node.tau_mem * (node.v_leak - v + node.r * i)
        elif isinstance(node, nir.LIF):
            v = v + dt / node.tau * (node.v_leak - v + node.r * now)
        else:
            v = v + dt * node.r * now
        fired = v > node.v_threshold
        v = np.where(fired, node.v_reset, v)
        spikes.append(fired)
    return np.array(spikes, float)


@pytest.mark.parametrize("case", ["lif", "if_hidden", "cuba"])
def test_neurons_are_nirs_equations(case):
    settings = {**CASES[case], "input_shape": (6,), "widths": (), "strides": (), "hidden": (9,)}
    net = network(**settings, batch_norm=False)
    graph = to_nir(net, dt=0.25)
    neuron = next(node for node in graph.nodes.values() if hasattr(node, "v_threshold"))
    current = np.random.default_rng(1).normal(size=(40, 9))
    ours, _ = net.layers[0].neuron(jnp.asarray(current, jnp.float32)[:, None], train=False)
    np.testing.assert_array_equal(ours[:, 0], euler(neuron, current, 0.25))
    assert 0 < ours.mean() < 1


def test_a_convolution_is_nirs(tmp_path):
    """Symmetric padding and a kernel with zeros in front: by a correlation written out."""
    net = network(batch_norm=False)
    graph = to_nir(net)
    node = graph.nodes["conv2d_1"]
    assert node.weight.shape == (6, 4, 4, 4) and tuple(node.padding) == (1, 1) and not node.weight[:, :, 0].any()
    x = np.random.default_rng(0).normal(size=(4, 8, 8))
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1)])
    out = np.array([[np.tensordot(node.weight, padded[:, r : r + 4, c : c + 4], 3) for c in (0, 2, 4, 6)]
                    for r in (0, 2, 4, 6)])  # fmt: skip
    ours = net.layers[1].weights(jnp.asarray(x.transpose(1, 2, 0), jnp.float32)[None])[0]
    np.testing.assert_allclose(out + node.bias, ours, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"neuron_kwargs": {"lif": {"reset": "soft"}}}, "neuron.reset='soft' does not"),
        ({"neuron_kwargs": {"lif": {"membrane_norm": "channel"}}}, "neuron.membrane_norm may turn that around"),
        ({"neuron_kwargs": {"lif": {"decay": 1.0}}}, "neuron.decay=1 has none"),
        ({"neuron": "if", "neuron_kwargs": {"if": {"initial": 0.5}}}, "neuron.initial=0.5 does not"),
        ({"neuron": "alif"}, "no neuron like ALIF"),
        ({"neuron": "relu", "time_steps": 1}, "no neuron like ReLU"),
        ({"hidden": (5,), "recurrent": True}, "recurrent layers are not written"),
    ],
)
def test_what_nir_has_no_word_for(settings, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        to_nir(network(**settings))


def test_graphs_that_are_no_plain_network():
    graph = to_nir(network(batch_norm=False))
    with pytest.raises(ValueError, match=r"gives numbers, which model\.decoding='count' can't read"):
        from_nir(graph, decoding="count")
    graph.nodes["lif"].tau[0, 0, 0] = 9.0
    with pytest.raises(ValueError, match="tau differs between the neurons"):
        from_nir(graph)
    leaky = graph.nodes["lif"]
    graph.nodes["lif"] = nir.IF(r=np.ones_like(leaky.r), v_threshold=leaky.v_threshold, v_reset=leaky.v_reset)
    with pytest.raises(ValueError, match="of one kind, and these differ between layers"):
        from_nir(graph)
    graph.edges.append(("lif", "conv2d"))
    with pytest.raises(ValueError, match="has branches or loops"):
        from_nir(graph)
