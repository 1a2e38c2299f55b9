"""The TPU kernel of decode_attention in jax's interpreter of a TPU, against the float64 reference. That it compiles for
one is tested in test_tpu_compile_decode.py."""

import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from lissom.ops import dispatch, testing
from lissom.ops.decode_attention import OP, decode_attention, pallas_tpu
from lissom.ops.interpreting import interpreting
from tests.ops.traced import grids

BF16, F32 = jnp.bfloat16, np.float32
CAPPED = {"logit_softcap": 3.0, "scale": 2.0}

# name: dtype, q_len, heads, kv_heads, head_dim, v_dim, lengths, page size or None for dense, heads of a block, options.
# Blocks are of 128 keys, or one page. A size of 128 lies as it is written, others are turned. Every pair of (dense or
# paged, how k lies, how v lies), dtype, one or more of tokens, heads and blocks of heads, and options stands somewhere.
CASES = {
    "dense": (F32, 1, 4, 2, 128, 128, (300, 3, 0), None, 2, {}),
    "dense_bf16": (BF16, 3, 4, 2, 128, 128, (384, 128, 1), None, 1, {"splits": 2}),
    "dense_turned": (F32, 3, 4, 2, 8, 6, (300, 129, 0), None, 2, CAPPED),
    "dense_turned_bf16": (BF16, 1, 2, 2, 64, 64, (257, 2, 384), None, 2, {"window": 100}),
    "dense_latent": (BF16, 2, 3, 1, 72, 128, (300, 40, 0), None, 1, {"splits": 40}),
    "dense_empty_parts": (F32, 1, 2, 1, 128, 8, (0, 380, 100), None, 1, {"splits": 3, "window": 5}),
    "paged": (F32, 2, 4, 2, 128, 128, (300, 3, 0), 8, 2, {"window": 140}),
    "paged_odd": (F32, 1, 3, 3, 128, 128, (375, 47, 48), 24, 3, {"splits": 3}),
    "paged_bf16": (BF16, 1, 8, 2, 128, 128, (300, 16, 17), 16, 1, CAPPED),
    "paged_turned": (BF16, 3, 4, 2, 16, 24, (300, 2, 0), 128, 2, {"splits": 2, **CAPPED}),
    "paged_turned_window": (F32, 1, 4, 4, 8, 128, (384, 100, 0), 128, 4, {"window": 1}),
    "paged_large": (BF16, 2, 2, 1, 128, 40, (300, 256, 513), 256, 1, {}),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, capfd):
    """Interpreted, with a search for races, which are reported on stdout."""
    monkeypatch.setattr(pallas_tpu, "MOST_SCORES", 0)
    monkeypatch.setattr(pallas_tpu, "DENSE_PAGE", 128)
    monkeypatch.setattr(
        pallas_tpu.pltpu, "InterpretParams", functools.partial(pltpu.InterpretParams, detect_races=True)
    )
    with interpreting():
        yield
    assert "RACE" not in capfd.readouterr().out


def problem(name, seed=0):
    """Arrays, with NaN wherever no sequence has a token, and what `decode_attention` takes beside them."""
    dtype, q_len, heads, kv_heads, head_dim, v_dim, lengths, page, _, options = CASES[name]
    rng = np.random.default_rng(seed)
    length = 384 if page is None else math.ceil(max(lengths) / page) * page
    shapes = ((3, q_len, heads, head_dim), (3, kv_heads, length, head_dim), (3, kv_heads, length, v_dim), (heads,))
    q, k, v, sinks = testing.normal(seed, *shapes, dtype=dtype)
    ends, at = np.array(lengths)[:, None, None], np.arange(length)
    low = np.maximum(ends - q_len - options.get("window", 10**6) + 1, 0)
    for x in (k, v):
        x[np.broadcast_to((at < low) | (at >= ends), x.shape[:3])] = np.nan
    options = {"lengths": np.array(lengths, np.int32), **options}
    if page is not None:
        pages = length // page
        places = rng.permutation(3 * pages + 2)[: 3 * pages].reshape(3, pages)
        k, v = (in_pages(x, places, page) for x in (k, v))
        start = np.arange(pages) * page
        used = (start < ends[:, 0]) & (start + page > low[:, 0])
        options["block_table"] = np.where(used, places, np.where(np.arange(pages) % 2, -7, 10**6)).astype(np.int32)
    return {"q": q, "k": k, "v": v, "sinks": sinks}, options


