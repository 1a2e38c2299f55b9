"""Decoding against a cache: dense, paged, split; every form against the float64 reference."""

import functools
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.ops import testing
from lissom.ops.attention import attention
from lissom.ops.decode_attention import OP, decode_attention, xla

LENGTHS = np.array([17, 3, 0], np.int32)
PAGE = 4


def problem(dtype=np.float32, q_len=2, seed=0):
    q, k, v, sinks = testing.normal(seed, (3, q_len, 4, 8), (3, 2, 20, 8), (3, 2, 20, 6), (4,), dtype=dtype)
    for x in (k, v):
        x[np.broadcast_to(np.arange(20) >= LENGTHS[:, None, None], x.shape[:3])] = np.nan
    return {"q": q, "k": k, "v": v, "sinks": sinks}


def paged(arrays, seed=0):
    """The same caches in pages that lie in any order, among others that hold NaN."""
    rng = np.random.default_rng(seed)
    places = rng.permutation(18)[:15].reshape(3, 5)
    pages = {}
    for name in ("k", "v"):
        x = np.moveaxis(arrays[name].reshape(3, 2, 5, PAGE, -1), 2, 1)
        pages[name] = np.full((18, *x.shape[2:]), np.nan, x.dtype)
        pages[name][places] = x
    table = np.where(np.arange(5) * PAGE < LENGTHS[:, None], places, -7)
    return {**arrays, **pages}, table.astype(np.int32)


def call(implementation, q, k, v, sinks, table=None, **options):
    return decode_attention(
        *(q, k, v), lengths=LENGTHS, sinks=sinks, block_table=table, return_lse=True, implementation=implementation,
        **options,
    )  # fmt: skip


