"""The TPU kernels of the grouped matmul, in jax's interpreter of a TPU, where memory that nobody wrote is NaN: blocks
that groups share, that overhang, that no group has. test_tpu_compile_grouped_matmul.py has the kernels compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.ops import testing
from lissom.ops.grouped_matmul import OP, grouped_matmul, pallas_tpu, transposed_grouped_matmul
from lissom.ops.grouped_matmul.cases import REAL, TINY, sizes
from lissom.ops.grouped_matmul.pallas_tpu import Blocks
from lissom.ops.interpreting import interpreting
from tests.ops.traced import grids

BF16, F32 = jnp.bfloat16, np.float32

# Several of each axis, the last of which overhangs. Tiles of a TPU are larger: the interpreter has none.
SMALL = Blocks(16, 4, 5)


@pytest.fixture(autouse=True)
def interpreted():
    # An interpreted kernel is a long program that runs once or twice.
    jax.config.update("jax_disable_most_optimizations", True)
    with interpreting():
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def in_blocks(patch, small=SMALL):
    for name in ("rows_blocks", "sums_blocks"):
        patch.setattr(pallas_tpu, name, lambda m, k, n, *_: Blocks(*map(min, (m, k, n), small)))


rows = functools.partial(grouped_matmul, implementation="pallas_tpu")
sums = functools.partial(transposed_grouped_matmul, implementation="pallas_tpu")


def inputs(case, dtype=F32):
    x, w, y = testing.normal(0, (case.m, case.k), (case.g, case.k, case.n), (case.m, case.n), dtype=dtype)
    return x, w, y, jnp.asarray(sizes(case))


@functools.cache
def programs():
    """Both forms for 45 rows in 5 groups of k = 6, n = 9, in small blocks; compiled once, for any sizes of groups."""
    x, w, y, of = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs(TINY["random"]))
    with interpreting(), pytest.MonkeyPatch.context() as patch:
        in_blocks(patch)
        return jax.jit(rows).lower(x, w, of).compile(), jax.jit(sums).lower(x, y, of).compile()


# Cases in small blocks, with their grids: (columns, items, parts of k) of `rows`, (rows, columns, items) of `sums`. In
# the others each axis is one block, which all groups share.
IN_BLOCKS = {
    "random": ((2, 7, 2), (2, 2, 7)),
    "some_empty": ((1, 8, 2), (2, 1, 8)),
}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", TINY)
def test_equals_reference(name, dtype, monkeypatch):
    x, w, y, of = inputs(TINY[name], dtype)
    if name in IN_BLOCKS:
        in_blocks(monkeypatch)
        assert grids(lambda: (rows(x, w, of), sums(x, y, of))) == list(IN_BLOCKS[name])
    both = lambda i, x, w, y: (
        grouped_matmul(x, w, of, implementation=i),
        transposed_grouped_matmul(x, y, of, implementation=i),
    )
    testing.check_case(OP, both, {"x": x, "w": w, "y": y}, "pallas_tpu", dtype)


# What the spreads of TINY may not meet, in 45 rows of blocks of 16: ends of groups at ends of blocks, groups of many
# blocks, groups that begin where x ends, no groups at all, blocks that no group has, too many rows.
SIZES = {
    "at_ends": (16, 16, 13, 0, 0),
    "whole": (32, 0, 13, 0, 0),
    "empty_first": (0, 0, 0, 0, 45),
    "empty_last": (45, 0, 0, 0, 0),
    "nothing": (0, 0, 0, 0, 0),
    "two_blocks_of_none": (3, 1, 0, 2, 0),
    "two_whole_blocks_of_none": (0, 10, 0, 6, 0),
    "single_rows": (1, 1, 1, 1, 1),
    "beyond": (20, 5, 40, 7, 9),
    "far_beyond": (0, 1000, 0, 1000, 0),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    x, w, y, _ = inputs(TINY["random"])
    of = jnp.asarray(SIZES[name])
    of_rows, of_sums = programs()
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    compare(of_rows(x, w, of), grouped_matmul(x, w, of, implementation="reference"))
    compare(of_sums(x, y, of), transposed_grouped_matmul(x, y, of, implementation="reference"))


def test_a_nan_stays_in_its_row_and_group():
    x, w, y, of = inputs(TINY["random"])
    of_rows, of_sums = programs()
    for row in (3, 44):
        bad, other = x.copy(), y.copy()
        bad[row] = other[row] = np.nan
        own = int(np.searchsorted(np.cumsum(of), row, side="right"))
        found = np.isnan(of_rows(bad, w, of)).any(1)
        assert np.flatnonzero(found).tolist() == [row]
        for pair in ((bad, y), (x, other)):
            found = np.isnan(of_sums(*pair, of)).any((1, 2))
            assert np.flatnonzero(found).tolist() == [own]


def test_a_nan_in_a_matrix_stays_in_its_group():
    x, w, _, _ = inputs(TINY["random"])
    w[2] = np.nan
    found = np.isnan(np.asarray(programs()[0](x, w, jnp.array([10, 9, 5, 20, 1])))).any(1)
    assert np.flatnonzero(found).tolist() == [19, 20, 21, 22, 23]


def test_what_is_behind_the_groups_is_not_seen():
    x, w, y, _ = inputs(TINY["random"])
    of, (of_rows, of_sums) = jnp.array([3, 0, 7, 8, 2]), programs()
    x[20:] = np.nan
    found = np.asarray(of_rows(x, w, of))
    assert (found[20:] == 0).all() and not np.isnan(found).any()
    assert not np.isnan(np.asarray(of_sums(x, y, of))).any()


def test_activations(monkeypatch):
    """Forward, where the kernel applies them; a forward pass that is differentiated takes the product of the kernel."""
    in_blocks(monkeypatch)
    x, w, _, of = inputs(TINY["short"])
    f = lambda i, x, w: [grouped_matmul(x, w, of, activation=a, implementation=i) for a in ("relu", "gelu", "silu")]
    testing.check_forward(OP, f, {"x": x, "w": w}, "pallas_tpu", F32)


def test_gradients_through_an_activation():
    x, w, _, of = inputs(TINY["short"])
    f = lambda i, x, w: grouped_matmul(x, w, of, activation="silu", implementation=i)
    testing.check_case(OP, f, {"x": x, "w": w}, "pallas_tpu", F32)


def test_a_wider_result():
    x, w, _, of = inputs(TINY["equal"], BF16)
    y = jax.jit(functools.partial(rows, preferred_element_type=F32))(x, w, of)
    assert y.dtype == F32
    theirs = grouped_matmul(x, w, of, preferred_element_type=F32, implementation="reference")
    np.testing.assert_allclose(y, theirs, rtol=1e-5, atol=1e-5)


REFUSED = {
    "x is float16": lambda x, w, of: (x.astype(np.float16), w.astype(np.float16), of, {}),
    "preferred_element_type is float16": lambda x, w, of: (x, w, of, {"preferred_element_type": np.float16}),
    "group_sizes: tables for 12 rows in 60000 groups take 0.92 MB; scalar memory has room for 0.75": lambda x, w, of: (
        x,
        jax.ShapeDtypeStruct((60000, *w.shape[1:]), F32),
        jax.ShapeDtypeStruct((60000,), np.int32),
        {},
    ),
}


@pytest.mark.parametrize("said", REFUSED)
def test_refusals(said):
    x, w, _, of = inputs(TINY["equal"])
    x, w, of, options = REFUSED[said](x, w, of)
    with pytest.raises(NotImplementedError, match=said):
        jax.eval_shape(functools.partial(rows, **options), x, w, of)


# ---- items and blocks, of which no kernel is run -----------------------------------------------------------------


@pytest.mark.parametrize(("block", "m", "g"), [(4, 30, 5), (1, 7, 3), (5, 5, 4), (8, 64, 1)])
def test_items_are_the_pairs_that_meet(block, m, g):
    """The tables against sets made by hand, for sizes drawn at random, some of which sum to more than m."""
    rng = np.random.default_rng(m)
    blocks = -(-m // block)
    make = jax.jit(lambda of, of_groups: pallas_tpu._items(of, m, block, of_groups), static_argnums=1)
    for _ in range(40):
        of = rng.integers(0, 3 * m // g, g) * rng.integers(0, 2, g)
        ends = np.minimum(np.cumsum(of), m)
        starts = np.concatenate([[0], ends[:-1]])
        pairs = list(dict.fromkeys((i // block, j) for j in range(g) for i in range(starts[j], ends[j])))
        for of_groups in (False, True):
            items = pallas_tpu.Items(*(np.asarray(table) for table in make(jnp.asarray(of, jnp.int32), of_groups)))
            assert len(items.word) == blocks + g - 1 and items.block.min() >= 0 and items.block.max() < blocks
            item = pallas_tpu._item(items.word)
            found = list(zip(items.block[item.has_rows].tolist(), items.group[item.has_rows].tolist()))
            assert found == pairs
            for (i, j), low, high in zip(found, item.low[item.has_rows], item.high[item.has_rows]):
                assert (low, high) == (max(starts[j] - i * block, 0), min(ends[j] - i * block, block))
            result = items.group if of_groups else items.written
            # Each block of the result once, all its items together, the first and the last of which know it.
            assert list(dict.fromkeys(result.tolist())) == list(range(g if of_groups else blocks))
            assert (np.diff(result) >= 0).all()
            assert result[item.is_first].tolist() == list(range(g if of_groups else blocks))
            if of_groups:
                assert result[item.is_last].tolist() == list(range(g))
                assert all(np.flatnonzero(item.is_last) >= np.flatnonzero(item.is_first))
                behind = items.word[np.flatnonzero(item.is_last)[-1] + 1 :]
            else:
                assert (result[item.has_rows] == items.block[item.has_rows]).all()
                behind = items.word[len(found) :] & ~(1 << pallas_tpu.FIRST_AT)
            # What does not exist changes nothing and moves no block of the operands.
            assert not behind.any()
            if len(behind):
                assert len({*zip(items.block[-len(behind) - 1 :], items.group[-len(behind) - 1 :])}) == 1 or not found


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", REAL)
def test_blocks_are_of_whole_tiles(name, dtype):
    case, dtype = REAL[name], jnp.dtype(dtype)
    for f in (pallas_tpu.rows_blocks, pallas_tpu.sums_blocks):
        for m, k, n in ((case.m, case.k, case.n), (case.m, case.n, case.k), (case.m + 1, case.k + 1, case.n + 1)):
            blocks = f(m, k, n, case.g, dtype, dtype)
            for size, whole, tile in zip(blocks, (m, k, n), (32 // dtype.itemsize, 128, 128)):
                assert 0 < size <= whole and (size == whole or size % tile == 0)


def test_a_matrix_is_read_once_for_its_group():
    """In bfloat16, of Qwen3's experts: whole along k, and in two parts along n, one for each core of a v5p."""
    case = REAL["qwen3_up"]
    blocks = pallas_tpu.rows_blocks(case.m, case.k, case.n, case.g, jnp.dtype(BF16), jnp.dtype(BF16))
    assert (blocks.k, 2 * blocks.n) == (case.k, case.n)
