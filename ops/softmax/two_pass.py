"""Two passes over each row, without a maximum: a sum of (mantissa, exponent) pairs; the output. Reads 2, writes 1.

    exp(x_i) = p_i 2^(n_i)
    sum_i exp(x_i) = P 2^N,    (P, N) + (p, n) = (P 2^(N - M) + p 2^(n - M), M),   M = max(N, n)
    y_i = p_i 2^(n_i - N) / P

Dukhan and Ablavatski 2020 (arXiv 2001.04438). No power of two overflows, since every exponent that is formed is at
most 0. The pairs are summed in LANES columns beside each other, which are added up at the end.

What the paper leaves open and was chosen here: -inf has mantissa 0, a row of -inf gives zeros; inf and NaN give NaN.
What is above 2^20 counts as 2^20, and what is below -2^20 as that: without a maximum to subtract, float32 has no bits
left for the fraction of x / ln 2. The other forms have no such bound.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lissom.ops.exponential import mantissa_and_exponent, power_of_two
from lissom.ops.softmax.rows import along_rows, over_blocks, wide

LOCAL = True

LANES = 512
"""Columns that are summed beside each other."""

LARGEST = np.float32(2**20)

STEP = 2**11 * math.log(2)
_HIGH = round(STEP * 2) / 2  # 12 bits
_MIDDLE = round((STEP - _HIGH) * 2**14) / 2**14  # 12 bits at most
STEP_PARTS = tuple(np.float32(part) for part in (_HIGH, _MIDDLE, STEP - _HIGH - _MIDDLE))
"""STEP in parts whose products with any k up to 2^11 have no rounding, but for the last."""

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
    within = jnp.clip(x, -LARGEST, LARGEST)
    # Cody and Waite's reduction twice: first by multiples k of 2^11 ln 2, exact in its two higher parts. The lowest
    # part is added where there is room for its bits.
    k = jnp.round(within * np.float32(1 / STEP))
    p, n = mantissa_and_exponent(within - k * STEP_PARTS[0] - k * STEP_PARTS[1], -k * STEP_PARTS[2])
    n += k.astype(jnp.int32) * 2**11
    p = jnp.where(jnp.isinf(x), jnp.where(x < 0, 0, jnp.nan), p).astype(jnp.float32)
    # NaN has no exponent; with this one it reaches the sum.
    return p, jnp.where(jnp.isneginf(x), NO_EXPONENT, jnp.where(jnp.isnan(p), 0, n))


def _power(n: jax.Array) -> jax.Array:
    """2^n of n <= 0."""
    return power_of_two(jnp.maximum(n, -127))


def _sum_of_exponentials(x: jax.Array) -> Pair:
    """(P, N), both [rows, 1], of x [rows, n]."""
    n = x.shape[1]
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
