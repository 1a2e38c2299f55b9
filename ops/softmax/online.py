"""Two passes over each row: the maximum and the sum of exponentials together; the output. Reads 2, writes 1.

A block of rows is brought into cache once, where its maxima and sums are found; the output pass is one operation over
the whole array. A row longer than a block goes by in parts, with a running maximum m and sum d,

    m' = max(m, max_j x_j),    d' = d exp(m - m') + sum_j exp(x_j - m')          over the columns j of a part

which is the online softmax of Milakov and Gimelshein 2018 (arXiv 1805.02867), by parts and not by single elements.
"""

import jax
import jax.numpy as jnp

from lissom.ops.softmax import rows as softmax_rows
from lissom.ops.softmax.rows import along_rows, output, over_blocks, statistics, subtrahend, wide

LOCAL = True


def check(x, *, axis: int) -> None:
    """Does everything (once differentiable)."""


def run(x, *, axis: int) -> jax.Array:
    return along_rows(_forward, x, axis)


def _forward(x: jax.Array) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    return output(rows, *over_blocks(_statistics, rows)).reshape(x.shape)


def _statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(maximum, sum of exp(x - maximum)) of x [rows, n], both [rows, 1]."""
    n, part = x.shape[1], softmax_rows.BLOCK
    if n <= part:
        return statistics(wide(x))

    def step(i, carry):
        return _merged(carry, statistics(wide(jax.lax.dynamic_slice_in_dim(x, i * part, part, 1))))

    first = n % part or part
    start = statistics(wide(x[:, n - first :]))
    return jax.lax.fori_loop(0, (n - first) // part, step, start)


def _merged(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    largest = jnp.maximum(a[0], b[0])
    scaled = [total * jnp.exp(m - subtrahend(largest)) for m, total in (a, b)]
    return largest, scaled[0] + scaled[1]
