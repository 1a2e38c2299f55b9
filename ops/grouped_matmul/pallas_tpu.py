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
# Rows of a block, or all of x where it has no more than the most. With fewer than 128 the matrix unit would take longer
# to load a part of w than to use it.
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
# A word of `Items`: two numbers of rows, of at most 2**11 - 1, and two flags.
HIGH_AT, FIRST_AT, LAST_AT = 11, 22, 23


class Blocks(NamedTuple):
    """Sizes of a block, each the whole axis or a multiple of a tile."""

    m: int
    k: int
    n: int


class Items(NamedTuple):
    """int32 tables [room], in SMEM, of the items; those behind the last one stay where it is, without rows."""

    word: jax.Array  # as `Item` says
    block: jax.Array  # of rows of the operands
    group: jax.Array
    written: jax.Array  # block of the result, in `rows`


@dataclass(frozen=True)
class Plan:
    """What is static in a call of `rows`. k: the length of x's rows."""

    blocks: Blocks
    k: int
    transposed: bool = False
    activation: Callable | None = None


def check(x, other, group_sizes, *, form: str, activation: str | None, dtype) -> None:
    for name, given in (("x", x.dtype), ("preferred_element_type", dtype)):
        if given not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(f"{name} is {given}; this kernel takes float32 and bfloat16.")
    # With the smallest blocks, since those of a backward pass are others.
    g = group_sizes.shape[0]
    numbers = len(Items._fields) * _most_items(x.shape[0], g, min(ROWS))
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
    items = _items(sizes, m, blocks.m, of_groups=False)
    parts = pl.cdiv(k, blocks.k)

    def at(index: Callable) -> Callable:
        """index(column, part, block, group, written) as Pallas calls it."""

        def called(column, t, part, *tables):
            items = Items(*tables)
            # Of what has no rows nothing is copied: it stays at the last part, where the item before it is.
            part = jnp.where(_item(items.word[t]).has_rows, part, parts - 1)
            return index(column, part, items.block[t], items.group[t], items.written[t])

        return called

    if transposed:
        w_spec = pl.BlockSpec(
            (None, blocks.n, blocks.k), at(lambda column, part, block, group, _: (group, column, part))
        )
    else:
        w_spec = pl.BlockSpec(
            (None, blocks.k, blocks.n), at(lambda column, part, block, group, _: (group, part, column))
        )
    result = jax.ShapeDtypeStruct((m, n), dtype)
    return pl.pallas_call(
        functools.partial(_rows_kernel, plan=Plan(blocks, k, transposed, activation)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items),
            grid=(pl.cdiv(n, blocks.n), len(items.word), parts),
            in_specs=(
                pl.BlockSpec((blocks.m, blocks.k), at(lambda column, part, block, *_: (block, part))),
                w_spec,
            ),
            out_specs=pl.BlockSpec(
                (blocks.m, blocks.n), at(lambda column, part, block, group, written: (written, column))
            ),
            scratch_shapes=[pltpu.VMEM((blocks.m, blocks.n), jnp.float32)] if parts > 1 else [],
        ),
        out_shape=result,
        # One core of the two of a v5p may take other columns, not other items.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=_cost(x, w, result, m * k * n, 0 if activation is None else m * n),
        interpret=pltpu.InterpretParams() if is_interpreting() else False,
        name="grouped_matmul_rows",
    )(*items, x, w)


