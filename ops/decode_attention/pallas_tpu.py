"""Decoding on TPUs: one Pallas kernel that copies from the cache the pages that are seen, and nothing else.

Never run on a TPU. The kernel is run in jax's interpreter of a TPU, and compiled by the real compiler for v5e and v5p;
no number here was measured.

Decoding reads each key and value once and computes little, so the copies from main memory (HBM) are what has to be
kept going. The cache stays where it is. One grid step is one *item*: a sequence, a block of its kv heads, and one of
`splits` parts of its keys. Inside, a loop walks over blocks of keys: it starts the copies of the next block into one
half of a buffer in vector memory (VMEM), waits for those of this block in the other half, and folds this block into
the running maximum, sum and output of an online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867;
FlashAttention-2, arXiv 2307.08691). The last block of an item starts the first copies of the next item, so short
sequences overlap too. The loop runs from the first block that `window` shows to the last one of the sequence's own
length: what is outside costs neither a copy nor a step.

A copy is one page [heads, page_size, head_dim]. Pages hold all heads (Kwon et al. 2023, arXiv 2309.06180), so with all
heads in a block it is one stretch of memory: 32 KB for a page of 16 tokens, 8 heads of 128 numbers in bfloat16. Many
such copies make a block, all in flight together, each at its address from the block table in scalar memory (SMEM). The
idea is that of jax's own paged attention kernel. A dense cache is read in the same way, as pages of up to DENSE_PAGE
tokens that lie behind each other.

The compiler (libtpu 0.0.48) lays an array whose last size is a multiple of 128 in memory as it is written. A head size
that is none would be padded, so the tokens of such a cache lie along the 128 lanes, if their number is a multiple: the
kernel takes it *turned*, as [heads, head_dim, page_size], which moves nothing. Where neither is a multiple of 128 the
cache would be copied as a whole at each call, and is refused.

All query heads that share a key head, and all new tokens, are the rows of one product with the block's keys. The two
cores of a v4 or v5p take half of the items each; `splits` gives them something to share where there is one sequence and
one block of heads (Flash-Decoding, Dao et al. 2023). Parts are of equal numbers of the blocks that the sequence uses,
and are merged by their log-sum-exp.

What lies behind a sequence's length is hidden from the scores, and its values are set to zero in the buffer before the
product, since 0 * NaN is NaN; that is done in the blocks at either end only.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lissom.ops.attention.kernel_layout import tiled
from lissom.ops.attention.merging import merge, with_sinks
from lissom.ops.interpreting import is_interpreting

LOCAL = True

LANES = 128
DENSE_PAGE = 256
# A dense cache's pages are chosen so that whole ones make whole registers at this number of keys or before.
DENSE_STEP = 1024
# Keys and values of one block, so that what is under way hides the time that a copy takes to start: 2.5 us of a v5e's
# bandwidth, 0.8 us of a v5p's. Modelled, not measured.
BLOCK_BYTES = 2**21
# Heads of a block are unrolled in the program.
MOST_HEADS = 8
# Scores of a head and block, so that the softmax of one block is not spilled for long.
MOST_SCORES = 2**17
# What the kernel may take of VMEM. The compiler's default limit is 16 MB, of the 16 to 128 MB that a chip has.
VMEM_BYTES = 13 * 2**20
# Lengths and block table lie in SMEM, which has 1 MB; the compiler takes some of it.
SMEM_BYTES = 3 * 2**18
# Hidden scores, and the maximum of no scores, are finite and far apart: the exponential of their difference is 0, and
# no infinity enters the kernel.
HIDDEN, LEAST = -1e38, -5e37


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in a call. rows: query heads of a group times new tokens, padded to whole tiles. page: tokens of
    a copy. block: keys of a block, whole pages. most_pages: of a sequence. turned: k, v, as the module says."""

    batch: int
    q_len: int
    kv_heads: int
    rows: int
    heads: int
    page: int
    block: int
    most_pages: int
    turned: tuple[bool, bool]
    splits: int
    window: int | None
    scale: float
    softcap: float | None
    interpret: bool

    @property
    def items(self) -> int:
        return self.splits * self.batch * (self.kv_heads // self.heads)

    @property
    def halves(self) -> int:
        """Of the items, one a core."""
        return 1 if self.items % 2 else 2


class Item(NamedTuple):
    """One item: scalars. It sees positions low..length-1, and walks over blocks first..stop-1 (none if it is empty)."""

    part: jax.Array
    sequence: jax.Array
    head: jax.Array
    low: jax.Array
    length: jax.Array
    first: jax.Array
    stop: jax.Array


def check(q, k, v, lengths, block_table, sinks, *, window, scale, logit_softcap, splits, return_lse) -> None:
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"q is {q.dtype}; this kernel takes float32 and bfloat16.")
    for name, x in (("k", k), ("v", v)):
        if x.shape[2] % _tile(x):
            what = "caches" if block_table is None else "pages"
            raise NotImplementedError(
                f"{name}: {what} of {x.shape[2]} tokens by {x.shape[3]} numbers do not lie in whole tiles; with a "
                f"multiple of {_tile(x)} tokens they do."
            )
    _check_numbers(lengths, block_table)
    _sizes(q, k, v, block_table)