def in_pages(x, places, page):
    """[3, kv_heads, length, d] as pages, among others that hold NaN."""
    batch, kv_heads, _, width = x.shape
    pages = np.full((places.size + 2, kv_heads, page, width), np.nan, x.dtype)
    pages[places] = np.moveaxis(x.reshape(batch, kv_heads, -1, page, width), 2, 1)
    return pages


def call(implementation, q, k, v, sinks=None, **options):
    return decode_attention(q, k, v, sinks=sinks, return_lse=True, implementation=implementation, **options)


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name, monkeypatch):
    monkeypatch.setattr(pallas_tpu, "MOST_HEADS", CASES[name][8])
    arrays, options = problem(name)
    if sum(map(ord, name)) % 2:  # half of the cases without sinks
        del arrays["sinks"]
    with dispatch.record() as choices:
        testing.check_forward(OP, functools.partial(call, **options), arrays, "pallas_tpu", CASES[name][0])
    assert ("decode_attention", "pallas_tpu", None) in choices


@pytest.mark.parametrize("name", CASES)
def test_no_copy_overwrites_what_is_still_read(name, monkeypatch):
    """A copy may be done as soon as it is started; elsewhere the interpreter does it when it is waited for."""
    eager = functools.partial(pltpu.InterpretParams, dma_execution_mode="eager")
    monkeypatch.setattr(pallas_tpu.pltpu, "InterpretParams", eager)
    arrays, options = problem(name, seed=1)
    testing.check_forward(OP, functools.partial(call, **options), arrays, "pallas_tpu", CASES[name][0])


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("splits", [None, 2])
def test_any_lengths(window, splits):
    """One program for all lengths, which are numbers of the device."""
    q, k, v = testing.normal(5, (3, 3, 2, 128), (3, 1, 320, 128), (3, 1, 320, 128))
    run = lambda name: jax.jit(lambda n: call(name, q, k, v, lengths=n, window=window, splits=splits))
    ours, right = run("pallas_tpu"), run("reference")
    rng = np.random.default_rng(0)
    for lengths in ([0, 0, 0], [1, 2, 3], [128, 129, 127], [320, 0, 256], *rng.integers(0, 321, (3, 3))):
        for a, b in zip(ours(np.array(lengths)), right(np.array(lengths))):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=str(lengths))


def test_a_length_beyond_the_cache_reads_nothing_outside():
    """Not allowed by the contract, but not looked for in jax arrays, and on a TPU a copy from outside may take the
    machine down."""
    q, k, v = testing.normal(6, (2, 1, 2, 128), (2, 1, 256, 128), (2, 1, 256, 128))
    ours, right = (
        decode_attention(q, k, v, lengths=jnp.array(lengths), implementation="pallas_tpu")
        for lengths in ([10**6, 9], [256, 9])
    )
    np.testing.assert_array_equal(ours, right)


def test_the_two_cores_of_a_chip_share_the_items():
    """3 sequences by 2 blocks of heads are 6 items; 3 by 1 are odd, and by 2 parts again 6."""
    q, k = np.ones((3, 1, 16, 128), F32), np.ones((3, 16, 256, 128), F32)
    run = lambda splits, heads: (
        lambda q, k: call("pallas_tpu", q, k[:, :heads], k[:, :heads], lengths=np.array([1, 2, 3]), splits=splits)
    )
    assert grids(run(None, 16), q, k) == [(2, 3)]
    assert grids(run(None, 8), q, k) == [(1, 3)]
    assert grids(run(2, 8), q, k) == [(2, 3)]


class Recorded:
    """A reference whose parts are known by their indices."""

    @property
    def at(self):
        return self

    def __getitem__(self, place):
        return place


