"""What the forward and the backward kernels of `pallas_gpu` share: tables of tiles and tests, products, masking.

The tables are made outside of the kernels in plain jnp (numpy where the mask is static). Inside, a step of a kernel
works on one tile of scores in the registers of a warpgroup.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from lissom.ops.attention import tiles
from lissom.ops.attention.masks import Interval, Mask
from lissom.ops.hopper import LOG2E, drain

LARGEST_HEAD = 256  # an accumulator of 64 rows by 256 takes half of a warpgroup's registers
PER_ROW = plgpu.Layout.WGMMA.reduce(1)  # a vector with an entry for each row of scores
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)


class Test(NamedTuple):
    """One `Interval`, by rows of the tables of a `Plan`; None where it has none (code None: the position)."""

    low: int | None
    high: int | None
    code: int | None


@dataclass(frozen=True)
class Plan:
    """What a kernel knows of a mask: tiles to visit and tests of elements.

    A list has the tiles that need no test first: the kernel runs one loop without tests and one with them, instead of a
    branch in every step that would end what the compiler can schedule.

    index: int32 [1 or batch, 1 or heads or kv_heads, tiles, most], numbers of the tiles on the other side
    counts: int32 [1 or batch, 1 or heads or kv_heads, tiles, 2], (those that need no test, all of them)
    bounds: int32 [bounds or 1, 1 or batch, q_len]; codes: int32 [codes or 1, 1 or batch, kv_len], padded to fours
    tests: rows of `bounds` and `codes`, static. limit: keys from there on do not exist; None where tiles fit.
    """

    index: jax.Array | np.ndarray
    counts: jax.Array | np.ndarray
    bounds: jax.Array | np.ndarray
    codes: jax.Array | np.ndarray
    tests: tuple[Test, ...]
    limit: int | None

    @property
    def operands(self):
        return tuple(jnp.asarray(table) for table in (self.index, self.counts, self.bounds, self.codes))

    @property
    def n_bounds(self) -> int:
        return sum(row is not None for test in self.tests for row in (test.low, test.high))

    @property
    def n_codes(self) -> int:
        return sum(test.code is not None for test in self.tests)

    def is_possible(self, whole: bool) -> bool:
        """Whether there may be tiles that need no test (`whole`), or that need one: a loop that cannot run is not
        compiled."""
        if isinstance(self.counts, np.ndarray):
            return bool((self.counts[..., 0] > 0).any() if whole else (self.counts[..., 1] > self.counts[..., 0]).any())
        return whole or bool(self.tests) or self.limit is not None


def plan(
    mask: Mask, tests: tuple[Interval, ...], q_len: int, kv_len: int, block_q: int, block_k: int, by_keys: bool = False
) -> Plan:
    """Tables for tiles of block_q by block_k. `by_keys`: lists of query tiles for each tile of keys."""
    found = tiles.maps(mask, tests, q_len, kv_len, block_q, block_k)
    most = tiles.most_tiles(mask, kv_len, block_k)
    visits = tiles.lists(found.transposed()) if by_keys else tiles.lists(found, most)
    xp = array_module(visits.index)
    first = xp.argsort(~visits.whole, axis=3, stable=True)  # entries behind the count are not whole: they stay behind
    index = xp.take_along_axis(visits.index, first, 3)
    counts = xp.stack([visits.whole.sum(3).astype(np.int32), visits.count], 3)
    bounds, codes, rows = [], [], []
    for test in tests:
        if test.code is None:
            # Cut to the positions that there are: the kernel subtracts a tile's start, which would wrap at the far end.
            test = Interval(*(None if x is None else array_module(x).clip(x, 0, kv_len) for x in (test.low, test.high)))
        places = []
        for table, into in ((test.low, bounds), (test.high, bounds), (test.code, codes)):
            places.append(None if table is None else len(into))
            if table is not None:
                into.append(table)
        rows.append(Test(*places))
    limit = kv_len if kv_len % block_k else None
    return Plan(index, counts, _stacked(bounds), _stacked(codes), tuple(rows), limit)


def array_module(*tables):
    """numpy where all tables are static, else jax.numpy."""
    return np if all(isinstance(table, np.ndarray) for table in tables) else jnp


def _stacked(tables: list) -> jax.Array | np.ndarray:
    # The copy engine takes rows of whole 16 bytes. A kernel that reads no table still has the operand.
    if not tables:
        return np.zeros((1, 1, 4), np.int32)
    xp = array_module(*tables)
    entries = max(table.shape[0] for table in tables)
    wide = [xp.broadcast_to(table, (entries, table.shape[1])).astype(np.int32) for table in tables]
    return xp.pad(xp.stack(wide), ((0, 0), (0, 0), (0, -wide[0].shape[1] % 4)))


# --- Inside of kernels ---------------------------------------------------------------------------------------------


def entry(table, batch, head, heads: int, kv_heads: int):
    """(batch, head) of a table whose first dimensions are [1 or batch, 1 or heads or kv_heads]."""
    batch = 0 if table.shape[0] == 1 else batch
    if table.shape[1] == 1:
        return batch, 0
    return batch, head if table.shape[1] == heads else head // (heads // kv_heads)


def place(n_tiles: int, heads: int):
    """(batch, tile, head) of this block of threads. The grid has one dimension, of which CUDA allows 2^31 - 1 (65535 of
    any other), so that batches have no limit; heads lie next to each other, and then tiles."""
    block = jax.lax.axis_index("block")
    row = jax.lax.div(block, jnp.int32(heads))
    batch = jax.lax.div(row, jnp.int32(n_tiles))
    return batch, row - batch * n_tiles, block - row * heads


def produce_keys(k_ref, v_ref, codes_ref, index_ref, count, plan, *, k_smem, v_smem, codes_smem, k_ready, v_ready,
                 k_free, v_free, **_):  # fmt: skip
    """Keeps the stages filled: k_ref, v_ref [kv_len, .] -> k_smem, v_smem [stages, block_k, .]."""
    stages, block_k = k_smem.shape[:2]

    @pl.loop(0, count)
    def _(step):
        slot = jax.lax.rem(step, jnp.int32(stages))
        keys = pl.ds(index_ref[step] * block_k, block_k)
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
        plgpu.copy_gmem_to_smem(k_ref.at[keys], k_smem.at[slot], k_ready.at[slot])
        if plan.n_codes:
            plgpu.copy_gmem_to_smem(codes_ref.at[:, keys], codes_smem.at[slot], k_ready.at[slot])
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
        plgpu.copy_gmem_to_smem(v_ref.at[keys], v_smem.at[slot], v_ready.at[slot])

    drain(count, stages, k_free, v_free)


def product(a_ref, b_ref, issued: Callable[[], None] = lambda: None) -> jax.Array:
    """a b^T in float32; a_ref [m, d], b_ref [n, d] in shared memory. `issued` runs while the product does."""

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, a_ref, b_ref.transpose((1, 0)))
        issued()
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((a_ref.shape[0], b_ref.shape[0]), jnp.float32))


def two_products(a_ref, b_ref, c_ref, d_ref, use: Callable) -> tuple:
    """(use(a b^T), c d^T), where `use` works on the first product while the second runs."""

    def multiply(first_ref, second_ref):
        plgpu.wgmma(first_ref, a_ref, b_ref.transpose((1, 0)))
        plgpu.wgmma(second_ref, c_ref, d_ref.transpose((1, 0)))
        used = use(plgpu.wgmma_accumulator_load(first_ref, wait_n=1))
        return used, second_ref[...]

    acc = plgpu.ACC((a_ref.shape[0], b_ref.shape[0]), jnp.float32)
    return pl.run_scoped(multiply, acc, acc)


def add_product(acc: jax.Array, a: jax.Array, b_ref, interpret: bool) -> jax.Array:
    """acc + a b; acc [m, d] and a [m, n] in registers, b_ref [n, d] in shared memory.

    jax's interpreter (0.11.2) has no `wgmma` whose first operand is in registers and no accumulator with a start value,
    so there it is a plain product: the one place where the interpreted kernel differs from the compiled one.
    """
    if interpret:
        b = b_ref[...]
        plgpu.commit_smem()  # a plain read is done before the copy engine may overwrite; `wgmma` needs none
        return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)
    return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, a, b_ref))(plgpu.ACC.init(acc))


def zeros(shape: tuple[int, int]) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def spread(vector: jax.Array, shape: tuple[int, int], along: int) -> jax.Array:
    """`vector` along dimension `along`, repeated over the other."""
    return jax.lax.broadcast_in_dim(vector, shape, (along,))


def capped(s: jax.Array, scale: float, softcap: float | None) -> tuple[jax.Array, float, jax.Array | None]:
    """(x, c, t): the logits in base 2 are c x; t = tanh(scale s / softcap) where there is a cap.

    tanh comes from exp2: the hardware's own is good to 2^-11, which a cap of 50 turns into logits that are off by 0.02.
    """
    if softcap is None:
        return s, scale * LOG2E, None
    t = 1.0 - 2.0 / (jnp.exp2(s * (2.0 * LOG2E * scale / softcap)) + 1.0)
    return t, softcap * LOG2E, t


def weighed(s: jax.Array, unit: float, m: jax.Array, may_be_empty: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A step of the online softmax: (the running maximum m after scores s, exp2(unit s - maximum), the factor by which
    what was summed shrinks)."""
    new = jnp.maximum(m, s.max(axis=1) * unit)
    # A row that has seen nothing yet: exp2(-inf - -inf) would be NaN.
    base = jnp.where(new == -jnp.inf, 0.0, new) if may_be_empty else new
    return new, jnp.exp2(s * unit - spread(base, s.shape, 0)), jnp.exp2(m - base)