def run(q, k, v, lengths, block_table, sinks, *, window, scale, logit_softcap, splits, return_lse):
    """out, or (out, lse), as `decode_attention` says."""
    (batch, q_len, heads, head_dim), (_, kv_heads, length, _) = q.shape, k.shape
    page, heads_together, block = _sizes(q, k, v, block_table)
    most_pages = length // page if block_table is None else block_table.shape[1]
    splits = min(splits or 1, -(-most_pages * page // block))
    plan = Plan(
        batch=batch,
        q_len=q_len,
        kv_heads=kv_heads,
        rows=_rows(q, k),
        heads=heads_together,
        page=page,
        block=block,
        most_pages=most_pages,
        turned=(_turned(k), _turned(v)),
        splits=splits,
        window=window,
        scale=scale,
        softcap=logit_softcap,
        interpret=is_interpreting(),
    )
    # Copies are not checked on the device: no number may lead out of the cache.
    lengths = jnp.clip(lengths.astype(jnp.int32), 0, most_pages * page)
    if block_table is not None:
        block_table = jnp.clip(block_table.astype(jnp.int32), 0, k.shape[0] - 1)
    group = heads // kv_heads
    queries = q.transpose(0, 2, 1, 3).reshape(batch, kv_heads, group * q_len, head_dim)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, plan.rows - group * q_len), (0, 0)))
    k, v = (x.swapaxes(2, 3) if turned else x for x, turned in zip((k, v), plan.turned))
    # What is scaled once more afterwards is not rounded before.
    out_dtype = jnp.float32 if splits > 1 or sinks is not None else q.dtype
    attend = jax.custom_vjp(functools.partial(_attend, plan, out_dtype))
    attend.defvjp(_forward_only, _forward_only)
    out, lse = attend(queries, k, v, lengths, block_table)
    out = out[:, :, :, : group * q_len].reshape(splits, batch, heads, q_len, -1).swapaxes(2, 3)
    lse = lse[..., : group * q_len].reshape(splits, batch, heads, q_len)
    out, lse = merge(list(zip(out, lse)))
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks.astype(lse.dtype))
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out


def _forward_only(*_):
    raise NotImplementedError("implementation: pallas_tpu decodes forward only; reference can be differentiated.")


def _check_numbers(lengths, block_table) -> None:
    numbers = lengths.size + (0 if block_table is None else block_table.size)
    if 4 * numbers > SMEM_BYTES:
        raise NotImplementedError(
            f"block_table: {numbers} numbers take {numbers / 2**18:.2f} MB; scalar memory has room for "
            f"{SMEM_BYTES / 2**20:.2f}. Larger pages make a smaller table."
        )


def _turned(x) -> bool:
    return x.shape[3] % LANES > 0


def _tile(x) -> int:
    """Tokens of a tile of the cache."""
    return LANES if _turned(x) else _sublanes(x)


def _sublanes(x) -> int:
    """The rows of a tile."""
    return 32 // x.dtype.itemsize


