"""Layers of signs: each operator by its equation, its slope, and what is stored of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lissom.compression.quantization import binary
from lissom.compression.quantization.binary import (
    OPERATORS,
    SCORED,
    Binary,
    PackedSigns,
    StoredBinary,
    clipped,
    everywhere,
    fourier,
    hyperbolic,
    parabola,
    sign,
)
from lissom.compression.quantization.transforms import Binarize, PackedLayers
from lissom.compression.transforms import layer_paths
from lissom.evaluation.measuring import imitates
from lissom.models.linear import Conv, Linear
from lissom.models.products import Convolution, Dense, noted
from lissom.models.registry import UnknownName
from lissom.models.resnet import ResNet
from lissom.models.variables import flatten, map_paths, merge, split
from lissom.ops.binary_matmul import pack_signs
from lissom.training.errors import UserError


def network(operator, ends="^(stem|head)$"):
    net = ResNet(input_shape=(6, 6, 1), classes=10, widths=(8, 16), blocks=(1, 1), activation="none", rngs=nnx.Rngs(0))
    return Binarize(rules=((ends, {"skip": True}), (".*", {"operator": operator}))).structure(net)


def output(module, x):
    parts = split(module)
    return jax.jit(lambda *state: merge(type(parts)(parts.graph, *state))(x)[0])(*parts[1:])


PICTURES = np.random.default_rng(1).normal(size=(4, 6, 6, 1)).astype(np.float32)


@pytest.mark.parametrize("operator", OPERATORS)
def test_packed_signs_are_what_was_trained(operator):
    """A bit a weight, and the same answers: signs are compared exactly, scales multiply sums of whole numbers."""
    trained = network(operator)
    packed = PackedLayers().structure(merge(split(trained)))
    want, got = output(trained, PICTURES), output(packed, PICTURES)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))
    assert imitates(trained) and not imitates(packed)
    inner = {path: layer for path, layer in layer_paths(packed, (Conv,)).items() if path != "stem"}
    assert len(inner) == 5
    for path, layer in inner.items():
        assert isinstance(layer.kernel, PackedSigns) and isinstance(layer.quantizer, StoredBinary), path
        assert layer.kernel.words.size == layer.kernel.shape[-1] * -(-layer.kernel.length // 32), path
        before = dict(layer_paths(trained, (Conv,)))[path]
        signs, scale = before.quantizer.weights(before.kernel[...], (0, 1, 2))
        np.testing.assert_allclose(layer.kernel[...], signs if scale is None else signs * scale, rtol=1e-6)


@pytest.mark.parametrize("operator", OPERATORS)
def test_it_learns(operator):
    parts = split(network(operator))
    labels = jnp.arange(4)

    @jax.jit
    def gradients(params):
        loss = lambda params: optax.softmax_cross_entropy_with_integer_labels(
            merge(parts._replace(params=params))(PICTURES, train=True)[0], labels
        ).mean()
        return jax.grad(loss)(params)

    moved = map_paths(lambda path, leaf: leaf + 0.1 if path.endswith("alpha") else leaf, parts.params)
    for params in (parts.params, moved):
        for name, leaf in flatten(gradients(params)).items():
            # A squeeze-excite block is multiplied by alpha, which begins with 0.
            waits = "excitation" in name and params is parts.params
            assert jnp.isfinite(leaf).all() and (jnp.abs(leaf).max() > 0) != waits, name


def test_sign():
    x = jnp.asarray([-2.0, -0.5, -0.0, 0.0, 0.5, 2.0])
    np.testing.assert_array_equal(sign(clipped, x), [-1, -1, 1, 1, 1, 1])
    slope = lambda kind: jax.vmap(jax.grad(functools.partial(sign, kind)))(x)
    np.testing.assert_array_equal(slope(clipped), [0, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(slope(everywhere), np.ones(6))
    np.testing.assert_array_equal(slope(parabola), [0, 1, 2, 2, 1, 0])
    np.testing.assert_allclose(slope(hyperbolic), 1 - np.tanh(x) ** 2, rtol=1e-6)
    # The series of a square wave, cut off: at 0 all of its terms add up.
    np.testing.assert_allclose(slope(fourier)[2], 4 * 0.1 / np.pi * 11, rtol=1e-6)
    wave = lambda x: 4 / np.pi * sum(np.sin((2 * i + 1) * 0.1 * x) / (2 * i + 1) for i in range(11))
    np.testing.assert_allclose(slope(fourier)[5], (wave(2.001) - wave(1.999)) / 0.002, rtol=1e-3)


def test_scales_by_hand():
    kernel = jnp.asarray([[1.0, -0.2], [3.0, 0.6]])
    scale = lambda operator: Binary(operator, kernel, Dense()).weights(kernel, (0,))[1]
    assert scale("bnn") is None
    np.testing.assert_allclose(scale("xnor"), [[2.0, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(scale("dorefa"), [[1.2]], rtol=1e-6)
    np.testing.assert_allclose(scale("xnor++"), [[2.0, 0.4]], rtol=1e-6)
    # Standardised to +-1, so that its mean magnitude is 1 and the power of two next to it.
    np.testing.assert_allclose(scale("irnet"), [[1.0, 1.0]], rtol=1e-6)
    signs, _ = Binary("irnet", kernel, Dense()).weights(kernel, (0,))
    np.testing.assert_array_equal(signs, [[-1, -1], [1, 1]])


def test_weights_far_out_move_by_what_is_within():
    """ReCU: a weight beyond the quantiles is cut to them, which are constants."""
    kernel = jax.random.normal(jax.random.key(0), (100, 1))
    quantizer = Binary("recu", kernel, Dense())
    signs, scale = quantizer.weights(kernel, (0,))
    wide = (kernel - kernel.mean()) / kernel.std()
    low, high = np.quantile(wide, [0.01, 0.99])
    np.testing.assert_allclose(scale[0, 0], np.abs(np.clip(wide, low, high)).mean(), rtol=1e-5)
    np.testing.assert_array_equal(signs, np.where(wide >= 0, 1, -1))


def test_a_threshold_of_an_instance():
    """beta + alpha mean x^3: each example and channel its own, and 0 at the beginning."""
    layer = Conv(2, 3, (3, 3), rngs=nnx.Rngs(0))
    quantizer = Binary("insta", layer.kernel[...], Convolution())
    x = jax.random.normal(jax.random.key(2), (4, 5, 5, 2))
    np.testing.assert_array_equal(quantizer.moved(x), x)
    quantizer.alpha[...], quantizer.beta[...] = jnp.asarray([0.5, 0.0]), jnp.asarray([0.0, 0.1])
    moved = quantizer.moved(x)
    np.testing.assert_allclose(moved[1, ..., 0], x[1, ..., 0] - 0.5 * (x[1, ..., 0] ** 3).mean(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moved[..., 1], x[..., 1] - 0.1, rtol=1e-5, atol=1e-6)


def excited(channels=8):
    layer = Conv(channels, 3, (3, 3), rngs=nnx.Rngs(0))
    quantizer = Binary("insta_plus", layer.kernel[...], Convolution())
    quantizer.alpha[...], quantizer.beta[...] = jnp.linspace(-1, 1, channels), jnp.linspace(0, 1, channels)
    return quantizer, jax.random.normal(jax.random.key(2), (4, 5, 5, channels))


def test_a_squeeze_excite_block_on_the_mean_of_cubes():
    """beta + alpha m 2 sigmoid(relu(m S) E) by float64, m of one example; what it draws is the kernel's own."""
    quantizer, x = excited()
    block, one = quantizer.excitation, np.asarray(x[1], np.float64)
    assert block.squeeze.shape == (8, 2) and block.excite.shape == (2, 8)
    m = (one**3).mean((0, 1))
    squeeze, excite, alpha, beta = (
        np.asarray(v[...], np.float64) for v in (block.squeeze, block.excite, quantizer.alpha, quantizer.beta)
    )
    gate = 2 / (1 + np.exp(-np.maximum(m @ squeeze, 0) @ excite))
    assert np.abs(gate - 1).max() > 0.01
    np.testing.assert_allclose(quantizer.moved(x)[1], one - (beta + alpha * m * gate), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(excited()[0].excitation.squeeze[...], squeeze.astype(np.float32))
    other = Binary("insta_plus", jnp.ones((3, 3, 8, 3)), Convolution())
    assert (other.excitation.squeeze[...] != squeeze.astype(np.float32)).any()


def test_without_excitation_it_is_insta():
    plus, x = excited()
    plus.excitation.excite[...] = jnp.zeros((2, 8))
    plain = Binary("insta", jnp.ones((3, 3, 8, 3)), Convolution())
    plain.alpha[...], plain.beta[...] = plus.alpha[...], plus.beta[...]
    np.testing.assert_allclose(plus.moved(x), plain.moved(x), rtol=1e-6, atol=1e-6)
    # At the beginning the threshold is 0, as it is there.
    np.testing.assert_array_equal(Binary("insta_plus", jnp.ones((3, 3, 8, 3)), Convolution()).moved(x), x)


def test_operations_of_thresholds_by_hand():
    """4 examples, 25 places, windows of 9 x 8 numbers, 3 channels out; the block of 8 x 2 x 8 costs 4 x 16 for its
    products, 2 and 3 x 8 beside them, an example."""
    count = {}
    for operator in ("bireal", "reactnet", "insta", "insta_plus"):
        layer = Conv(8, 3, (3, 3), rngs=nnx.Rngs(0))
        layer.quantizer = nnx.data(Binary(operator, layer.kernel[...], Convolution()))
        with noted() as calls:
            jax.eval_shape(layer, jax.ShapeDtypeStruct((4, 5, 5, 8), jnp.float32))
        count[operator] = layer.quantizer.rounding_operations(calls[0])
    numbers, weights = 4 * 25 * 72, 72 * 3 * 3
    assert count == {
        "bireal": numbers + weights,
        "reactnet": 2 * numbers + weights,
        "insta": 6 * numbers + weights,
        "insta_plus": 6 * numbers + weights + 4 * (64 + 2 + 24),
    }


@pytest.mark.parametrize("channels", [3, 8, 16, 20, 32, 40])
@pytest.mark.parametrize(("shape", "kernel", "stride"), [((7, 6), (3, 3), 2), ((5, 5), (2, 2), 1), ((9,), (5,), 1)])
def test_windows_of_bits_are_those_of_signs(channels, shape, kernel, stride):
    """Exactly, whether eight channels fill a byte, and a window a word, or not; NaN and both zeros too."""
    layer = Conv(channels, 5, kernel, stride=stride, rngs=nnx.Rngs(0))
    layer.quantizer = nnx.data(Binary("bnn", layer.kernel[...], Convolution(stride)))
    x = np.random.default_rng(0).normal(size=(2, *shape, channels)).astype(np.float32)
    x[0, 0, ..., 0], x[0, 1, ..., 0], x[1, 0, ..., 1] = 0.0, -0.0, np.nan
    want = layer(x)
    layer.kernel, layer.quantizer = map(nnx.data, layer.quantizer.stored(layer.kernel[...], Convolution(stride)))
    np.testing.assert_array_equal(layer(x), want)


def test_windows_of_bits_are_gathered_as_bytes(monkeypatch):
    """What is packed is the picture, once, and not each of its windows."""
    layer = Conv(16, 5, (3, 3), rngs=nnx.Rngs(0))
    quantizer, packed = Binary("bnn", layer.kernel[...], Convolution()), []
    layer.kernel, layer.quantizer = map(nnx.data, quantizer.stored(layer.kernel[...], Convolution()))
    monkeypatch.setattr(binary, "pack_signs", lambda x: packed.append(x.shape) or pack_signs(x))
    layer(jnp.ones((2, 8, 8, 16)))
    assert packed == [(2, 8, 8, 16)]


def test_outside_of_a_picture_signs_are_1():
    layer = Conv(1, 1, (3,), rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.asarray([1.0, 1.0, 1.0]).reshape(3, 1, 1)
    layer.quantizer = nnx.data(Binary("bnn", layer.kernel[...], Convolution()))
    np.testing.assert_array_equal(layer(jnp.full((1, 4, 1), -2.0))[0, :, 0], [-1, -3, -3, -1])


def test_mistakes_are_one_sentence():
    net = lambda: ResNet(input_shape=(6, 6, 1), classes=10, widths=(8,), blocks=(1,), rngs=nnx.Rngs(0))
    with pytest.raises(UnknownName, match="did you mean 'reactnet'"):
        Binarize(rules=((".*", {"operator": "reacnet"}),)).structure(net())
    with pytest.raises(UserError, match="it takes operator"):
        Binarize(rules=((".*", {"weights": "int8"}),)).structure(net())
    with pytest.raises(UserError, match="'convs' matches no layer"):
        Binarize(rules=(("convs", {"operator": "bnn"}),)).structure(net())
    for operator in ("insta", "insta_plus"):
        with pytest.raises(UserError, match=f"head: operator='{operator}' takes means over places"):
            Binarize(rules=(("head", {"operator": operator}),)).structure(net())
    assert set(SCORED) < set(OPERATORS) and len(SCORED) == 8
    assert isinstance(net().head, Linear)
