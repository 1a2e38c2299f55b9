"""What the forms of softmax share: blocks of rows, the output pass, the backward pass."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lissom.ops.exponential import exp

BLOCK = 2**20
"""Elements of a block of rows that is worked on while it lies in cache: 4 MB in float32, so that a block is worth the
start of its operations on every thread."""


def along_rows(forward: Callable, x: jax.Array, axis: int) -> jax.Array:
    """`forward`, a softmax over the last axis, over `axis` of x, with the backward pass below."""
    return jnp.moveaxis(_softmax(forward, jnp.moveaxis(x, axis, -1)), -1, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax(forward: Callable, x: jax.Array) -> jax.Array:
    return forward(x).astype(x.dtype)


def _forward(forward: Callable, x: jax.Array):
    y = _softmax(forward, x)
    return y, y if x.dtype == wide(x).dtype else x


def _backward(forward: Callable, kept: jax.Array, dy: jax.Array):
    """dx = y (dy - sum(dy y)); a row of zeros gets zeros. y is kept where it has no rounding of its own; below float32
    x is, and y taken again: the rounding of y in the sum would more than double the error."""
    y = kept if kept.dtype == wide(kept).dtype else forward(kept)
    dy = wide(dy)
    return ((y * (dy - (dy * y).sum(-1, keepdims=True))).astype(kept.dtype),)


_softmax.defvjp(_forward, _backward)


def wide(x: jax.Array) -> jax.Array:
    """float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def over_blocks(f: Callable, x: jax.Array):
    """f over blocks of rows of x [rows, n]; the results of f, arrays with as many rows, joined."""
    rows = max(1, min(x.shape[0], BLOCK // x.shape[1]))
    if rows == x.shape[0]:
        return f(x)

    def body(i, results):
        # Where the blocks do not come out even the last one starts earlier, since slices are moved to within the
        # array: rows that were done are done again.
        start = i * rows
        # The barrier has the block copied into cache once, and not read from x by every step of f.
        block = jax.lax.optimization_barrier(jax.lax.dynamic_slice_in_dim(x, start, rows))
        put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0)
        return jax.tree.map(put, results, f(block))

    shapes = jax.eval_shape(f, jax.ShapeDtypeStruct((rows, x.shape[1]), x.dtype))
    results = jax.tree.map(lambda s: jax.lax.empty((x.shape[0], *s.shape[1:]), s.dtype), shapes)
    return jax.lax.fori_loop(0, -(-x.shape[0] // rows), body, results)


def statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row's (maximum, sum of exp(x - maximum)), both [..., 1]; x is `wide`. A row of -inf has (-inf, 0)."""
    largest = x.max(-1, keepdims=True)
    # jnp.exp and not ours: the CPU compiler sums jnp.exp as it goes, and would first store ours.
    return largest, jnp.exp(x - subtrahend(largest)).sum(-1, keepdims=True)


def subtrahend(largest: jax.Array) -> jax.Array:
    """What is subtracted from a row: its maximum, or the lowest finite number where that is -inf (-inf - -inf is
    NaN)."""
    return jnp.maximum(largest, jnp.finfo(largest.dtype).min)


def output(x: jax.Array, largest: jax.Array, total: jax.Array) -> jax.Array:
    """exp(x - largest) / total, and 0 where the total is: the last pass over a row."""
    # Without the barrier XLA would take exp(x - largest) here and in the sum for one array and keep it in memory, which
    # costs a write and a read more than computing it twice.
    largest, total = jax.lax.optimization_barrier((largest, total))
    return exp(wide(x) - subtrahend(largest)) * (1 / jnp.where(total == 0, 1, total))
