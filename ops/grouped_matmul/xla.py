"""A loop over the groups, of products of a few static sizes: exact, no row is sorted, padded or copied.

A group is cut into whole blocks of `BLOCK` rows and a rest. The rest is one product of the least of `RESTS` rows that
holds it, begun earlier where x ends before; rows that are not of the group are left as they are. So a group computes
at most 63 rows too many, and a product, which packs its matrix anew, has as many rows as possible.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from lissom.ops.grouped_matmul import differentiable

LOCAL = True

BLOCK = 256
RESTS = (16, 32, 64, 96, 128, 192, 256)


def check(x, other, group_sizes, *, form: str, activation: str | None, dtype) -> None:
    """Does everything."""


def run(x, other, group_sizes, **options) -> jax.Array:
    return differentiable.run(FORMS, x, other, group_sizes, **options)


def _counted(m: int, k: int, n: int, f) -> jax.Array:
    """f(), named so that evaluation/costs.py knows its operations: those of the rows, which the lengths of the loops
    sum to whatever the sizes of the groups."""
    f.__name__ = f"products_{2 * m * k * n}"
    return jax.jit(f)()


def _bounds(sizes: jax.Array, m: int) -> tuple[jax.Array, jax.Array]:
    """First row of each group, and the row behind its last; int32 [g]."""
    ends = jnp.cumsum(sizes)
    return jnp.minimum(ends - sizes, m), jnp.minimum(ends, m)


def _parts(m: int) -> tuple[int, tuple[int, ...]]:
    """The block and the sizes of a rest for x of m rows."""
    block = min(BLOCK, m)
    return block, (*(rest for rest in RESTS if rest < block), block)


def _rest(sizes: tuple[int, ...], rows: jax.Array, nothing, product):
    """`product(b)` with the least b of `sizes` that holds so many rows; `nothing()` for none."""
    which = jnp.searchsorted(jnp.array((0, *sizes), jnp.int32), rows)
    return lax.switch(which, [nothing, *(functools.partial(product, b) for b in sizes)])


def _inside(start: jax.Array, b: int, first: jax.Array, end: jax.Array) -> jax.Array:
    """[b, 1]: which of the rows from `start` are of first <= row < end."""
    row = start + jnp.arange(b, dtype=jnp.int32)[:, None]
    return (row >= first) & (row < end)


def _rows(x, w, sizes, transposed: bool, activation, dtype) -> jax.Array:
    m, n = x.shape[0], w.shape[1 if transposed else 2]
    block, rests = _parts(m)
    starts, ends = _bounds(sizes, m)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def group(j, y):
        matrix = lax.dynamic_index_in_dim(w, j, 0, keepdims=False)
        whole = (ends[j] - starts[j]) // block
        first = starts[j] + whole * block

        def product(start, b):
            part = lax.dynamic_slice_in_dim(x, start, b, 0)
            found = lax.dot_general(part, matrix, contract, preferred_element_type=wide)
            return (found if activation is None else activation(found)).astype(dtype)

        def step(i, y):
            start = starts[j] + i * block
            return lax.dynamic_update_slice_in_dim(y, product(start, block), start, 0)

        def rest(b):
            start = jnp.minimum(first, m - b)
            before = lax.dynamic_slice_in_dim(y, start, b, 0)
            found = jnp.where(_inside(start, b, first, ends[j]), product(start, b), before)
            return lax.dynamic_update_slice_in_dim(y, found, start, 0)

        y = lax.fori_loop(0, whole, step, y)
        return _rest(rests, ends[j] - first, lambda: y, rest)

    return _counted(m, x.shape[1], n, lambda: lax.fori_loop(0, sizes.shape[0], group, jnp.zeros((m, n), dtype)))


def _sums(x, y, sizes, dtype) -> jax.Array:
    m, k, n = *x.shape, y.shape[1]
    block, rests = _parts(m)
    starts, ends = _bounds(sizes, m)
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def product(start, b, keep=None):
        left, right = (lax.dynamic_slice_in_dim(array, start, b, 0) for array in (x, y))
        if keep is not None:
            # Both: a NaN in a row of another group times 0 would be NaN.
            left, right = (jnp.where(keep, array, 0) for array in (left, right))
        return lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=wide)

    def group(j, z):
        whole = (ends[j] - starts[j]) // block
        first = starts[j] + whole * block

        def rest(b):
            start = jnp.minimum(first, m - b)
            return product(start, b, _inside(start, b, first, ends[j]))

        found = _rest(rests, ends[j] - first, lambda: jnp.zeros((k, n), wide), rest)
        found = lax.fori_loop(0, whole, lambda i, z: z + product(starts[j] + i * block, block), found)
        return lax.dynamic_update_index_in_dim(z, found.astype(dtype), j, 0)

    zeros = lambda: jnp.zeros((sizes.shape[0], k, n), dtype)
    return _counted(m, k, n, lambda: lax.fori_loop(0, sizes.shape[0], group, zeros()))


FORMS = differentiable.Forms(_rows, _sums)