def _sums(x, y, sizes, dtype) -> jax.Array:
    m, k, n, g = *x.shape, y.shape[1], sizes.shape[0]
    blocks = sums_blocks(m, k, n, g, x.dtype, jnp.dtype(dtype))
    items = _items(sizes, m, blocks.m, of_groups=True)
    result = jax.ShapeDtypeStruct((g, k, n), dtype)
    return pl.pallas_call(
        _sums_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(k, blocks.k), pl.cdiv(n, blocks.n), len(items.word)),
            in_specs=(
                pl.BlockSpec((blocks.m, blocks.k), lambda row, column, t, word, block, group: (block[t], row)),
                pl.BlockSpec((blocks.m, blocks.n), lambda row, column, t, word, block, group: (block[t], column)),
            ),
            out_specs=pl.BlockSpec(
                (None, blocks.k, blocks.n), lambda row, column, t, word, block, group: (group[t], row, column)
            ),
            scratch_shapes=[pltpu.VMEM((blocks.k, blocks.n), jnp.float32)],
        ),
        out_shape=result,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(x, y, result, m * k * n, 0),
        interpret=pltpu.InterpretParams() if is_interpreting() else False,
        name="grouped_matmul_sums",
    )(items.word, items.block, items.group, x, y)


FORMS = differentiable.Forms(_rows, _sums)


def _cost(left, right, result, products: int, transcendentals: int) -> pl.CostEstimate:
    """Of each array read or written once: how often the blocks are copied depends on the sizes of groups."""
    moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in (left, right, result))
    return pl.CostEstimate(flops=2 * products, transcendentals=transcendentals, bytes_accessed=moved)


# ---- items ------------------------------------------------------------------------------------------------------


def _most_items(m: int, g: int, block: int) -> int:
    return pl.cdiv(m, block) + g - 1


