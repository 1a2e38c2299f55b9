"""The kernels of `pallas_gpu`, which explains them."""

import functools
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lissom.ops.grouped_matmul.differentiable import ACTIVATIONS
from lissom.ops.hopper import LOG2E, ROWS, Block, by_role, drain, fill, multiply, tile

STEP = 64  # of the sum, a stage of the ring: a swizzled row of 128 bytes
PIECE = 64  # columns that are in registers a second time
PANEL = 8  # tiles of columns that are made before the rest


def rows_kernel(x, w, entries, blocks, *, tile: Block, height: int, transposed: bool, activation, dtype, options):
    """y [m, n] of x [m, k], m a multiple of 8, and w [g, k, n] or [g, n, k]; the tables as of `pallas_gpu._tables`."""
    n = w.shape[1 if transposed else 2]
    body = functools.partial(
        _rows, tile=tile, height=height, transposed=transposed, f=_FAST[activation], grid=options["grid"][0]
    )
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((x.shape[0], n), dtype),
        scratch_types=_scratch(tile, x.dtype, dtype, (tile.columns, STEP) if transposed else (STEP, tile.columns)),
        **options,
    )(x, w, entries, blocks)


def sums_kernel(x, y, bounds, *, tile: Block, dtype, options):
    """z [g, k, n] of x [m, k] and y [m, n], m a multiple of 8; bounds int32 [2, g], first rows and those behind."""
    scratch = _scratch(tile, x.dtype, dtype, (STEP, tile.columns))
    if tile.consumers > 1:
        scratch["cleared"] = plgpu.Barrier(num_arrivals=tile.consumers)
    return plgpu.kernel(
        functools.partial(_sums, tile=tile, grid=options["grid"][0]),
        out_type=jax.ShapeDtypeStruct((bounds.shape[1], x.shape[1], y.shape[1]), dtype),
        scratch_types=scratch,
        **options,
    )(x, y, bounds)


def _scratch(of: Block, dtype, out_dtype, right: tuple[int, int]) -> dict:
    return {
        "left_smem": tile((of.stages, of.consumers, STEP, ROWS), dtype),  # a tile of 64 by 64 for each consumer
        "right_smem": tile((of.stages, *right), dtype),
        "out_smem": tile((of.consumers, ROWS, of.columns), out_dtype),
        "ready": plgpu.Barrier(num_arrivals=of.consumers + 1, num_barriers=of.stages),
        "free": plgpu.Barrier(num_arrivals=of.consumers, num_barriers=of.stages),
    }


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp2(x * -LOG2E))


# By exp2: the hardware's tanh is good to 2^-11, and (1 + tanh(u)) / 2 is sigmoid(2 u).
_FAST = {
    None: lambda x: x,
    ACTIVATIONS["relu"]: lambda x: jnp.maximum(x, 0.0),
    ACTIVATIONS["gelu"]: lambda x: x * _sigmoid(x * (1.0 + 0.044715 * x * x) * (2.0 * math.sqrt(2.0 / math.pi))),
    ACTIVATIONS["silu"]: lambda x: x * _sigmoid(x),
}


# --- Inside of kernels ---------------------------------------------------------------------------------------------


def _quotient(a, b):
    """Of integers of at least 0: no floor is needed."""
    return jax.lax.div(a, jnp.asarray(b, jnp.int32))


def _own_tiles(count: int, grid: int):
    """(how many of `count` tiles this block of threads makes, a function from 0, 1, ... to their numbers)."""
    first = jax.lax.axis_index("block")
    return _quotient(count - first + (grid - 1), grid), lambda i: first + i * grid


def _place(number, tall: int, wide: int):
    """(row, column) of a tile of a matrix of tall by wide tiles: columns of a panel, then rows, then panels."""
    if wide <= PANEL:
        row = _quotient(number, wide)
        return row, number - row * wide
    panel = _quotient(number, tall * PANEL)
    number = number - panel * (tall * PANEL)
    width = jnp.minimum(wide - panel * PANEL, PANEL)
    row = _quotient(number, width)
    return row, panel * PANEL + number - row * width


