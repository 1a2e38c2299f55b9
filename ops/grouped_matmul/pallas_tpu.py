"""Grouped matmul on TPUs: Pallas kernels that walk over the pairs of a block of rows and a group that meet.

Never run on a TPU. The kernels are run in jax's interpreter of a TPU, and compiled by the real compiler for v5e and
v5p; no number here was measured.

Rows of x [m, k] are cut into whole blocks, of BM rows, that know nothing of the groups. A group of rows begins and ends
anywhere in a block, so a block belongs to each group that has a row in it. An *item* is such a pair, in the order of
rows; with g groups there are at most ceil(m / BM) + g - 1, since each item but the first moves on to the next block, to
the next group, or to both. Which they are depends on values: tables of them are made outside of the kernels and lie in
scalar memory (SMEM), where they say which blocks are copied next. The grid is static. Items behind the last one stay at
its blocks, so that nothing is copied for them.

`rows`, y_i = f(x_i w_j) for the rows i of group j: an item is the product of its block with the matrix of its group, of
which its own rows are kept. The block of y stays in vector memory (VMEM) while items of one block follow one another,
and the matrix while items of one group do. Blocks in which no row has a group have an item each too, to be zeroed.

`sums`, z_j = sum_i x_i^T y_i over the rows i of group j: an item adds the product of its rows to a float32 sum in VMEM,
which is written with the last item of the group. Rows of other groups are 0 in both operands, since 0 * NaN is NaN. An
empty group has an item too, to be zeroed.

So a group costs at most BM - 1 rows too many at each end. Megablocks (arXiv 2211.15841) makes groups of whole blocks
instead, by copying rows. That one block is computed for several groups is the idea of jax's own kernel for TPUs, too.

Block sizes are the fastest in a model of a v5e (`_seconds`): modelled, not measured.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lissom.ops.grouped_matmul import differentiable
from lissom.ops.interpreting import is_interpreting

LOCAL = True

LANES = 128
# Rows of a block. All of x where it has no more than the most; the least makes the longest tables.
ROWS = (128, 256, 512, 1024)
# What a kernel may take of VMEM. The compiler's default limit is 16 MB, of the 16 to 128 MB that a chip has.
VMEM_BYTES = 13 * 2**20
# The tables lie in SMEM, which has 1 MB; the compiler takes some of it.
SMEM_BYTES = 3 * 2**18
# A v5e, as Google describes it, and a step of the grid, as jax's Pallas documentation does. A v5p has more bandwidth
# for each flop: what keeps a v5e busy does so there.
FLOPS, BANDWIDTH, STEP = 197e12, 819e9, 0.35e-6
# Products of bfloat16 parts that make one of float32.
PASSES = 6


class Blocks(NamedTuple):
    """Sizes of a block, each the whole axis or a multiple of a tile."""

    m: int
    k: int
    n: int


class Items(NamedTuple):
    """int32 tables, in SMEM. Item t is of block `block[t]` and group `group[t]`, whose rows are start <= row < end;
    items from `count[0]` on do not exist. written: the block of the result of `rows`."""

    block: jax.Array  # [items]
    written: jax.Array  # [items]
    group: jax.Array  # [items]
    start: jax.Array  # [g]
    end: jax.Array  # [g]
    count: jax.Array  # [1]


@dataclass(frozen=True)
class Plan:
    """What is static in a call. k: the length of x's rows. room: of the tables."""

    blocks: Blocks
    k: int
    room: int
    transposed: bool = False
    activation: Callable | None = None


def check(x, other, group_sizes, *, form: str, activation: str | None, dtype) -> None:
    for name, given in (("x", x.dtype), ("preferred_element_type", dtype)):
        if given not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(f"{name} is {given}; this kernel takes float32 and bfloat16.")
    # With the smallest blocks, since those of a backward pass are others.
    g = group_sizes.shape[0]
    numbers = 3 * _most_items(x.shape[0], g, min(ROWS)) + 2 * g + 1
    if 4 * numbers > SMEM_BYTES:
        raise NotImplementedError(
            f"group_sizes: tables for {x.shape[0]} rows in {g} groups take {numbers / 2**18:.2f} MB; scalar memory has "
            f"room for {SMEM_BYTES / 2**20:.2f}."
        )


def run(x, other, group_sizes, **options) -> jax.Array:
    return differentiable.run(FORMS, x, other, group_sizes, **options)