def _items(sizes: jax.Array, m: int, block: int, of_groups: bool) -> Items:
    """The pairs that meet, of blocks of `block` rows and groups. of_groups: what is first and last is judged by group,
    each of which has an item; else by block of the result.

    With first_j the block in which group j begins, and the items of the groups before it in before_j, item t of group j
    is of block first_j + t - before_j.
    """
    blocks, g = pl.cdiv(m, block), sizes.shape[0]
    end = jnp.cumsum(sizes)
    start, end = jnp.minimum(end - sizes, m), jnp.minimum(end, m)
    first = start // block
    met = jnp.where(end > start, (end - 1) // block - first + 1, 1 if of_groups else 0)
    before = jnp.cumsum(met) - met
    count = before[-1] + met[-1]
    number = jnp.arange(_most_items(m, g, block), dtype=jnp.int32)
    exists = number < count
    t = jnp.minimum(number, jnp.maximum(count - 1, 0))
    group = jnp.searchsorted(before + met, t, side="right", method="compare_all")
    group = jnp.minimum(group, g - 1)  # there may be no items at all
    at = jnp.minimum((first - before)[group] + t, blocks - 1)  # an empty group may begin at m
    low, high = (jnp.where(exists, jnp.clip(table[group] - at * block, 0, block), 0) for table in (start, end))
    written = jnp.where(exists, at, jnp.minimum(pl.cdiv(end[-1], block) + number - count, blocks - 1))
    judged = group if of_groups else written
    changes, edge = judged[1:] != judged[:-1], jnp.ones(1, bool)
    is_first = jnp.concatenate([edge, changes])
    is_last = exists & (jnp.concatenate([changes, edge]) | (number == count - 1))
    word = low + (high << HIGH_AT) + (is_first << FIRST_AT) + (is_last << LAST_AT)
    return Items(*(table.astype(jnp.int32) for table in (word, at, group, written)))


class Item(NamedTuple):
    """A word, unpacked: scalars. Rows low <= row < high of the item's block are of its group."""

    low: jax.Array
    high: jax.Array
    is_first: jax.Array
    is_last: jax.Array

    @property
    def has_rows(self) -> jax.Array:
        return self.low < self.high

    def has_all(self, block: int) -> jax.Array:
        return (self.high - self.low) == block

    def own(self, shape: tuple[int, int]) -> jax.Array:
        """Bool of `shape`, that of a block: which rows are of the group."""
        row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return (self.low <= row) & (row < self.high)


def _item(word) -> Item:
    rows = (1 << HIGH_AT) - 1
    return Item(word & rows, (word >> HIGH_AT) & rows, (word & 1 << FIRST_AT) != 0, (word & 1 << LAST_AT) != 0)


# ---- kernels ----------------------------------------------------------------------------------------------------


def _rows_kernel(word, block, group, written, x_ref, w_ref, y_ref, *sums, plan: Plan):
    """x [bm, bk]; w [bk, bn], or [bn, bk] where transposed; y [bm, bn]; sums: float32 [bm, bn], where k has parts."""
    part, parts = pl.program_id(2), pl.cdiv(plan.k, plan.blocks.k)
    item = _item(word[pl.program_id(1)])
    has_all = item.has_all(plan.blocks.m)

    @pl.when((part == 0) & item.is_first & ~has_all)
    def _():
        y_ref[...] = jnp.zeros_like(y_ref)

    def product(overhangs: bool):
        x, w, axis = x_ref[...], w_ref[...], 1 if plan.transposed else 0
        if overhangs:
            x, w = (_cut(a, along, plan.k % plan.blocks.k) for a, along in ((x, 1), (w, axis)))
        return _dot(x, w, 1, axis)

    def write(product: jax.Array):
        y = (product if plan.activation is None else plan.activation(product)).astype(y_ref.dtype)

        @pl.when(has_all)
        def _():
            y_ref[...] = y

        @pl.when(~has_all)
        def _():
            y_ref[...] = jnp.where(item.own(y.shape), y, y_ref[...])

    if parts == 1:
        pl.when(item.has_rows)(lambda: write(product(False)))
        return
    (sum_ref,) = sums

    @pl.when(part == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(item.has_rows & (part < parts - 1))
    def _():
        sum_ref[...] += product(False)

    @pl.when(item.has_rows & (part == parts - 1))
    def _():
        write(sum_ref[...] + product(plan.k % plan.blocks.k > 0))


def _sums_kernel(word, block, group, x_ref, y_ref, z_ref, sum_ref):
    """x [bm, bk]; y [bm, bn]; z [bk, bn]; their sum, float32 [bk, bn]."""
    item = _item(word[pl.program_id(2)])
    has_all = item.has_all(x_ref.shape[0])

    @pl.when(item.is_first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(has_all)
    def _():
        sum_ref[...] += _dot(x_ref[...], y_ref[...], 0, 0)

    @pl.when(item.has_rows & ~has_all)
    def _():
        # Both, as the module says; x in the last block of rows may be anything behind row m.
        x, y = (jnp.where(item.own(ref.shape), ref[...], jnp.zeros_like(ref)) for ref in (x_ref, y_ref))
        sum_ref[...] += _dot(x, y, 0, 0)

    @pl.when(item.is_last)
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
        operands = b.m * b.k + b.k * b.n
        copied = operands * dtype.itemsize + b.m * b.n * result_dtype.itemsize
        # In float32 the product, its sum and what the activation takes.
        return 2 * copied + _split(operands, dtype) + 3 * 4 * b.m * b.n <= VMEM_BYTES

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
        operands = (4 * b.m * b.k + 3 * b.m * b.n) * dtype.itemsize + _split(b.m * b.k + b.m * b.n, dtype)
        return operands + (2 * result_dtype.itemsize + 2 * 4) * b.k * b.n <= VMEM_BYTES

    def seconds(b: Blocks) -> float:
        blocks, rows, columns = pl.cdiv(m, b.m), pl.cdiv(k, b.k), pl.cdiv(n, b.n)
        moved = rows * columns * blocks * b.m * (b.k + b.n) * dtype.itemsize + g * k * n * result_dtype.itemsize
        return _seconds(b, rows, rows * columns * (blocks + g - 1), moved, dtype)

    return _fastest(m, k, n, dtype, fits, seconds)


def _split(operands: int, dtype) -> int:
    """Bytes of the three parts in bfloat16 that the compiler makes of each number of float32 for a product."""
    return 3 * 2 * operands if dtype == jnp.float32 else 0


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
