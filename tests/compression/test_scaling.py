"""Scales, what shares them, and the gradients that are made up for rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.compression.quantization.formats import FORMATS, SCALE_FORMATS, Float, Integer
from lissom.compression.quantization.rounding import (
    clipped_at,
    fake,
    initial_scale,
    straight_through,
    with_learned_scale,
)
from lissom.compression.quantization.scaling import Scheme, dequantize, quantize, scale_shape, spread

SIGNED = [name for name, format in FORMATS.items() if format.signed]


def weights(shape=(6, 32, 5), seed=0):
    """Of channels of very different sizes."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * np.exp2(rng.uniform(-6, 6, shape[-1])), jnp.float32)


@pytest.mark.parametrize(
    ("per", "contracted", "shape"),
    [
        ("tensor", (0, 1), (1, 1, 1)),
        ("channel", (0, 1), (1, 1, 5)),
        ("channel", (-1,), (6, 32, 1)),
        (8, (0, 1), (6, 4, 5)),
        (16, (1,), (6, 2, 5)),
        (1, (1,), (6, 32, 5)),
    ],
)
def test_what_shares_a_scale(per, contracted, shape):
    """Each scale is that of the largest of its numbers, found by going through them one by one."""
    x, scheme = np.asarray(weights()), Scheme("int8", per=per)
    assert scale_shape(x.shape, per, contracted) == shape
    found = quantize(jnp.asarray(x), scheme, contracted)
    peaks = np.zeros(shape)
    for index in np.ndindex(*x.shape):
        own = tuple(i * groups // size for i, groups, size in zip(index, shape, x.shape, strict=True))
        peaks[own] = max(peaks[own], abs(x[index]))
    np.testing.assert_allclose(found.scale, peaks / 127, rtol=1e-6)
    np.testing.assert_allclose(found.numbers * spread(found.scale, x.shape), dequantize(found))


@pytest.mark.parametrize("per", ["tensor", "channel", 8])
@pytest.mark.parametrize("name", SIGNED)
def test_the_error_is_bounded(name, per):
    """Half a step: of integers the scale, of floats 2^-mantissa of the number (or the step of subnormals), of a table
    the widest gap."""
    x, scheme = weights(), Scheme(name, per=per)
    found, format = quantize(x, scheme, (0, 1)), FORMATS[name]
    scale, error = np.asarray(spread(found.scale, x.shape)), np.abs(dequantize(found) - x)
    if isinstance(format, Integer):
        bound = scale / 2
    elif isinstance(format, Float):
        bound = np.maximum(2.0 ** -(format.mantissa + 1) * np.abs(x), scale * format.smallest / 2)
    else:
        bound = scale * np.diff(np.asarray(format.numbers)).max() / 2
    assert (error <= bound * (1 + 1e-5)).all()
    assert error.max() > 0 or name == "fp8_e5m2"


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("way", ["nearest", "up", "down"])
def test_scales_are_numbers_of_their_format(scale_format, way):
    x = weights()
    scheme = Scheme("fp4_e2m1", per=16, scale_format=scale_format, scale_rounding=way)
    exact = np.asarray(quantize(x, Scheme("fp4_e2m1", per=16), (1,)).scale)
    found = quantize(x, scheme, (1,))
    format = SCALE_FORMATS[scale_format]
    np.testing.assert_array_equal(format.round(found.scale), found.scale)
    if way == "up":  # nothing saturates
        assert (np.asarray(found.scale) >= exact * (1 - 1e-6)).all()
        assert (
            np.abs(dequantize(found) - x) <= np.abs(x) / 4 + np.asarray(spread(found.scale, x.shape)) / 4 + 1e-6
        ).all()
    if way == "down":
        assert (np.asarray(found.scale) <= np.maximum(exact, format.smallest) * (1 + 1e-6)).all()
        assert np.abs(found.numbers).max() == 6


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("way", ["nearest", "up", "down"])
def test_two_levels_of_scales_do_not_depend_on_the_size_of_the_tensor(way, seed):
    """Without the tensor's scale, e4m3 has none for what is so small or so large; with it the numbers are the same."""
    x = weights((4, 32), seed)
    two = Scheme("fp4_e2m1", per=16, scale_format="ue4m3", scale_rounding=way, tensor_scale=True)
    one = Scheme("fp4_e2m1", per=16, scale_format="ue4m3")
    base = quantize(x, two, (1,))
    assert float(base.scale.max() / base.tensor) == pytest.approx(448, rel=1e-6)
    for factor in (2.0**-40, 2.0**40):
        found = quantize(factor * x, two, (1,))
        np.testing.assert_array_equal(found.numbers, base.numbers)
        np.testing.assert_allclose(dequantize(found), factor * dequantize(base), rtol=1e-6)
        worse = dequantize(quantize(factor * x, one, (1,)))
        assert np.abs(worse - factor * x).max() > 0.5 * factor * np.abs(x).max()


@pytest.mark.parametrize("scheme", [Scheme("int4"), Scheme("fp4_e2m1", per=8, scale_format="e8m0"),
                                    Scheme("nf4", per=8, scale_format="ue4m3", tensor_scale=True)])  # fmt: skip
def test_silence_stays_silence_and_what_is_no_number_is_told(scheme):
    x = jnp.zeros((4, 16)).at[0, 0].set(1e-30)
    found = jax.jit(lambda x: dequantize(quantize(x, scheme, (1,))))(x)
    assert np.isfinite(found).all() and not np.asarray(found[1:]).any()
    for wrong in (np.nan, np.inf):
        bad = jnp.ones((4, 16)).at[2, 3].set(wrong)
        found = np.asarray(dequantize(quantize(bad, scheme, (1,))))
        own = slice(None) if isinstance(scheme.per, str) else slice(0, 8)
        assert np.isnan(found[2, own]).all()
        if not scheme.tensor_scale:
            assert np.isfinite(found[[0, 1, 3]]).all()


def test_bits():
    assert Scheme("int8").bits((10, 6), (0,)) == 8 * 60 + 32 * 6
    assert Scheme("int4", per="tensor").bits((10, 6), (0,)) == 4 * 60 + 32
    assert (
        Scheme("fp4_e2m1", per=5, scale_format="ue4m3", tensor_scale=True).bits((10, 6), (0,)) == 4 * 60 + 8 * 12 + 32
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": "int3"}, "format='int3' must be one of int8, int4"),
        ({"format": "int8", "per": "row"}, "per='row' must be 'tensor', 'channel' or the size of a group"),
        ({"format": "int8", "per": 0}, "per=0 must be a whole number, at least 1"),
        ({"format": "int8", "per": 2.0}, "per=2.0 must be a whole number"),
        ({"format": "int8", "per": True}, "per=True must be a whole number"),
        (
            {"format": "int8", "scale_format": "e8m0", "tensor_scale": True},
            "tensor_scale=True goes with ue4m3 or ue5m3",
        ),
        ({"format": "int8", "scale_format": "e4m3"}, "scale_format='e4m3' must be one of float32, e8m0"),
        ({"format": "int8", "scale_rounding": "away"}, "scale_rounding='away' must be one of"),
        ({"format": "int8", "tensor_scale": True}, "tensor_scale=True goes with a scale_format of few bits"),
        ({"format": "int8", "clip": 0.0}, "clip=0.0 must be above 0"),
    ],
)
def test_bad_schemes(settings, words):
    with pytest.raises(ValueError, match=words):
        Scheme(**settings)