def finished(acc: jax.Array, m: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of the sums of an online softmax; 0 and -inf of a row that has seen nothing."""
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    return acc * spread(1.0 / total, acc.shape, 0), jnp.where(empty, -jnp.inf, m / LOG2E + jnp.log(total))


def seen(plan: Plan, bounds, codes, start, shape: tuple[int, int], key_axis: int) -> jax.Array:
    """Bool `shape`: the tests on a tile whose keys begin at `start` and lie along `key_axis`.

    bounds, codes: rows of the plan's tables for this tile, int32 vectors along the queries and the keys.
    """
    position = plgpu.broadcasted_iota(jnp.int32, shape, key_axis, layout=plgpu.Layout.WGMMA)
    result = None if plan.limit is None else position < plan.limit - start
    for test in plan.tests:
        # The start of the tile is taken from the few bounds, not added to each position.
        code = position if test.code is None else spread(codes[test.code], shape, key_axis)
        shift = start if test.code is None else 0
        parts = []
        if test.low is not None:
            parts.append(spread(bounds[test.low] - shift, shape, 1 - key_axis) <= code)
        if test.high is not None:
            parts.append(code < spread(bounds[test.high] - shift, shape, 1 - key_axis))
        for part in parts:
            result = part if result is None else result & part
    return result