def _rows(x, w, sizes, transposed: bool, activation, dtype) -> jax.Array:
    (m, k), (g, n) = x.shape, (w.shape[0], w.shape[1 if transposed else 2])
    blocks = rows_blocks(m, k, n, g, x.dtype, jnp.dtype(dtype))
    plan = Plan(blocks, k, _most_items(m, g, blocks.m), transposed, activation)
    items = _items(sizes, m, blocks.m, plan.room, with_empty=False)
    parts = pl.cdiv(k, blocks.k)

    def part_of(t, part, items: Items):
        # Of what does not exist nothing is copied: it stays at the last part of the item before.
        return jnp.where(t < items.count[0], part, parts - 1)

    def w_index(column, t, part, *tables):
        items = Items(*tables)
        place = part_of(t, part, items), column
        return items.group[t], *(reversed(place) if transposed else place)

    return pl.pallas_call(
        functools.partial(_rows_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items),
            grid=(pl.cdiv(n, blocks.n), plan.room, parts),
            in_specs=(
                pl.BlockSpec(
                    (blocks.m, blocks.k),
                    lambda column, t, part, *tables: (Items(*tables).block[t], part_of(t, part, Items(*tables))),
                ),
                pl.BlockSpec((None, *((blocks.n, blocks.k) if transposed else (blocks.k, blocks.n))), w_index),
            ),
            out_specs=pl.BlockSpec(
                (blocks.m, blocks.n), lambda column, t, part, *tables: (Items(*tables).written[t], column)
            ),
            scratch_shapes=[pltpu.VMEM((blocks.m, blocks.n), jnp.float32)] if parts > 1 else [],
        ),
        out_shape=jax.ShapeDtypeStruct((m, n), dtype),
        # One core of the two of a v5p may take other columns, not other items.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=_cost(x, w, jax.ShapeDtypeStruct((m, n), dtype), m * k * n, 0 if activation is None else m * n),
        interpret=pltpu.InterpretParams() if is_interpreting() else False,
        name="grouped_matmul_rows",
    )(*items, x, w)


