"""Decoding on Hopper GPUs (H100, H200) with Mosaic GPU: a few queries against a cache that is read once.

NEVER RUN ON A GPU. The kernel passes jax's interpreter, which models memory, barriers and copies and finds races, and
it lowers for CUDA; no line of this has met hardware, and nothing is known of its speed. So it stands in no default
order. What the interpreter does not see is said in `ops/attention/pallas_gpu.py`; and it takes a warpgroup for one
thread. That its four warps wait for each other, before a stage is filled again and before results take the ring's
place, is Pallas's doing, which puts a barrier before each copy and each store (unless `unsafe_no_auto_barriers`).

What bounds it is the reading of keys and values, so all queries that share them are computed together: the q_len x
(heads / kv_heads) rows of one head of the cache are the 64 rows of a `wgmma` product, the least it takes (grouped
queries as rows: Ainslie et al. 2023, arXiv 2305.13245; more than 64 are further blocks of threads, next to each other
in the grid, that find the cache in L2). Rows without a query cost arithmetic that the reading leaves idle.

A block of threads is one warpgroup. It owns a part of the keys of one head of one sequence (Flash-Decoding, Dao et al.
2023; with several parts a small batch fills the machine too) and takes them tile by tile from a ring of stages in
shared memory, which the copy engine fills:

    s   = q k^T                                    wgmma, both operands in shared memory
    m'  = max(m, max_j c s)                        c = scale log2(e): base 2, the scale folded into the exponent's FMA
    p   = exp2(c s - m'),  a = exp2(m - m')
    l   = a l + sum_j p,   acc = a acc + p v       wgmma, p in registers, never normalised

A tile's stage is filled again as soon as its products are done, by the warpgroup itself: there is no other that copies,
hence no registers to divide, and two blocks of threads fit on a multiprocessor (where head sizes allow: `_block`), of
which one computes while the other waits. 32 KiB of keys and values a stage and two or three stages a block keep at
least 64 KiB under way a multiprocessor; the memory of an H200 needs about 36 (4.8 TB/s, 132 multiprocessors, 1 us).
Parts are written in float32, out / l and lse = ln 2 (m + log2 l), and joined by `attention.merging.merge`, in XLA.

Lengths are read when the kernel runs. A sequence's tiles, from the first that its window shows to the last that it
fills, are divided evenly among its parts, so that short sequences leave no part idle in a long cache; tiles that no
query sees are not fetched. Tiles that every query sees whole have a loop of their own without tests, and come first.
Rows of values behind the length or before the first query's window, which may hold NaN, are cleared in the tiles at
either end: 0 NaN is NaN.

Pages (PagedAttention, Kwon et al. 2023, arXiv 2309.06180): a tile is copied in windows, as long as divides both page
and tile, each from the page that the table names. The entries for the tile that will come into a stage are read when
the stage's present tile is begun, so that they are there when it is done. A window of pages behind the length, or
before what is seen, need not have a page; the last or the first that is seen is copied again in its place.

Forward only. The grid has one dimension, and no limit on the batch. Under `vmap`, jax adds one, of which CUDA allows
65535.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lissom.ops.attention.merging import merge, with_sinks
from lissom.ops.attention.pallas_gpu_parts import (
    LARGEST_HEAD,
    PER_ROW,
    add_product,
    capped,
    finished,
    place,
    product,
    spread,
    weighed,
    zeros,
)
from lissom.ops.hopper import ROWS, tile
from lissom.ops.interpreting import is_interpreting

LOCAL = True

MULTIPROCESSORS = 132  # of an H100 SXM and an H200
LEAST_KEYS = 256
"""Of a part: for 8 rows, writing and reading its result moves 1/16 of what its keys and values do."""
HALF_BYTES = 112 * 1024  # of 228 KiB shared memory a multiprocessor, for each of two blocks of threads
TILE_BYTES = 216 * 1024  # for a single one, which has 227


class Block(NamedTuple):
    """A tile of `columns` keys, `stages` of them in the ring."""

    columns: int
    stages: int


class Request(NamedTuple):
    """What is static. page: positions a page, None for a dense cache. group: query heads a head of the cache."""

    q_len: int
    group: int
    kv_heads: int
    page: int | None
    window: int | None
    scale: float
    softcap: float | None
    splits: int
    block: Block
    interpret: bool

    @property
    def rows(self) -> int:
        return self.q_len * self.group

    @property
    def copied(self) -> int:
        """Keys that one copy brings."""
        return self.block.columns if self.page is None else math.gcd(self.page, self.block.columns)


def check(q, k, v, lengths, block_table, sinks, *, window, scale, logit_softcap, splits, return_lse) -> None:
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        raise NotImplementedError(f"q is {q.dtype}; tensor cores take float16 and bfloat16 (float32 only as tf32).")
    for name, size in (("head_dim", q.shape[3]), ("v_dim", v.shape[3])):
        if size % 64 or size > LARGEST_HEAD:
            raise NotImplementedError(f"{name} {size} is not 64, 128, 192 or 256; padding would copy the cache.")
    if k.shape[2] % 8:
        what = "the cache's length" if block_table is None else "page size"
        raise NotImplementedError(f"{what} {k.shape[2]} is not a multiple of 8; padding would copy the cache.")
    if scale <= 0:
        raise NotImplementedError(f"scale {scale} is not positive: the running maximum is taken before it.")


def _block(head_dim: int, v_dim: int) -> Block:
    """Tile sizes from what has to fit. Guesses: not tuned on hardware.

    A stage of 32 KiB where heads are small, for long copies and few steps; at least the 64 rows that a warpgroup clears
    at once. Shared memory for two blocks of threads a multiprocessor if they have two stages each, else for one.
    """
    both = head_dim + v_dim
    columns = 128 if both <= 128 else 64
    fitting = lambda room: min(3, (room - 2 * ROWS * head_dim) // (2 * columns * both))
    stages = fitting(HALF_BYTES)
    return Block(columns, stages if stages >= 2 else fitting(TILE_BYTES))


def _parts(blocks: int, keys: int) -> int:
    """Parts that fill the machine with two blocks of threads a multiprocessor, of LEAST_KEYS keys at least."""
    return max(1, min(-(-2 * MULTIPROCESSORS // blocks), keys // LEAST_KEYS))


def run(q, k, v, lengths, block_table, sinks, *, window, scale, logit_softcap, splits, return_lse):
    batch, q_len, heads, head_dim = q.shape
    kv_heads, v_dim = k.shape[1], v.shape[3]
    group = heads // kv_heads
    page = None if block_table is None else k.shape[2]
    room = k.shape[2] * (1 if block_table is None else block_table.shape[1])
    window = None if window is None or window >= room else window
    block = _block(head_dim, v_dim)
    if splits is None:
        blocks = batch * kv_heads * -(-q_len * group // ROWS)
        splits = _parts(blocks, room if window is None else min(room, window + q_len - 1))
    splits = min(splits, -(-room // block.columns))
    request = Request(
        q_len, group, kv_heads, page, window, scale, logit_softcap, splits, block, is_interpreting()
    )  # fmt: skip
    rows = q.reshape(batch, q_len, kv_heads, group, head_dim).swapaxes(1, 2).reshape(batch * kv_heads, -1, head_dim)
    # Copies of swizzled tiles clip what lies outside of an array, but take lengths of eight.
    rows = jnp.pad(rows, ((0, 0), (0, -request.rows % 8), (0, 0)))
    numbers = [x.astype(jnp.int32) for x in (lengths, block_table) if x is not None]
    out, lse = _call(request, rows, *(x.reshape(-1, *x.shape[2:]) for x in (k, v)), *numbers)
    out = out[:, : request.rows].reshape(splits, batch, kv_heads, q_len, group, v_dim)
    out = out.swapaxes(2, 3).reshape(splits, batch, q_len, heads, v_dim)
    lse = lse[:, : request.rows].reshape(splits, batch, kv_heads, q_len, group)
    lse = lse.swapaxes(3, 4).reshape(splits, batch, heads, q_len)
    out, lse = merge(list(zip(out, lse)))
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks.astype(lse.dtype))
    out = out.astype(v.dtype)
    return (out, lse) if return_lse else out


def _call(request: Request, q, k, v, lengths, *table):
    """out [splits * batch * kv_heads, rows, v_dim] and lse [splits * batch * kv_heads, at least rows], parts.

    q [batch * kv_heads, rows, head_dim], k and v [batch or pages * kv_heads, length or page, .].
    """
    (columns, stages), (_, rows, head_dim), v_dim = request.block, q.shape, v.shape[2]
    keys = tile((stages, columns, head_dim), k.dtype), tile((stages, columns, v_dim), v.dtype)
    parts, blocks = request.splits * q.shape[0], -(-rows // ROWS)
    return plgpu.kernel(
        functools.partial(_decode, request=request),
        out_type=[
            jax.ShapeDtypeStruct((parts, rows, v_dim), jnp.float32),
            # Room for every row of a product: what is copied without a swizzle is not clipped (`attention.pallas_gpu`).
            jax.ShapeDtypeStruct((parts, blocks * ROWS), jnp.float32),
        ],
        scratch_types={
            "q_smem": tile((ROWS, head_dim), q.dtype),
            # The results take the ring's place when the last tile is done.
            "ring": plgpu.RefUnion(keys, (tile((ROWS, v_dim), jnp.float32), plgpu.SMEM((ROWS,), jnp.float32))),
            "q_ready": plgpu.Barrier(),
            "ready": plgpu.Barrier(num_arrivals=2 * (columns // request.copied), num_barriers=stages),
        },
        # Splits, sequences, and blocks of rows, of which those of one head lie next to each other.
        grid=(request.splits * lengths.shape[0] * request.kv_heads * blocks,),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="lissom_decode_attention",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if request.interpret else False,
        # Rows are reduced within four neighbouring threads, which takes no scratch.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(q, k, v, lengths, *table)


class Part(NamedTuple):
    """Tiles [begin, end) of a sequence of `length` tokens; of them [whole, whole_end) need no test. low: the first
    position that a query sees."""

    length: jax.Array
    low: jax.Array
    begin: jax.Array
    end: jax.Array
    whole: jax.Array
    whole_end: jax.Array

    @property
    def untested(self) -> jax.Array:
        return self.whole_end - self.whole

    @property
    def count(self) -> jax.Array:
        return self.end - self.begin

    def tile(self, step) -> jax.Array:
        """The tile of a step: those that need no test, then those before them, then those behind."""
        tested = step - self.untested
        before = self.whole - self.begin
        tested = jnp.where(tested < before, self.begin + tested, self.whole_end + tested - before)
        return jnp.where(step < self.untested, self.whole + step, tested)


def part_of(request: Request, length, split) -> Part:
    """What part `split` has to do of a sequence of `length` tokens (int32 scalars).

    Query i stands at length - q_len + i: the first is what bounds what all see at the end, the last at the beginning.
    """
    columns = request.block.columns
    divided = lambda x, by: jax.lax.div(x, jnp.int32(by))  # both are at least 0: no floor needed
    behind = lambda x: divided(x + (columns - 1), columns)
    window = request.window
    low = jnp.int32(0) if window is None else jnp.maximum(length - request.q_len - window + 1, 0)
    first = divided(low, columns)
    last = behind(length)
    each = divided(last - first + (request.splits - 1), request.splits)
    begin = jnp.minimum(first + split * each, last)
    end = jnp.minimum(begin + each, last)
    whole = begin if window is None else jnp.clip(behind(jnp.maximum(length - window, 0)), begin, end)
    whole_end = jnp.clip(divided(jnp.maximum(length - request.q_len + 1, 0), columns), whole, end)
    return Part(length, low, begin, end, whole, whole_end)


def _decode(q_ref, k_ref, v_ref, lengths_ref, *refs, request, q_smem, ring, q_ready, ready):
    """q_ref [batch * kv_heads, rows, head_dim]; k_ref, v_ref [batch or pages * kv_heads, length or page, .];
    lengths_ref [batch]; refs: table_ref [batch, most_pages] if there is one, out_ref [parts, rows, v_dim], lse_ref
    [parts, at least rows]. q_smem [ROWS, head_dim]; ring: k_smem, v_smem [stages, columns, .], or out_smem
    [ROWS, v_dim] and lse_smem [ROWS]."""
    *table_refs, out_ref, lse_ref = refs
    (k_smem, v_smem), (out_smem, lse_smem) = ring
    columns, stages = request.block
    blocks = -(-request.rows // ROWS)
    split, sequence, head = place(lengths_ref.shape[0], request.kv_heads * blocks)
    first_row = 0
    if blocks > 1:
        first_row = jax.lax.rem(head, jnp.int32(blocks)) * ROWS
        head = jax.lax.div(head, jnp.int32(blocks))
    own = sequence * request.kv_heads + head
    part = part_of(request, lengths_ref[sequence], split)

    def places(step) -> list[tuple]:
        """Where the copies of a tile begin: (first index, position) in k_ref and v_ref."""
        start = part.tile(step) * columns
        if request.page is None:
            return [(own, start)]
        # The table need not name what nobody sees.
        copied = jnp.int32(request.copied)
        first, last = (jax.lax.div(x, copied) * copied for x in (part.low, part.length - 1))
        starts = [jnp.clip(start + offset, first, last) for offset in range(0, columns, request.copied)]
        page, table_ref = jnp.int32(request.page), table_refs[0].at[sequence]
        return [(table_ref[jax.lax.div(x, page)] * request.kv_heads + head, jax.lax.rem(x, page)) for x in starts]

    def fetch(slot, places) -> None:
        for number, (index, start) in enumerate(places):
            into = pl.ds(number * request.copied, request.copied)
            for ref, smem in ((k_ref, k_smem), (v_ref, v_smem)):
                there = ref.at[index, pl.ds(start, request.copied)]
                plgpu.copy_gmem_to_smem(there, smem.at[slot, into], ready.at[slot])

    plgpu.copy_gmem_to_smem(q_ref.at[own, pl.ds(first_row, ROWS)], q_smem, q_ready)
    for slot in range(stages):
        pl.when(slot < part.count)(lambda slot=slot: fetch(slot, places(slot)))
    plgpu.barrier_wait(q_ready)

    def step(number, carry, tested):
        slot = jax.lax.rem(number, jnp.int32(stages))
        following = places(number + stages)
        plgpu.barrier_wait(ready.at[slot])
        start = part.tile(number) * columns if tested else None
        carry = _attend(carry, q_smem, k_smem.at[slot], v_smem.at[slot], part, start, first_row, request)

        pl.when(number + stages < part.count)(lambda: fetch(slot, following))
        return carry

    row = lambda value: plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), PER_ROW)
    carry = zeros((ROWS, v_smem.shape[2])), row(-jnp.inf), row(0.0)
    carry = jax.lax.fori_loop(0, part.untested, functools.partial(step, tested=False), carry)
    carry = jax.lax.fori_loop(part.untested, part.count, functools.partial(step, tested=True), carry)
    out_smem[...], lse_smem[...] = finished(*carry)
    plgpu.commit_smem()
    at = split * q_ref.shape[0] + own
    plgpu.copy_smem_to_gmem(out_smem, out_ref.at[at, pl.ds(first_row, ROWS)])
    plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[at, pl.ds(first_row, ROWS)])
    plgpu.wait_smem_to_gmem(0)


def _attend(carry, q_ref, k_ref, v_ref, part: Part, start, first_row, request: Request):
    """One step of the online softmax: k_ref [columns, head_dim], v_ref [columns, v_dim] in shared memory.

    start: the position of the tile's first key where elements have to be tested, None where all rows see all keys.
    """
    acc, m, total = carry
    s, unit, _ = capped(product(q_ref, k_ref), request.scale, request.softcap)
    if start is not None:
        s = jnp.where(_seen(request, start - part.length, first_row, s.shape), s, -jnp.inf)
        overhangs = (start < part.low) | (start + k_ref.shape[0] > part.length)
        pl.when(overhangs)(lambda: _clear(v_ref, part.low - start, part.length - start))
    new, p, kept = weighed(s, unit, m, may_be_empty=start is not None)
    total = total * kept + p.sum(axis=1)
    acc = add_product(acc * spread(kept, acc.shape, 0), p.astype(q_ref.dtype), v_ref, request.interpret)
    return acc, new, total


def _seen(request: Request, start, first_row, shape: tuple[int, int]) -> jax.Array:
    """Bool [rows, keys]: whether a row sees a key; `start` is the first key's place from the end of the sequence.

    Row r holds query r // group, at q_len - r // group from the end. Instead of the division, x <= r // group is taken
    as x group <= r.
    """
    iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
    rows, keys = iota(0) + first_row, iota(1) + (start + request.q_len)
    seen = keys * request.group <= rows
    if request.window is not None:
        seen &= rows < (keys + request.window) * request.group
    return seen


def _clear(v_ref, first, end) -> None:
    """Zeros in the rows of a tile before `first` and from `end` on. By 64 columns, for the sake of registers."""
    row = plgpu.broadcasted_iota(jnp.int32, (v_ref.shape[0], 64), 0, layout=plgpu.Layout.WGMMA)
    unseen = (row < first) | (row >= end)
    for column in range(0, v_ref.shape[1], 64):
        part = v_ref.at[:, pl.ds(column, 64)]
        part[...] = jnp.where(unseen, 0.0, plgpu.load(part, layout=plgpu.Layout.WGMMA))
    plgpu.commit_smem()
