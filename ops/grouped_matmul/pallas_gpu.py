"""Grouped matmul on Hopper GPUs (H100, H200) with Mosaic GPU: two kernels, each the gradient of the other.

NEVER RUN ON A GPU: the kernels pass jax's interpreter, which models memory, barriers and copies and finds races, and
they lower for CUDA. It does not see that `wgmma` is asynchronous or what it reads too early, nor how values lie in
registers. jax's compiler and ptxas (CUDA 13.0) took them to machine code of sm_90a once, by hand, without spills. Hence
in no default order.

`rows`: y_i = f(x_i w_j). x lies in blocks of `height` rows on a fixed grid. A block of threads makes one tile of y, a
block by `columns`, for the groups of the block one after the other: all rows times w_j in float32 registers, of which
those of the group are put into the tile in shared memory. Then the tile is written, once and whole:

* Tables say which groups a block has (`_tables`), so that sizes are values on the device and the grid is static. An
  empty group is in no block. A block behind the last group has none, and is written as zeros.
* Every write is a swizzled copy, which the copy engine cuts at the ends of y. Blocks of threads that each took a block
  and one of its groups would write single rows into what they share.
* Products of the other groups' rows are thrown away, unlike a sum over groups with rows cleared, where 0 times an
  infinite w_j would be NaN in rows of other groups.

With m rows in g groups there are at most m / height + g products of a block. `height` is 128, or what a group has on
average if that is less: one multiprocessor would do all 32 groups of 4 rows in a block of 128, where decoding wants all
of them to read matrices. Very uneven groups still meet in one block: a limit of speed, not of what is computed.

`sums`: z_j = x_j^T y_j in tiles of 128 rows (columns of x) by `columns`, over 64 rows of x and y a step. Both operands
lie with the sum along rows, which `wgmma` takes of 16-bit types. Steps begin at the last multiple of 8 before the
group, where the copy engine can. In the first and the last one, rows of others are cleared in shared memory, in both
operands, since 0 times NaN is NaN. These steps come last: the others have a loop without tests. An empty group writes
zeros.

Both: as many blocks of threads as multiprocessors, each with every 132nd tile, so that the copies of the next tile are
under way while one is written. One warpgroup copies into a ring of stages, two compute, each on 64 of a tile's 128
rows, or one where a tile has 64. Tiles of the same time are neighbours: first the columns of a panel of at most 8
tiles, then the blocks of rows (of a group, in `sums`), then the next panel. So within a panel w_j is read from memory
once, where it fits into the L2 cache (8 tiles of 256 columns of k = 4096 are 16 MiB of 50), and x once a panel.

Modelled, not measured: a step of 128 x 256 x 64 is 2^22 operations, 1024 clocks at 4096 a clock of a multiprocessor,
for which 48 KiB come from L2: at the peak 48 bytes a clock and multiprocessor, 11 TB/s of all 132, which is more than
L2 gives; so L2 is the bound, at half to two thirds of the peak. Tiles that two multiprocessors copy to each other
(clusters) would need a third less; left out. Next to it, a tile's end (registers to shared memory) costs about 1000
clocks without products, of k / 64 steps of 1024.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lissom.ops.grouped_matmul import differentiable
from lissom.ops.grouped_matmul.pallas_gpu_kernels import PIECE, STEP, rows_kernel, sums_kernel
from lissom.ops.hopper import ROWS, SHARED_BYTES, Block, consumer_registers
from lissom.ops.interpreting import is_interpreting

LOCAL = True

MULTIPROCESSORS = 132  # of an H100 SXM and an H200
TALLEST = 2 * ROWS
LEAST_STAGES = 3  # two under way while one is computed on
MOST_STAGES = 6
MULTIPLE = 64  # of k and n: the copy engine's swizzled rows of 128 bytes


def check(x, other, group_sizes, *, form: str, activation: str | None, dtype) -> None:
    if x.dtype not in (jnp.float16, jnp.bfloat16):
        raise NotImplementedError(f"x is {x.dtype}; tensor cores take float16 and bfloat16 (float32 only as tf32).")
    if dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
        raise NotImplementedError(
            f"preferred_element_type {dtype} is not float16, bfloat16 or float32, in which sums are."
        )
    for name, size in (("k", x.shape[1]), ("n", other.shape[-1])):
        if size % MULTIPLE:
            raise NotImplementedError(f"{name} {size} is not a multiple of {MULTIPLE}; padding would copy w.")


def run(x, other, group_sizes, **options) -> jax.Array:
    return differentiable.run(FORMS, x, other, group_sizes, **options)


def _height(m: int, g: int) -> int:
    """Rows of a block of y: a power of two of 8 to 128, at most what a group has on average."""
    return next(size for size in (TALLEST, 64, 32, 16, 8) if size * g <= m or size == 8)


def _tile(consumers: int, n: int, others: int, itemsize: int) -> Block:
    """Sizes from what has to fit. Guesses: not tuned on hardware.

    As wide as registers (`_registers`) and shared memory for LEAST_STAGES allow, and as leaves a tile for each
    multiprocessor; `others` are the tiles of one column. Then as many stages as fit.
    """
    for most in (256, 192, 128, 64):
        count = -(-n // most)
        columns = 64 * -(-n // (64 * count))
        tiles = (Block(consumers, columns, stages) for stages in range(MOST_STAGES, LEAST_STAGES - 1, -1))
        found = next((tile for tile in tiles if _bytes(tile, itemsize) <= SHARED_BYTES), None)
        fits = found is not None and _registers(columns) <= consumer_registers(consumers)
        if fits and (others * count >= MULTIPROCESSORS or most == 64):
            return found
    raise AssertionError("64 columns always fit")


def _registers(columns: int) -> int:
    """Of a thread, at the widest place. Of a float32 tile of 64 rows a thread has half as many as that has columns.

    The sums, whose place what is written takes, and 64 columns of what was there; 48 for a step of the activation, the
    results of tests and addresses. ptxas (CUDA 13.0) spills nothing where this says that columns fit: 256, with an
    activation too.
    """
    return columns // 2 + PIECE // 2 + 48


def _bytes(tile: Block, itemsize: int) -> int:
    """Of shared memory for a kernel's arrays, as it allocates them: all are multiples of its alignment, 1 KiB."""
    stage = 2 * STEP * (tile.rows + tile.columns)
    return tile.stages * stage + itemsize * tile.rows * tile.columns