def test_groups_that_do_not_divide_are_an_error():
    with pytest.raises(ValueError, match=r"groups of 5 do not divide axis 1 of \[6, 32, 5\]"):
        quantize(weights(), Scheme("int4", per=5), (0, 1))
    with pytest.raises(ValueError, match="contracted names none"):
        quantize(weights(), Scheme("int4", per=5), ())


# ---- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_straight_through_is_clipping(name):
    format = FORMATS[name]
    x = jnp.asarray([-2, -0.4, 0.3, 0.9, 2]) * format.largest
    value, gradient = jax.vjp(lambda x: straight_through(format, x), x)
    np.testing.assert_array_equal(value, format.round(x))
    np.testing.assert_array_equal(gradient(jnp.full(5, 3.0))[0], [0, 3 * format.signed, 3, 3, 0])
    further = jax.vjp(lambda x: straight_through(format, x, None, 2.0), 1.5 * x)[1](jnp.ones(5))[0]
    np.testing.assert_array_equal(further, [0, format.signed, 1, 1, 0])


@pytest.mark.parametrize("per", ["tensor", "channel", 4])
def test_fake_is_what_is_stored(per):
    x, scheme = weights((8, 3)), Scheme("int4", per=per)
    value, pull = jax.vjp(lambda x: fake(x, scheme, (0,)), x)
    np.testing.assert_array_equal(value, dequantize(quantize(x, scheme, (0,))))
    given = jnp.arange(24.0).reshape(8, 3)
    np.testing.assert_allclose(pull(given)[0], given, rtol=1e-6)