def _rows(q, k) -> int:
    return tiled(q.shape[2] // k.shape[1] * q.shape[1], _sublanes(q))


def _sizes(q, k, v, block_table) -> tuple[int, int, int]:
    """(tokens of a page, heads of a block, keys of a block): as many heads as go together, since the heads of a page
    lie together, then as many keys as fill a block of BLOCK_BYTES."""
    length, kv_heads, rows = k.shape[2], k.shape[1], _rows(q, k)
    page = length
    if block_table is None:
        tile = max(_tile(k), _tile(v))
        sizes = (size for size in range(tile, DENSE_PAGE + 1, tile) if length % size == 0)
        page = max(size for size in sizes if math.lcm(size, LANES) <= DENSE_STEP)
    most = page * (length // page if block_table is None else block_table.shape[1])
    widths = [tiled(x.shape[3], LANES) for x in (q, v)]
    key_bytes = k.dtype.itemsize * sum(widths)
    # Scores have keys along lanes: a block is whole pages and whole registers. It may be longer than the cache.
    step = math.lcm(page, LANES)
    for heads in (n for n in range(min(MOST_HEADS, kv_heads), 0, -1) if kv_heads % n == 0):
        room = min(BLOCK_BYTES // (heads * key_bytes), MOST_SCORES // rows, tiled(most, step))
        block = max(room // step, 1) * step
        # Two halves of the buffer; q, out and lse twice; running maxima, sums and outputs; four tiles of scores.
        buffers = 2 * heads * block * key_bytes
        copied = 2 * heads * rows * (widths[0] * q.dtype.itemsize + 4 * (widths[1] + 1))
        running = 4 * heads * rows * (widths[1] + 2 * LANES)
        fits = buffers + copied + running + 4 * 4 * rows * block <= VMEM_BYTES
        if fits and (heads == 1 or heads * step * key_bytes <= BLOCK_BYTES):
            return page, heads, block
    raise NotImplementedError(
        f"{rows} queries a key head and blocks of {step} keys, with head sizes {q.shape[3]} and {v.shape[3]}, do not "
        f"fit in {VMEM_BYTES / 2**20:.0f} MB of VMEM."
    )


def _attend(plan: Plan, out_dtype, q, k, v, lengths, table):
    """q [batch, kv_heads, rows, head_dim]; k and v turned where the plan says so; lengths int32 [batch]; table int32
    [batch, most_pages], None for a dense cache -> out [splits, batch, kv_heads, rows, v_dim], lse float32 [splits,
    batch, kv_heads, 1, rows]."""
    attend = jax.custom_batching.custom_vmap(functools.partial(_pallas_call, plan, out_dtype))

    @attend.def_vmap
    def of_more_sequences(size: int, batched, *operands):
        # jax's own rule would call the kernel once for each entry of the axis.
        own_pages = table is not None and (batched[1] or batched[2])
        shared_pages = table is not None and not own_pages
        operands = [
            x if x is None or b or (shared_pages and n in (1, 2)) else jnp.broadcast_to(x, (size, *x.shape))
            for n, (x, b) in enumerate(zip(operands, batched))
        ]
        if own_pages:
            first = jnp.arange(size, dtype=jnp.int32) * operands[1].shape[1]
            operands[4] += first[:, None, None]
        flat = [
            x if x is None or (shared_pages and n in (1, 2)) else x.reshape(-1, *x.shape[2:])
            for n, x in enumerate(operands)
        ]
        _check_numbers(*flat[3:])
        out, lse = _attend(dataclasses.replace(plan, batch=size * plan.batch), out_dtype, *flat)
        apart = lambda x: jnp.moveaxis(x.reshape(plan.splits, size, plan.batch, *x.shape[2:]), 1, 0)
        return (apart(out), apart(lse)), (True, True)

    return attend(q, k, v, lengths, table)


def _pallas_call(plan: Plan, out_dtype, q, k, v, lengths, table):
    heads, rows = plan.heads, plan.rows
    head_dim, v_dim = q.shape[3], v.shape[2 if plan.turned[1] else 3]
    buffers = [
        (width, plan.block) if turned else (plan.block, width) for width, turned in zip((head_dim, v_dim), plan.turned)
    ]
    scalars = (lengths,) if table is None else (lengths, table.reshape(-1))
    per_half = plan.items // plan.halves

    def item(half, number):
        return _place(plan, half * per_half + number)

    def of_q(half, number, *_):
        _, sequence, head = item(half, number)
        return sequence, head, 0, 0

    def of_result(half, number, *_):
        return *item(half, number), 0, 0

    whole = plan.batch * plan.kv_heads * plan.most_pages * plan.page
    return pl.pallas_call(
        functools.partial(_kernel if table is not None else _dense_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(plan.halves, per_half),
            in_specs=(
                pl.BlockSpec((None, heads, rows, head_dim), of_q),
                # With pl.ANY the compiler copies a cache that fits into VMEM as a whole, used or not.
                pl.BlockSpec(memory_space=pltpu.HBM),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ),
            out_specs=(
                pl.BlockSpec((None, None, heads, rows, v_dim), of_result),
                pl.BlockSpec((None, None, heads, 1, rows), of_result),
            ),
            scratch_shapes=(
                *(pltpu.VMEM((2, heads, *shape), k.dtype) for shape in buffers),
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM((heads, rows, LANES), jnp.float32),
                pltpu.VMEM((heads, rows, LANES), jnp.float32),
                pltpu.VMEM((heads, rows, v_dim), jnp.float32),
            ),
        ),
        out_shape=(
            jax.ShapeDtypeStruct((plan.splits, plan.batch, plan.kv_heads, rows, v_dim), out_dtype),
            jax.ShapeDtypeStruct((plan.splits, plan.batch, plan.kv_heads, 1, rows), jnp.float32),
        ),
        # The items of one half come one after the other: each starts the copies of the next.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        # Of full sequences: what is used of them is not known before the program runs.
        cost_estimate=pl.CostEstimate(
            flops=2 * whole * rows * (head_dim + v_dim),
            transcendentals=whole * rows,
            bytes_accessed=whole * (head_dim + v_dim) * k.dtype.itemsize,
        ),
        interpret=pltpu.InterpretParams() if plan.interpret else False,
        name="decode_attention",
    )(*scalars, q, k, v)


def _dense_kernel(lengths, *refs, plan: Plan):
    _kernel(lengths, None, *refs, plan=plan)


def _kernel(
    lengths,  # SMEM [batch]
    table,  # SMEM [batch * most_pages], or None
    q_ref,  # [heads, rows, head_dim]
    k_hbm,  # HBM [batch or pages, kv_heads, length or page, head_dim], the last two changed where turned, as in buffers
    v_hbm,  # HBM [batch or pages, kv_heads, length or page, v_dim]
    out_ref,  # [heads, rows, v_dim]
    lse_ref,  # [heads, 1, rows]
    k_buffer,  # [2, heads, block, head_dim]
    v_buffer,  # [2, heads, block, v_dim]
    semaphores,  # [2, 2]: half of the buffer, k or v
    half_ref,  # SMEM [1]: the half of the buffer in which this item's first block is
    most_ref,  # [heads, rows, LANES], the running maximum, the same in all lanes
    sum_ref,  # [heads, rows, LANES]
    out_sum_ref,  # [heads, rows, v_dim]
    *,
    plan: Plan,
):
    number, per_half = pl.program_id(1), pl.num_programs(1)
    place = pl.program_id(0) * per_half + number
    item = _item(plan, lengths, place)
    copies = functools.partial(_copies, plan, table, ((k_hbm, k_buffer), (v_hbm, v_buffer)), semaphores)

    @pl.when(number == 0)
    def _():
        half_ref[0] = 0
        copies(item, item.first, 0, lambda copy: copy.start())

    most_ref[...] = jnp.full_like(most_ref, LEAST)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    out_sum_ref[...] = jnp.zeros_like(out_sum_ref)
    # An empty item takes one turn, without copies of its own, to start those of the next.
    end = jnp.maximum(item.stop, item.first + 1)

    def turn(block, half):
        @pl.when(block + 1 < end)
        def _():
            copies(item, block + 1, 1 - half, lambda copy: copy.start())

        @pl.when((block + 1 == end) & (number + 1 < per_half))
        def _():
            following = _item(plan, lengths, place + 1)
            copies(following, following.first, 1 - half, lambda copy: copy.start())

        copies(item, block, half, lambda copy: copy.wait())
        begin = block * plan.block

        @pl.when((begin < item.low) | (begin + plan.block > item.length))
        def _():
            for head in range(plan.heads):
                values = v_buffer[half, head]
                position = begin + jax.lax.broadcasted_iota(jnp.int32, values.shape, 1 if plan.turned[1] else 0)
                filled = (item.low <= position) & (position < item.length)
                v_buffer[half, head] = jnp.where(filled, values, jnp.zeros_like(values))

        @pl.when(block < item.stop)
        def _():
            for head in range(plan.heads):
                own = (q_ref.at[head], k_buffer.at[half, head], v_buffer.at[half, head])
                _fold(plan, item.length, begin, *own, most_ref.at[head], sum_ref.at[head], out_sum_ref.at[head])

        return 1 - half

    half_ref[0] = jax.lax.fori_loop(item.first, end, turn, half_ref[0])
    for head in range(plan.heads):
        total = sum_ref[head]
        sees = total > 0
        total = jnp.where(sees, total, 1)
        out_ref[head] = (out_sum_ref[head] / _wide(total, out_ref.shape[2])).astype(out_ref.dtype)
        lse_ref[head] = jnp.where(sees, most_ref[head] + jnp.log(total), -jnp.inf).T[:1]


def _place(plan: Plan, number):
    """(part, sequence, block of heads) of item `number`."""
    # lax.div rounds to zero, which is one operation; the floor of // is several.
    blocks = plan.kv_heads // plan.heads
    sequence = jax.lax.div(number, blocks)
    part = jax.lax.div(sequence, plan.batch)
    return part, sequence - part * plan.batch, number - sequence * blocks


def _item(plan: Plan, lengths, number) -> Item:
    part, sequence, head = _place(plan, number)
    length = lengths[sequence]
    low = 0 if plan.window is None else length - plan.q_len - plan.window + 1
    low = jnp.maximum(jnp.int32(low), 0)
    first, stop = jax.lax.div(low, plan.block), jax.lax.div(length + plan.block - 1, plan.block)
    blocks = stop - first
    ends = [first + jax.lax.div((part + more) * blocks, plan.splits) for more in (0, 1)]
    return Item(part, sequence, head, low, length, *ends)


def _copies(plan: Plan, table, memories, semaphores, item: Item, block, half, act: Callable) -> None:
    """Does `act` with every copy of the pages that the item sees of a block, into a half of the buffers."""
    pages = plan.block // plan.page
    begin = jnp.maximum(block * pages, jax.lax.div(item.low, plan.page))
    end = jnp.minimum((block + 1) * pages, jax.lax.div(item.length + plan.page - 1, plan.page))
    heads = pl.ds(item.head * plan.heads, plan.heads)

    def tokens(page, turned: bool):
        tokens = pl.ds(pl.multiple_of(page * plan.page, plan.page), plan.page)
        return (slice(None), tokens) if turned else (tokens,)

    def one(number, _):
        for which, ((memory, buffer), turned) in enumerate(zip(memories, plan.turned)):
            if table is None:
                source = (item.sequence, heads, *tokens(number, turned))
            else:
                source = (table[item.sequence * plan.most_pages + number], heads)
            to = (half, slice(None), *tokens(number - block * pages, turned))
            act(pltpu.make_async_copy(memory.at[source], buffer.at[to], semaphores.at[half, which]))

    jax.lax.fori_loop(begin, jnp.where(block < item.stop, end, begin), one, None)


def _fold(plan: Plan, length, begin, q_ref, k_ref, v_ref, most_ref, sum_ref, out_sum_ref) -> None:
    """Adds the keys at begin, begin + 1, ... to the running maximum, sum and output of one head.

    q_ref [rows, head_dim], k_ref [block, head_dim], v_ref [block, v_dim], both the other way round where turned;
    most_ref, sum_ref [rows, LANES], out_sum_ref [rows, v_dim].
    """
    k_turned, v_turned = plan.turned
    scores = _dot(q_ref[...], k_ref[...], 0 if k_turned else 1) * plan.scale
    if plan.softcap is not None:
        scores = plan.softcap * jnp.tanh(scores * (1 / plan.softcap))
    # Rows are heads of the group, and new tokens within each.
    token = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0), plan.q_len)
    behind = length - plan.q_len + token - begin - jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    seen = behind >= 0 if plan.window is None else (behind >= 0) & (behind < plan.window)
    scores = jnp.where(seen, scores, HIDDEN)
    before = most_ref[...]
    most = jnp.maximum(before, scores.max(1, keepdims=True))
    weights = jnp.exp(scores - _wide(most, plan.block))
    shrink = jnp.exp(before - most)
    most_ref[...] = most
    sum_ref[...] = shrink * sum_ref[...] + weights.sum(1, keepdims=True)
    products = _dot(weights.astype(v_ref.dtype), v_ref[...], 1 if v_turned else 0)
    out_sum_ref[...] = _wide(shrink, products.shape[1]) * out_sum_ref[...] + products


def _dot(a: jax.Array, b: jax.Array, of_b: int) -> jax.Array:
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((1,), (of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def _wide(column: jax.Array, width: int) -> jax.Array:
    """[n, LANES], the same in all lanes -> [n, width]."""
    return jnp.tile(column, (1, math.ceil(width / LANES)))[:, :width]
