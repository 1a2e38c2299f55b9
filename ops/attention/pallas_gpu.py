"""Attention on Hopper GPUs (H100, H200) with Mosaic GPU: flash attention, forward and backward.

NEVER RUN ON A GPU. The kernels pass jax's interpreter, which models memory, barriers and copies and finds races, and
they lower for CUDA; no line of this has met hardware, and nothing is known of its speed. So it stands in no default
order. Three things the interpreter does not see: products whose first operand or start value is in registers
(`pallas_gpu_parts.add_product` has a plain product there), that `wgmma` is asynchronous, and how values lie in
registers (the lowering checks that, not what it costs).

Forward (FlashAttention-3, Shah et al. 2024, arXiv 2407.08608; Dao 2023, arXiv 2307.08691). A block of threads owns a
tile of queries of one head: one warpgroup copies, up to three compute, each on 64 rows. The copying one walks the
tile's list of key tiles and keeps a ring of stages in shared memory full (`k_ready` and `v_ready` say that a stage is
filled, `k_free` and `v_free` that every consumer is done with it); keys and values have barriers of their own, so
that scores begin before the values are there. A consumer goes, for each key tile,

    s   = q k^T                                    wgmma, both operands in shared memory
    m'  = max(m, max_j c s)                        c = scale log2(e): base 2, the scale folded into the exponent's FMA
    p   = exp2(c s - m'),  a = exp2(m - m')
    l   = a l + sum_j p,   acc = a acc + p v       wgmma, p in registers, never normalised

and at the end out = acc / l, lse = ln 2 (m + log2 l). Only lse is saved. Two consumers take turns: while one has the
tensor cores the other takes its softmax (the paper's ping-pong). The paper's overlap within a warpgroup, the scores
of the next tile before the values of this one, is left out.

Backward (FlashAttention-2, section 3.1.2): p again from lse, in two kernels instead of one with atomic sums, so that
results do not change from run to run; scores are computed twice for it, 7 products instead of 5. With delta = sum_d
out d_out - d_lse, which carries the gradient of lse:

    dp = d_out v^T,   ds = p (dp - delta)
    dq kernel, by tiles of queries:             dq += ds k
    dk/dv kernel, by tiles of keys, transposed: dv += p^T d_out,  dk += ds^T q      over all query heads of a group

The second product of a step runs while the first one's exponentials are taken. Where both sums of the second kernel
do not fit into registers (head_dim + v_dim > 256) it runs once for each.

Masks: a kernel knows lists of tiles (`tiles.py`) and integer tests of elements (`masks.Interval`), nothing else.
Tiles that every query sees whole come first in a list and have a loop of their own without tests. Tables of tests
travel with the tiles they belong to.

A tile of q, k, v or their gradients that is not whole is the copy engine's work: a copy into or out of swizzled memory
goes by a map of the array, fills with zeros what lies outside and writes nothing there. It takes lengths of eight, so
odd ones are padded before (a copy), and so are head sizes up to a multiple of 64. A copy without a swizzle knows
nothing of rows: jax makes it one stretch of memory and cuts it at the end of the whole array, so that what overhangs a
row is that of the next. Hence lse has room for whole tiles; bounds and codes are read so, and what they say of queries
and keys that do not exist changes nothing.

The grid has one dimension, and no limit on the batch. Under `vmap`, jax adds one, of which CUDA allows 65535.
Differentiable once. jax refuses causal masks in an attention kernel of its own with CUDA 12.8.0 to 12.9.0, because
ptxas miscompiles them there; so does `check` every mask, where that ptxas was installed as a wheel (`_ptxas`). A ptxas
of another origin is not known here.
"""

import functools
import importlib.metadata
import itertools
from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from lissom.ops import block_sizes
from lissom.ops.attention import tiles
from lissom.ops.attention.kernel_layout import moved
from lissom.ops.attention.masks import Full, Interval, Mask, without_padding
from lissom.ops.attention.merging import with_sinks
from lissom.ops.attention.pallas_gpu_backward import dk_dv_of, dq_of
from lissom.ops.attention.pallas_gpu_forward import forward
from lissom.ops.attention.pallas_gpu_parts import LARGEST_HEAD, plan
from lissom.ops.attention.sparse import BlockSparse, listed
from lissom.ops.hopper import LOG2E, ROWS, SHARED_BYTES, Block
from lissom.ops.interpreting import is_interpreting

LOCAL = True

