"""Norms folded into weights and thresholds; trained activations as spiking neurons."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.compression.artefacts import export, reload
from lissom.compression.transforms import applied, build_transforms, structured
from lissom.eval import evaluate
from lissom.models.norms import BatchNorm
from lissom.models.spiking.network import SpikingNet
from lissom.models.variables import flatten, merge, split
from lissom.models.vit import VisionTransformer
from lissom.training.errors import UserError

SMALL = {"input_shape": (8, 8, 1), "classes": 5, "widths": (6, 7, 8), "strides": (1, 2, 2)}


def network(**settings):
    """With statistics, scales (of either sign) and biases as training might have left them."""
    net = SpikingNet(**{**SMALL, **settings}, rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    for _, node in nnx.iter_graph(net):
        if isinstance(node, BatchNorm):
            shape = node.scale.shape
            node.scale[...] = 1.5 * jax.random.normal(next(keys), shape)
            node.bias[...] = 0.6 + 0.3 * jax.random.normal(next(keys), shape)
            node.mean[...] = 0.2 * jax.random.normal(next(keys), shape)
            node.var[...] = jnp.exp(jax.random.normal(next(keys), shape))
    return net


def changed(net, name, data=(), **settings):
    return applied(merge(split(net)), build_transforms([{"name": name, **settings}]), data)


def pictures(count=4):
    return jax.random.uniform(jax.random.key(2), (count, 8, 8, 1))


def spikes_of(net, x):
    x = net.encoder(x, net.steps, None)
    return [y for _, _, y, _ in net.through(x, net.steps, (None,) * len(net.layers))]


@pytest.mark.parametrize("norm", ["none", "channel", "element"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_folded_network_fires_the_same_spikes(norm, batch_norm):
    net = network(batch_norm=batch_norm, neuron_kwargs={"lif": {"membrane_norm": norm}}, time_steps=6)
    if norm == "none" and not batch_norm:
        with pytest.raises(UserError, match="'fold_norms': there is no norm to fold"):
            structured(net, build_transforms([{"name": "fold_norms"}]))
        return
    assert any((node.scale[...] < 0).any() for _, node in nnx.iter_graph(net) if isinstance(node, BatchNorm))
    folded = changed(net, "fold_norms")
    assert not [node for _, node in nnx.iter_graph(folded) if isinstance(node, BatchNorm)]
    x = pictures()
    for want, got in zip(spikes_of(net, x), spikes_of(folded, x), strict=True):
        assert 0.02 < float(want.mean()) < 0.98
        np.testing.assert_array_equal(want, got)
    np.testing.assert_allclose(net.running(x), folded.running(x), atol=1e-5)
    # The weights are other ones: they hold the norm, or the sign of a channel's.
    before, after = (layers[0].weights.kernel[...] for layers in (net.layers, folded.layers))
    assert (before != after).any() == (batch_norm or norm == "channel")


def test_a_dense_twin_is_folded_too():
    net = network(neuron="relu", time_steps=1)
    folded = changed(net, "fold_norms")
    x = pictures()
    np.testing.assert_allclose(net(x)[0], folded(x)[0], rtol=1e-4, atol=1e-5)


def test_the_first_layer_of_a_conversion_is_exact():
    """Over as many steps as levels, the mean of an IF neuron's spikes is the quantized activation; with one layer the
    network's answer is the same."""
    settings = {"widths": (6,), "strides": (2,), "neuron": "clip_floor", "time_steps": 1}
    net = network(**settings, neuron_kwargs={"clip_floor": {"levels": 8, "limit": 2.0}})
    converted = changed(net, "to_spiking", steps=8)
    x = pictures()
    (spikes,), (values,) = spikes_of(converted, x), spikes_of(net, x)
    assert set(np.unique(spikes)) == {0, 1} and converted.steps == 8
    np.testing.assert_allclose(2 * spikes.mean(0), values[0], atol=1e-6)
    np.testing.assert_allclose(converted(x)[0], net(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("neuron", ["clip_floor", "relu"])
def test_a_conversion_comes_nearer_with_steps(neuron):
    # With few levels the network's own rounding would be what is left.
    net = network(neuron=neuron, time_steps=1, neuron_kwargs={"clip_floor": {"levels": 255}})
    x = pictures(16)
    data = [{"inputs": np.asarray(x)}]
    want, errors = net(x)[0], []
    for steps in (2, 16, 128, 512):
        got = changed(net, "to_spiking", data, steps=steps, percentile=100.0)(x)[0]
        errors.append(float(jnp.abs(got - want).mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0
    assert errors[3] < 0.05 * float(want.std())


def test_thresholds_are_balanced_by_the_percentile():
    """Of hand-made activations: one layer of one weight, whose activation is the pixel."""
    net = network(widths=(1,), strides=(1,), kernel=1, batch_norm=False, neuron="relu", time_steps=1)
    net.layers[0].weights.kernel[...] = jnp.ones((1, 1, 1, 1))
    values = np.linspace(0, 10, 3 * 64, dtype=np.float32).reshape(3, 8, 8, 1)
    half = changed(net, "to_spiking", [{"inputs": values}], steps=1, percentile=50.0)
    assert float(half.layers[0].weights.kernel[0, 0, 0, 0]) == pytest.approx(1 / 5)
    np.testing.assert_allclose(half.head.kernel[...], 5 * net.head.kernel[...], rtol=1e-5)
    # Where few pixels are lit the percentile is 0, and the limit the largest.
    few = np.where(values > 9.5, values, 0)
    rare = changed(net, "to_spiking", [{"inputs": few}], steps=1, percentile=50.0)
    assert float(rare.layers[0].weights.kernel[0, 0, 0, 0]) == pytest.approx(1 / 10)
    # Only so many examples are looked at: the first has the smallest values.
    first = changed(net, "to_spiking", [{"inputs": values}] * 2, steps=1, percentile=100.0, examples=1)
    assert float(first.layers[0].weights.kernel[0, 0, 0, 0]) == pytest.approx(1 / values[0].max())


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"steps": 0}, "transform 'to_spiking': steps=0 must be at least 1"),
        ({"steps": 4, "percentile": 0.0}, "transform 'to_spiking': percentile=0.0 must be above 0 and at most 100"),
        ({"steps": 4}, "it is for model.neuron='relu' or 'clip_floor', not a LIF"),
        ({"steps": 4}, "it is for the network 'spiking', not for a VisionTransformer"),
        ({"steps": 4}, "it is for model.encoding='direct'"),
        ({"steps": 4}, "it is for model.decoding='mean'"),
    ],
)
def test_bad_input(settings, words):
    if "VisionTransformer" in words:
        net = VisionTransformer(
            input_shape=(8, 8, 1), classes=5, width=8, depth=1, heads=1, patch=4, rngs=nnx.Rngs(0), mixer="attention"
        )
    elif "decoding" in words:
        net = network(neuron="relu", time_steps=1, decoding="max_membrane")
    elif "direct" in words:
        net = network(input_shape=(3, 8, 8, 1), neuron="relu", encoding="frames", time_steps=0)
    else:
        net = network()
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        changed(net, "to_spiking", **settings)


def test_rows_of_a_conversion(tiny_run):
    """One run, as it was trained and at two numbers of steps: exported, reloaded, told apart."""
    _, run = tiny_run(
        "vision/digits_snn",
        **{
            "model.neuron": "clip_floor",
            "model.time_steps": 1,
            "evaluation.transforms": ({"name": "to_spiking", "steps": 2}, {"name": "to_spiking", "steps": 5}),
        },
    )
    rows = evaluate([run])
    assert [row.identity.transform for row in rows] == [None, "to_spiking steps=2", "to_spiking steps=5"]
    values = [{m.name: m.value for m in row.measurements} for row in rows]
    assert "firing_rate" not in values[0] and values[1]["firing_rate"] > 0
    assert values[1]["inference_energy"] < values[2]["inference_energy"]
    directory = export(run, run / "exports" / "again", [{"name": "fold_norms"}])
    parts = reload(directory)
    assert not flatten(parts.stats)
    assert merge(parts)(pictures())[0].shape == (4, 10)