def test_the_largest_number_has_its_gradient():
    """Though its quotient with the scale may lie beyond the range by a rounding."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2000, 3)), jnp.float32)
    assert (quantize(x, Scheme("int4"), (1,)).numbers.max(1) <= 7).all()
    gradient = jax.grad(lambda x: fake(x, Scheme("int4"), (1,)).sum())(x)
    np.testing.assert_allclose(gradient, 1, rtol=1e-6)


def test_only_a_range_that_is_meant_cuts_gradients_off():
    """Numbers that saturate since a scale was rounded down keep theirs; those beyond a range of 0.7 max |x| do not."""
    x = weights((8, 16))
    few = Scheme("fp4_e2m1", per=8, scale_format="ue4m3", scale_rounding="down", tensor_scale=True)
    found = quantize(x, few, (1,))
    assert (np.abs(x / spread(found.scale, x.shape)) > 6.01).any()
    np.testing.assert_allclose(jax.grad(lambda x: fake(x, few, (1,)).sum())(x), 1, rtol=1e-6)
    narrow = Scheme("int4", per="channel", clip=0.7)
    beyond = np.abs(x) > 0.7 * np.abs(x).max(1, keepdims=True) * (1 + 1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: fake(x, narrow, (1,)).sum())(x), ~beyond, rtol=1e-6)
    assert beyond.any()
    # Unsigned: what is below 0 is cut off, and nothing else.
    unsigned = Scheme("uint4", per=8, scale_format="ue4m3", scale_rounding="down", tensor_scale=True)
    np.testing.assert_allclose(jax.grad(lambda x: fake(x, unsigned, (1,)).sum())(x), x >= 0, rtol=1e-6)
    # The scale's own format has an end: what is far beyond it does not move.
    far = jnp.asarray([[1.0, -2.0, 0.5, 1e5]])
    few = Scheme("fp4_e2m1", per=4, scale_format="ue4m3")
    np.testing.assert_array_equal(fake(far, few, (1,))[0, 3], 6 * 448)
    for through_scale in (False, True):
        found = jax.grad(lambda x, t=through_scale: fake(x, few, (1,), through_scale=t)[0, 3])(far)
        np.testing.assert_array_equal(found, np.zeros((1, 4)))


@pytest.mark.parametrize("way", ["nearest", "up", "down"])
@pytest.mark.parametrize("peak", [8.9, 11.0, 7.0])
def test_a_rounded_scale_has_the_gradient_of_what_it_stands_for(way, peak):
    """Where the peak saturates, y = 6 s with ds/dpeak = 1/6, so that dy/dpeak is 1; else the rule within the range."""
    x, scheme = jnp.asarray([1.0, -2.0, 0.5, peak]), Scheme("fp4_e2m1", "tensor", "e8m0", way)
    scale = float(quantize(x, scheme, (0,)).scale[0])
    y, gradient = jax.value_and_grad(lambda x: fake(x, scheme, (0,), through_scale=True)[3])(x)
    inside = peak / scale <= 6
    expected = 1.0 + (float(y) / scale - peak / scale) / 6 if inside else 1.0
    np.testing.assert_allclose(gradient, [0, 0, 0, expected], atol=1e-5)


def test_the_scale_has_a_gradient_if_asked():
    """y_i = s q_i with s = |x_k| / L: dy_i/dx_k has q_i - x_i / s besides, and L for k itself, whose own number does
    not move within its range."""
    x, scheme = jnp.asarray([0.3, -1.7, 2.9, 7.0]), Scheme("int4", per="tensor")
    jacobian = jax.jacobian(lambda x: fake(x, scheme, (0,), through_scale=True))(x)
    scale, numbers = 1.0, np.round(np.asarray(x))
    expected = np.eye(4)
    expected[:, 3] += (numbers - np.asarray(x) / scale) / 7
    np.testing.assert_allclose(jacobian, expected, atol=1e-6)
    # Along x itself y is linear as long as nothing is rounded to another number.
    np.testing.assert_allclose(jacobian @ x, fake(x, scheme, (0,)), atol=1e-5)


def test_learned_scales_by_hand():
    """LSQ's equations 2, 3 and section 2.2, at numbers within and beyond the range."""
    x, scale, format = jnp.asarray([[0.26, -0.9], [3.0, -5.0]]), jnp.asarray([[0.1, 0.5]]), FORMATS["int4"]
    value, pull = jax.vjp(lambda x, s: with_learned_scale(x, s, format), x, scale)
    np.testing.assert_allclose(value, [[0.3, -1.0], [0.7, -3.5]], rtol=1e-6)
    d_x, d_scale = pull(jnp.ones((2, 2)))
    np.testing.assert_array_equal(d_x, [[1, 1], [0, 0]])
    factor = 1 / np.sqrt(2 * 7)
    np.testing.assert_allclose(d_scale, factor * np.array([[3 - 2.6 + 7, -2 + 1.8 - 7]]), rtol=1e-5)
    # A step that went below 0 is no end.
    lost = jax.vjp(lambda s: with_learned_scale(x, s, format), jnp.asarray([[-0.1, 0.5]]))
    assert np.isfinite(lost[0]).all() and np.isfinite(lost[1](jnp.ones((2, 2)))[0]).all()
    np.testing.assert_allclose(initial_scale(x, (1, 2), format), 2 * np.array([[1.63, 2.95]]) / np.sqrt(7), rtol=1e-6)


