"""Numbers of few bits against `ml_dtypes`, by formula and by looking through all of them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lissom.compression.quantization.formats import FORMATS, SCALE_FORMATS, Integer, numbers
from lissom.compression.quantization.packing import pack, unpack

ALL = {**FORMATS, **SCALE_FORMATS}
DTYPES = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "ue4m3": ml_dtypes.float8_e4m3fn,
}
INTEGERS = [name for name, format in FORMATS.items() if isinstance(format, Integer)]


def lowest(format):
    return -format.largest if format.signed else (format.smallest if format.name == "e8m0" else 0.0)


def in_range(format, count=4000):
    """Numbers of all magnitudes, and some near the largest."""
    rng = np.random.default_rng(0)
    wide = np.exp2(rng.uniform(np.log2(format.smallest) - 2, np.log2(format.largest), count)) * rng.choice(
        [-1, 1], count
    )
    x = np.concatenate([wide, rng.uniform(-1, 1, count) * min(format.largest, 1e3)]).astype(np.float32)
    return x[(x >= lowest(format)) & (np.abs(x) <= format.largest)]


@pytest.mark.parametrize("name", DTYPES)
def test_rounding_is_the_cast_of_ml_dtypes(name):
    """On all finite bfloat16 numbers in the range."""
    format, dtype = ALL[name], DTYPES[name]
    x = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) <= format.largest)]
    x = x[x >= lowest(format)]
    np.testing.assert_array_equal(jax.jit(format.round)(x), x.astype(dtype).astype(np.float32))
    # The unsigned ones of scales have the codes of the signed ones.
    codes = np.arange(1 if name == "e8m0" else 0, 2**format.bits // (2 if name == "ue4m3" else 1), dtype=np.uint8)
    known = codes.view(dtype).astype(np.float32)
    codes, known = codes[np.isfinite(known)], known[np.isfinite(known)]
    np.testing.assert_array_equal(jax.jit(format.decode)(codes), known)
    np.testing.assert_array_equal(jax.jit(format.encode)(known), codes)


def test_ue5m3_has_a_table_of_its_own():
    """By its definition: exponents of 2^-14 to 2^16 with eight fractions, below them subnormals; NaN on top."""
    normal = [2.0**e * (1 + m / 8) for e in range(-14, 17) for m in range(8)]
    table = [2.0**-17 * m for m in range(8)] + normal[:-1]
    format = SCALE_FORMATS["ue5m3"]
    np.testing.assert_array_equal(numbers(format), table)
    assert format.largest == 114688 == table[-1] and format.smallest == 2.0**-17
    np.testing.assert_array_equal(format.encode(jnp.asarray(table)), np.arange(255))


@pytest.mark.parametrize("name", ALL)
def test_codes(name):
    format = ALL[name]
    own = numbers(format)
    codes = np.asarray(format.encode(jnp.asarray(own, jnp.float32)))
    assert codes.max() < 2**format.bits and len(np.unique(codes)) == len(own)
    np.testing.assert_array_equal(format.decode(jnp.asarray(codes)), own)
    np.testing.assert_array_equal(format.round(jnp.asarray(own, jnp.float32)), own)
    assert own.max() == format.largest and own[own > 0].min() == format.smallest
    if name in INTEGERS:
        np.testing.assert_array_equal(own, np.arange(lowest(format), format.largest + 1))


@pytest.mark.parametrize("name", ALL)
def test_of_all_numbers_the_nearest_next_above_and_next_below(name):
    format, x = ALL[name], in_range(ALL[name])
    own = numbers(format)
    nearest, up, down = (np.asarray(format.round(x, way=way)) for way in ("nearest", "up", "down"))
    best = np.abs(own[None] - x[:, None].astype(np.float64)).min(1)
    np.testing.assert_array_equal(np.abs(nearest - x.astype(np.float64)), best)
    np.testing.assert_array_equal(up, own[np.searchsorted(own, x)])
    np.testing.assert_array_equal(down, own[np.searchsorted(own, x, side="right") - 1])


@pytest.mark.parametrize("name", ALL)
def test_stochastic_rounding_is_right_on_average(name):
    """Over evenly spaced draws: one of the two neighbours, each as often as its distance to the other says."""
    format, x = ALL[name], in_range(ALL[name], 40)
    draws = (np.arange(1000, dtype=np.float32) + 0.5) / 1000
    rounded = np.asarray(jax.jit(lambda x, u: format.round(x, u))(x[:, None], draws[None])).astype(np.float64)
    up, down = (np.asarray(format.round(x, way=way)).astype(np.float64) for way in ("up", "down"))
    assert ((rounded == up[:, None]) | (rounded == down[:, None])).all()
    assert (np.abs(rounded.mean(1) - x) <= 2e-3 * (up - down)).all()


@pytest.mark.parametrize("name", ALL)
def test_beyond_the_largest_and_not_a_number(name):
    format = ALL[name]
    x = np.array([np.inf, 2 * format.largest if format.largest < 1e38 else np.inf, -np.inf, np.nan], np.float32)
    for uniform in (None, 0.7 * np.ones(4, np.float32)):
        found = np.asarray(jax.jit(lambda x, u=uniform: format.round(x, u))(x))
        assert found[0] == found[1] == format.largest
        assert found[2] == lowest(format) and np.isnan(found[3])


@pytest.mark.parametrize("name", ALL)
def test_no_draw_leaves_the_format(name):
    """x + u rounds up to the next whole number where u is next to 1: of the largest, that would be one too many."""
    format = ALL[name]
    x = jnp.asarray([format.largest, lowest(format), format.smallest], jnp.float32)
    found = jax.jit(format.round)(x, jnp.full(3, 1 - 2.0**-24, jnp.float32))
    assert set(np.asarray(found).tolist()) <= set(numbers(format).tolist()) and found[0] == format.largest
    np.testing.assert_array_equal(format.decode(format.encode(found)), found)


def test_codes_that_are_no_numbers():
    for name, codes in {"fp8_e4m3": (0x7F, 0xFF), "fp8_e5m2": (0x7C, 0x7F), "ue5m3": (255,), "e8m0": (255,)}.items():
        assert np.isnan(ALL[name].decode(jnp.asarray(codes, jnp.uint8))).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (8, 1, 2), (5, 0)])
def test_packed_codes_are_those_that_were(bits, shape):
    codes = np.random.default_rng(0).integers(0, 2**bits, shape).astype(np.uint8)
    packed = pack(jnp.asarray(codes), bits)
    assert packed.shape == (-(-shape[0] * bits // 8), *shape[1:]) and packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack(packed, bits, shape[0]), codes)


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="codes of 3 bits do not fill bytes"):
        pack(jnp.zeros(4, jnp.uint8), 3)
    with pytest.raises(ValueError, match="9 codes of 4 bits are 5 bytes, not 4"):
        unpack(jnp.zeros(4, jnp.uint8), 4, 9)