OPTIONS = [{}, {"splits": 3}, {"window": 5}, {"logit_softcap": 3.0, "scale": 2.0}, {"splits": 40, "window": 1}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_dense(options, dtype):
    testing.check_forward(OP, functools.partial(call, **options), problem(dtype), "xla", dtype)


@pytest.mark.parametrize("lengths", [[10, 3, 0], [20, 19, 18], [7, 6, 6], [20, 20, 2]], ids=str)
@pytest.mark.parametrize("window", [None, 3])
def test_dense_in_parts(lengths, window, monkeypatch):
    """Half of the cache is used at most, or more; the last part begins earlier than its turn; NaN behind the tokens."""
    monkeypatch.setattr(xla, "PART_KEYS", 6)
    monkeypatch.setitem(globals(), "LENGTHS", np.array(lengths, np.int32))
    testing.check_forward(OP, functools.partial(call, window=window), problem(), "xla", np.float32)


def test_what_is_not_used_is_passed_over(monkeypatch):
    """An eighth of the cache takes an eighth of the parts, a window one or two; a full cache is one part."""
    seen = []
    square = xla.square

    def counting(tests, q, keys):
        jax.debug.callback(lambda at: seen.append(int(at)), keys.start)
        return square(tests, q, keys)

    monkeypatch.setattr(xla, "square", counting)
    q, k, v = testing.normal(5, (1, 1, 2, 4), (1, 2, 4096, 4), (1, 2, 4096, 4))
    run = jax.jit(functools.partial(decode_attention, implementation="xla"), static_argnames="window")
    for length, window, starts in (
        (512, None, [0, 256]), (513, None, [0, 256, 512]), (4096, 100, [3840]), (4000, 300, [3584, 3840]),
        (4096, None, [0]),
    ):  # fmt: skip
        seen.clear()
        jax.block_until_ready(run(q, k, v, lengths=np.array([length]), window=window))
        jax.effects_barrier()
        assert sorted(seen) == starts


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("options", [{"window": 5}, {"window": 1, "splits": 3}], ids=str)
def test_what_stands_before_the_window_is_never_used(options, is_paged, implementation):
    """Pages that were freed hold anything, and the table need not name them. Two queries at positions 15 and 16."""
    right = problem()
    spoilt = {name: x.copy() for name, x in right.items()}
    low = 17 - 2 - options["window"] + 1
    for name in "kv":
        spoilt[name][0, :, :low] = np.nan
    given, table = paged(spoilt) if is_paged else (spoilt, None)
    if is_paged:
        table[0, : low // PAGE] = -7
    expected, ours = call("reference", **right, **options), call(implementation, **given, table=table, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_paged(options, monkeypatch):
    monkeypatch.setattr(xla, "GATHERED_KEYS", 2 * PAGE)  # several steps of the loop, the last not whole
    arrays, table = paged(problem())
    testing.check_forward(OP, functools.partial(call, table=table, **options), arrays, "xla", np.float32)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_paged_is_dense(implementation):
    arrays = problem(seed=3)
    pages, table = paged(arrays, seed=3)
    dense, of_pages = call(implementation, **arrays), call(implementation, **pages, table=table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), dense, of_pages)


@settings(max_examples=20, deadline=None)
@given(
    q_len=st.integers(1, 4),
    lengths=st.tuples(*[st.integers(0, 20)] * 3),
    window=st.none() | st.integers(1, 8),
    splits=st.none() | st.integers(1, 6),
    part=st.sampled_from([xla.PART_KEYS, 6]),
    seed=st.integers(0, 99),
)
def test_any_lengths(q_len, lengths, window, splits, part, seed):
    """Against plain attention over the part of each cache that is filled."""
    q, k, v = testing.normal(seed, (3, q_len, 2, 4), (3, 1, 20, 4), (3, 1, 20, 4))
    with mock.patch.object(xla, "PART_KEYS", part):
        ours, lse = decode_attention(
            q, k, v, lengths=np.array(lengths), window=window, splits=splits, return_lse=True, implementation="xla"
        )
    for b, n in enumerate(lengths):
        for i in range(q_len):
            at = n - q_len + i
            low = 0 if window is None else max(at - window + 1, 0)
            if at < 0:
                assert (ours[b, i] == 0).all() and (lse[b, :, i] == -np.inf).all()
                continue
            keys, values = (jnp.swapaxes(x[b : b + 1, :, low : at + 1], 1, 2) for x in (k, v))
            alone = attention(q[b : b + 1, i : i + 1], keys, values, implementation="reference")
            np.testing.assert_allclose(ours[b, i], alone[0, 0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16])
def test_lengths_of_small_integers(kind):
    """Fewer tokens than queries: the first queries stand before the first key."""
    q, k, v = testing.normal(4, (2, 3, 2, 4), (2, 1, 20, 4), (2, 1, 20, 4))
    exact = decode_attention(q, k, v, lengths=np.array([1, 20]), implementation="reference")
    assert (exact[0, :2] == 0).all()
    for name in ("reference", "xla"):
        ours = decode_attention(q, k, v, lengths=np.array([1, 20], kind), implementation=name)
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-6)


def test_a_dense_cache_is_not_copied():
    cache = (8, 4, 4096, 64)
    shapes = [(8, 1, 4, 64), cache, cache]
    arrays = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    run = lambda q, k, v, n: decode_attention(q, k, v, lengths=n, implementation="xla")
    plan = jax.jit(run).lower(*arrays, jax.ShapeDtypeStruct((8,), np.int32)).compile().memory_analysis()
    assert plan.temp_size_in_bytes <= np.prod(cache) * 4 / 4


def test_pages_are_gathered_a_few_at_a_time():
    pages = (64, 4, 128, 64)
    arrays = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((2, 1, 4, 64), pages, pages)]
    numbers = [jax.ShapeDtypeStruct(shape, np.int32) for shape in ((2,), (2, 32))]
    run = lambda q, k, v, n, t: decode_attention(q, k, v, lengths=n, block_table=t, implementation="xla")
    plan = jax.jit(run).lower(*arrays, *numbers).compile().memory_analysis()
    assert plan.temp_size_in_bytes <= np.prod(pages) * 4  # two caches of 32 pages each would be twice that


PAGES = (5, 2, 4, 8)
PAGED = {"k": PAGES, "v": PAGES, "block_table": np.array([[0, 1, 5, 9], [4, 3, 2, 1], [-1, 0, 0, 0]])}


