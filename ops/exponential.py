"""exp in float32 for CPUs, cheaper than XLA's own.

    exp(x) = 2^n p(r),    n = round(x / ln 2),    r = x - n ln 2 in [-ln 2 / 2, ln 2 / 2]

The reduction by a multiple of ln 2 in two parts is Cody and Waite's (Software Manual for the Elementary Functions,
1980). p is 1 + r + r^2 q(r), with q interpolated at Chebyshev's points when this module is imported. XLA's CPU compiler
vectorises every step, and fuses it with what stands around it.

Accuracy, against float64 over all of float32 (tests/ops/test_ops_exponential.py): `LARGEST_ERROR` units in the last
place where the result is a normal number. Results below 2^-126 may be 0, as XLA's own are on CPUs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

LARGEST_ERROR = 1.5
"""In units in the last place."""

LARGEST_FINITE = 88.37
"""From 127.5 ln 2 = 88.376 on the result is infinity: 2^n with n = 128 has no float32."""

# At the first, 2^n is 0; at the second it is infinity.
_LOWEST, _HIGHEST = np.float32(-127 * math.log(2)), np.float32(128 * math.log(2))

DEGREE = 4
"""Of q. With 3 the error is above 5 units in the last place; with 5 it is what it is with 4."""

# 355 / 512: nine bits, so that its product with any n has no rounding.
_LN2_HIGH = np.float32(355 / 512)
_LN2_LOW = np.float32(math.log(2) - 355 / 512)
_LOG2_E = np.float32(1 / math.log(2))

# Added to a float32 below 2^22, this leaves the nearest integer in the lowest bits.
_TO_INTEGER = np.float32(1.5 * 2**23)
_TO_INTEGER_BITS = int(_TO_INTEGER.view(np.int32))


def _coefficients() -> list[np.float32]:
    """Of q, highest power first."""
    half = math.log(2) / 2
    tail = lambda r: sum(r**k / math.factorial(k + 2) for k in range(20))
    fitted = np.polynomial.Chebyshev.interpolate(tail, DEGREE, domain=[-half, half])
    return [np.float32(c) for c in fitted.convert(kind=np.polynomial.Polynomial).coef[::-1]]


_COEFFICIENTS = _coefficients()


def mantissa_and_exponent(x: jax.Array, low: jax.Array | float = 0.0) -> tuple[jax.Array, jax.Array]:
    """(p, n) with exp(x + low) = p 2^n: p float32 in [0.70, 1.42], n int32. x is float32 with |x| <= 2 * 10^4, where
    n ln 2 is exact in its higher part; low is a correction with |low| <= 2^-5, below the precision of x."""
    # The integer comes out of the bits. Subtracting _TO_INTEGER again in float32 would be the same and one step
    # shorter, but XLA simplifies (a + c) - c to a.
    n = jax.lax.bitcast_convert_type(x * _LOG2_E + _TO_INTEGER, jnp.int32) - _TO_INTEGER_BITS
    whole = n.astype(jnp.float32)
    r = x - whole * _LN2_HIGH - whole * _LN2_LOW + low
    p = r * _COEFFICIENTS[0] + _COEFFICIENTS[1]
    for c in (*_COEFFICIENTS[2:], np.float32(1), np.float32(1)):
        p = p * r + c
    return p, n


def power_of_two(n: jax.Array) -> jax.Array:
    """2^n in float32 of int32 n from -127 (which gives 0) to 128 (which gives infinity)."""
    return jax.lax.bitcast_convert_type((n + 127) << 23, jnp.float32)


@jax.custom_jvp
def exp(x: jax.Array) -> jax.Array:
    """e^x, elementwise. Any float dtype; dtypes other than float32 take `jnp.exp`.

    -inf gives 0, inf gives inf, NaN gives NaN. In float32 results from 2^127.5 on (x > 88.37) are inf. Differentiable
    to any order.
    """
    if x.dtype != jnp.float32:
        return jnp.exp(x)
    # Comparisons with NaN are false: NaN passes through both bounds, and through p. jnp.clip does the same, slower.
    x = jnp.where(x < _LOWEST, _LOWEST, x)
    x = jnp.where(x > _HIGHEST, _HIGHEST, x)
    p, n = mantissa_and_exponent(x)
    return p * power_of_two(n)


@exp.defjvp
def _exp_jvp(primals, tangents):
    y = exp(*primals)
    return y, y * tangents[0]
