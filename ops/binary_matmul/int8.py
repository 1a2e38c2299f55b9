"""Signs unpacked to int8, and XLA's product of these with int32 sums: for machines with a unit for it."""

import jax
import jax.numpy as jnp

from lissom.ops.binary_matmul.packing import unpack_signs

LOCAL = False


def check(x_bits, w_bits, *, length: int) -> None:
    """Does everything."""


def run(x_bits, w_bits, *, length: int) -> jax.Array:
    # Without the barrier the signs may be computed anew for every product.
    x, w = jax.lax.optimization_barrier(tuple(unpack_signs(bits, length, jnp.int8) for bits in (x_bits, w_bits)))
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
