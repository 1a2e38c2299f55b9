"""Binary matmul on Hopper GPUs with Mosaic GPU: bits are counted in registers, without the unit for it.

NEVER RUN ON A GPU: interpreted and lowered for CUDA in tests, and in no default order.

A warpgroup makes a tile of y, ROWS by COLUMNS. A word of each row of x and one of each row of w are loaded at a time,
from arrays that were turned, [words, rows], so that what is loaded together lies together; xor gives the words of the
tile's pairs. Words are not counted one by one, which a multiprocessor does for 16 threads a cycle (CUDA's programming
guide, throughput of arithmetic instructions), but added as numbers of one bit at every place (carry-save adders: 5
logical operations, which the compiler can join into 2, at 64 threads a cycle): eight words and the sums `ones`, `twos`
and `fours` make new sums and a word of the places at which an eight is full. Only the bits of that are counted, in 12
operations, and at the end those of the three sums (Harley and Seal's count; Warren 2013, Hacker's Delight, section
5-1).

That makes some 4.4 operations a word, 14 words a cycle and multiprocessor: at best a fifth of what the tensor cores of
an H200 would do with signs unpacked to bfloat16, on matrices so large that these are busy. It is meant for few rows,
where the bits of w, a sixteenth of the bytes in bfloat16, are all that is to be read. Neither was measured.

Rows of x, of w and words are padded to whole tiles as they are turned; y is cut where it was padded, a copy.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lissom.ops.binary_matmul.batches import on_rows
from lissom.ops.interpreting import is_interpreting

LOCAL = True

ROWS, COLUMNS, WORDS = 64, 32, 8
MOST_ELEMENTS = 2**31
PER_ROW, PER_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


class Sums(NamedTuple):
    """Of a tile's pairs of rows. Words whose bits count 1, 2 and 4 at every place, and how many eights there were."""

    ones: jax.Array
    twos: jax.Array
    fours: jax.Array
    eights: jax.Array


def check(x_bits, w_bits, *, length: int) -> None:
    words = _padded(x_bits.shape[-1], WORDS)
    _check_size(x_bits.size // x_bits.shape[-1], w_bits.shape[0], words)


def _check_size(m: int, n: int, words: int) -> None:
    m, n = _padded(m, ROWS), _padded(n, COLUMNS)
    most = max(m * words, n * words, m * n)
    if most >= MOST_ELEMENTS:
        raise NotImplementedError(f"{most} elements need offsets of more than 32 bits; this kernel has no larger.")


def run(x_bits, w_bits, *, length: int) -> jax.Array:
    return on_rows(functools.partial(_product, length, is_interpreting()), x_bits, w_bits)


def _padded(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def _turned(bits: jax.Array, tile: int) -> jax.Array:
    """[words, rows], in whole tiles: words of 0 in both operands differ nowhere."""
    rows, words = (_padded(size, to) - size for size, to in zip(bits.shape, (tile, WORDS)))
    return jnp.pad(bits, ((0, rows), (0, words))).T


def _product(length: int, interpret: bool, x: jax.Array, w: jax.Array) -> jax.Array:
    m, n = len(x), len(w)
    x, w = _turned(x, ROWS), _turned(w, COLUMNS)
    _check_size(m, n, len(x))  # again: under `vmap` there are more rows
    tiles = (x.shape[1] // ROWS, w.shape[1] // COLUMNS)
    y = plgpu.kernel(
        functools.partial(_kernel, length, tiles[1]),
        out_type=jax.ShapeDtypeStruct((x.shape[1], w.shape[1]), jnp.int32),
        grid=(tiles[0] * tiles[1],),
        grid_names=("tile",),
        kernel_name="lissom_binary_matmul",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(x, w)
    return y[:m, :n]


def _kernel(length: int, columns: int, x_ref, w_ref, y_ref):
    """x_ref [words, rows], w_ref [words, columns], y_ref [rows, columns]. Tiles of one time share their rows of x."""
    tile = jax.lax.axis_index("tile")
    row = jax.lax.div(tile, jnp.int32(columns))
    rows = pl.ds(row * ROWS, ROWS)
    across = pl.ds((tile - row * columns) * COLUMNS, COLUMNS)

    def differing(word) -> jax.Array:
        x = plgpu.load(x_ref.at[word, rows], layout=PER_ROW, optimized=False)
        w = plgpu.load(w_ref.at[word, across], layout=PER_COLUMN, optimized=False)
        spread = lambda vector, along: jax.lax.broadcast_in_dim(vector, (ROWS, COLUMNS), (along,))
        return spread(x, 0) ^ spread(w, 1)

    def eight(step, sums: Sums) -> Sums:
        ones, twos, fours, eights = sums
        carries = []
        words = [differing(step * WORDS + j) for j in range(WORDS)]
        for a, b in zip(words[::2], words[1::2]):
            ones, carry = _added(ones, a, b)
            carries.append(carry)
        twos, first = _added(twos, *carries[:2])
        twos, second = _added(twos, *carries[2:])
        fours, eight = _added(fours, first, second)
        return Sums(ones, twos, fours, eights + _bits(eight))

    zeros = lambda dtype: plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), dtype), plgpu.Layout.WGMMA)
    start = Sums(*(zeros(jnp.uint32) for _ in Sums._fields))
    ones, twos, fours, eights = jax.lax.fori_loop(0, x_ref.shape[0] // WORDS, eight, start)
    count = 8 * eights + 4 * _bits(fours) + 2 * _bits(twos) + _bits(ones)
    y_ref[rows, across] = length - 2 * count.astype(jnp.int32)


def _added(a: jax.Array, b: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum, carry) of three bits at each place."""
    both = a ^ b
    return both ^ c, (a & b) | (both & c)


def _bits(x: jax.Array) -> jax.Array:
    """How many are set, in pairs of bits, then in fours, then in bytes, which the product sums into the highest."""
    u = jnp.uint32
    x = x - ((x >> u(1)) & u(0x55555555))
    x = (x & u(0x33333333)) + ((x >> u(2)) & u(0x33333333))
    x = (x + (x >> u(4))) & u(0x0F0F0F0F)
    return (x * u(0x01010101)) >> u(24)
