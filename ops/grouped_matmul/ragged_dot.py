"""`jax.lax.ragged_dot`, as XLA lowers it: one op on a TPU, a product for every group elsewhere."""

import jax
import jax.numpy as jnp
from jax import lax

from lissom.ops.grouped_matmul import differentiable

LOCAL = True

SUMS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def check(x, other, group_sizes, *, form: str, activation: str | None, dtype) -> None:
    """Does everything."""


def run(x, other, group_sizes, **options) -> jax.Array:
    return differentiable.run(FORMS, x, other, group_sizes, **options)


def _rows(x, w, sizes, transposed: bool, activation, dtype) -> jax.Array:
    w = w.swapaxes(1, 2) if transposed else w
    y = lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
    return (y if activation is None else activation(y)).astype(dtype)


def _sums(x, y, sizes, dtype) -> jax.Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return lax.ragged_dot_general(x, y, sizes, SUMS, preferred_element_type=wide).astype(dtype)


FORMS = differentiable.Forms(_rows, _sums)
