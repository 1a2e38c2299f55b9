"""The Hopper kernel of decoding, interpreted against the float64 reference, and lowered for CUDA. No GPU is needed, and
none is used: what the interpreter does not see is said in `ops/attention/pallas_gpu.py`."""

import functools
import re
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.ops import dispatch, testing
from lissom.ops.decode_attention import OP, decode_attention, pallas_gpu
from lissom.ops.interpreting import interpreting
from tests.ops.traced import grids, stores

LEAST = pallas_gpu.Block(64, 2)  # so that rings are shorter than lists and stages are used again


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    room: int
    q_len: int = 1
    heads: tuple[int, int] = (2, 1)
    sizes: tuple[int, int] = (64, 64)
    dtype: type = jnp.bfloat16
    page: int | None = None
    sinks: bool = False
    block: pallas_gpu.Block | None = LEAST
    """None: the one that `_block` takes."""
    options: dict = field(default_factory=dict)


# Lengths where a sequence is empty, shorter than its queries, ends within a tile, at its end, and one behind it.
CASES = {
    "dense": Case((130, 0, 64), 200),
    "as_chosen": Case((517, 130), 520, heads=(4, 2), block=None),
    "as_chosen_for_large_heads": Case((200,), 200, q_len=3, heads=(8, 2), sizes=(128, 128), block=None),
    "largest_heads": Case((140,), 144, sizes=(256, 192), dtype=jnp.float16, block=None),
    "split": Case((321, 1, 65), 328, q_len=3, heads=(2, 2), dtype=jnp.float16, options={"splits": 3}),
    "more_parts_than_tiles": Case((70, 200), 200, q_len=2, options={"splits": 40}),
    "more_rows_than_a_product": Case((66, 130), 136, q_len=2, heads=(40, 1)),
    "softcap_and_sinks": Case((90, 0), 96, heads=(4, 2), sinks=True, options={"logit_softcap": 3.0, "scale": 0.5}),
    "window": Case((400, 70, 30), 400, q_len=3, heads=(4, 2), options={"window": 100}),
    "window_split": Case((400, 129, 2), 400, q_len=3, dtype=jnp.float16, options={"window": 150, "splits": 2}),
    "window_of_one": Case((65, 64, 2), 72, q_len=4, options={"window": 1}),
    "window_of_all": Case((65, 2), 72, q_len=4, options={"window": 10**9}),
    "pages_of_16": Case((200, 0, 33), 240, q_len=3, heads=(4, 2), page=16),
    "pages_of_16_split": Case((200, 17), 208, page=16, dtype=jnp.float16, sinks=True, options={"splits": 2}),
    "pages_of_64": Case((257, 128), 320, page=64, sizes=(64, 128)),
    "pages_of_128": Case((257, 130), 384, page=128, options={"window": 90}),
    "pages_of_16_behind_a_window": Case((201, 70, 3), 208, q_len=3, page=16, options={"window": 50, "splits": 2}),
    "pages_that_no_tile_divides": Case((185, 95), 192, page=24, q_len=2),
    "pages_of_32_as_chosen": Case((185, 129), 192, page=32, heads=(4, 2), block=None),
}
GARBAGE = -7


def problem(case):
    """(arrays, function of them); what stands behind lengths or before all windows, and every page that nobody owns,
    is NaN."""
    heads, kv_heads = case.heads
    shapes = {
        "q": (len(case.lengths), case.q_len, heads, case.sizes[0]),
        **{name: (len(case.lengths), kv_heads, case.room, size) for name, size in zip("kv", case.sizes)},
        **({"sinks": (heads,)} if case.sinks else {}),
    }
    arrays = dict(zip(shapes, testing.normal(0, *shapes.values(), dtype=case.dtype)))
    lengths, table = np.array(case.lengths, np.int32), None
    for name in "kv":
        at, low = np.arange(case.room), lowest(case)[:, None, None]
        unseen = (at < low) | (at >= lengths[:, None, None])
        arrays[name][np.broadcast_to(unseen, arrays[name].shape[:3])] = np.nan
    if case.page:
        arrays, table = in_pages(arrays, lowest(case), lengths, case.page)
    options = {"lengths": lengths, "block_table": table, **case.options}
    return arrays, functools.partial(call, options)


