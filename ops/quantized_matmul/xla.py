"""A product in plain XLA operations that reads the codes once, and never has the whole matrix of numbers in memory.

Measured on two cores of an AMD EPYC (AVX-512, jax 0.11.2), 4096 by 11008, scales of groups of 128, in turns:

* One row of x, int8, a scale a channel: numbers times x, summed, which the compiler makes one kernel of, in 0.65 to
  0.8 of the time of a product with a matrix of float32 that lies there.
* With scales of groups, or of 4 bits, that kernel is 5 to 15 times as slow. So the numbers of a block of channels are
  made first, in cache, as the left operand of a product with x. For 4 rows that takes a third of the time of the
  product with a matrix that lies there in float32, a half for 16, four fifths for 64; for one row of 4 bits and for 512
  rows it is no faster. The numbers of all channels at once, in memory, take 9 times as long for 4 rows and as long for
  512; x on the left 2 times as long for 4 rows and as long for 64.
* int8 x: the product of int8 that gives int32, whole, or a group at a time. It takes x [m, k] and codes [n, k] as they
  lie (n last is as fast; transposed before, 10 times as slow). Of one row the compiler makes a loop instead, in 70 ms;
  padded rows cost nothing (5 ms).
* int8 x, codes of 4 bits: to cut x into halves costs as much as x is large, to put numbers in order as much as they
  are. One core: 50,176 rows of 144 times 16 channels 8.6 ms cut, 2.0 in order; 16 rows of 4096 times 4096 3.3 cut, 15
  in order, but with scales of groups of 128, each a part of both halves, 38 cut and 19 in order.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lissom.ops.quantized_matmul.decoding import halves, in_halves, in_order, result_dtype, working_dtype
from lissom.ops.quantized_matmul.rows import as_rows, batched_as_rows

LOCAL = False

BLOCK = 2**21
"""Numbers of a block, 8 MB in float32: with half or twice as many 4096 by 11008 was no faster."""

LEAST_ROWS = 4

ROWS = (((1,), (1,)), ((), ()))  # of dot_general: rows times rows


def check(x, codes, scale, x_scale, *, bits: int) -> None:
    """Does everything."""


def run(x, codes, scale, x_scale, *, bits: int) -> jax.Array:
    def product(x, codes, scale, x_scale):
        y = _product(bits, x, codes, scale)
        return (y if x_scale is None else x_scale * y).astype(result_dtype(x, scale))

    return as_rows(product, x, codes, scale, x_scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(bits: int, x, codes, scale) -> jax.Array:
    """[m, n] in the working dtype, without the scales of x [m, k]."""
    return batched_as_rows(functools.partial(_forms, bits))(x, codes, scale)


def _forms(bits: int, x, codes, scale) -> jax.Array:
    form = _integers if x.dtype == jnp.int8 else _floats
    f = lambda x, codes, scale: form(bits, x, codes, scale)
    # By this name evaluation/costs.py knows the operations: a sum is no product to it, and padded rows are some.
    f.__name__ = f"products_{2 * x.shape[0] * x.shape[1] * codes.shape[0]}"
    return jax.jit(f)(x, codes, scale)


def _forward(bits: int, x, codes, scale):
    return _product(bits, x, codes, scale), (x, codes, scale)


def _backward(bits: int, kept, dy):
    """dx = dy w; of a scale the sum over its group of (dy^T x) numbers. A block of channels at a time; what is not
    asked for the compiler leaves out."""
    x, codes, scale = kept
    wide = dy.dtype
    rows = in_halves(x, bits).astype(wide).reshape(len(x), -1)

    def step(dx, codes, scale, dy):
        numbers = _numbers(codes, scale.shape[1], bits, wide)  # [n, h, g, k]
        weights = numbers * scale[:, None, :, None].astype(wide)
        dx = dx + lax.dot_general(dy, weights.reshape(len(dy), -1), (((0,), (0,)), ((), ())))
        if len(x) == 1 and x.dtype == jnp.int8:  # sums first, which are exact
            return dx, dy * (rows.reshape(numbers.shape[1:]) * numbers).sum((1, 3))
        outer = lax.dot_general(dy, rows, (((1,), (0,)), ((), ())))
        return dx, (outer.reshape(numbers.shape) * numbers).sum((1, 3))

    n, block = len(codes), _block(codes.shape[0], x.shape[1])
    whole = n // block * block
    cut = lambda a: a[:whole].reshape(-1, block, *a.shape[1:])
    dx, of_blocks = lax.scan(
        lambda dx, part: step(dx, *part), jnp.zeros_like(rows), tuple(map(cut, (codes, scale, dy.T)))
    )
    d_scale = of_blocks.reshape(whole, scale.shape[1])
    if whole < n:
        dx, rest = step(dx, codes[whole:], scale[whole:], dy.T[whole:])
        d_scale = jnp.concatenate([d_scale, rest])
    dx = in_order(dx.reshape(in_halves(x, bits).shape), bits).astype(x.dtype) if x.dtype != jnp.int8 else None
    return dx, None, d_scale.astype(scale.dtype)


_product.defvjp(_forward, _backward)


def _floats(bits: int, x, codes, scale) -> jax.Array:
    wide, groups = working_dtype(x, scale), scale.shape[1]
    rows = in_halves(x, bits).astype(wide).reshape(len(x), -1)
    if len(x) == 1 and bits == 8 and groups == 1:
        return (codes.astype(wide) * rows[0]).sum(-1)[None] * scale[:, 0]

    def block(codes, scale):
        weights = _numbers(codes, groups, bits, wide) * scale[:, None, :, None].astype(wide)
        # Without the barrier they might be made in the steps of a slower kernel for both.
        return lax.dot_general(lax.optimization_barrier(weights).reshape(len(codes), -1), rows, ROWS)

    return _over_blocks(block, (codes, scale), (len(x),), wide, x.shape[1]).T


def _integers(bits: int, x, codes, scale) -> jax.Array:
    """Sums in int32 of each group, then times scales."""
    m, wide, groups = len(x), working_dtype(x, scale), scale.shape[1]
    if m < LEAST_ROWS:
        # The barrier keeps the compiler from taking the padding off again.
        x = lax.optimization_barrier(jnp.pad(x, ((0, LEAST_ROWS - m), (0, 0))))
    ordered = bits == 4 and (groups > 1 or m >= len(codes))
    rows = x[:, None] if ordered else in_halves(x, bits)

    def block(codes, scale):
        numbers = codes[:, None] if bits == 8 else lax.optimization_barrier(halves(codes, bits))
        if ordered:
            numbers = in_order(numbers, bits)[:, None]
        if groups == 1:
            return _int32(rows, numbers).astype(wide) * scale[:, 0].astype(wide)
        size = rows.shape[2] // groups

        def group(g, y):
            part = lambda a: lax.dynamic_slice_in_dim(a, g * size, size, 2)
            of_group = lax.dynamic_index_in_dim(scale, g, 1, keepdims=False)
            return y + _int32(part(rows), part(numbers)).astype(wide) * of_group.astype(wide)

        return lax.fori_loop(0, groups, group, jnp.zeros((len(rows), len(codes)), wide))

    if bits == 8:
        y = block(codes, scale)
    else:
        y = _over_blocks(lambda *part: block(*part).T, (codes, scale), (len(rows),), wide, x.shape[1]).T
    return lax.optimization_barrier(y)[:m] if m < LEAST_ROWS else y


def _int32(a: jax.Array, b: jax.Array) -> jax.Array:
    """int32 [m, n] of int8 a [m, h, k] and b [n, h, k]."""
    flat = lambda x: x.reshape(len(x), -1)
    return lax.dot_general(flat(a), flat(b), ROWS, preferred_element_type=jnp.int32)


def _numbers(codes: jax.Array, groups: int, bits: int, dtype) -> jax.Array:
    """[n, h, g, k / h g]: the numbers of all groups, in `halves`."""
    found = halves(codes, bits)
    return found.reshape(*found.shape[:2], groups, -1).astype(dtype)


def _block(n: int, k: int) -> int:
    """Channels of a block."""
    return min(n, max(8, BLOCK // k // 8 * 8))


def _over_blocks(f: Callable, arrays: tuple, shape: tuple[int, ...], dtype, k: int) -> jax.Array:
    """f(*parts) [b, *shape] of blocks of b rows of the arrays [n, ...], joined: [n, *shape]."""
    n = len(arrays[0])
    size = _block(n, k)
    if size == n:
        return f(*arrays)

    def body(i, y):
        # Where blocks do not come out even the last one starts earlier, since slices are moved to within the array.
        part = f(*(lax.dynamic_slice_in_dim(a, i * size, size) for a in arrays))
        return lax.dynamic_update_slice_in_dim(y, part, i * size, 0)

    return lax.fori_loop(0, -(-n // size), body, jnp.zeros((n, *shape), dtype))
