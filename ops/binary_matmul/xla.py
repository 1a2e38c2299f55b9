"""xor and popcount of words, in two forms that XLA for CPUs takes as one vectorized kernel each; int32 sums.

`_by_rows`, for few rows: w is read as it lies. The words of a pair of rows are counted in LANES sums beside each other,
which are added up at the end.

`_by_columns`, for many: a block of COLUMNS rows of w is turned, [words, COLUMNS], so that it stays in the first cache
while the rows of x pass by. An element of the result is a sum over WORDS words in registers, each of x repeated over a
register of columns. The result is written in place, a block after the other.

`int8` was slower on the CPU at every size that was tried (docs/benchmarks.md).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from lissom.ops.binary_matmul.batches import on_rows

LOCAL = True

LANES = 16
COLUMNS = 256
WORDS = 24
ROWS = 8192
"""Of x in a block whose sums, COLUMNS each, stay in cache between the words."""
MOST_UNROLLED = 32
"""Sums over WORDS that are written out; of longer rows they are a loop."""


def check(x_bits, w_bits, *, length: int) -> None:
    """Does everything."""


def run(x_bits, w_bits, *, length: int) -> jax.Array:
    return on_rows(functools.partial(_product, length), x_bits, w_bits)


def _product(length: int, x: jax.Array, w: jax.Array) -> jax.Array:
    form = _by_rows if _is_for_rows(*x.shape) else _by_columns
    f = lambda x, w: form(length, x, w)
    # By this name evaluation/costs.py knows the operations, of which it sees none in a popcount.
    f.__name__ = f"products_{2 * x.shape[0] * length * w.shape[0]}"
    return jax.jit(f)(x, w)


def _is_for_rows(rows: int, words: int) -> bool:
    """Measured: turning w is worth it from some rows on, later where the sums are long."""
    return words <= LANES * MOST_UNROLLED and rows <= (64 if words >= 64 else 4)


def _by_rows(length: int, x: jax.Array, w: jax.Array) -> jax.Array:
    short = -x.shape[1] % LANES
    x, w = (jnp.pad(bits, ((0, 0), (0, short))) for bits in (x, w))
    parts = (slice(i, i + LANES) for i in range(0, x.shape[1], LANES))
    counts = sum(_differing(x[:, None, part], w[None, :, part]) for part in parts)
    return length - 2 * counts.sum(-1)


def _by_columns(length: int, x: jax.Array, w: jax.Array) -> jax.Array:
    (m, n), rows, columns = (len(x), len(w)), min(len(x), ROWS), min(len(w), COLUMNS)

    def block(i, j, y):
        # Where blocks do not come out even the last one starts earlier, since slices are moved to within the array:
        # what was done is done again.
        at = (i * rows, j * columns)
        part = lax.dynamic_slice_in_dim(x, at[0], rows)
        turned = _laid_out(lax.dynamic_slice_in_dim(w, at[1], columns).T)
        return lax.dynamic_update_slice(y, length - 2 * _counts(part, turned), at)

    row_of_blocks = lambda i, y: lax.fori_loop(0, -(-n // columns), functools.partial(block, i), y)
    return lax.fori_loop(0, -(-m // rows), row_of_blocks, lax.empty((m, n), jnp.int32))


def _laid_out(x: jax.Array) -> jax.Array:
    """x in memory as its shape says: XLA would leave a transposed array as it lies, and gather from it."""
    return lax.optimization_barrier(x.reshape(-1)).reshape(x.shape)


def _counts(x: jax.Array, turned: jax.Array) -> jax.Array:
    """[m, n]: the bits that differ between x [m, words] and turned [words, n]."""
    words = x.shape[1]
    first = words if words <= WORDS * 3 // 2 else words % WORDS or WORDS

    def some(start, count: int) -> jax.Array:
        left = lax.dynamic_slice_in_dim(x, start, count, 1)
        right = lax.dynamic_slice_in_dim(turned, start, count, 0)
        return sum(_differing(left[:, j : j + 1], right[j]) for j in range(count))

    def step(i, counts):
        # The barrier keeps each sum over WORDS apart, and with that in registers.
        return lax.optimization_barrier(counts) + some(first + i * WORDS, WORDS)

    counts, steps = some(0, first), (words - first) // WORDS
    return lax.fori_loop(0, steps, step, counts, unroll=min(steps, MOST_UNROLLED)) if steps else counts


def _differing(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.population_count(a ^ b).astype(jnp.int32)
