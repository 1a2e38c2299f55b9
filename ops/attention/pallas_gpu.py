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
travel with the tiles they belong to. Everything that is not a whole tile is the copy engine's work: it fills with
zeros what lies outside and writes nothing there; but it takes lengths of eight, so odd ones are padded before (a
copy), and so are head sizes up to a multiple of 64.

Under `vmap`, jax adds a dimension to the grid. Differentiable once. With CUDA 12.8.0 to 12.9.0, jax refuses causal
masks in an attention kernel of its own because ptxas miscompiles them there; take 12.9.1 or later for this one too.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from lissom.ops import block_sizes
from lissom.ops.attention import tiles
from lissom.ops.attention.masks import Mask, without_padding
from lissom.ops.attention.merging import with_sinks
from lissom.ops.attention.pallas_gpu_backward import dk_dv_of, dq_of
from lissom.ops.attention.pallas_gpu_forward import forward
from lissom.ops.attention.pallas_gpu_parts import LOG2E, ROWS, plan
from lissom.ops.attention.sparse import BlockSparse, listed
from lissom.ops.interpreting import is_interpreting

LOCAL = True

KERNEL = "attention.pallas_gpu"

LARGEST_HEAD = 256  # an accumulator of 64 rows by 256 takes half of a warpgroup's registers
MOST_BATCH = 65535
TILE_BYTES = 216 * 1024  # of 227 KiB shared memory; the rest is for statistics, tables of tests, reductions, barriers


class Block(NamedTuple):
    """One kernel's tile: 64 rows for each of `consumers` warpgroups by `columns` a step, `stages` in the ring."""

    consumers: int
    columns: int
    stages: int

    @property
    def rows(self) -> int:
        return ROWS * self.consumers


class Blocks(NamedTuple):
    """rows are queries in `forward` and `dq`, keys in `dk_dv`."""

    forward: Block
    dq: Block
    dk_dv: Block


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
    if q.shape[0] > MOST_BATCH:
        raise NotImplementedError(f"batch {q.shape[0]} is larger than CUDA's grid of {MOST_BATCH}.")
    if scale <= 0:
        raise NotImplementedError(f"scale {scale} is not positive: the running maximum is taken before it.")
    blocks = listed(mask)
    if blocks is None:
        return
    if not isinstance(blocks, BlockSparse):
        raise NotImplementedError(f"mask {type(blocks).__name__} lists single keys, which are not tiles.")
    if blocks.block_q % ROWS or blocks.block_k % ROWS:
        raise NotImplementedError(f"mask: blocks of {blocks.block_q} by {blocks.block_k} are not multiples of {ROWS}.")


def _blocks(q_len: int, kv_len: int, head_dim: int, v_dim: int, listed_blocks: tuple[int, int] | None) -> Blocks:
    """Tile sizes from what has to fit. Guesses: not tuned on hardware.

    Registers, of about 232 a thread with two consumers (a float32 accumulator of 64 by n takes n / 2): forward,
    scores and their 16-bit copy next to the output; dq, two tiles of scores next to dq; dk/dv, two next to both sums.
    So 128 columns where heads are small. Shared memory, for one block of threads a multiprocessor (registers allow no
    second): rows that stay, then as many stages as fit, at most 4; a single consumer where not even 2 do. One
    consumer also where one is enough for the whole length, and tiles that divide the mask's blocks.
    """
    block_q, block_k = (128, 128) if listed_blocks is None else listed_blocks
    both = head_dim + v_dim
    widest = max(head_dim, v_dim)

    def fitting(length: int, block: int, columns: int, resident: int) -> Block:
        most = 1 if length <= ROWS or block % (2 * ROWS) else 2
        for consumers in range(most, 0, -1):
            left = TILE_BYTES - 2 * ROWS * consumers * resident
            stages = min(4, left // (2 * columns * both))
            if stages >= 2:
                return Block(consumers, columns, stages)
        raise AssertionError(f"no tile fits head sizes {head_dim} and {v_dim}")

    columns = lambda block, most: 128 if block % 128 == 0 and widest <= most else 64
    return Blocks(
        forward=fitting(q_len, block_q, columns(block_k, 128), head_dim if head_dim == v_dim else both),
        dq=fitting(q_len, block_q, columns(block_k, 64), both),
        dk_dv=fitting(kv_len, block_k, columns(block_q, 64), both),
    )


def run(q, k, v, mask: Mask, bias, sinks, *, scale: float, logit_softcap: float | None, return_lse: bool):
    q_len, kv_len, v_dim = q.shape[1], k.shape[1], v.shape[3]
    valid = mask.valid_queries(q_len)
    q, k, v = without_padding(mask, q, k, v)
    places = tiles.order(mask, q_len)
    if places is not None:
        q, k, v = (x[:, places] for x in (q, k, v))
    request = Request(q_len, kv_len, scale, logit_softcap, is_interpreting())
    out, lse = _attend(request, *(_padded(x) for x in (q, k, v)), mask)
    out, lse = out[:, :q_len, :, :v_dim], lse[..., :q_len]
    if places is not None:
        back = np.argsort(places)
        out, lse = out[:, back], lse[..., back]
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
    return _measured_or_chosen(request, mask, q, v), functools.partial(plan, mask, tests, q_len, kv_len)


def _measured_or_chosen(request: Request, mask: Mask, q, v) -> Blocks:
    """The sizes that were measured on the chip (ops/block_sizes.py), where they fit this request; else `_blocks`."""
    named, head_dim, v_dim = listed(mask), q.shape[3], v.shape[3]
    listed_blocks = None if named is None else (named.block_q, named.block_k)
    chosen = _blocks(request.q_len, request.kv_len, head_dim, v_dim, listed_blocks)
    lengths = {"q_len": request.q_len, "kv_len": request.kv_len}
    key = block_sizes.key_of(KERNEL, mask, dtype=q.dtype, head_dim=head_dim, v_dim=v_dim, **lengths)
    sizes = block_sizes.tuned(key) or {}
    measured = {name: Block(*sizes[name]) for name in sizes}
    return chosen._replace(**{n: b for n, b in measured.items() if _fits(n, b, head_dim, v_dim, listed_blocks)})


def _fits(kernel: str, block: Block, head_dim: int, v_dim: int, listed_blocks: tuple[int, int] | None) -> bool:
    """Whether a tile fits into shared memory and divides the blocks of the mask."""
    both = head_dim + v_dim
    resident = head_dim if kernel == "forward" and head_dim == v_dim else both
    bytes_of = 2 * block.rows * resident + 2 * block.columns * both * block.stages
    sides = (block.columns, block.rows) if kernel == "dk_dv" else (block.rows, block.columns)
    divides = listed_blocks is None or all(size % side == 0 for size, side in zip(listed_blocks, sides))
    return bytes_of <= TILE_BYTES and divides and block.stages >= 2


def candidates(q, k, v, mask: Mask) -> list[dict[str, tuple[int, int, int]]]:
    """Sizes to try, for scripts/tune_ops.py: one kernel's at a time, (consumers, columns, stages) of all that fit."""
    named = listed(mask)
    listed_blocks = None if named is None else (named.block_q, named.block_k)
    head_dim, v_dim = (x.shape[3] + -x.shape[3] % 64 for x in (q, v))
    blocks = [Block(*sizes) for sizes in itertools.product((1, 2, 3), (64, 128), (2, 3, 4))]
    return [
        {kernel: tuple(block)}
        for kernel in Blocks._fields
        for block in blocks
        if _fits(kernel, block, head_dim, v_dim, listed_blocks)
    ]


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