def _bounds(sizes: jax.Array, m: int) -> jax.Array:
    """int32 [2, g]: the first row of each group, and the row behind its last."""
    ends = jnp.cumsum(sizes)
    return jnp.minimum(jnp.stack([ends - sizes, ends]), m)


def _tables(sizes: jax.Array, m: int, height: int) -> tuple[jax.Array, jax.Array]:
    """(entries int32 [3, g + 1], blocks int32 [2, blocks]), what `rows` visits.

    entries: the first row, the row behind the last, and the number of each group that is not empty, in order; then
    entries without rows, of which there is one at least. blocks: the first entry of each block of rows and their count,
    at least 1: what is behind the last group has an entry without rows.
    """
    starts, ends = _bounds(sizes, m)
    is_empty = ends <= starts
    # As many comparisons as groups squared, which is one small operation where sorting is several.
    number = jnp.arange(sizes.shape[0], dtype=jnp.int32)
    place = jnp.where(is_empty, sizes.shape[0], jnp.cumsum(~is_empty) - 1)
    of_entry = place == jnp.arange(sizes.shape[0] + 1, dtype=jnp.int32)[:, None]  # [entry, group]
    of_entry &= ~is_empty
    entries = jnp.stack([jnp.where(of_entry, table, 0).sum(1) for table in (starts, ends, number)])
    first_row = height * jnp.arange(-(-m // height), dtype=jnp.int32)[:, None]
    first = (~is_empty & (ends <= first_row)).sum(1)
    behind = (~is_empty & (starts < first_row + height)).sum(1)
    return entries.astype(jnp.int32), jnp.stack([first, jnp.maximum(behind - first, 1)]).astype(jnp.int32)


def _options(name: str, tiles: int, tile: Block) -> dict:
    """Of `plgpu.kernel`."""
    return {
        "grid": (min(tiles, MULTIPROCESSORS),),
        "grid_names": ("block",),
        "num_threads": tile.consumers + 1,
        "thread_name": "warpgroup",
        "kernel_name": f"lissom_grouped_matmul_{name}",
        "interpret": plgpu.InterpretGPUParams(detect_races=True) if is_interpreting() else False,
        "compiler_params": plgpu.CompilerParams(approx_math=True),
    }


def _in_eights(x: jax.Array) -> jax.Array:
    """Rows up to a multiple of 8, which the copy engine's tiles divide: a copy where x has another number."""
    return jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0)))


def _rows(x, w, sizes, transposed: bool, activation, dtype) -> jax.Array:
    m, n, g = x.shape[0], w.shape[1 if transposed else 2], w.shape[0]
    height = _height(m, g)
    x, dtype, blocks = _in_eights(x), jnp.dtype(dtype), -(-m // height)
    tile = _tile(-(-height // ROWS), n, blocks, dtype.itemsize)
    options = _options("rows", blocks * -(-n // tile.columns), tile)
    call = functools.partial(rows_kernel, tile=tile, height=height, transposed=transposed, activation=activation)
    return call(x, w, *_tables(sizes, m, height), dtype=dtype, options=options)[:m]


def _sums(x, y, sizes, dtype) -> jax.Array:
    m, k, n, g = *x.shape, y.shape[1], sizes.shape[0]
    dtype, consumers = jnp.dtype(dtype), min(2, -(-k // ROWS))
    tile = _tile(consumers, n, g * -(-k // (consumers * ROWS)), dtype.itemsize)
    tiles = g * -(-k // tile.rows) * -(-n // tile.columns)
    return sums_kernel(
        _in_eights(x), _in_eights(y), _bounds(sizes, m), tile=tile, dtype=dtype, options=_options("sums", tiles, tile)
    )


FORMS = differentiable.Forms(_rows, _sums)
