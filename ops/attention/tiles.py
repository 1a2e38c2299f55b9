"""From a mask to the tiles that a kernel visits: for each tile of queries, a list of tiles of keys.

A kernel cuts scores into tiles of block_q queries by block_k keys. What a mask asks of a tile follows from the smallest
and the largest entry of its tables there (`masks.Interval`) and from its list of blocks (`sparse.BlockSparse`): nothing
is seen (the tile is not in the list), all is seen (`whole`: its tests need not be evaluated), or the tests decide.
The bounds are safe, not tight: a tile that is listed may still show nothing.

Neighbourhoods on a grid are visited in an order in which the queries of a tile lie together in the plane (`order`), so
that few tiles of keys meet them: fused neighbourhood attention, Hassani, Hwu and Shi 2024 (arXiv 2403.04690), with the
tokens moved beforehand instead of in the kernel's copies.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lissom.ops.attention.masks import And, Interval, Mask, Neighbourhood
from lissom.ops.attention.sparse import BlockSparse, listed

Table = jax.Array | np.ndarray


class Tiles(NamedTuple):
    """For each tile of queries, the tiles of keys to visit: [1 or batch, 1 or heads or kv_heads, query tiles, most].

    `index` int32: numbers of key tiles in rising order; behind `count` the last one is repeated (0 where there is
    none), so that a pipeline that fetches ahead fetches nothing new. `count` int32, without the last dimension.
    `whole` bool: every query of the tile sees every key of it. numpy where the mask is static.
    """

    index: Table
    count: Table
    whole: Table


class Maps(NamedTuple):
    """Bool [1 or batch, 1 or heads or kv_heads, query tiles, key tiles]: `some` may be seen, `whole` is seen."""

    some: Table
    whole: Table

    def transposed(self) -> "Maps":
        """The same by key tiles, for the gradients of keys and values."""
        return Maps(*(table.swapaxes(2, 3) for table in self))


def order(mask: Mask, length: int, block: int = 128) -> np.ndarray | None:
    """The order in which to lay the tokens so that tiles of `block` of them are compact on the grid of a 2-D (or
    dilated) `Neighbourhood`: residue class by residue class, each in the rectangles of `block` tokens that meet the
    fewest tiles. None where the sequence is fine, or lists of blocks speak of its own order."""
    parts = mask.parts if isinstance(mask, And) else (mask,)
    grids = [part for part in parts if isinstance(part, Neighbourhood)]
    if len(grids) != 1 or listed(mask) is not None:
        return None
    return _best_order(grids[0], length, block)


@functools.lru_cache(maxsize=32)
def _best_order(grid: Neighbourhood, length: int, block: int) -> np.ndarray | None:
    plain = grid.dilation == (1,) * len(grid.shape)
    if len(grid.shape) == 1:
        return None if plain else _laid(grid, (length,))
    candidates = [_laid(grid, (h, block // h)) for h in (1, 2, 4, 8, 16, 32) if block % h == 0]
    if plain:
        candidates.insert(0, np.arange(length, dtype=np.int32))  # row by row
    tests = grid.intervals(length, length)
    visited = [
        maps(grid, reordered(tests, length, places), length, length, block, block).some.sum() for places in candidates
    ]
    best = int(np.argmin(visited))
    return None if plain and best == 0 else candidates[best]


def _laid(grid: Neighbourhood, rectangle: tuple[int, ...]) -> np.ndarray:
    """Tokens by residue class, in it by rectangle, in it row by row."""
    axes = [np.arange(n) for n in grid.shape]
    inner = [axis // d for axis, d in zip(axes, grid.dilation)]
    keys = []  # from the fastest to the slowest, as lexsort takes them
    for parts in (
        [i % s for i, s in zip(inner, rectangle)],
        [i // s for i, s in zip(inner, rectangle)],
        [axis % d for axis, d in zip(axes, grid.dilation)],
    ):
        keys += [part.ravel() for part in np.meshgrid(*parts, indexing="ij")][::-1]
    return np.lexsort(keys).astype(np.int32)


def reordered(tests: tuple[Interval, ...], kv_len: int, places: np.ndarray | None) -> tuple[Interval, ...]:
    """The tests when queries and keys are laid in the order `places`."""
    if places is None:
        return tests
    move = lambda table: None if table is None else table[:, places]
    return tuple(Interval(move(test.low), move(test.high), test.codes(kv_len)[:, places]) for test in tests)


def maps(mask: Mask, tests: tuple[Interval, ...], q_len: int, kv_len: int, block_q: int, block_k: int) -> Maps:
    """Which tiles of `mask`, whose (reordered) intervals are `tests`, have to be visited."""
    some = np.ones((1, 1, -(-q_len // block_q), -(-kv_len // block_k)), bool)
    whole = some.copy()
    if kv_len % block_k:
        whole[..., -1] = False  # the tile overhangs: there are keys in it that do not exist
    for test in tests:
        code = _bounds(test.codes(kv_len), block_k, 2)
        if test.low is not None:
            low = _bounds(test.low, block_q, 3)
            some, whole = some & (low[0] <= code[1]), whole & (low[1] <= code[0])
        if test.high is not None:
            high = _bounds(test.high, block_q, 3)
            some, whole = some & (code[0] < high[1]), whole & (code[1] < high[0])
    blocks = listed(mask)
    if blocks is not None:
        if not isinstance(blocks, BlockSparse):
            raise NotImplementedError("mask: single key columns are not tiles.")
        named = blocks.block_map(kv_len)
        for axis, (block, tile, tiles) in enumerate(
            ((blocks.block_q, block_q, some.shape[2]), (blocks.block_k, block_k, some.shape[3])), start=2
        ):
            if block % tile:
                raise NotImplementedError(
                    f"mask: blocks of {blocks.block_q} by {blocks.block_k} are not whole tiles of {block_q} by "
                    f"{block_k}."
                )
            named = named.repeat(block // tile, axis)
            named = named[:, :, :tiles] if axis == 2 else named[..., :tiles]
        some, whole = some & named, whole & named
    return Maps(some, whole)


def _bounds(table: Table, size: int, axis: int) -> tuple[Table, Table]:
    """(smallest, largest) entry of each tile, [1 or batch, 1, tiles, 1] or, for axis 2, [1 or batch, 1, 1, tiles]."""
    xp = np if isinstance(table, np.ndarray) else jnp
    missing = -table.shape[1] % size
    tiles = xp.pad(table, ((0, 0), (0, missing)), mode="edge").reshape(table.shape[0], -1, size)
    return tuple(xp.expand_dims(reduce(tiles, 2), (1, axis)) for reduce in (xp.min, xp.max))


def most_tiles(mask: Mask, kv_len: int, block_k: int) -> int:
    """A static bound on the length of a list that is made on the device."""
    blocks, tiles = listed(mask), -(-kv_len // block_k)
    return tiles if blocks is None else min(tiles, blocks.index.shape[3] * -(-blocks.block_k // block_k))


def lists(found: Maps, most: int | None = None) -> Tiles:
    """The lists of the tiles that may be seen; of at most `most` entries (None: as many as there are tiles, or
    as a static map needs)."""
    some, whole = found
    static = isinstance(some, np.ndarray)
    xp = np if static else jnp
    count = some.sum(3).astype(np.int32)
    if static:
        most = max(int(count.max()), 1)
    most = min(some.shape[3] if most is None else max(most, 1), some.shape[3])
    # The tiles that are seen to the front, each part in its order.
    index = xp.argsort(~some, axis=3, stable=True)[..., :most]
    step = xp.minimum(xp.arange(most), xp.maximum(count, 1)[..., None] - 1)
    index = xp.where(count[..., None] > 0, xp.take_along_axis(index, step, 3), 0)
    marked = xp.take_along_axis(xp.broadcast_to(whole, some.shape), index, 3)
    return Tiles(index.astype(np.int32), count, marked & (xp.arange(most) < count[..., None]))