def test_clipped_activations_by_hand():
    x, format = jnp.asarray([-1.0, 0.3, 1.4, 9.0]), FORMATS["uint2"]
    value, pull = jax.vjp(lambda x, a: clipped_at(x, a, format), x, jnp.asarray(1.5))
    np.testing.assert_allclose(value, [0, 0.5, 1.5, 1.5])
    d_x, d_largest = pull(jnp.asarray([1.0, 2.0, 4.0, 8.0]))
    np.testing.assert_array_equal(d_x, [0, 2, 4, 0])
    assert d_largest == 8
    # On the edges, and where nothing is a number.
    _, pull = jax.vjp(lambda x, a: clipped_at(x, a, format), jnp.asarray([0.0, 1.5]), jnp.asarray(1.5))
    np.testing.assert_array_equal(np.concatenate([pull(jnp.ones(2))[0], pull(jnp.ones(2))[1][None]]), [0, 0, 1])
    assert np.isnan(clipped_at(jnp.asarray([jnp.nan]), jnp.asarray(1.5), format))
    with pytest.raises(ValueError, match="take an unsigned format, not int4"):
        clipped_at(x, jnp.asarray(1.0), FORMATS["int4"])


def test_stochastic_fake_is_unbiased():
    x, scheme = weights((16, 4)), Scheme("int4")
    draws = jnp.linspace(0, 1, 500, endpoint=False) + 1e-3
    mean = jax.vmap(lambda u: fake(x, scheme, (0,), jnp.full(x.shape, u)))(draws).mean(0)
    step = spread(quantize(x, scheme, (0,)).scale, x.shape)
    assert (np.abs(mean - x) <= 4e-3 * step).all()
