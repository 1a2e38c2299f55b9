"""Products with weights of few bits, and of numbers of few bits with such weights."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from lissom.ops import dispatch
from lissom.ops.quantized_matmul.decoding import CODES, FP8, is_quantized

__all__ = ["OP", "quantized_matmul"]

OP = dispatch.Op(
    name="quantized_matmul",
    implementations={
        "reference": "lissom.ops.quantized_matmul.reference",
        "xla": "lissom.ops.quantized_matmul.xla",
        # Never run on their hardware: in no default order.
        "pallas_gpu": "lissom.ops.quantized_matmul.pallas_gpu",
        "pallas_tpu": "lissom.ops.quantized_matmul.pallas_tpu",
    },
    defaults={"default": ("xla",)},
)

FLOATS = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)


def quantized_matmul(
    x: Num[Array, "*rows k"],
    codes: Num[Array, "n k_codes"],
    scale: Float[Array, "n g"],
    *,
    bits: int = 8,
    x_scale: Float[Array, "..."] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "*rows n"]:
    """x times the transpose of a matrix that is stored in few bits, with a scale for each group of its numbers.

        y[..., n] = x_scale[...] sum_g scale[n, g] sum_{k in group g} x[..., k] number(codes[n, k])

    codes: the summed axis k lies last, so that one row of x reads them as they lie. bits=8: int8, float8_e4m3fn or
    float8_e5m2 [n, k]. bits=4: uint8 [n, k / 2], two numbers from -8 to 7 a byte in two's complement, that of the even
    k in the low four bits.
    scale: float32 (float64: in float64) [n, g]; the k / g numbers of a group follow one another, an even number of them
    with bits=4. g = 1 is a scale a channel.
    x: without x_scale float16, bfloat16, float32 or float64, whose products with numbers times scales are summed in
    float32 at least; y has the dtype of x. With x_scale int8, or a float8 where the codes are one; y has the dtype of
    `scale`. Products of integers are summed exactly, in int32 for each group, so that k / g times the largest product
    has to stay below 2^31. Sums of float8 are of float32.
    x_scale: of the dtype of `scale`, broadcastable to [..., 1]: one, or one a row.
    implementation: see `lissom.ops.dispatch`: None (the platform's default), "reference", "xla", "pallas_gpu",
    "pallas_tpu", or a sequence.

    For inference: codes and an x of few bits are constants, of which no gradient is taken. "reference" and "xla" can be
    differentiated with respect to everything else, the kernels raise NotImplementedError.

    ValueError names the argument that does not fit; NotImplementedError comes from an implementation that was asked for
    by name and cannot do the request. Weights of few bits for few rows: Frantar et al. 2022 (arXiv 2210.17323); rows
    and channels with scales of their own: Dettmers et al. 2022 (arXiv 2208.07339).
    """
    _check(x, codes, scale, bits, x_scale)
    x, codes, scale = jnp.asarray(x), jax.lax.stop_gradient(jnp.asarray(codes)), jnp.asarray(scale)
    if x_scale is not None:
        x, x_scale = jax.lax.stop_gradient(x), jnp.asarray(x_scale)
        x_scale = x_scale.reshape((1,) * (x.ndim - x_scale.ndim) + x_scale.shape)
    # The first axis is the batch, unless it is the one that is summed over.
    rows = (None,) if x.ndim == 1 else ("batch", *(None,) * (x.ndim - 1))
    return dispatch.call(
        OP,
        operands=(x, codes, scale, x_scale),
        options={"bits": bits},
        implementation=implementation,
        operand_dims=(rows, (None, None), (None, None), None if x_scale is None else rows),
        result_dims=rows,
    )


def _check(x, codes, scale, bits, x_scale) -> None:
    if bits not in CODES or isinstance(bits, bool):
        raise ValueError(f"bits is one of {', '.join(map(str, CODES))}, got {bits!r}.")
    _check_dtype("codes", codes, CODES[bits], f" with bits={bits}")
    _check_dtype("scale", scale, (jnp.float32, jnp.float64))
    _check_dtype("x", x, (*FLOATS, jnp.int8, *FP8))
    if codes.ndim != 2 or scale.ndim != 2 or 0 in (*codes.shape, *scale.shape):
        raise ValueError(
            f"codes and scale are of rank 2 and not empty, got shapes {codes.shape} and {tuple(scale.shape)}."
        )
    n, k = codes.shape[0], codes.shape[1] * 8 // bits
    if x.ndim == 0 or 0 in x.shape or x.shape[-1] != k:
        given = " (two a byte)" if bits == 4 else ""
        raise ValueError(f"x is [..., {k}], not empty, for codes {codes.shape}{given}, got shape {x.shape}.")
    groups = scale.shape[1]
    if scale.shape[0] != n or k % groups:
        raise ValueError(
            f"scale is [{n}, g] for codes {codes.shape}, where g divides k = {k}, got shape {scale.shape}."
        )
    if bits == 4 and k // groups % 2:
        raise ValueError(f"scale: a group of {k // groups} numbers of 4 bits would end within a byte.")
    if (x_scale is not None) != is_quantized(x.dtype):
        need = "needs an x_scale" if x_scale is None else "takes no x_scale: it is no number of few bits"
        raise ValueError(f"x_scale: x of {x.dtype} {need}.")
    if x_scale is None:
        return
    if (x.dtype == jnp.int8) != (codes.dtype not in FP8):
        raise ValueError(
            f"x is int8 for codes of integers and a float8 for codes of float8, got {x.dtype} for {codes.dtype}."
        )
    _check_dtype("x_scale", x_scale, (scale.dtype,), ", as scale is")
    if not _broadcasts(x_scale.shape, (*x.shape[:-1], 1)):
        raise ValueError(f"x_scale is broadcastable to {(*x.shape[:-1], 1)}, got shape {x_scale.shape}.")
    largest = 2**7 * 2 ** (bits - 1)
    if x.dtype == jnp.int8 and k // groups * largest >= 2**31:
        raise ValueError(
            f"scale: a group of {k // groups} products of up to {largest} may not fit into int32; give more groups."
        )


def _check_dtype(name: str, array, dtypes: Sequence, when: str = "") -> None:
    known = [jnp.dtype(dtype) for dtype in dtypes]
    if getattr(array, "dtype", None) not in known:
        given = getattr(array, "dtype", type(array).__name__)
        raise ValueError(f"{name} is an array of {' or '.join(map(str, known))}{when}, got {given}.")


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(size in (1, whole) for size, whole in zip(shape[::-1], to[::-1]))
