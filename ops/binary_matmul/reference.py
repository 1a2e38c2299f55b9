"""The equation: signs as integers, multiplied and summed."""

import jax
import jax.numpy as jnp

from lissom.ops.binary_matmul.packing import unpack_signs

LOCAL = False


def check(x_bits, w_bits, *, length: int) -> None:
    """Does everything."""


def run(x_bits, w_bits, *, length: int) -> jax.Array:
    x, w = unpack_signs(x_bits, length), unpack_signs(w_bits, length)
    return jnp.einsum("...k,nk->...n", x, w, preferred_element_type=jnp.int32)