def copied(plan: pallas_tpu.Plan, lengths, table, monkeypatch) -> list[tuple]:
    """(place in k, place in the buffer) of each copy that is started, in all items."""
    monkeypatch.setattr(pallas_tpu.pltpu, "make_async_copy", lambda source, to, semaphore: (source, to, semaphore[1]))
    found, memory = [], Recorded()
    keep = lambda copy: found.append(copy[:2]) if copy[2] == 0 else None
    with jax.disable_jit():
        for number in range(plan.items):
            item = pallas_tpu._item(plan, lengths, number)
            for block in range(int(item.first), max(int(item.stop), int(item.first) + 1)):
                pallas_tpu._copies(plan, table, ((memory, memory),) * 2, memory, item, block, 0, keep)
    return found


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(("window", "firsts"), [(None, [0, 0, 0, 0]), (33, [16, 0, 0, 2])])
def test_pages_that_are_seen_are_copied_once_and_no_others(window, firsts, splits, monkeypatch):
    """Of pages of 16: 290 tokens are 19 pages, 16 are 1, 70 are 5. The first of two new tokens sees from n - 2 - 33 + 1
    on: position 256 of 290, page 16; and 36 of 70, page 2."""
    plan = pallas_tpu.Plan(
        batch=4, q_len=2, kv_heads=4, rows=8, heads=2, page=16, block=128, most_pages=20, turned=(False, False),
        splits=splits, window=window, scale=1.0, softcap=None, interpret=True,
    )  # fmt: skip
    table = np.arange(1000, 1080, dtype=np.int32)
    found = copied(plan, np.array([290, 16, 0, 70], np.int32), table, monkeypatch)
    pages = Counter((int(page), int(heads.start)) for (page, heads), _ in found)
    expected = {
        (1000 + 20 * sequence + page, heads): 1
        for sequence, (first, end) in enumerate(zip(firsts, [19, 1, 0, 5]))
        for page in range(first, end)
        for heads in (0, 2)
    }
    assert pages == expected
    for (page, _), (_, _, tokens) in found:
        assert (int(tokens.start), tokens.size) == (16 * ((page - 1000) % 20 % 8), 16)