KERNEL = "attention.pallas_gpu"

ALIGNMENT = 1024  # of each array in shared memory
REGISTERS = 232  # of a thread, with two consumers


class Blocks(NamedTuple):
    """rows are queries in `forward` and `dq`, keys in `dk_dv`."""

    forward: Block
    dq: Block
    dk_dv: Block


class Shape(NamedTuple):
    """What a kernel's tile sizes depend on: padded head sizes, sides of the mask's blocks, rows of its tables."""

    head_dim: int
    v_dim: int
    listed: tuple[int, int] | None = None
    bounds: int = 0
    codes: int = 0
    softcap: bool = False


class Request(NamedTuple):
    """What is static. Lengths are those of the mask; arrays are padded to eights."""

    q_len: int
    kv_len: int
    scale: float
    softcap: float | None
    interpret: bool

    @property
    def options(self) -> dict:
        interpret = plgpu.InterpretGPUParams(detect_races=True) if self.interpret else False
        return {"scale": self.scale, "softcap": self.softcap, "interpret": interpret}


def check(q, k, v, mask: Mask, bias, sinks, *, scale: float, logit_softcap: float | None, return_lse: bool) -> None:
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        raise NotImplementedError(f"q is {q.dtype}; tensor cores take float16 and bfloat16 (float32 only as tf32).")
    if max(q.shape[-1], v.shape[-1]) > LARGEST_HEAD:
        raise NotImplementedError(f"head_dim {q.shape[-1]} or v_dim {v.shape[-1]} is larger than {LARGEST_HEAD}.")
    if bias is not None:
        raise NotImplementedError("bias is not loaded by this kernel.")
    if scale <= 0:
        raise NotImplementedError(f"scale {scale} is not positive: the running maximum is taken before it.")
    ptxas = _ptxas()
    if ptxas is not None and (12, 8) <= ptxas < (12, 9, 86) and not isinstance(mask, Full) and not is_interpreting():
        raise NotImplementedError(f"ptxas {'.'.join(map(str, ptxas))} miscompiles masks; CUDA 12.9.1 has a good one.")
    blocks = listed(mask)
    if blocks is None:
        return
    if not isinstance(blocks, BlockSparse):
        raise NotImplementedError(f"mask {type(blocks).__name__} lists single keys, which are not tiles.")
    if blocks.block_q % ROWS or blocks.block_k % ROWS:
        raise NotImplementedError(f"mask: blocks of {blocks.block_q} by {blocks.block_k} are not multiples of {ROWS}.")


@functools.cache
def _ptxas() -> tuple[int, ...] | None:
    """The version of the CUDA 12 compiler that jax[cuda12] installs (12.9.86 is that of CUDA 12.9.1); None without."""
    try:
        importlib.metadata.version("jax-cuda12-plugin")
        return tuple(map(int, importlib.metadata.version("nvidia-cuda-nvcc-cu12").split(".")[:3]))
    except importlib.metadata.PackageNotFoundError:
        return None


def _blocks(q_len: int, kv_len: int, shape: Shape) -> Blocks:
    """Tile sizes from what has to fit. Guesses: not tuned on hardware.

    128 columns where heads are small and registers have room for them (`_registers`). Shared memory (`_bytes`) for one
    block of threads a multiprocessor (registers allow no second): as many stages as fit, at most 4; a single consumer
    where not even 2 do. One consumer also where one is enough for the whole length, and tiles that divide the mask's
    blocks.
    """
    block_q, block_k = (128, 128) if shape.listed is None else shape.listed

    def fitting(kernel: str, length: int, block: int, other: int) -> Block:
        is_small = max(shape.head_dim, shape.v_dim) <= (128 if kernel == "forward" else 64)
        columns = 128 if is_small and other % 128 == 0 and _registers(kernel, 128, shape) <= REGISTERS else 64
        most = 1 if length <= ROWS or block % (2 * ROWS) else 2
        for consumers, stages in itertools.product(range(most, 0, -1), (4, 3, 2)):
            found = Block(consumers, columns, stages)
            if _bytes(kernel, found, shape) <= SHARED_BYTES:
                return found
        raise NotImplementedError(
            f"no tile fits head sizes {shape.head_dim} and {shape.v_dim} beside a mask of {shape.bounds} bounds and "
            f"{shape.codes} codes."
        )

    return Blocks(
        forward=fitting("forward", q_len, block_q, block_k),
        dq=fitting("dq", q_len, block_q, block_k),
        dk_dv=fitting("dk_dv", kv_len, block_k, block_q),
    )


