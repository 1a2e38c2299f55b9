"""What the forms of the op share: which codes there are, their numbers, and how rows lie beside them.

Numbers of 4 bits need not lie side by side as they are counted: of each byte the low halves are one matrix, the high
halves another, and x is cut into its even and odd columns to go with them (`halves`, `in_halves`). A sum over k is the
same in any order, and x is mostly small; where it is not, the numbers can be put in order (`in_order`).
"""

import jax
import jax.numpy as jnp

FP8 = (jnp.float8_e4m3fn, jnp.float8_e5m2)
CODES = {8: (jnp.int8, *FP8), 4: (jnp.uint8,)}


def is_quantized(dtype) -> bool:
    """Whether x of this dtype has a scale."""
    return dtype in (jnp.int8, *FP8)


def working_dtype(x: jax.Array, scale: jax.Array):
    """In which sums are scaled: float32, or float64 where one of them is."""
    return jnp.dtype(scale.dtype if is_quantized(x.dtype) else jnp.promote_types(x.dtype, scale.dtype))


def result_dtype(x: jax.Array, scale: jax.Array):
    return jnp.dtype(scale.dtype if is_quantized(x.dtype) else x.dtype)


def halves(codes: jax.Array, bits: int) -> jax.Array:
    """[n, 1, k] as given, or int8 [n, 2, k / 2] of 4 bits: the numbers of even k, then those of odd k."""
    if bits == 8:
        return codes[:, None]
    # As signed bytes: a shift to the right repeats the sign.
    byte = jax.lax.bitcast_convert_type(codes, jnp.int8)
    return jnp.stack([(byte << 4) >> 4, byte >> 4], 1)


def in_halves(x: jax.Array, bits: int) -> jax.Array:
    """x [m, k] as [m, 1, k] or [m, 2, k / 2], in the order of `halves`."""
    return x[:, None] if bits == 8 else x.reshape(len(x), -1, 2).swapaxes(1, 2)


def in_order(x: jax.Array, bits: int) -> jax.Array:
    """The inverse of `in_halves`: [m, k]."""
    return x[:, 0] if bits == 8 else x.swapaxes(1, 2).reshape(len(x), -1)