def _sums(x, y, sizes, dtype) -> jax.Array:
    m, k, n, g = *x.shape, y.shape[1], sizes.shape[0]
    blocks = sums_blocks(m, k, n, g, x.dtype, jnp.dtype(dtype))
    plan = Plan(blocks, k, _most_items(m, g, blocks.m))
    items = _items(sizes, m, blocks.m, plan.room, with_empty=True)
    return pl.pallas_call(
        functools.partial(_sums_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items),
            grid=(pl.cdiv(k, blocks.k), pl.cdiv(n, blocks.n), plan.room),
            in_specs=(
                pl.BlockSpec((blocks.m, blocks.k), lambda row, column, t, *tables: (Items(*tables).block[t], row)),
                pl.BlockSpec((blocks.m, blocks.n), lambda row, column, t, *tables: (Items(*tables).block[t], column)),
            ),
            out_specs=pl.BlockSpec(
                (None, blocks.k, blocks.n), lambda row, column, t, *tables: (Items(*tables).group[t], row, column)
            ),
            scratch_shapes=[pltpu.VMEM((blocks.k, blocks.n), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((g, k, n), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(x, y, jax.ShapeDtypeStruct((g, k, n), dtype), m * k * n, 0),
        interpret=pltpu.InterpretParams() if is_interpreting() else False,
        name="grouped_matmul_sums",
    )(*items, x, y)


FORMS = differentiable.Forms(_rows, _sums)


def _cost(left, right, result, products: int, transcendentals: int) -> pl.CostEstimate:
    """Of each array read or written once: how often the blocks are copied depends on the sizes of groups."""
    moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in (left, right, result))
    return pl.CostEstimate(flops=2 * products, transcendentals=transcendentals, bytes_accessed=moved)


# ---- items ------------------------------------------------------------------------------------------------------


def _most_items(m: int, g: int, block: int) -> int:
    return pl.cdiv(m, block) + g - 1


def _items(sizes: jax.Array, m: int, block: int, room: int, with_empty: bool) -> Items:
    """The pairs that meet, of blocks of `block` rows and groups; with_empty: an item for each empty group, too.

    With first_j the block in which group j begins, and the items of the groups before it in before_j, item t of group j
    is of block first_j + t - before_j.
    """
    blocks, g = pl.cdiv(m, block), sizes.shape[0]
    end = jnp.cumsum(sizes)
    start, end = jnp.minimum(end - sizes, m), jnp.minimum(end, m)
    first = start // block
    met = jnp.where(end > start, (end - 1) // block - first + 1, 1 if with_empty else 0)
    behind = jnp.cumsum(met)
    count = behind[-1]
    t = jnp.arange(room, dtype=jnp.int32)
    exists = jnp.minimum(t, jnp.maximum(count - 1, 0))
    # Behind the last group where there are no items at all.
    group = jnp.minimum(jnp.searchsorted(behind, exists, side="right", method="compare_all"), g - 1)
    # An empty group may begin at m.
    at = jnp.minimum((first - (behind - met))[group] + exists, blocks - 1)
    used = pl.cdiv(end[-1], block)
    written = jnp.where(t < count, at, jnp.minimum(used + t - count, blocks - 1))
    return Items(*(table.astype(jnp.int32) for table in (at, written, group, start, end, count[None])))


class Item(NamedTuple):
    """Scalars. exists, and has rows; whole: all rows of its block are of its group; begins: the block's first row."""

    exists: jax.Array
    whole: jax.Array
    begins: jax.Array
    start: jax.Array
    end: jax.Array


def _item(items: Items, t: jax.Array, block: int) -> Item:
    group, begins = items.group[t], items.block[t] * block
    start, end = items.start[group], items.end[group]
    exists = (t < items.count[0]) & (start < end)
    return Item(exists, exists & (start <= begins) & (begins + block <= end), begins, start, end)


def _own(item: Item, shape: tuple[int, int]) -> jax.Array:
    """Bool of `shape`: which rows of the item's block are of its group."""
    row = item.begins + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (item.start <= row) & (row < item.end)


def _changes(table, t: jax.Array) -> jax.Array:
    """Whether entry t differs from the one before."""
    return (t == 0) | (table[t] != table[jnp.maximum(t - 1, 0)])


# ---- kernels ----------------------------------------------------------------------------------------------------


def _rows_kernel(*refs, plan: Plan):
    """refs: the tables in SMEM; x [bm, bk]; w [bk, bn] or [bn, bk]; y [bm, bn]; where k comes in parts, their sum."""
    items, (x_ref, w_ref, y_ref, *sums) = Items(*refs[: len(Items._fields)]), refs[len(Items._fields) :]
    t, part = pl.program_id(1), pl.program_id(2)
    parts = pl.cdiv(plan.k, plan.blocks.k)
    item = _item(items, t, plan.blocks.m)

    @pl.when((part == 0) & _changes(items.written, t) & ~item.whole)
    def _():
        y_ref[...] = jnp.zeros_like(y_ref)

    def product(overhangs: bool):
        x, w, axis = x_ref[...], w_ref[...], 1 if plan.transposed else 0
        if overhangs:
            x, w = (_cut(a, along, plan.k - (parts - 1) * plan.blocks.k) for a, along in ((x, 1), (w, axis)))
        return _dot(x, w, 1, axis)

    def write(product: jax.Array):
        y = (product if plan.activation is None else plan.activation(product)).astype(y_ref.dtype)

        @pl.when(item.whole)
        def _():
            y_ref[...] = y

        @pl.when(~item.whole)
        def _():
            y_ref[...] = jnp.where(_own(item, y.shape), y, y_ref[...])

    if parts == 1:
        pl.when(item.exists)(lambda: write(product(False)))
        return
    (sum_ref,) = sums

    @pl.when(item.exists & (part == 0))
    def _():
        sum_ref[...] = product(False)

    @pl.when(item.exists & (part > 0) & (part < parts - 1))
    def _():
        sum_ref[...] += product(False)

    @pl.when(item.exists & (part == parts - 1))
    def _():
        write(sum_ref[...] + product(plan.k % plan.blocks.k > 0))


def _sums_kernel(*refs, plan: Plan):
    """refs: the tables in SMEM; x [bm, bk]; y [bm, bn]; z [bk, bn]; the sum, float32 [bk, bn]."""
    items, (x_ref, y_ref, z_ref, sum_ref) = Items(*refs[: len(Items._fields)]), refs[len(Items._fields) :]
    t = pl.program_id(2)
    item = _item(items, t, plan.blocks.m)

    @pl.when(_changes(items.group, t))
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(item.whole)
    def _():
        sum_ref[...] += _dot(x_ref[...], y_ref[...], 0, 0)

    @pl.when(item.exists & ~item.whole)
    def _():
        x, y = (jnp.where(_own(item, ref.shape), ref[...], jnp.zeros_like(ref)) for ref in (x_ref, y_ref))
        sum_ref[...] += _dot(x, y, 0, 0)

    after, count = t + 1, items.count[0]

    @pl.when((after == count) | ((after < count) & _changes(items.group, jnp.minimum(after, plan.room - 1))))
    def _():
        z_ref[...] = sum_ref[...].astype(z_ref.dtype)


def _cut(block: jax.Array, axis: int, length: int) -> jax.Array:
    """`block` with zeros behind `length` along `axis`, where memory is of unknown value."""
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, block.shape, axis) < length, block, jnp.zeros_like(block))


def _dot(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((of_a,), (of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


# ---- block sizes ------------------------------------------------------------------------------------------------


@functools.cache
def rows_blocks(m: int, k: int, n: int, g: int, dtype, result_dtype) -> Blocks:
    """The sizes for `rows` that are fastest in the model, of those that fit."""

    def fits(b: Blocks) -> bool:
        copied = (b.m * b.k + b.k * b.n) * dtype.itemsize + b.m * b.n * result_dtype.itemsize
        # In float32 the product, its sum and what the activation takes.
        return 2 * copied + 3 * 4 * b.m * b.n <= VMEM_BYTES

    def seconds(b: Blocks) -> float:
        blocks, parts, columns = pl.cdiv(m, b.m), pl.cdiv(k, b.k), pl.cdiv(n, b.n)
        items = blocks + g - 1
        # What is whole along k stays while items of one block, and of one group, follow one another.
        of_x, of_w = (blocks, g) if parts == 1 else (items, items)
        moved = columns * parts * (of_x * b.m * b.k + of_w * b.k * b.n) * dtype.itemsize
        return _seconds(b, columns, columns * items * parts, moved + m * n * result_dtype.itemsize, dtype)

    return _fastest(m, k, n, dtype, fits, seconds)


@functools.cache
def sums_blocks(m: int, k: int, n: int, g: int, dtype, result_dtype) -> Blocks:
    """As `rows_blocks`, for `sums`."""

    def fits(b: Blocks) -> bool:
        # In the dtype of the operands what is copied, twice, and what is masked, and x transposed; in float32 the
        # product and the sum.
        operands = (4 * b.m * b.k + 3 * b.m * b.n) * dtype.itemsize
        return operands + (2 * result_dtype.itemsize + 2 * 4) * b.k * b.n <= VMEM_BYTES

    def seconds(b: Blocks) -> float:
        blocks, rows, columns = pl.cdiv(m, b.m), pl.cdiv(k, b.k), pl.cdiv(n, b.n)
        moved = rows * columns * blocks * b.m * (b.k + b.n) * dtype.itemsize + g * k * n * result_dtype.itemsize
        return _seconds(b, rows, rows * columns * (blocks + g - 1), moved, dtype)

    return _fastest(m, k, n, dtype, fits, seconds)


def _seconds(b: Blocks, apart: int, steps: int, moved: int, dtype) -> float:
    """steps: of the grid, each a product of one block. apart: parts of the grid that the two cores of a v5p can share,
    of which an odd one leaves a core idle. moved: bytes."""
    flops = 2 * steps * b.m * b.k * b.n * (PASSES if dtype == jnp.float32 else 1)
    return (steps * STEP + max(flops / FLOPS, moved / BANDWIDTH)) * (apart + apart % 2) / apart


def _fastest(m: int, k: int, n: int, dtype, fits: Callable, seconds: Callable) -> Blocks:
    """In the model blocks are of whole tiles. With the least of each size they always fit."""
    sublanes = 32 // dtype.itemsize
    in_tiles = lambda b: Blocks(_tiled(b.m, sublanes), _tiled(b.k, LANES), _tiled(b.n, LANES))
    rows = [size for size in ROWS if size < m] + ([m] if m <= max(ROWS) else [])
    found = (Blocks(bm, bk, bn) for bm in rows for bk in _parts(k) for bn in _parts(n))
    return min((b for b in found if fits(in_tiles(b))), key=lambda b: seconds(in_tiles(b)))


def _parts(length: int) -> Iterator[int]:
    """All of an axis, halves, quarters and so on, in whole registers."""
    yield length
    ways = 2
    while (size := _tiled(pl.cdiv(length, ways), LANES)) < length:
        yield size
        if size == LANES:
            return
        ways *= 2


def _tiled(size: int, tile: int) -> int:
    return -(-size // tile) * tile