def _registers(kernel: str, columns: int, shape: Shape) -> int:
    """Of a thread, at the widest place. Of a float32 tile of 64 rows a thread has half as many as that has columns, of
    a 16-bit one a quarter, and of a vector along the columns a quarter; vectors along the rows count as nothing.

    The forward kernel has its output, scores and their copy for the next product; the others two tiles of scores, and
    with a softcap its tanh, next to their sums. Copies live when vectors are dead. 16 are for the results of tests. So
    ptxas (CUDA 13.0) spills at most 8 bytes where this says that 128 columns fit. At 64 columns sums of 256 spill up to
    132, which there is no smaller tile to prevent.
    """
    head_dim, v_dim = shape.head_dim, shape.v_dim
    both = head_dim + v_dim
    sums = {"forward": v_dim, "dq": head_dim, "dk_dv": both if both <= LARGEST_HEAD else max(head_dim, v_dim)}[kernel]
    tiles_of_scores = 1 if kernel == "forward" else 2 + shape.softcap
    vectors = 1 + shape.bounds if kernel == "dk_dv" else shape.codes
    tests = 16 if shape.bounds else 0
    return sums // 2 + tiles_of_scores * columns // 2 + max(vectors, 1) * columns // 4 + tests


def _bytes(kernel: str, block: Block, shape: Shape) -> int:
    """Of shared memory for a kernel's arrays, as it allocates them."""
    bounds, codes = max(shape.bounds, 1), max(shape.codes, 1)
    one_buffer = kernel == "forward" and shape.head_dim == shape.v_dim
    own = [shape.head_dim] if one_buffer else [shape.head_dim, shape.v_dim]
    ring = [shape.head_dim, shape.v_dim]
    own_vectors = {"forward": [1, bounds], "dq": [2, bounds], "dk_dv": [codes]}[kernel]
    ring_vectors = [2, bounds] if kernel == "dk_dv" else [codes]
    sizes = [block.rows * 2 * size for size in own] + [block.rows * 4 * size for size in own_vectors]
    keys = block.stages * block.columns
    sizes += [keys * 2 * size for size in ring] + [keys * 4 * size for size in ring_vectors]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def run(q, k, v, mask: Mask, bias, sinks, *, scale: float, logit_softcap: float | None, return_lse: bool):
    q_len, kv_len, v_dim = q.shape[1], k.shape[1], v.shape[3]
    valid = mask.valid_queries(q_len)
    q, k, v = without_padding(mask, q, k, v)
    places = tiles.order(mask, q_len)
    q, k, v = (moved(x, places, 1) for x in (q, k, v))
    request = Request(q_len, kv_len, scale, logit_softcap, is_interpreting())
    out, lse = _attend(request, *(_padded(x) for x in (q, k, v)), mask)
    out, lse = out[:, :q_len, :, :v_dim], lse[..., :q_len]
    back = None if places is None else np.argsort(places).astype(np.int32)
    out, lse = moved(out, back, 1), moved(lse, back, 2)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks.astype(lse.dtype))
    if valid is not None:
        # Their output is 0 already; this keeps whatever cotangent padding rows receive out of the gradients.
        out = jnp.where(valid[:, :, None, None], out, 0)
    return (out, lse) if return_lse else out