def lowest(case):
    """The first position that any query of a sequence sees."""
    window = case.options.get("window", case.room + case.q_len)
    return np.maximum(np.array(case.lengths) - case.q_len - window + 1, 0)


def in_pages(arrays, low, lengths, page):
    """The same caches in pages that lie in any order; entries for pages that nobody sees are garbage."""
    batch, kv_heads, room, _ = arrays["k"].shape
    each = room // page
    places = np.random.default_rng(1).permutation(batch * each + 3)[: batch * each].reshape(batch, each)
    pages = {}
    for name in "kv":
        x = np.moveaxis(arrays[name].reshape(batch, kv_heads, each, page, -1), 2, 1)
        pages[name] = np.full((batch * each + 3, *x.shape[2:]), np.nan, x.dtype)
        pages[name][places] = x
    start = np.arange(each) * page
    is_seen = (start < lengths[:, None]) & (start + page > low[:, None])
    return {**arrays, **pages}, np.where(is_seen, places, GARBAGE).astype(np.int32)


def call(options, implementation, **arrays):
    return decode_attention(**arrays, **options, return_lse=True, implementation=implementation)


@pytest.fixture
def no_races(capfd):
    """The interpreter reports a race on stdout and goes on."""
    yield
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name, no_races, monkeypatch):
    case = CASES[name]
    if case.block is not None:
        monkeypatch.setattr(pallas_gpu, "_block", lambda *sizes: case.block)
    arrays, run = problem(case)
    with interpreting():
        testing.check_forward(OP, run, arrays, "pallas_gpu", case.dtype)


@pytest.mark.parametrize("rows", [1, 8, 65])
def test_stores_that_are_not_clipped_stay_in_their_rows(rows, monkeypatch):
    """jax copies what has no swizzle as one stretch of memory: what overhangs a row would be written into the next."""
    with stores(monkeypatch) as found:
        q, k, v, lengths = abstract((2, rows, 1, 64, 256))
        run = functools.partial(decode_attention, implementation="pallas_gpu", splits=2)
        jax.make_jaxpr(lambda q, k, v, lengths: run(q, k, v, lengths=lengths))(q, k, v, lengths)
    assert len(found.swizzled) == 1
    (lse,) = found.plain
    assert lse.copied == (64,) and lse.array == (2 * 2, 128 if rows > 64 else 64)


def test_batches_of_any_size_have_a_grid():
    """CUDA takes 65535 blocks in all but one dimension."""
    run = lambda q, k, v, n: decode_attention(q, k, v, lengths=n, splits=1, implementation="pallas_gpu")
    assert grids(run, *abstract((70000, 8, 2, 64, 64))) == [(140000,)]


def test_queries_without_keys_give_zero_and_minus_infinity():
    arrays, run = problem(Case((0, 1), 8, q_len=2))
    with interpreting():
        out, lse = jax.jit(functools.partial(run, "pallas_gpu"))(**arrays)
    assert (
        (out[0] == 0).all() and (lse[0] == -np.inf).all() and (out[1, 0] == 0).all() and (lse[1, :, 0] == -np.inf).all()
    )
    np.testing.assert_array_equal(out[1, 1], np.repeat(arrays["v"][1, :, 0], 2, axis=0))  # sees key 0 alone


def test_vmap_equals_a_loop():
    q, k, v = testing.normal(4, (2, 1, 1, 2, 64), *[(2, 1, 1, 72, 64)] * 2, dtype=jnp.bfloat16)
    lengths = np.array([[40], [72]], np.int32)
    one = lambda q, k, v, lengths: decode_attention(q, k, v, lengths=lengths, implementation="pallas_gpu")
    with interpreting():
        together = jax.jit(jax.vmap(one))(q, k, v, lengths)
        for i in range(2):
            np.testing.assert_array_equal(together[i], jax.jit(one)(q[i], k[i], v[i], lengths[i]))