def _row_of(rows: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (rows, PIECE), 0, layout=plgpu.Layout.WGMMA)


def _pieces(columns: int) -> list:
    return [pl.ds(start, PIECE) for start in range(0, columns, PIECE)]


def _rows(x_ref, w_ref, entries_ref, blocks_ref, y_ref, *, tile, height, transposed, f, grid, left_smem, right_smem,
          out_smem, ready, free):  # fmt: skip
    """x_ref [m, k], w_ref [g, k, n] or [g, n, k], y_ref [m, n]; left_smem [stages, consumers, rows, k], right_smem
    [stages, k, n] or [stages, n, k] of a step."""
    columns, k_steps = tile.columns, x_ref.shape[1] // STEP
    tall, wide = blocks_ref.shape[1], -(-y_ref.shape[1] // columns)
    count, number = _own_tiles(tall * wide, grid)
    lines = min(height, ROWS)  # that a consumer writes
    steps_of = lambda entry: jnp.where(entries_ref[1, entry] > entries_ref[0, entry], k_steps, 0)

    def produce():
        def of_tile(i, filled):
            block, column = _place(number(i), tall, wide)
            first = blocks_ref[0, block]

            def of_group(visit, filled):
                matrix = w_ref.at[entries_ref[2, first + visit]]
                n = pl.ds(column * columns, columns)

                @pl.loop(0, steps_of(first + visit))
                def _(step):
                    k = pl.ds(step * STEP, STEP)

                    def copies(slot):
                        for group in range(tile.consumers):
                            rows = pl.ds(block * height + group * ROWS, ROWS)
                            yield x_ref.at[rows, k], left_smem.at[slot, group]
                        yield matrix.at[(n, k) if transposed else (k, n)], right_smem.at[slot]

                    fill(filled + step, copies, ready, free)

                return filled + steps_of(first + visit)

            return jax.lax.fori_loop(0, blocks_ref[1, block], of_group, filled)

        drain(jax.lax.fori_loop(0, count, of_tile, jnp.int32(0)), tile.stages, free)

    def consume(group):
        out = out_smem.at[group]

        def operands(slot):
            b = right_smem.at[slot]
            return left_smem.at[slot, group], b.transpose((1, 0)) if transposed else b

        def of_tile(i, filled):
            block, column = _place(number(i), tall, wide)
            first = blocks_ref[0, block]
            first_row = block * height + group * ROWS

            def of_group(visit, filled):
                low, high = (entries_ref[j, first + visit] - first_row for j in range(2))
                end = filled + steps_of(first + visit)

                def product(acc_ref):
                    multiply(acc_ref, filled, end, operands, ready, free)
                    return acc_ref[...]

                new = f(pl.run_scoped(product, plgpu.ACC((ROWS, columns), jnp.float32))).astype(out.dtype)
                # What was written before has left shared memory.
                pl.when(visit == 0)(lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True))
                is_whole = (low <= 0) & (high >= lines)

                @pl.when(is_whole)
                def _():
                    out[...] = new

                @pl.when(~is_whole)
                def _():
                    # Rows before the group are of earlier visits, those behind it for later ones or of no group.
                    row = _row_of(ROWS)
                    for piece in _pieces(columns):
                        before = plgpu.load(out.at[:, piece], layout=plgpu.Layout.WGMMA)
                        own = new[:, piece.start : piece.start + PIECE]
                        out[:, piece] = jnp.where(row < low, before, jnp.where(row < high, own, 0.0))

                return end

            filled = jax.lax.fori_loop(0, blocks_ref[1, block], of_group, filled)
            plgpu.commit_smem()
            place = pl.ds(first_row, lines), pl.ds(column * columns, columns)
            plgpu.copy_smem_to_gmem(out.at[pl.ds(0, lines)], y_ref.at[place])
            return filled

        jax.lax.fori_loop(0, count, of_tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    by_role(tile.consumers, consume, produce)


class _Steps(NamedTuple):
    """The rows from `low` to `high`, a group's, in steps of which `whole` need no test and come first; the
    others are the first one if `head` is 1, and the last. The first one begins at `begin`, a multiple of 8."""

    low: jax.Array
    high: jax.Array
    begin: jax.Array
    count: jax.Array
    whole: jax.Array
    head: jax.Array

    def row(self, step):
        """The first row of a step."""
        tested = jnp.where(step - self.whole < self.head, 0, self.count - 1)
        return self.begin + jnp.where(step < self.whole, self.head + step, tested) * STEP


def _steps_of(low, high) -> _Steps:
    begin = _quotient(low, 8) * 8
    count = jnp.where(high > low, _quotient(high - begin + (STEP - 1), STEP), 0)
    head = jnp.where(begin < low, 1, 0)
    tail = jnp.where(begin + count * STEP > high, 1, 0)
    return _Steps(low, high, begin, count, jnp.maximum(count - head - tail, 0), head)


def _sums(x_ref, y_ref, bounds_ref, z_ref, *, tile, grid, left_smem, right_smem, out_smem, ready, free, cleared=None):
    """x_ref [m, k], y_ref [m, n], z_ref [g, k, n]; left_smem [stages, consumers, rows, k], right_smem [stages, rows, n]
    of a step."""
    columns, (groups, k, n) = tile.columns, z_ref.shape
    tall, wide = -(-k // tile.rows), -(-n // columns)
    count, number = _own_tiles(groups * tall * wide, grid)

    def place(i):
        """(group of rows, first of k, first of n) of a tile."""
        matrix = _quotient(number(i), tall * wide)
        row, column = _place(number(i) - matrix * (tall * wide), tall, wide)
        return matrix, row * tile.rows, column * columns

    def produce():
        def of_tile(i, filled):
            matrix, first_k, first_n = place(i)
            steps = _steps_of(bounds_ref[0, matrix], bounds_ref[1, matrix])

            @pl.loop(0, steps.count)
            def _(step):
                rows = pl.ds(pl.multiple_of(steps.row(step), 8), STEP)

                def copies(slot):
                    for group in range(tile.consumers):
                        yield x_ref.at[rows, pl.ds(first_k + group * ROWS, ROWS)], left_smem.at[slot, group]
                    yield y_ref.at[rows, pl.ds(first_n, columns)], right_smem.at[slot]

                fill(filled + step, copies, ready, free)

            return filled + steps.count

        drain(jax.lax.fori_loop(0, count, of_tile, jnp.int32(0)), tile.stages, free)

    def consume(group):
        out = out_smem.at[group]
        operands = lambda slot: (left_smem.at[slot, group].transpose((1, 0)), right_smem.at[slot])

        def of_tile(i, filled):
            matrix, first_k, first_n = place(i)
            steps = _steps_of(bounds_ref[0, matrix], bounds_ref[1, matrix])

            def clear(step, slot):
                first = steps.row(step - filled)
                row = _row_of(STEP)
                is_others = (row < steps.low - first) | (row >= steps.high - first)

                def clear_piece(part):
                    part[...] = jnp.where(is_others, 0.0, plgpu.load(part, layout=plgpu.Layout.WGMMA))

                clear_piece(left_smem.at[slot, group])
                for j, piece in enumerate(_pieces(columns)):  # in turns: all consumers read them
                    pl.when(group == j % tile.consumers)(lambda piece=piece: clear_piece(right_smem.at[slot, :, piece]))
                plgpu.commit_smem()
                if cleared is not None:
                    plgpu.barrier_arrive(cleared)
                    plgpu.barrier_wait(cleared)

            def product(acc_ref):
                whole, end = filled + steps.whole, filled + steps.count
                multiply(acc_ref, filled, whole, operands, ready, free)
                multiply(acc_ref, whole, end, operands, ready, free, clear)
                return acc_ref[...]

            acc = pl.run_scoped(product, plgpu.ACC((ROWS, columns), jnp.float32))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out[...] = acc.astype(out.dtype)
            plgpu.commit_smem()
            at = matrix, pl.ds(first_k + group * ROWS, ROWS), pl.ds(first_n, columns)
            plgpu.copy_smem_to_gmem(out, z_ref.at[at])
            return filled + steps.count

        jax.lax.fori_loop(0, count, of_tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    by_role(tile.consumers, consume, produce)