def _padded(x: jax.Array) -> jax.Array:
    """Zeros up to lengths of 8, which the copy engine's tiles divide, and head sizes of 64, a row of its swizzle."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, -x.shape[3] % 64)))


def _prepared(request: Request, mask: Mask, q, v):
    """(tile sizes, a function that makes a kernel's tables)."""
    q_len, kv_len = request.q_len, request.kv_len
    tests = tiles.reordered(mask.intervals(q_len, kv_len), kv_len, tiles.order(mask, q_len))
    blocks = _measured_or_chosen(request, mask, _shape(mask, tests, q.shape[3], v.shape[3], request.softcap), q.dtype)
    return blocks, functools.partial(plan, mask, tests, q_len, kv_len)


def _shape(mask: Mask, tests: tuple[Interval, ...], head_dim: int, v_dim: int, softcap: float | None) -> Shape:
    named = listed(mask)
    sides = None if named is None else (named.block_q, named.block_k)
    bounds = sum(table is not None for test in tests for table in (test.low, test.high))
    return Shape(head_dim, v_dim, sides, bounds, sum(test.code is not None for test in tests), softcap is not None)


def _measured_or_chosen(request: Request, mask: Mask, shape: Shape, dtype) -> Blocks:
    """The sizes that were measured on the chip (ops/block_sizes.py), where they fit this request; else `_blocks`."""
    chosen = _blocks(request.q_len, request.kv_len, shape)
    lengths = {"q_len": request.q_len, "kv_len": request.kv_len}
    key = block_sizes.key_of(KERNEL, mask, dtype=dtype, head_dim=shape.head_dim, v_dim=shape.v_dim, **lengths)
    sizes = block_sizes.tuned(key) or {}
    measured = {name: Block(*sizes[name]) for name in sizes}
    return chosen._replace(**{name: block for name, block in measured.items() if _fits(name, block, shape)})


def _fits(kernel: str, block: Block, shape: Shape) -> bool:
    """Whether a tile fits into shared memory and divides the blocks of the mask."""
    sides = (block.columns, block.rows) if kernel == "dk_dv" else (block.rows, block.columns)
    divides = shape.listed is None or all(size % side == 0 for size, side in zip(shape.listed, sides))
    return _bytes(kernel, block, shape) <= SHARED_BYTES and divides and block.stages >= 2


def candidates(q, k, v, mask: Mask) -> list[dict[str, tuple[int, int, int]]]:
    """Sizes to try, for scripts/tune_ops.py: one kernel's at a time, (consumers, columns, stages) of all that fit."""
    head_dim, v_dim = (x.shape[3] + -x.shape[3] % 64 for x in (q, v))
    tests = tiles.reordered(mask.intervals(q.shape[1], k.shape[1]), k.shape[1], tiles.order(mask, q.shape[1]))
    shape = _shape(mask, tests, head_dim, v_dim, None)
    blocks = [Block(*sizes) for sizes in itertools.product((1, 2, 3), (64, 128), (2, 3, 4))]
    return [{kernel: tuple(block)} for kernel in Blocks._fields for block in blocks if _fits(kernel, block, shape)]


def key_of(q, k, v, mask: Mask) -> dict:
    """Of a request in the table of block sizes: of head sizes as they are padded."""
    head_dim, v_dim = (x.shape[3] + -x.shape[3] % 64 for x in (q, v))
    lengths = {"q_len": q.shape[1], "kv_len": k.shape[1]}
    return block_sizes.key_of(KERNEL, mask, dtype=q.dtype, head_dim=head_dim, v_dim=v_dim, **lengths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(request: Request, q, k, v, mask: Mask):
    """(out, lse) of padded arrays."""
    blocks, tables = _prepared(request, mask, q, v)
    consumers, columns, stages = blocks.forward
    planned = tables(blocks.forward.rows, columns)
    return tuple(forward(q, k, v, planned, columns, consumers, stages, **request.options))


def _attend_forward(request: Request, q, k, v, mask: Mask):
    out, lse = _attend(request, q, k, v, mask)
    return (out, lse), (q, k, v, mask, out, lse)


def _attend_backward(request: Request, saved, cotangents):
    q, k, v, mask, out, lse = saved
    d_out, d_lse = cotangents
    blocks, tables = _prepared(request, mask, q, v)
    # A row that saw nothing gets p = exp2(s - inf) = 0 everywhere, and no cotangent of its lse -inf.
    empty = jnp.isneginf(lse)
    delta = jnp.einsum("bqhd,bqhd->bhq", out, d_out, preferred_element_type=jnp.float32) - d_lse
    stats = jnp.stack([jnp.where(empty, jnp.inf, lse * LOG2E), jnp.where(empty, 0, delta)], axis=2)
    d_out = d_out.astype(q.dtype)
    consumers, columns, stages = blocks.dq
    dq = dq_of(q, k, v, d_out, stats, tables(blocks.dq.rows, columns), columns, consumers, stages, **request.options)
    consumers, columns, stages = blocks.dk_dv
    by_keys = tables(columns, blocks.dk_dv.rows, by_keys=True)
    sums = lambda *wants: dk_dv_of(
        q, k, v, d_out, stats, by_keys, columns, consumers, stages, wants=wants, **request.options
    )
    fits = q.shape[3] + v.shape[3] <= LARGEST_HEAD
    dk, dv = sums("dk", "dv") if fits else (*sums("dk"), *sums("dv"))
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)