@pytest.mark.parametrize("window", [None, 1, 5, 20])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("q_len", [1, 6])
def test_parts_have_each_tile_that_is_seen_once(window, splits, q_len):
    """And none that is not seen, which is therefore not read; tiles that are taken without tests need none."""
    request = pallas_gpu.Request(q_len, 1, 1, None, window, 1.0, None, splits, pallas_gpu.Block(4, 2), False)
    for length in (0, 1, 2, 4, 5, 8, 23, 40, 41):
        at = np.arange(length - q_len, length)[:, None]
        keys = np.arange(44)
        seen = (keys <= at) & (keys > at - (window or 100)) & (at >= 0)
        tiles = seen.reshape(q_len, 11, 4)
        taken = []
        for split in range(splits):
            part = pallas_gpu.part_of(request, jnp.int32(length), jnp.int32(split))
            own = [int(part.tile(jnp.int32(step))) for step in range(int(part.count))]
            assert len(own) <= -(-tiles.any((0, 2)).sum() // splits)
            assert all(tiles[:, i].all() for i in own[: int(part.untested)])
            assert not any(tiles[:, i].all() for i in own[int(part.untested) :])
            taken += own
        assert sorted(taken) == np.flatnonzero(tiles.any((0, 2))).tolist()


@pytest.mark.parametrize(
    ("blocks", "keys", "parts"),
    [(512, 8192, 1), (264, 8192, 1), (263, 8192, 2), (8, 131072, 33), (8, 8192, 32), (8, 1000, 3), (8, 100, 1)],
)
def test_parts_fill_the_machine_or_have_keys_enough(blocks, keys, parts):
    assert pallas_gpu._parts(blocks, keys) == parts


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("v_dim", [64, 128, 192, 256])
def test_tiles_fit(head_dim, v_dim):
    columns, stages = pallas_gpu._block(head_dim, v_dim)
    ring = stages * columns * (head_dim + v_dim) * 2
    resident = 64 * head_dim * 2
    blocks = 2 if head_dim + v_dim <= 256 else 1  # of threads on a multiprocessor
    assert stages >= 2 and resident + max(ring, 64 * v_dim * 4) <= (112 if blocks == 2 else 216) * 1024
    # At least what has to be under way for all of the bandwidth, with one stage of each block being worked on.
    assert blocks * ring * (stages - 1) / stages >= 36 * 1024
    # The output, scores and their 16-bit copy, of 255 registers.
    assert v_dim / 2 + columns / 2 + columns / 4 <= 255


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": np.float32}, "q is float32"),
        ({"head_dim": 80}, "head_dim 80 is not"),
        ({"head_dim": 320}, "head_dim 320 is not"),
        ({"v_dim": 32}, "v_dim 32 is not"),
        ({"length": 100}, "the cache's length 100 is not a multiple of 8"),
        ({"length": 12, "table": True}, "page size 12 is not a multiple of 8"),
        ({"scale": -1.0}, "scale -1.0"),
    ],
)
def test_refusals(changes, reason):
    changes = {"batch": 1, "length": 8, "head_dim": 64, "v_dim": 64, "dtype": jnp.bfloat16, **changes}
    batch, length, dtype = (changes.pop(name) for name in ("batch", "length", "dtype"))
    sizes = [changes.pop(name) for name in ("head_dim", "v_dim")]
    q = jax.ShapeDtypeStruct((batch, 1, 1, sizes[0]), dtype)
    k, v = (jax.ShapeDtypeStruct((batch, 1, length, size), dtype) for size in sizes)
    table = np.zeros((batch, 1), np.int32) if changes.pop("table", False) else None
    run = functools.partial(decode_attention, implementation="pallas_gpu", block_table=table, **changes)
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(lambda q, k, v: run(q, k, v, lengths=jnp.zeros(batch, jnp.int32)), q, k, v)


