"""Binary matmul: products of matrices of +1 and -1, of which a word holds 32."""

import operator
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Int32, UInt32

from lissom.ops import dispatch
from lissom.ops.binary_matmul.packing import WORD, pack_signs

__all__ = ["OP", "binary_matmul", "pack_signs"]

OP = dispatch.Op(
    name="binary_matmul",
    implementations={
        "reference": "lissom.ops.binary_matmul.reference",
        "xla": "lissom.ops.binary_matmul.xla",
        "int8": "lissom.ops.binary_matmul.int8",
        # Never run on their hardware: in no default order.
        "pallas_gpu": "lissom.ops.binary_matmul.pallas_gpu",
        "pallas_tpu": "lissom.ops.binary_matmul.pallas_tpu",
    },
    # `xla` is made for the vector registers and the cache of a CPU.
    defaults={"cpu": ("xla",), "default": ("int8",)},
)


def binary_matmul(
    x_bits: UInt32[Array, "... w"],
    w_bits: UInt32[Array, "n w"],
    *,
    length: int,
    implementation: str | Sequence[str] | None = None,
) -> Int32[Array, "... n"]:
    """The product of matrices of +1 and -1 that `pack_signs` packed. It is exact.

        y[..., n] = sum_k s(x[..., k]) s(w[n, k]) = length - 2 popcount(x_bits[...] xor w_bits[n]),    s = +1 or -1

    x_bits [..., w], w_bits [n, w]: uint32, w = ceil(length / 32), neither empty. Bit k of word j is 1 where entry
    32 j + k is +1. Bits behind `length` are 0, as `pack_signs` leaves them: they are values, which no check sees, and
    where one is set in one of the two the result is off by 2.
    length: the entries of a row, from 1 to 2^31 - 1.
    implementation: see `lissom.ops.dispatch`: None (the platform's default), "reference", "xla", "int8",
    "pallas_gpu", "pallas_tpu", or a sequence.

    Bits have no gradients: a layer that learns them has its own (a straight-through estimator). ValueError names the
    argument that does not fit; NotImplementedError comes from an implementation that was asked for by name and cannot
    do the request.

    Courbariaux et al. 2016 (arXiv:1602.02830) have the product as xnor and popcount, Rastegari et al. 2016 (XNOR-Net,
    arXiv:1603.05279) with scales around it, which are the caller's. xor counts what differs, so that bits that are 0
    in both need no correction.
    """
    for name, bits in (("x_bits", x_bits), ("w_bits", w_bits)):
        if not hasattr(bits, "dtype") or bits.dtype != jnp.uint32:
            raise ValueError(f"{name} is a uint32 array, got {getattr(bits, 'dtype', type(bits).__name__)}.")
    try:
        if isinstance(length, bool):
            raise TypeError
        length = operator.index(length)
    except TypeError:
        raise ValueError(f"length is an integer, got {length!r}.") from None
    if not 0 < length < 2**31:
        raise ValueError(f"length is from 1 to 2^31 - 1, got {length}.")
    words = -(-length // WORD)
    if x_bits.ndim < 1 or 0 in x_bits.shape or x_bits.shape[-1] != words:
        raise ValueError(f"x_bits is [..., {words}] for length {length} and not empty, got shape {x_bits.shape}.")
    if w_bits.ndim != 2 or 0 in w_bits.shape or w_bits.shape[1] != words:
        raise ValueError(f"w_bits is [n, {words}] for length {length} and not empty, got shape {w_bits.shape}.")
    # The first axis of x is the batch, unless it is the one that is summed over.
    leading = ("batch", *(None,) * (x_bits.ndim - 2))[: x_bits.ndim - 1]
    return dispatch.call(
        OP,
        operands=(jnp.asarray(x_bits), jnp.asarray(w_bits)),
        options={"length": length},
        implementation=implementation,
        operand_dims=((*leading, None), (None, None)),
        result_dims=(*leading, None),
    )
