"""Signs as bits of words, and back."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Real, UInt32

WORD = 32
"""Signs of a word."""


def pack_signs(x: Real[Array, "... k"]) -> UInt32[Array, "... w"]:
    """Signs along the last axis, 32 a word: w = ceil(k / 32).

    Bit i of word j is 1 where x[..., 32 j + i] >= 0, else 0, and 0 behind the end of a row. So 0 and -0.0 count as +1
    (as in arXiv:1602.02830, equation 1), and NaN, which is not at least 0, as -1. What the machine flushes to zero is 0
    (XLA for CPUs: negative subnormal numbers).

    x: a float or integer array of rank 1 at least and not empty; ValueError otherwise.
    """
    kinds = (jnp.floating, jnp.integer)
    if not hasattr(x, "dtype") or not any(jnp.issubdtype(x.dtype, kind) for kind in kinds):
        raise ValueError(f"x is a float or integer array, got {getattr(x, 'dtype', type(x).__name__)}.")
    if x.ndim < 1 or 0 in x.shape:
        raise ValueError(f"x has rank 1 at least and is not empty, got shape {x.shape}.")
    bits = (jnp.asarray(x) >= 0).astype(jnp.uint32)
    bits = jnp.pad(bits, ((0, 0),) * (x.ndim - 1) + ((0, -x.shape[-1] % WORD),))
    words = bits.reshape(*x.shape[:-1], -1, WORD) << jnp.arange(WORD, dtype=jnp.uint32)
    return words.sum(-1, dtype=jnp.uint32)


def unpack_signs(bits: UInt32[Array, "... w"], length: int, dtype=jnp.int32) -> Real[Array, "... k"]:
    """The first `length` signs of each row, +1 or -1, in `dtype`."""
    apart = (bits[..., None] >> jnp.arange(WORD, dtype=jnp.uint32)) & 1
    signs = 2 * apart.astype(dtype) - 1
    return jax.lax.slice_in_dim(signs.reshape(*bits.shape[:-1], -1), 0, length, axis=-1)