# batch, heads, kv_heads, head_dim, room
LLAMA3_8B = (64, 32, 8, 128, 8192)
LOWERED = {
    "llama3_8b": (LLAMA3_8B, {}),
    "llama3_8b, 4 queries, one user": ((1, *LLAMA3_8B[1:]), {"q_len": 4}),
    "llama3_8b, pages of 128": (LLAMA3_8B, {"page": 128}),
    "llama3_8b, pages of 64": (LLAMA3_8B, {"page": 64}),
    "llama3_8b, pages of 16": (LLAMA3_8B, {"page": 16, "q_len": 16}),
    "64 a head, all of them own keys": ((8, 16, 16, 64, 4096), {"dtype": jnp.float16}),
    "gemma2_9b": ((16, 16, 8, 256, 8192), {"window": 4096, "logit_softcap": 50.0, "page": 32}),
    "one head of keys": ((2, 128, 1, 128, 131072), {"q_len": 2}),
}  # fmt: skip


def abstract(sizes, q_len=1, page=None, dtype=jnp.bfloat16):
    """q, k, v, lengths and perhaps a table, without data."""
    batch, heads, kv_heads, head_dim, room = sizes
    cache = (batch, kv_heads, room, head_dim) if page is None else (batch * room // page, kv_heads, page, head_dim)
    numbers = [(batch,)] if page is None else [(batch,), (batch, room // page)]
    floats = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((batch, q_len, heads, head_dim), cache, cache)]
    return [*floats, *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in numbers)]


def lowered(arguments, mesh=(("x", 1),), **options):
    """The program for machines with an H200, where there is none."""
    run = lambda q, k, v, lengths, table=None: decode_attention(
        q, k, v, lengths=lengths, block_table=table, implementation="pallas_gpu", **options
    )
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    names, sizes = zip(*mesh)
    auto = (jax.sharding.AxisType.Auto,) * len(names)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(sizes, names, auto, abstract_device=h200)):
        return jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_an_h200(name):
    sizes, options = LOWERED[name]
    given = {key: value for key, value in options.items() if key in ("q_len", "page", "dtype")}
    arguments = abstract(sizes, **given)
    program = lowered(arguments, **{key: value for key, value in options.items() if key not in given})
    assert testing.show_lowered(program, "cuda") == {("decode_attention", "pallas_gpu")}
    assert "lissom_decode_attention" in program and program.count("@mosaic_gpu_v2") == 1
    # The cache goes into the kernel as it is: nothing but a change of its shape is done to it.
    first, kv_heads, *rest = arguments[1].shape
    caches = ["x".join(map(str, shape)) for shape in ((first, kv_heads, *rest), (first * kv_heads, *rest))]
    done = re.findall(rf"stablehlo\.(\w+).*tensor<(?:{'|'.join(caches)})x", program)
    assert sorted(done) == ["custom_call", "reshape", "reshape"]


def test_under_shard_map_a_device_has_its_part():
    with dispatch.partition(batch="data", heads="tensor"):
        program = lowered(abstract((4, 8, 2, 64, 256)), mesh=(("data", 2), ("tensor", 2)))
    (kernel,) = [line for line in program.splitlines() if "@mosaic_gpu_v2" in line]
    assert kernel.count("tensor<2x256x64xbf16>") == 2  # of 4 sequences by 2 heads, flat


def test_too_much_shared_memory_is_noticed_while_lowering(monkeypatch):
    """So that the tests above say that tiles fit. The error says how much there is beside the tiles: little enough that
    two blocks of threads of 112 KiB, and the 1 KiB that CUDA takes of each, fit into the 228 of a multiprocessor."""
    monkeypatch.setattr(pallas_gpu, "_block", lambda *sizes: pallas_gpu.Block(64, 8))
    with pytest.raises(ValueError, match="shared memory") as error:
        lowered(abstract((1, 4, 1, 128, 1024), page=8))
    asked = int(re.search(r"smem_bytes=(\d+)", str(error.value))[1])
    beside = asked - 2 * (64 * 128 + 8 * 64 * 256)
    assert beside > 0 and 2 * (pallas_gpu.HALF_BYTES + beside + 1024) <= 228 * 1024
