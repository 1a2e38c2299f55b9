"""The kernels of `pallas_gpu`, which explains them."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lissom.ops.attention.pallas_gpu_parts import PER_COLUMN, PER_ROW, add_product, spread, zeros
from lissom.ops.hopper import ROWS, by_role, drain, fill, multiply, tile

WIDE_STEP, NARROW_STEP = 128, 64  # bytes of codes a step, a swizzled row: of `products`, of `weights`
COLUMN_MULTIPLE = 32  # of `products`: y is float32, written in swizzled rows of 128 bytes
CONSUMERS = 2  # of `products`
COLUMNS, COLUMNS_OF_GROUPS = 256, 128  # of a tile of `products`
PIECE = 64  # columns that are written together
STAGES = {COLUMNS: 3, COLUMNS_OF_GROUPS: 5}
WEIGHT_STAGES = 8
PANEL = 8  # tiles of columns that are made before the rest, while their codes are in L2


def quantized_kernel(x, codes, scale, x_scale, *, interpret):
    """y float32 [m, n] of x [m, k], m a multiple of 8, codes [n, k], scale [n, g] and x_scale [m, 1]."""
    (m, k), (n, groups) = x.shape, scale.shape
    once = groups == 1 and x.dtype == jnp.int8
    columns = COLUMNS if once else COLUMNS_OF_GROUPS
    tall, wide = -(-m // (CONSUMERS * ROWS)), -(-n // columns)
    # What is read without the copy engine is not cut at its ends.
    scale = jnp.pad(scale.T, ((0, 0), (0, wide * columns - n)))
    x_scale = jnp.pad(x_scale[:, 0], (0, tall * CONSUMERS * ROWS - len(x_scale)))
    steps = k // groups // WIDE_STEP if x.dtype == jnp.int8 else 1
    body = functools.partial(_products, once=once, steps=steps, tall=tall, wide=wide)
    stages = STAGES[columns]
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), jnp.float32),
        scratch_types={
            "x_smem": tile((stages, CONSUMERS, ROWS, WIDE_STEP), x.dtype),
            "codes_smem": tile((stages, columns, WIDE_STEP), codes.dtype),
            "out_smem": tile((CONSUMERS, ROWS, PIECE), jnp.float32),
            "ready": plgpu.Barrier(num_arrivals=CONSUMERS + 1, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        },
        grid=(tall * wide,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="lissom_quantized_matmul_products",
        interpret=interpret,
    )(x, codes, scale, x_scale)


def _products(x_ref, codes_ref, scale_ref, x_scale_ref, y_ref, *, once: bool, steps: int, tall: int, wide: int, x_smem,
              codes_smem, out_smem, ready, free):  # fmt: skip
    """x_ref [m, k], codes_ref [n, k], scale_ref [g, n], x_scale_ref [m], y_ref [m, n]; `steps` to a sum, which is
    scaled once (`once`) or added to others."""
    stages, columns = codes_smem.shape[:2]
    all_steps = x_ref.shape[1] // WIDE_STEP
    row, column = _place(tall, wide)
    first_row, first_column = row * (CONSUMERS * ROWS), column * columns
    sums = all_steps // steps
    group_of = lambda number: jax.lax.div(number * scale_ref.shape[0], jnp.int32(sums))

    def produce():
        @pl.loop(0, all_steps)
        def _(step):
            k = pl.ds(step * WIDE_STEP, WIDE_STEP)

            def copies(slot):
                for group in range(CONSUMERS):
                    yield x_ref.at[pl.ds(first_row + group * ROWS, ROWS), k], x_smem.at[slot, group]
                yield codes_ref.at[pl.ds(first_column, columns), k], codes_smem.at[slot]

            fill(step, copies, ready, free)

        drain(all_steps, stages, free)

    def consume(group):
        operands = lambda slot: (x_smem.at[slot, group], codes_smem.at[slot].transpose((1, 0)))

        def product(number):
            """Of the steps of a sum."""

            def of_steps(acc_ref):
                multiply(acc_ref, number * steps, (number + 1) * steps, operands, ready, free)
                return acc_ref[...]

            kind = jnp.int32 if x_ref.dtype == jnp.int8 else jnp.float32
            return pl.run_scoped(of_steps, plgpu.ACC((ROWS, columns), kind))

        def scales(number, start, length):
            ref = scale_ref.at[group_of(number), pl.ds(first_column + start, length)]
            return plgpu.load(ref, layout=PER_COLUMN, optimized=False)

        def add(number, y):
            return y + product(number).astype(jnp.float32) * spread(scales(number, 0, columns), y.shape, 1)

        y = product(0) if once else jax.lax.fori_loop(0, sums, add, zeros((ROWS, columns)))
        own_row = first_row + group * ROWS
        of_rows = plgpu.load(x_scale_ref.at[pl.ds(own_row, ROWS)], layout=PER_ROW, optimized=False)
        out = out_smem.at[group]
        for start in range(0, columns, PIECE):
            piece = y[:, start : start + PIECE].astype(jnp.float32) * spread(of_rows, (ROWS, PIECE), 0)
            if once:
                piece *= spread(scales(0, start, PIECE), piece.shape, 1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out[...] = piece
            plgpu.commit_smem()
            at = pl.ds(own_row, ROWS), pl.ds(first_column + start, PIECE)

            @pl.when(first_column + start < y_ref.shape[1])
            def _(at=at):
                plgpu.copy_smem_to_gmem(out, y_ref.at[at])

        plgpu.wait_smem_to_gmem(0)

    by_role(CONSUMERS, consume, produce)


def _place(tall: int, wide: int):
    """(row, column) of the tile of this block of threads: columns of a panel, then rows, then panels."""
    number = jax.lax.axis_index("block")
    panel = jax.lax.div(number, jnp.int32(tall * PANEL))
    number = number - panel * (tall * PANEL)
    width = jnp.minimum(wide - panel * PANEL, PANEL)
    row = jax.lax.div(number, width)
    return row, panel * PANEL + number - row * width


def weights_kernel(x, codes, scale, *, rows: int, interpret):
    """y^T float32 [n, m] of x [h, m, k / h] (1 half for 8 bits, 2 for 4), m a multiple of `rows`, codes [n, k / h] and
    scale [n, g]."""
    (halves, m, _), n = x.shape, len(codes)
    tall, wide = -(-n // ROWS), m // rows
    scale = jnp.pad(scale.T, ((0, 0), (0, tall * ROWS - n))) * (1.0 if halves == 1 else 1 / 16)
    if halves == 2:
        codes = jax.lax.bitcast_convert_type(codes, jnp.int8)
    return plgpu.kernel(
        functools.partial(_weights, wide=wide, interpret=bool(interpret)),
        out_type=jax.ShapeDtypeStruct((n, m), jnp.float32),
        scratch_types={
            "x_smem": tile((WEIGHT_STAGES * halves, rows, NARROW_STEP), x.dtype),
            "codes_smem": plgpu.SMEM(
                (WEIGHT_STAGES, ROWS, NARROW_STEP),
                jnp.int8,
                transforms=(plgpu.TilingTransform((8, NARROW_STEP)), plgpu.SwizzleTransform(NARROW_STEP)),
            ),
            "out_smem": tile((ROWS, rows), jnp.float32),
            "ready": plgpu.Barrier(num_arrivals=halves + 1, num_barriers=WEIGHT_STAGES),
            "free": plgpu.Barrier(num_barriers=WEIGHT_STAGES),
        },
        grid=(tall * wide,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="lissom_quantized_matmul_weights",
        interpret=interpret,
    )(x, codes, scale)


def _weights(x_ref, codes_ref, scale_ref, y_ref, *, wide: int, interpret: bool, x_smem, codes_smem, out_smem, ready,
             free):  # fmt: skip
    """x_ref [h, m, k / h], codes_ref [n, k / h], scale_ref [g, n], y_ref [n, m]."""
    (stages, *_), halves, rows = codes_smem.shape, x_ref.shape[0], x_smem.shape[1]
    groups, steps = scale_ref.shape[0], x_ref.shape[2] // NARROW_STEP
    block = jax.lax.axis_index("block")
    channel = jax.lax.div(block, jnp.int32(wide))
    first, first_row = channel * ROWS, (block - channel * wide) * rows

    def produce():
        @pl.loop(0, steps)
        def _(step):
            k = pl.ds(step * NARROW_STEP, NARROW_STEP)

            def copies(slot):
                yield codes_ref.at[pl.ds(first, ROWS), k], codes_smem.at[slot]
                for half in range(halves):
                    yield x_ref.at[half, pl.ds(first_row, rows), k], x_smem.at[slot * halves + half]

            fill(step, copies, ready, free)

        drain(steps, stages, free)

    def consume(_):
        def add_step(step, acc):
            slot = jax.lax.rem(step, jnp.int32(stages))
            plgpu.barrier_wait(ready.at[slot])
            codes = plgpu.load(codes_smem.at[slot], layout=plgpu.Layout.WGMMA_UPCAST_2X)
            for half, numbers in enumerate(_operands(codes, halves, x_smem.dtype)):
                numbers = plgpu.layout_cast(numbers, plgpu.Layout.WGMMA)
                acc = add_product(acc, numbers, x_smem.at[slot * halves + half].transpose((1, 0)), interpret)
            plgpu.barrier_arrive(free.at[slot])
            return acc

        def add_group(group, y):
            own = steps // groups
            acc = jax.lax.fori_loop(group * own, (group + 1) * own, add_step, zeros((ROWS, rows)))
            of_channels = plgpu.load(scale_ref.at[group, pl.ds(first, ROWS)], layout=PER_ROW, optimized=False)
            return y + acc * spread(of_channels, acc.shape, 0)

        out_smem[...] = jax.lax.fori_loop(0, groups, add_group, zeros((ROWS, rows)))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, y_ref.at[pl.ds(first, ROWS), pl.ds(first_row, rows)])
        plgpu.wait_smem_to_gmem(0)

    by_role(1, consume, produce)


def _operands(codes: jax.Array, halves: int, dtype) -> list[jax.Array]:
    """The numbers of each half, of 4 bits 16 times as large: there is no shift of bytes."""
    if halves == 1:
        return [codes.astype(dtype)]
    low = ((codes ^ 8) & 15).astype(dtype)  # the number + 8
    return [low * 16.0 - 128.0, (codes & -16).astype(dtype)]
