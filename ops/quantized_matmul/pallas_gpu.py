"""Products with few bits on Hopper GPUs (H100, H200) with Mosaic GPU: two kernels, neither of which copies the codes.

NEVER RUN ON A GPU: the kernels pass jax's interpreter, which models memory, barriers and copies and finds races, and
they lower for CUDA. It does not see that `wgmma` is asynchronous or what it reads too early, nor how values lie in
registers. Hence in no default order.

`products`, of int8 with int8 or float8 with float8: tiles of 128 rows of x by `columns` channels, over 128 numbers a
step. Both operands lie with the sum along rows, as `wgmma` takes 8 bits. One warpgroup copies into a ring of stages,
two compute, each on 64 rows. A scale a channel, of int8, comes to the int32 sum once, at the end. With groups the sums
of a group are scaled and added in float32, so that a thread has two accumulators, and a tile half as many columns. So
are those of float8, 128 at a time: `wgmma` of float8 adds in fewer bits than float32 has (DeepSeek-V3, arXiv
2412.19437, section 3.3.2). The tile is written in pieces through a small place in shared memory.

`weights`, of float16 or bfloat16 with int8 or 4 bits: few rows of x, so that reading the codes is what takes time. A
product of 64 channels by at most `MOST_ROWS` rows of x has the channels as its rows: y^T = w x^T, w in registers, made
of codes there, x in shared memory. One warpgroup copies, one computes. Bytes of 4 bits become two operands, the low and
the high halves, which meet the even and the odd columns of x (cut apart outside: a copy of x). Both are 16 times too
large, as the high half of a signed byte is, which the scale takes back. y^T is turned outside. More rows of x are
further tiles, next to each other in the grid, which make numbers of the same codes again.

Both: the results of groups, sums of products that are exact, are scaled in float32; scales are read transposed, [g, n],
so that those of a tile lie together (a copy of the scales). Sizes of tiles are guesses: not tuned on hardware.

Modelled, not measured: `weights` reads 64 bytes of each of 64 channels a step, 4 KiB; 8 stages of it and of x keep 32
KiB or more a block of threads under way, of which a multiprocessor has room for two where x has at most 32 rows; the
memory of an H200 needs about 36 (4.8 TB/s, 132 multiprocessors, 1 us). `products` computes 128 x 256 x 128 a step, 1024
clocks at 8192 operations a clock, for which 48 KiB come from L2: 48 bytes a clock and multiprocessor, so L2 is the
bound, as in `grouped_matmul`.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lissom.ops.interpreting import is_interpreting
from lissom.ops.quantized_matmul.decoding import FP8, in_halves, is_quantized, result_dtype
from lissom.ops.quantized_matmul.pallas_gpu_kernels import (
    COLUMN_MULTIPLE,
    NARROW_STEP,
    WIDE_STEP,
    quantized_kernel,
    weights_kernel,
)
from lissom.ops.quantized_matmul.rows import as_rows, batched_as_rows, forward_only

LOCAL = True

MOST_ROWS = 64
ROW_MULTIPLE = 32
"""Of x in `weights`: the copy engine writes y^T in swizzled rows of 128 bytes."""


def check(x, codes, scale, x_scale, *, bits: int) -> None:
    if x.dtype not in (jnp.float16, jnp.bfloat16, jnp.int8, *FP8):
        raise NotImplementedError(f"x is {x.dtype}; tensor cores take float16, bfloat16, int8 and float8.")
    if scale.dtype != jnp.float32:
        raise NotImplementedError(f"scale is {scale.dtype}; this kernel takes float32.")
    if is_quantized(x.dtype) and bits == 4:
        raise NotImplementedError(f"codes of 4 bits with x of {x.dtype} have no kernel; float16 and bfloat16 have.")
    if not is_quantized(x.dtype) and codes.dtype in FP8:
        raise NotImplementedError(f"codes of {codes.dtype} with x of {x.dtype} have no kernel; x of float8 has.")
    step, multiple = (WIDE_STEP, COLUMN_MULTIPLE) if is_quantized(x.dtype) else (NARROW_STEP, 8)
    n, groups = scale.shape
    if codes.shape[1] // groups % step:
        least = step * 8 // bits
        raise NotImplementedError(
            f"scale: a group of {x.shape[-1] // groups} numbers is not a multiple of {least}, a step of this kernel."
        )
    if n % multiple:
        raise NotImplementedError(f"codes have {n} rows, not a multiple of {multiple}; padding would copy them.")


def run(x, codes, scale, x_scale, *, bits: int) -> jax.Array:
    product = forward_only("pallas_gpu", functools.partial(_call, bits))
    return as_rows(batched_as_rows(product), x, codes, scale, x_scale)


def _call(bits: int, x, codes, scale, x_scale) -> jax.Array:
    m = len(x)
    interpret = plgpu.InterpretGPUParams(detect_races=True) if is_interpreting() else False
    if x_scale is not None:
        return quantized_kernel(_padded(x, 8), codes, scale, x_scale, interpret=interpret)[:m]
    rows = min(MOST_ROWS, _up_to(m, ROW_MULTIPLE))
    halves = in_halves(_padded(x, rows), bits).swapaxes(0, 1)  # [h, m, k / h]
    y = weights_kernel(halves, codes, scale, rows=rows, interpret=interpret)
    return y[:, :m].T.astype(result_dtype(x, scale))


def _up_to(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _padded(x: jax.Array, multiple: int) -> jax.Array:
    """Rows up to a multiple, which the copy engine's tiles divide: a copy where x has another number."""
    return jnp.pad(x, ((0, _up_to(len(x), multiple) - len(x)), (0, 0)))
