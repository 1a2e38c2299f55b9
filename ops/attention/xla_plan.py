"""How the `xla` form cuts a head into blocks: which queries go together, and where their keys lie.

A plan is a few stages, each a `scan` over blocks with equally many queries. A stage has a few kinds of block, which
differ in the number of their keys; the kind of each block is a number that the scan reads (known while tracing, unless
lists of blocks were made on the device).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lissom.ops import block_sizes
from lissom.ops.attention.masks import At, Interval, Mask, Neighbourhood, Span, key_range
from lissom.ops.attention.sparse import BlockSparse, KeyColumns, listed

BLOCK_SCORES = 2**20
"""Scores of one block of one head; with it the block's queries shrink as the keys grow, and memory stays
linear."""

KERNEL = "attention.xla"

LEAST_ROWS, MOST_ROWS = 64, 256
"""Bounds on the queries of a block: fewer make thin products, more compute too much beside a triangle."""

STEP_SCORES = 2**18
"""Small blocks are computed several at a time, up to so many scores: a step of a loop costs about 0.1 ms on a CPU."""

GROUPS = 8
"""Bodies to compile at most for a triangle. In 8 steps it computes 1/8 more than the triangle itself."""

SQUARE = 8
"""Queries of a block of a plane, along each side: 64 queries with a window of 7 meet (8 + 6)^2 = 196 keys."""


# ---- places: where the queries or the keys of a block are in their arrays --------------------------------------


class Rows(NamedTuple):
    """Consecutive positions, or any (`At`): fetched by `rows`, gradients put back by `add`."""

    at: Span | At

    def take(self, table):
        return self.at.take(table)

    def positions(self):
        return self.at.positions()

    def rows(self, x: jax.Array, axis: int) -> jax.Array:
        """The entries of x along the axis, or x itself where the axis is 1 and stands for all (bias)."""
        if x.shape[axis] == 1:
            return x
        if isinstance(self.at, Span):
            return jax.lax.dynamic_slice_in_dim(x, self.at.start, self.at.size, axis)
        return jnp.take(x, self.at.index, axis, mode="clip")

    def add(self, x: jax.Array, part: jax.Array, axis: int) -> jax.Array:
        """x with `part` added at these places."""
        if x.shape[axis] == 1:
            return x + part
        if isinstance(self.at, Span):
            old = jax.lax.dynamic_slice_in_dim(x, self.at.start, self.at.size, axis)
            return jax.lax.dynamic_update_slice_in_dim(x, old + part, self.at.start, axis)
        return x.at[(slice(None),) * axis + (self.at.index,)].add(part, mode="clip")


class Blocks(NamedTuple):
    """Blocks of `size` positions each, by their numbers [n]. The length of arrays is a multiple of `size`."""

    numbers: jax.Array | np.ndarray
    size: int

    def take(self, table):
        return At(self.positions()).take(table)

    def positions(self):
        return (self.numbers[:, None] * self.size + np.arange(self.size, dtype=np.int32)).reshape(-1)

    def _cut(self, x, axis):
        return x.reshape(*x.shape[:axis], -1, self.size, *x.shape[axis + 1 :])

    def rows(self, x, axis):
        if x.shape[axis] == 1:
            return x
        part = jnp.take(self._cut(x, axis), self.numbers, axis, mode="clip")
        return part.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    def add(self, x, part, axis):
        if x.shape[axis] == 1:
            return x + part
        at = (slice(None),) * axis + (self.numbers,)
        return self._cut(x, axis).at[at].add(self._cut(part, axis), mode="clip").reshape(x.shape)


class Patch(NamedTuple):
    """A rectangle of a plane that lies row by row in the sequence: `start` (y, x), `size` and `plane` (rows,
    columns)."""

    start: tuple[jax.Array, jax.Array]
    size: tuple[int, int]
    plane: tuple[int, int]

    def take(self, table):
        return self.rows(jnp.asarray(table), 1)

    def positions(self):
        y, x = (start + np.arange(size, dtype=np.int32) for start, size in zip(self.start, self.size))
        return (y[:, None] * self.plane[1] + x).reshape(-1)

    def _corner(self, x, axis):
        return tuple(jnp.int32(i) for i in (*(0,) * axis, *self.start, *(0,) * (x.ndim - axis - 1)))

    def rows(self, x, axis):
        if x.shape[axis] == 1:
            return x
        plane = x.reshape(*x.shape[:axis], *self.plane, *x.shape[axis + 1 :])
        shape = (*x.shape[:axis], *self.size, *x.shape[axis + 1 :])
        return jax.lax.dynamic_slice(plane, self._corner(x, axis), shape).reshape(
            *x.shape[:axis], -1, *x.shape[axis + 1 :]
        )

    def add(self, x, part, axis):
        if x.shape[axis] == 1:
            return x + part
        plane = x.reshape(*x.shape[:axis], *self.plane, *x.shape[axis + 1 :])
        part = part.reshape(*x.shape[:axis], *self.size, *x.shape[axis + 1 :])
        corner = self._corner(x, axis)
        old = jax.lax.dynamic_slice(plane, corner, part.shape)
        return jax.lax.dynamic_update_slice(plane, old + part, corner).reshape(x.shape)


Place = Rows | Blocks | Patch


class Block(NamedTuple):
    """One block: its queries, its keys, and which of the keys count (bool [keys]; None: all)."""

    q: Place
    k: Place
    counts: jax.Array | np.ndarray | None = None


class Stage(NamedTuple):
    """A scan, each step of which computes `together` blocks of `size` queries and at most widths[kind] keys. `kinds`
    int [steps] picks the body of each step, `at` (arrays [steps, together, ...]) is what it reads; bodies[kind](at) is
    the `Block` of one entry of `at`, or None where no key is seen."""

    size: int
    widths: tuple[int, ...]
    bodies: tuple[Callable[[Any], Block | None], ...]
    kinds: jax.Array | np.ndarray
    at: Any

    @property
    def together(self) -> int:
        return jax.tree.leaves(self.at)[0].shape[1]


class Plan(NamedTuple):
    """Stages whose results stand one behind the other, and the order that puts them back: of queries, or of blocks of
    `unit` queries (None: they are in order). Arrays are padded to `q_len` queries and `kv_len` keys first."""

    stages: tuple[Stage, ...]
    q_len: int
    kv_len: int
    restore: jax.Array | np.ndarray | None = None
    unit: int = 1


class Sizes(NamedTuple):
    """What is tuned: the most queries of a block, and the scores of a step."""

    rows: int
    step_scores: int


def key_of(q, k, v, mask: Mask) -> dict:
    """Of a request in the table of block sizes; arrays [batch, length, heads, d]."""
    lengths = {"q_len": q.shape[1], "kv_len": k.shape[1]}
    return block_sizes.key_of(KERNEL, mask, dtype=q.dtype, head_dim=q.shape[3], v_dim=v.shape[3], **lengths)


def sizes_of(key: dict) -> Sizes:
    """Those that were measured on this chip (ops/block_sizes.py), else what is good on the CPUs that were tried."""
    measured = block_sizes.tuned(key)
    return Sizes(MOST_ROWS, STEP_SCORES) if measured is None else Sizes(**measured)


def candidates(q, k, v, mask: Mask) -> list[dict[str, int]]:
    """Sizes to try, for scripts/tune_ops.py."""
    # Lists say themselves how many queries go together.
    rows = (MOST_ROWS,) if listed(mask) is not None else (64, 128, 256, 512)
    return [{"rows": most, "step_scores": 2**n} for most in rows for n in (16, 18, 19, 20, 21)]


def _together(blocks: int, scores: int, step_scores: int) -> int:
    """How many blocks of so many scores make a step: a divisor of their number."""
    most = max(step_scores // scores, 1)
    return next(n for n in range(min(most, blocks), 0, -1) if blocks % n == 0)


# ---- consecutive keys: triangles, bands ------------------------------------------------------------------------


class Group(NamedTuple):
    """Query blocks that share one program: `starts` and `key_starts`, one each a block; `size` queries,
    `width` keys."""

    starts: tuple[int, ...]
    key_starts: tuple[int, ...]
    size: int
    width: int


def groups_of(tests: tuple[Interval, ...], q_len: int, kv_len: int, rows: int) -> tuple[Group, ...]:
    """Cuts the queries into blocks of about `rows`, finds each block's keys, and joins neighbours into
    groups."""
    size = min(rows, q_len)
    starts = list(range(0, q_len, size))
    ranges = [key_range(tests, s, min(s + size, q_len), kv_len) for s in starts]
    groups = []
    if q_len % size:
        low, high = ranges.pop()
        groups = [Group((starts.pop(),), (min(low, kv_len - 1),), q_len % size, max(high - low, 1))]
    widths = [max(high - low, 1) for low, high in ranges]
    # One loop for all while it computes little more than the blocks need, else as many loops as are allowed.
    together = len(starts) if len(starts) * max(widths) <= 1.2 * sum(widths) else -(-len(starts) // GROUPS)
    for first in reversed(range(0, len(starts), together)):
        part = slice(first, first + together)
        width = max(widths[part])
        key_starts = tuple(min(low, kv_len - width) for low, _ in ranges[part])
        groups.insert(0, Group(tuple(starts[part]), key_starts, size, width))
    return tuple(groups)


def rows_of_a_block(tests: tuple[Interval, ...], q_len: int, kv_len: int, group: int, most_rows: int) -> int:
    """How many queries a block has, from how many keys a query sees."""
    ranges = [key_range(tests, i, i + 1, kv_len) for i in (0, q_len // 2, q_len - 1)]
    seen = max(1, *(high - low for low, high in ranges))
    # A block of n queries of a band or a triangle meets n keys more than one query does.
    most = most_rows if ranges[0] == (0, kv_len) else min(_round(seen) // 4, most_rows)
    return max(LEAST_ROWS, min(BLOCK_SCORES // (seen * group), most))


def _round(n: int) -> int:
    return 1 << max(n - 1, 1).bit_length()


def _consecutive(tests, q_len: int, kv_len: int, group: int, sizes: Sizes) -> Plan:
    groups = groups_of(tests, q_len, kv_len, rows_of_a_block(tests, q_len, kv_len, group, sizes.rows))
    stages = []
    for size in dict.fromkeys(group.size for group in groups):
        alike = [group for group in groups if group.size == size]
        # Several blocks a step only where all are of one kind: a band. The blocks of a triangle are large.
        together = (
            _together(len(alike[0].starts), size * alike[0].width * group, sizes.step_scores) if len(alike) == 1 else 1
        )
        kinds = np.repeat(np.arange(len(alike), dtype=np.int32), [len(part.starts) // together for part in alike])
        at = tuple(np.concatenate([part[i] for part in alike]).astype(np.int32) for i in (0, 1))
        at = tuple(x.reshape(-1, together) for x in at)
        bodies = tuple(
            lambda at, part=part: Block(Rows(Span(at[0], part.size)), Rows(Span(at[1], part.width))) for part in alike
        )
        stages.append(Stage(size, tuple(part.width for part in alike), bodies, kinds, at))
    return Plan(tuple(stages), q_len, kv_len)


# ---- a plane ----------------------------------------------------------------------------------------------------


def _plane(mask: Neighbourhood, group: int, sizes: Sizes) -> Plan:
    """Squares of queries, each with the rectangle that holds the windows of all of them."""
    cuts = []  # for each axis: [(size, width, starts, key starts)]
    for axis, n in enumerate(mask.shape):
        test = mask.along(axis)
        size = min(SQUARE, n)
        starts = np.arange(0, n, size)
        low = np.array([test.low[0, s : s + size].min() for s in starts])
        width = max(int(test.high[0, s : s + size].max()) - int(lo) for s, lo in zip(starts, low))
        low = np.minimum(low, n - width)
        whole = n // size
        cuts.append([(size, width, starts[:whole], low[:whole])])
        if n % size:
            cuts[-1].append((n % size, width, starts[whole:], low[whole:]))
    stages, order = [], []
    places = np.arange(np.prod(mask.shape)).reshape(mask.shape)
    for rows in cuts[0]:
        for columns in cuts[1]:
            size, width = ((rows[i], columns[i]) for i in (0, 1))
            at = tuple(
                grid.ravel().astype(np.int32)
                for i in (2, 3)
                for grid in np.meshgrid(rows[i], columns[i], indexing="ij")
            )

            def body(at, size=size, width=width):
                return Block(Patch((at[0], at[1]), size, mask.shape), Patch((at[2], at[3]), width, mask.shape))

            for y, x in zip(at[0], at[1]):
                order.append(places[y : y + size[0], x : x + size[1]].ravel())
            area = size[0] * size[1], width[0] * width[1]
            together = _together(len(at[0]), area[0] * area[1] * group, sizes.step_scores)
            at = tuple(x.reshape(-1, together) for x in at)
            stages.append(Stage(area[0], (area[1],), (body,), np.zeros(len(at[0]), np.int32), at))
    return Plan(tuple(stages), places.size, places.size, np.argsort(np.concatenate(order)).astype(np.int32))


# ---- lists ------------------------------------------------------------------------------------------------------


def _counts_to_compile(counts, most: int) -> np.ndarray:
    """The lengths of list that get a body of their own: those that occur, if they are known and few; else 0, 1, 2, 3,
    4, 6, 8, 12, ... (a third more than needed at most, a seventh on average)."""
    if isinstance(counts, np.ndarray):
        found = np.unique(counts)
        if len(found) <= GROUPS:
            return found
        most = int(found[-1])
    steps = [0, 1, *(n for i in range(1, 32) for n in (2**i, 3 * 2 ** (i - 1)))]
    return np.array(sorted({*(step for step in steps if step < most), most}), np.int32)


def _by_lists(mask: BlockSparse | KeyColumns, q_len: int, kv_len: int, group: int, entry: tuple, sizes: Sizes) -> Plan:
    """`entry`: (batch, head) of the list to take, traced."""
    index, counts = mask.index.astype(np.int32), mask.counts().astype(np.int32)
    size = getattr(mask, "block_k", 1)
    block_q = mask.block_q
    while block_q % 2 == 0 and block_q > LEAST_ROWS and block_q * group * index.shape[3] * size > BLOCK_SCORES:
        block_q //= 2
    repeat = mask.block_q // block_q
    static = isinstance(index, np.ndarray) and isinstance(counts, np.ndarray)
    names_one = mask.counting(-(-kv_len // size))
    lengths = _counts_to_compile(counts if static else None, index.shape[3])
    counts, index, names_one = (_entry(table, entry) for table in (counts, index, names_one))
    xp = np if isinstance(index, np.ndarray) and isinstance(counts, np.ndarray) else jnp
    counts, index, names_one = (
        xp.repeat(table, repeat, 0)[: -(-q_len // block_q)] for table in (counts, index, names_one)
    )
    blocks, scores = len(counts), block_q * group * index.shape[1] * size
    exact = static and len(lengths) == 1
    numbers, restore = np.arange(blocks, dtype=np.int32), None
    together = _together(blocks, scores, sizes.step_scores) if exact else 0
    together = together or max(min(sizes.step_scores // scores, blocks), 1)
    if together > 1 and not exact:
        # Blocks with lists of like length make a step; what is missing to whole steps has empty lists.
        order = xp.argsort(-counts, stable=True).astype(np.int32)
        more = -blocks % together
        numbers, counts, index, names_one = (
            xp.pad(table[order], [(0, more)] + [(0, 0)] * (table.ndim - 1))
            for table in (xp.asarray(numbers), counts, index, names_one)
        )
        restore = xp.argsort(order)
    index = xp.clip(index, 0, -(-kv_len // size) - 1).astype(np.int32)
    at = tuple(table.reshape(-1, together, *table.shape[1:]) for table in (numbers, index, names_one))
    kinds = xp.searchsorted(lengths, counts.reshape(-1, together).max(1)).astype(np.int32)

    def body(at, length):
        number, names, names_one = at
        if length == 0:
            return None
        names = names[:length]
        counting = None if exact else jnp.repeat(names_one[:length], size)
        keys = Blocks(names, size) if isinstance(mask, BlockSparse) else Rows(At(names))
        return Block(Rows(Span(number * block_q, block_q)), keys, counting)

    bodies = tuple(lambda at, n=int(n): body(at, n) for n in lengths)
    stage = Stage(block_q, tuple(int(n) * size for n in lengths), bodies, kinds, at)
    return Plan((stage,), blocks * block_q, -(-kv_len // size) * size, restore, block_q)


def _entry(table, entry):
    """The list of one (batch, head), numpy where one serves all."""
    if table.shape[:2] == (1, 1):
        return table[0, 0]
    batch, head = (i if n > 1 else 0 for i, n in zip(entry, table.shape[:2]))
    return jnp.asarray(table)[batch, head]


# ---- choice -----------------------------------------------------------------------------------------------------


def plan(
    mask: Mask, tests: tuple[Interval, ...], q_len: int, kv_len: int, group: int, entry: tuple, sizes: Sizes
) -> Plan:
    """The plan of one head whose `group` query heads share keys; `entry` is its (batch, head), traced."""
    lists = listed(mask)
    if lists is not None:
        return _by_lists(lists, q_len, kv_len, group, entry, sizes)
    if isinstance(mask, Neighbourhood) and len(mask.shape) == 2 and mask.dilation == (1, 1):
        return _plane(mask, group, sizes)
    return _consecutive(tests, q_len, kv_len, group, sizes)


def area(mask: Mask, q_len: int, kv_len: int) -> int:
    """Scores that a head computes under a static mask."""
    found = plan(mask, mask.intervals(q_len, kv_len), q_len, kv_len, 1, (0, 0), Sizes(MOST_ROWS, STEP_SCORES))
    return sum(
        stage.together * stage.size * stage.widths[kind] for stage in found.stages for kind in np.asarray(stage.kinds)
    )


__all__ = ["Block", "Plan", "Stage", "area", "groups_of", "plan"]
