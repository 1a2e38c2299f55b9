"""Codes of few bits, several in a byte: what a checkpoint holds, and what a machine without such numbers reads.

    packed = pack(codes, bits)          uint8 [ceil(n bits / 8), ...] of codes [n, ...]
    unpack(packed, bits, n)             the codes

Along the first axis, 8 / bits codes in a byte, the first in the lowest bits; where they do not fill the last byte, it
ends in zeros. Bytes on disk are then the bits that were promised: `Array.nbytes` of an int4 array counts a byte for
each.
"""

import jax
import jax.numpy as jnp


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """bits: 1, 2, 4 or 8; codes: below 2^bits."""
    each = _codes_a_byte(bits)
    padded = jnp.pad(codes.astype(jnp.uint8), ((0, -len(codes) % each), *((0, 0),) * (codes.ndim - 1)))
    parts = padded.reshape(len(padded) // each, each, *codes.shape[1:])
    packed = jnp.zeros((len(parts), *codes.shape[1:]), jnp.uint8)
    for place in range(each):
        packed = packed | (parts[:, place] << (bits * place))
    return packed


def unpack(packed: jax.Array, bits: int, count: int) -> jax.Array:
    """uint8 [count, ...]. ValueError where the bytes are not those of so many codes."""
    each = _codes_a_byte(bits)
    if len(packed) != -(-count // each):
        raise ValueError(f"{count} codes of {bits} bits are {-(-count // each)} bytes, not {len(packed)}")
    parts = [(packed >> (bits * place)) & (2**bits - 1) for place in range(each)]
    return jnp.stack(parts, 1).reshape(each * len(packed), *packed.shape[1:])[:count]


def _codes_a_byte(bits: int) -> int:
    if bits not in (1, 2, 4, 8):
        raise ValueError(f"codes of {bits} bits do not fill bytes: 1, 2, 4 or 8")
    return 8 // bits