@pytest.mark.parametrize(
    ("name", "mapped"),
    [
        ("dense", ("q", "lengths")),
        ("dense_turned", ("k", "v")),
        ("dense_bf16", ("lengths",)),
        ("paged", ("q", "lengths", "block_table")),
        ("paged_odd", ("k", "q")),
        ("paged_turned", ("q",)),
    ],
)
def test_vmap_equals_a_loop_and_is_one_kernel(name, mapped):
    arrays, options = problem(name)
    # Filled to the full: other lengths meet no NaN.
    arrays = {n: np.nan_to_num(x, nan=0.5) for n, x in arrays.items()}
    statics = {n: x for n, x in options.items() if not isinstance(x, np.ndarray)}
    arrays |= {n: x for n, x in options.items() if isinstance(x, np.ndarray)}
    change = {"lengths": lambda x: x // 2 + 1, "block_table": lambda x: x[::-1]}
    stacked = {n: np.stack([x, change.get(n, lambda x: x[::-1])(x)]) if n in mapped else x for n, x in arrays.items()}
    run = functools.partial(call, "pallas_tpu", **statics)
    axes = {n: 0 if n in mapped else None for n in arrays}
    together = jax.vmap(lambda arrays: run(**arrays), in_axes=(axes,))
    assert len(grids(together, stacked)) == 1
    results = jax.jit(together)(stacked)
    for i in range(2):
        # As jax arrays: other lengths meet entries that name no page, which would be refused.
        alone = run(**{n: jnp.asarray(x[i] if n in mapped else x) for n, x in stacked.items()})
        for a, b in zip(results, alone):
            # Two programs, so two orders of the same sums: what is rounded to bfloat16 may be one step apart.
            np.testing.assert_allclose(a[i], b, rtol=max(1e-5, float(jnp.finfo(b.dtype).eps)), atol=1e-6)


@pytest.mark.parametrize("name", ["dense", "paged"])
def test_on_two_devices(name):
    """Heads are split, and of a dense cache the batch too; pages are whole on each device but for the heads."""
    arrays, options = problem(name)
    arrays = {n: x[:2] if n == "q" or (n in "kv" and name == "dense") else x for n, x in arrays.items()}
    options = {n: x[:2] if isinstance(x, np.ndarray) else x for n, x in options.items()}
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    run = functools.partial(call, "pallas_tpu", **options)
    alone = run(**arrays)
    with dispatch.partition(mesh, batch="data", heads="tensor"):
        together = jax.jit(lambda arrays: run(**arrays))(arrays)
    for a, b in zip(together, alone):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_pages_of_a_dense_cache(monkeypatch):
    """(page, keys of a block) by length: of 1000 = 8 * 125, 200 is no part of 1024 keys, but 5 * 128 are 16 of 40."""
    monkeypatch.setattr(pallas_tpu, "DENSE_PAGE", 256)
    expected = {4096: (256, 256), 384: (192, 384), 1000: (40, 640), 1016: (8, 128)}
    for length, (page, block) in expected.items():
        q, k = np.ones((1, 1, 1, 128), F32), np.ones((1, 1, length, 128), F32)
        assert pallas_tpu._sizes(q, k, k, None) == (page, 1, block), length


def refusal(q, k, v, table=None):
    arrays = [jax.ShapeDtypeStruct(*x) for x in (q, k, v)]
    numbers = [jax.ShapeDtypeStruct((q[0][0],), np.int32)] + (
        [] if table is None else [jax.ShapeDtypeStruct(table, np.int32)]
    )
    run = lambda q, k, v, n, t=None: call("pallas_tpu", q, k, v, lengths=n, block_table=t)
    with pytest.raises(NotImplementedError) as error:
        jax.eval_shape(run, *arrays, *numbers)
    return str(error.value)


def test_what_cannot_be_done_is_refused():
    f16 = [((2, 1, 2, 128), np.float16)] + [((2, 2, 256, 128), np.float16)] * 2
    assert "q is float16" in refusal(*f16)
    dense = lambda length, width, dtype: [((2, 1, 2, width), dtype)] + [((2, 2, length, width), dtype)] * 2
    assert "k: caches of 264 tokens by 128 numbers do not lie in whole tiles" in refusal(*dense(264, 128, BF16))
    assert "a multiple of 16 tokens" in refusal(*dense(264, 128, BF16))
    assert "a multiple of 8 tokens" in refusal(*dense(260, 128, F32))
    assert "a multiple of 128 tokens" in refusal(*dense(264, 64, F32))
    paged = [((2, 1, 2, 64), BF16)] + [((9, 2, 16, 64), BF16)] * 2
    assert "k: pages of 16 tokens by 64 numbers" in refusal(*paged, (2, 4))
    split = [((2, 1, 2, 128), BF16), ((9, 2, 16, 128), BF16), ((9, 2, 16, 64), BF16)]
    assert "v: pages of 16 tokens by 64 numbers" in refusal(*split, (2, 4))
    table = [((256, 1, 2, 128), BF16)] + [((9, 2, 16, 128), BF16)] * 2
    assert "scalar memory has room for 0.75" in refusal(*table, (256, 1024))
    many = [((2, 64, 128, 128), BF16)] + [((2, 1, 256, 128), BF16)] * 2
    assert "8192 queries a key head and blocks of 128 keys, with head sizes 128 and 128, do not fit" in refusal(*many)


def test_a_sequence_of_names_passes_over_what_it_refuses():
    for width, length, expected in (
        (128, 256, "pallas_tpu"),
        (128, 264, "xla"),
        (64, 256, "pallas_tpu"),
        (64, 264, "xla"),
    ):
        cache = jax.ShapeDtypeStruct((2, 2, length, width), BF16)
        with dispatch.record() as choices:
            jax.eval_shape(
                lambda q, k, v, n: decode_attention(q, k, v, lengths=n, implementation=("pallas_tpu", "xla")),
                jax.ShapeDtypeStruct((2, 1, 2, width), BF16), cache, cache, jax.ShapeDtypeStruct((2,), np.int32),
            )  # fmt: skip
        assert {c.implementation for c in choices} == {expected}, (width, length)


def test_a_gradient_is_refused():
    arrays, options = problem("dense")
    with pytest.raises(NotImplementedError, match="forward only"):
        jax.grad(lambda q: call("pallas_tpu", **{**arrays, "q": q}, **options)[0].sum())(jnp.asarray(arrays["q"]))