def test_entries_that_nobody_sees_may_be_anything():
    """Behind the length, and before a window: pages 5 and -1 do not exist."""
    q, k, v = testing.normal(5, (3, 1, 4, 8), PAGES, PAGES)
    call = lambda table: decode_attention(
        q, k, v, lengths=np.array([8, 16, 6]), block_table=table, window=2, implementation="xla"
    )
    np.testing.assert_array_equal(call(PAGED["block_table"]), call(np.maximum(PAGED["block_table"], 0) % 5))


@pytest.mark.parametrize("window", [2**31, sys.maxsize])
def test_a_window_beyond_all_positions_is_none(window):
    q, k, v = testing.normal(5, (3, 1, 4, 8), *[(3, 2, 20, 8)] * 2)
    for name in ("xla", "reference"):
        call = lambda window, name=name: decode_attention(
            q, k, v, lengths=np.array([20, 0, 7]), window=window, implementation=name
        )
        np.testing.assert_array_equal(call(window), call(None))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"q": (3, 1, 4)}, "q has 4 dimensions"),
        ({"k": (2, 2, 20, 8)}, "k is .batch=3"),
        ({"v": (3, 2, 19, 8)}, "v agrees with k"),
        ({"q": (3, 1, 3, 8)}, "q has 3 heads"),
        ({"lengths": np.zeros(2, np.int32)}, "lengths is an integer array .batch=3."),
        ({"lengths": np.zeros(3)}, "lengths is an integer array .batch=3., got float64"),
        ({"lengths": [1, 2, 3]}, "lengths is an integer array .batch=3., got .1, 2, 3."),
        ({"block_table": np.zeros((2, 5), np.int32)}, "block_table is an integer array .batch=3, most_pages."),
        ({"block_table": np.zeros(3, np.int32)}, "block_table is an integer array .batch=3, most_pages."),
        ({"block_table": np.zeros((3, 0), np.int32)}, "block_table is an integer array .batch=3, most_pages."),
        ({"scale": np.ones(1)}, "scale is a finite Python number"),
        ({"window": True}, "window is an int of at least 1"),
        ({"window": 0}, "window is an int of at least 1"),
        ({"splits": 1.5}, "splits is an int of at least 1"),
        ({"logit_softcap": -1.0}, "logit_softcap is a positive"),
        ({"sinks": (3,)}, "sinks is a float array .heads=4."),
        ({"q": [1.0]}, r"q is an array, got \[1.0\]."),
        ({"k": None}, "k is an array, got None."),
        ({"q": jnp.zeros((3, 1, 4, 8), jnp.float8_e5m2)}, "q is bfloat16, float16, float32 or float64"),
        ({"v": jnp.zeros((3, 2, 20, 8), jnp.bfloat16)}, "v has dtype bfloat16, q has float32: cast them to one"),
        ({"k": (3, 20, 2, 8), "v": (3, 20, 2, 8)}, "Heads come before positions: k is .batch, kv_heads, length"),
        ({"return_lse": 1}, "return_lse is True or False, got 1."),
        ({"lengths": np.array([3, 21, 2])}, "lengths is between 0 and 20, the room in the cache, got 21"),
        ({"lengths": np.array([3, 2, -1])}, "lengths is between 0 and 20, the room in the cache, got -1"),
        ({"lengths": np.array([9, 0, 0]), **PAGED}, r"block_table names pages between 0 and 4 .*, got 5 at \[0, 2\]"),
        ({"lengths": np.array([0, 0, 1]), **PAGED}, r"block_table names pages between 0 and 4 .*, got -1 at \[2, 0\]"),
        ({"lengths": np.array([0, 17, 0]), **PAGED}, "lengths is between 0 and 16, the room in the cache, got 17"),
    ],
)
def test_a_wrong_argument_is_named(arguments, words):
    given_ = {"q": (3, 1, 4, 8), "k": (3, 2, 20, 8), "v": (3, 2, 20, 8), "lengths": np.zeros(3, np.int32), **arguments}
    given_ = {n: jnp.zeros(a) if isinstance(a, tuple) else a for n, a in given_.items()}
    with pytest.raises(ValueError, match=words):
        decode_attention(given_.pop("q"), given_.pop("k"), given_.pop("v"), **given_)
