"""Attention for TPUs: three Pallas kernels that visit only the tiles that the mask can show.

Never run on a TPU. The kernels (`pallas_tpu_kernels`) are run in jax's interpreter of a TPU, and compiled by the real
compiler for v5e and v5p; no number here was measured.

Forward is FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm 1): for a tile of queries the tiles of keys come one
after the other; a running maximum m and sum l of each row, and the not yet normalised output, stay in the chip's vector
memory (VMEM); the division by l comes once, at the end. Beside the output only lse = m + log l is kept. Backward
(algorithm 2) recomputes the weights p = exp(s - lse) twice: one kernel sums dq over the keys, one sums dk and dv over
the queries, and over the query heads that share a key head. With delta_i = sum_d out_id dout_id - dlse_i:

    dv_j = sum_i p_ij dout_i     ds_ij = p_ij (dout_i . v_j - delta_i)     dq_i = scale sum_j ds_ij k_j
                                                                           dk_j = scale sum_i ds_ij q_i

The grid is (batch, heads, steps), and step s is a number from a list in scalar memory (SMEM) that says which tile of
queries meets which tile of keys: `outer` is the tile that is summed over to the end, `inner` the one that changes. The
pipeline reads the list ahead, so a tile that nobody sees is neither copied nor waited for: a causal mask takes half the
steps, and on the device the number of steps itself is a result. A kernel knows no masks, only this list and the tests
`low <= code < high` (`masks.Interval`) of the tiles that are seen in part. The idea of lists that are fetched ahead is
that of jax's splash attention kernel, whose lists lie row by row and are padded to the longest.

In all three kernels scores are [outer, inner]: what belongs to an inner token is a row of numbers and comes as it lies
in memory; what belongs to an outer token is turned into a column once, at its first step. Columns are repeated over the
128 lanes of a register, which is how Mosaic can add them to scores without moving data.

float32 inputs are multiplied with `Precision.HIGHEST` (six passes of the bfloat16 unit); bfloat16 products are
accumulated, and the softmax taken, in float32. Head sizes under 128 take the room of 128 in VMEM and in the copies of
q, k and v that lie heads-major.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lissom.ops import block_sizes
from lissom.ops.attention import kernel_layout as layout
from lissom.ops.attention import merging, tiles
from lissom.ops.attention import pallas_tpu_kernels as kernels
from lissom.ops.attention.masks import Full, Interval, Mask, without_padding
from lissom.ops.attention.sparse import BlockSparse, listed
from lissom.ops.interpreting import is_interpreting

LOCAL = True

KERNEL = "attention.pallas_tpu"

LANES = kernels.LANES
# A step costs about 0.35 us whatever it does (jax's Pallas documentation), which is about what the scores of 256 by 256
# take on a v5e: modelled, not measured.
STEP_SCORES = 256 * 256
# What a kernel may take of VMEM. The compiler's default limit is 16 MB, of the 16 to 128 MB that a chip has.
VMEM_BYTES = 16 * 2**20
# All lists of one kernel lie in SMEM, which has 1 MB; the compiler takes some of it.
SMEM_BYTES = 3 * 2**18


def check(q, k, v, mask: Mask, bias, sinks, *, scale: float, logit_softcap: float | None, return_lse: bool) -> None:
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"q is {q.dtype}; this kernel takes float32 and bfloat16.")
    if bias is not None:
        raise NotImplementedError("bias: its gradient is as large as all scores.")
    blocks = listed(mask)
    if blocks is not None:
        if not isinstance(blocks, BlockSparse):
            raise NotImplementedError("mask: single key columns are not tiles.")
        for name in ("block_q", "block_k"):
            if getattr(blocks, name) % LANES:
                raise NotImplementedError(f"mask: {name} {getattr(blocks, name)} is not a multiple of {LANES}.")
    tests = _tests(mask, q, k)
    block_q, block_k = _blocks(q, k, v, mask, tests)
    group = q.shape[2] // k.shape[2]
    of_queries, of_keys = -(-q.shape[1] // block_q), -(-k.shape[1] // block_k)
    if max(of_queries, of_keys) > kernels.MOST_OUTER or max(group * of_queries, of_keys) > kernels.MOST_INNER:
        raise NotImplementedError(f"{of_queries} by {of_keys} tiles and {group} heads a group are too many to number.")
    batch = max([1, *(table.shape[0] for test in tests for table in test if table is not None)])
    batch, heads = (batch, 1) if blocks is None else (max(batch, blocks.index.shape[0]), blocks.index.shape[1])
    size = 4 * batch * heads * max(_rooms(q, k, mask, tests, block_q, block_k))
    if size > SMEM_BYTES:
        raise NotImplementedError(
            f"mask: the lists of tiles of {batch} batch entries and {heads} heads take {size / 2**20:.2f} MB; scalar "
            f"memory has room for {SMEM_BYTES / 2**20:.2f}."
        )


def run(q, k, v, mask: Mask, bias, sinks, *, scale: float, logit_softcap: float | None, return_lse: bool):
    """out [batch, q_len, heads, v_dim], and lse [batch, heads, q_len] if asked for."""
    (batch, q_len, heads, _), (kv_len, kv_heads) = q.shape, k.shape[1:3]
    tests = _tests(mask, q, k)
    block_q, block_k = _blocks(q, k, v, mask, tests)
    padded_q, padded_k = layout.tiled(q_len, block_q), layout.tiled(kv_len, block_k)
    found = tiles.maps(mask, tests, q_len, kv_len, block_q, block_k)
    by_keys = tiles.Maps(*(layout.grouped(table, kv_heads, heads // kv_heads) for table in found.transposed()))
    room_q, room_k = _rooms(q, k, mask, tests, block_q, block_k)
    rules, tables = layout.stacked(tests, padded_q, padded_k)
    static = isinstance(found.some, np.ndarray)
    lists = found.some.shape[0] * found.some.shape[1]
    plan = kernels.Plan(
        rules=rules,
        scale=scale,
        softcap=logit_softcap,
        kv_len=kv_len if padded_k > kv_len else None,
        block_q=block_q,
        block_k=block_k,
        always_whole=static and bool((found.whole | ~found.some).all()),
        visits=batch * heads * (int(found.some.sum()) // lists if static else room_q),
        exact_out=sinks is not None,  # they scale it once more, and their gradient is a sum over all of it
        interpret=is_interpreting(),
    )
    valid, places = mask.valid_queries(q_len), tiles.order(mask, q_len)
    q, k, v = without_padding(mask, q, k, v)
    out, lse = kernels.attend(
        plan,
        layout.heads_major(q, places, padded_q),
        layout.heads_major(k, places, padded_k),
        layout.heads_major(v, places, padded_k),
        jax.tree.map(jnp.asarray, tables),
        _steps(found, room_q),
        _steps(by_keys, room_k),
    )
    out, lse = layout.tokens_major(out, places, q_len), layout.rows_back(lse[:, :, 0], places, q_len)
    if valid is not None:
        # It is 0 there already; this keeps whatever cotangent padding receives out of the gradients.
        out = jnp.where(valid[:, :, None, None], out, 0)
    if sinks is not None:
        out, lse = merging.with_sinks(out, lse, sinks.astype(lse.dtype))
        out = out.astype(v.dtype)
    return (out, lse) if return_lse else out


def _tests(mask: Mask, q, k) -> tuple[Interval, ...]:
    q_len, kv_len = q.shape[1], k.shape[1]
    return tiles.reordered(mask.intervals(q_len, kv_len), kv_len, tiles.order(mask, q_len))


def _blocks(q, k, v, mask: Mask, tests: tuple[Interval, ...]) -> tuple[int, int]:
    """Tile sizes (queries, keys): the fastest pair by a model, among those that fit.

    Sizes are multiples of the 128 lanes, along which tables and lse lie. All three kernels share one pair. Large tiles
    fetch keys less often and take fewer steps; small ones waste less at a mask's edges and at the ends. Time is
    modelled as the visited scores plus STEP_SCORES a step, as far as visits are known before the program runs; of
    equals, the one with more queries fetches fewer keys. A list of blocks is cut into tiles that divide its blocks.

    VMEM is reckoned as two tiles of scores in float32 (the compiler works through them in pieces), two buffers of all
    that is copied, sums and columns. The compiler agrees: it takes tiles of 1024 by 1024 with head sizes of 128 in
    float32 (reckoned 17.9 MB) and refuses 256 (25 MB).

    What was measured on the chip (ops/block_sizes.py) comes before the model.
    """
    times = _modelled_times(q, k, v, mask, tests)
    if not times:
        raise NotImplementedError(f"head sizes {q.shape[3]} and {v.shape[3]} leave no room for tiles in VMEM.")
    sizes = block_sizes.tuned(key_of(q, k, v, mask))
    measured = None if sizes is None else (sizes["block_q"], sizes["block_k"])
    return measured if measured in times else min(times, key=times.get)


def key_of(q, k, v, mask: Mask) -> dict:
    """Of a request in the table of block sizes."""
    lengths = {"q_len": q.shape[1], "kv_len": k.shape[1]}
    return block_sizes.key_of(KERNEL, mask, dtype=q.dtype, head_dim=q.shape[3], v_dim=v.shape[3], **lengths)


def candidates(q, k, v, mask: Mask) -> list[dict[str, int]]:
    """All sizes that fit, for scripts/tune_ops.py."""
    found = _modelled_times(q, k, v, mask, _tests(mask, q, k))
    return [{"block_q": block_q, "block_k": block_k} for block_q, block_k in found]


def _modelled_times(q, k, v, mask: Mask, tests: tuple[Interval, ...]) -> dict[tuple[int, int], tuple]:
    """(queries, keys) that fit -> what to take the least of."""
    blocks = listed(mask)
    sides = []
    for length, block in ((q.shape[1], blocks and blocks.block_q), (k.shape[1], blocks and blocks.block_k)):
        sizes = sorted({min(size, layout.tiled(length, LANES)) for size in (128, 256, 512, 1024)})
        sides.append([size for size in sizes if blocks is None or block % size == 0])
    width = q.dtype.itemsize * sum(layout.tiled(x.shape[3], LANES) for x in (q, v))
    columns = 2 + max(2 * len(tests), 1)
    times = {}
    for block_q in sides[0]:
        for block_k in sides[1]:
            # q comes with d_out, k with v; the gradients of the longer of them, with their sums in float32.
            longer = max(block_q, block_k)
            copied = 2 * width * (block_q + block_k + longer)
            sums = 4 * longer * (width // q.dtype.itemsize + columns * LANES)
            if copied + sums + 2 * 4 * block_q * block_k <= VMEM_BYTES:
                steps = int(_most_visits(q, k, mask, tests, block_q, block_k).sum())
                times[block_q, block_k] = (steps * (STEP_SCORES + block_q * block_k), -block_q)
    return times


def _most_visits(q, k, mask: Mask, tests: tuple[Interval, ...], block_q: int, block_k: int) -> np.ndarray:
    """For each tile of queries, at most so many tiles of keys, as far as it is known before the program runs: int
    [1 or batch, 1 or heads or kv_heads, query tiles]."""
    blocks = listed(mask)
    static = blocks is not None and isinstance(blocks.index, np.ndarray) and isinstance(blocks.counts(), np.ndarray)
    known = tuple(test for test in tests if test.static)
    some = tiles.maps(blocks if static else Full(), known, q.shape[1], k.shape[1], block_q, block_k).some
    return np.minimum(some.sum(3), tiles.most_tiles(mask, k.shape[1], block_k))


def _rooms(q, k, mask: Mask, tests: tuple[Interval, ...], block_q: int, block_k: int) -> tuple[int, int]:
    """The largest number of steps that a list by tiles of queries, and one by tiles of keys, can have. A tile that
    meets no other takes a step too, to write its zeros."""
    visits, group = _most_visits(q, k, mask, tests, block_q, block_k), q.shape[2] // k.shape[2]
    of_keys = -(-k.shape[1] // block_k)
    by_keys = min(group * int(visits.sum(2).max()) + of_keys, group * visits.shape[2] * of_keys)
    return int(np.maximum(visits, 1).sum(2).max()), by_keys


def _steps(found: tiles.Maps, room: int) -> kernels.Steps:
    """The steps of each list of `found` [b, h, outer tiles, inner tiles], one outer tile after the other."""
    some, whole = found
    xp = np if isinstance(some, np.ndarray) else jnp
    batch, heads, _, inner = some.shape
    visited = some | (~some.any(3, keepdims=True) & (np.arange(inner) == 0))
    flat = lambda table: xp.broadcast_to(table, some.shape).reshape(batch, heads, -1)
    count = flat(visited).sum(2, keepdims=True)
    # The places themselves are sorted: a stable argsort of flags takes the compiler 5 to 20 seconds longer.
    place = xp.sort(xp.where(flat(visited), np.arange(some[0, 0].size, dtype=np.int32), some[0, 0].size), 2)[..., :room]
    number = np.arange(place.shape[2])
    exists = number < count
    place = xp.take_along_axis(place, xp.minimum(number, count - 1), 2)
    runs, is_whole = (xp.take_along_axis(flat(table), place, 2) & exists for table in (some, whole))
    outer = place // inner
    changes = outer[..., 1:] != outer[..., :-1]
    end = xp.ones((batch, heads, 1), bool)
    first = xp.concatenate([end, changes], 2)
    last = xp.concatenate([changes, end], 2)
    # Behind the end of a list the last place is repeated: its last step is that of the list.
    last = xp.where(number == count - 1, True, last & exists)
    words = kernels.packed(first, last, runs, is_whole, outer, place % inner)
    longest = count.max()
    return kernels.Steps(jnp.asarray(words), int(longest) if xp is np else longest.astype(jnp.int32))
