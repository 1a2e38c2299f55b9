"""Two passes over each row, without a maximum: a sum of (mantissa, exponent) pairs; the output. Reads 2, writes 1.

    exp(x_i) = p_i 2^(n_i)
    sum_i exp(x_i) = P 2^N,    (P, N) + (p, n) = (P 2^(N - M) + p 2^(n - M), M),   M = max(N, n)
    y_i = p_i 2^(n_i - N) / P

Dukhan and Ablavatski 2020 (arXiv 2001.04438). No power of two overflows, since every exponent that is formed is at
most 0. The pairs are summed in LANES columns beside each other, which are added up at the end.

What the paper leaves open and was chosen here: -inf has mantissa 0, a row of -inf gives zeros; inf and NaN give NaN.
The reduction by ln 2 is exact to rounding for |x| up to 2 * 10^4; from there on the error grows as |x| 2^-24, and
|x| above 2^20 counts as 2^20. The other forms subtract the maximum first and have no such bound.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lissom.ops.exponential import mantissa_and_exponent, power_of_two
from lissom.ops.softmax.rows import along_rows, over_blocks, wide

LOCAL = True

LANES = 512
"""Columns that are summed beside each other."""

LARGEST = np.float32(2**20)
NO_EXPONENT = -(2**22)
"""Below every n of a finite x."""

Pair = tuple[jax.Array, jax.Array]


def check(x, *, axis: int) -> None:
    if x.dtype == jnp.float64:
        raise NotImplementedError("x is float64; two_pass has a float32 exponential.")


def run(x, *, axis: int) -> jax.Array:
    return along_rows(_forward, x, axis)


def _forward(x: jax.Array) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    total, largest = jax.lax.optimization_barrier(over_blocks(_sum_of_exponentials, rows))
    p, n = _pair(rows)
    y = p * _power(n - largest) * (1 / jnp.where(total == 0, 1, total))
    return y.reshape(x.shape)


def _pair(x: jax.Array) -> Pair:
    x = wide(x)
    p, n = mantissa_and_exponent(jnp.clip(x, -LARGEST, LARGEST))
    p = jnp.where(jnp.isinf(x), jnp.where(x < 0, 0, jnp.nan), p).astype(jnp.float32)
    # NaN has no exponent; with this one it reaches the sum.
    return p, jnp.where(jnp.isneginf(x), NO_EXPONENT, jnp.where(jnp.isnan(p), 0, n))


def _power(n: jax.Array) -> jax.Array:
    """2^n of n <= 0."""
    return power_of_two(jnp.maximum(n, -127))


def _sum_of_exponentials(x: jax.Array) -> Pair:
    """(P, N), both [rows, 1], of x [rows, n]."""
    rows, n = x.shape
    lanes = min(LANES, n)

    def step(i, carry: Pair) -> Pair:
        return _added(carry, _pair(jax.lax.dynamic_slice_in_dim(x, i * lanes, lanes, 1)))

    rest = n % lanes
    first = jnp.pad(x[:, n - rest :], ((0, 0), (0, lanes - rest)), constant_values=-jnp.inf)
    p, n = jax.lax.fori_loop(0, n // lanes, step, _pair(first))
    largest = n.max(1, keepdims=True)
    return (p * _power(n - largest)).sum(1, keepdims=True), largest


def _added(a: Pair, b: Pair) -> Pair:
    largest = jnp.maximum(a[1], b[1])
    return a[0] * _power(a[1] - largest) + b[0] * _power(b[1] - largest), largest
