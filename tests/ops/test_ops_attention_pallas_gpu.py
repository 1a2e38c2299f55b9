"""The Hopper kernels of attention, interpreted against the float64 reference, and lowered for CUDA. No GPU is needed,
and none is used: what the interpreter does not see is said in `ops/attention/pallas_gpu.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.ops import dispatch, testing
from lissom.ops.attention import (
    OP,
    BlockSparse,
    Causal,
    Full,
    KeyColumns,
    Lengths,
    Neighbourhood,
    Prefix,
    Segments,
    Window,
    attention,
    pallas_gpu,
)
from lissom.ops.attention.cases import REAL
from lissom.ops.interpreting import interpreting
from tests.ops.traced import grids, stores

PACKED = np.repeat(np.array([0, 1, 2, -1]), [20, 60, 50, 10])[None]  # 140 tokens, the last ten padding
BLOCKS = BlockSparse(np.array([[[[0, 0], [2, 1], [1, 0]]]]), np.array([[[1, 2, 0]]]), 64, 64)  # nothing for the third
PER_HEAD = BlockSparse(np.array([[[[0], [1]], [[1], [0]]]]), None, 64, 64)

# name: mask, (batch, q_len, kv_len, heads, kv_heads, head_dim, v_dim), dtype, options
CASES = {
    "full": (Full(), (1, 128, 128, 1, 1, 64, 64), jnp.bfloat16, {}),
    "odd_lengths_and_grouped_heads": (Full(), (1, 67, 131, 2, 1, 24, 40), jnp.float16, {}),
    "causal": (Causal(), (1, 200, 200, 1, 1, 64, 64), jnp.float16, {}),
    "causal_large_heads": (Causal(), (1, 130, 130, 1, 1, 128, 128), jnp.bfloat16, {}),
    "two_head_sizes": (Causal(), (1, 70, 70, 1, 1, 192, 128), jnp.bfloat16, {}),
    "decode": (Lengths(np.array([7, 90])) & Causal(np.array([6, 89])), (2, 1, 100, 2, 1, 64, 64), jnp.bfloat16, {}),
    "window": (Window(40, 10), (1, 150, 150, 2, 2, 64, 64), jnp.bfloat16, {"logit_softcap": 3.0}),
    "rows_that_see_nothing": (Window(30, 0, -70), (1, 140, 140, 1, 1, 64, 64), jnp.float16, {}),
    "traced_prefix": (Prefix(np.array([30, 100]), 0), (2, 128, 128, 1, 1, 64, 64), jnp.bfloat16, {"sinks": True}),
    "packed": (Segments(PACKED) & Causal(), (1, 140, 140, 2, 1, 64, 64), jnp.bfloat16, {"sinks": True}),
    "neighbourhood": (Neighbourhood((12, 16), 5, 1, 1, (True, False)), (1, 192, 192, 1, 1, 64, 64), jnp.bfloat16, {}),
    "dilated": (Neighbourhood((140,), 9, 3), (1, 140, 140, 1, 1, 64, 64), jnp.float16, {"scale": 0.5}),
    "blocks": (BLOCKS, (1, 180, 190, 1, 1, 64, 64), jnp.bfloat16, {}),
    "blocks_on_device": (BLOCKS.on_device() & Causal(60), (1, 180, 190, 2, 1, 64, 64), jnp.float16, {}),
    "blocks_of_heads": (PER_HEAD, (1, 128, 128, 2, 1, 64, 64), jnp.bfloat16, {"logit_softcap": 3.0}),
}
AS_CHOSEN = {"full", "neighbourhood", "rows_that_see_nothing"}  # with the tiles that `_blocks` takes


def problem(name):
    """(arrays, function of them); what stands at padding is NaN."""
    mask, (batch, q_len, kv_len, heads, kv_heads, head_dim, v_dim), dtype, options = CASES[name]
    shapes = {
        "q": (batch, q_len, heads, head_dim),
        "k": (batch, kv_len, kv_heads, head_dim),
        "v": (batch, kv_len, kv_heads, v_dim),
    }
    if options.get("sinks"):
        shapes["sinks"] = (heads,)
    arrays = dict(zip(shapes, testing.normal(0, *shapes.values(), dtype=dtype)))
    for valid, names in ((mask.valid_keys(kv_len), "kv"), (mask.valid_queries(q_len), "q")):
        for array in names if valid is not None else ():
            arrays[array][~np.broadcast_to(valid, arrays[array].shape[:2])] = np.nan
    options = {option: value for option, value in options.items() if option != "sinks"}
    return arrays, functools.partial(call, mask, options)


def call(mask, options, implementation, **arrays):
    return attention(**arrays, mask=mask, **options, return_lse=True, implementation=implementation)


@pytest.fixture
def no_races(capfd):
    """The interpreter reports a race on stdout and goes on."""
    yield
    assert "RACE" not in capfd.readouterr().out


def with_least_tiles(patch):
    """Tiles of 64 columns in rings of two stages, so that lists are longer than rings and stages are used again."""
    blocks = pallas_gpu._blocks
    least = lambda *a: pallas_gpu.Blocks(*(block._replace(columns=64, stages=2) for block in blocks(*a)))
    patch.setattr(pallas_gpu, "_blocks", least)


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name, no_races, monkeypatch):
    if name not in AS_CHOSEN:
        with_least_tiles(monkeypatch)
    arrays, run = problem(name)
    with interpreting():
        testing.check_case(OP, run, arrays, "pallas_gpu", CASES[name][2])


def test_vmap_over_arrays_and_masks_equals_a_loop():
    q, k, v, weight = testing.normal(4, *[(2, 1, 64, 1, 64)] * 4, dtype=jnp.bfloat16)
    lengths = np.array([[40], [64]])

    def one(q, k, v, weight, length):
        f = lambda *x: (attention(*x, mask=Lengths(length), implementation="pallas_gpu") * weight).sum()
        return jax.grad(f, argnums=(0, 1, 2))(q, k, v)

    with interpreting():
        together = jax.jit(jax.vmap(one))(q, k, v, weight, lengths)
        for i in range(2):
            alone = jax.jit(one)(*(a[i] for a in (q, k, v, weight, lengths)))
            for a, b in zip(together, alone):
                np.testing.assert_array_equal(a[i], b)


def test_rows_without_keys_give_zero_minus_infinity_and_no_gradient():
    q, k, v = (jnp.asarray(x) for x in testing.normal(5, *[(1, 8, 1, 64)] * 3, dtype=jnp.bfloat16))
    run = lambda q, k, v: attention(q, k, v, mask=Causal(-1), return_lse=True, implementation="pallas_gpu")
    with interpreting():
        (out, lse), pull = jax.vjp(jax.jit(run), q, k, v)
        dq, dk, dv = pull((jnp.ones_like(out), jnp.ones_like(lse)))
    assert (out[0, 0] == 0).all() and lse[0, 0, 0] == -np.inf
    np.testing.assert_array_equal(out[0, 1], v[0, 0])  # sees key 0 alone
    assert (dq[0, 0] == 0).all() and (dk[0, 7] == 0).all() and (dv[0, 7] == 0).all()
    assert all(np.isfinite(g.astype(np.float32)).all() for g in (dq, dk, dv))


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("v_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("listed", [None, (64, 64), (128, 64), (64, 128)])
@pytest.mark.parametrize(("bounds", "codes", "softcap"), [(0, 0, False), (1, 0, False), (6, 2, False), (2, 1, True)])
def test_tiles_fit_and_divide_the_blocks_of_a_mask(head_dim, v_dim, listed, bounds, codes, softcap):
    shape = pallas_gpu.Shape(head_dim, v_dim, listed, bounds, codes, softcap)
    blocks = pallas_gpu._blocks(4096, 4096, shape)
    for name, block in blocks._asdict().items():
        resident = block.rows * (head_dim if name == "forward" and head_dim == v_dim else head_dim + v_dim)
        ring = block.stages * block.columns * (head_dim + v_dim)
        # Statistics, bounds and codes, of 4 bytes; alignment of at most 7 arrays.
        vectors = (bounds + 2) * (block.stages * block.columns if name == "dk_dv" else block.rows)
        vectors += codes * (block.rows if name == "dk_dv" else block.stages * block.columns)
        assert 2 * (resident + ring) + 4 * vectors <= 224 * 1024 and block.stages >= 2
        # Float32 sums, two tiles of scores (one in the forward kernel) and a 16-bit copy, of 232 registers.
        sums = {"forward": v_dim, "dq": head_dim, "dk_dv": head_dim + v_dim}[name]
        sums = max(head_dim, v_dim) if sums > 256 else sums
        assert sums / 2 + (1 if name == "forward" else 2) * block.columns / 2 + block.columns / 4 <= 232
        if listed is not None:
            queries, keys = (block.columns, block.rows) if name == "dk_dv" else (block.rows, block.columns)
            assert listed[0] % queries == 0 and listed[1] % keys == 0


def test_small_heads_with_tests_have_narrow_tiles_of_keys():
    """128 columns of dk and dv spill registers there, as ptxas says (812 bytes with a softcap)."""
    columns = lambda **has: tuple(b.columns for b in pallas_gpu._blocks(4096, 4096, pallas_gpu.Shape(64, 64, **has)))
    assert columns() == (128, 128, 128)
    assert columns(bounds=1) == (128, 128, 64)
    assert columns(softcap=True) == (128, 64, 64)
    assert columns(bounds=2, codes=1, softcap=True) == (128, 64, 64)
    assert columns(bounds=4, codes=2) == (128, 64, 64)  # a plane


MANY_TESTS = (Window(300, 5), Prefix(np.array([100]), 0), Segments(np.zeros((1, 512), np.int32)), Causal(), Causal(7))


def test_shared_memory_has_room_for_the_tables_of_many_tests():
    mask = functools.reduce(lambda a, b: a & b, (*MANY_TESTS, *MANY_TESTS[:2]))
    x = jax.ShapeDtypeStruct((1, 512, 1, 64), jnp.bfloat16)
    loss = lambda *x: attention(*x, mask=mask, implementation="pallas_gpu").astype(jnp.float32).sum()
    assert lowered(jax.grad(loss, argnums=(0, 1, 2)), x, x, x).count("@mosaic_gpu_v2") == 3


@pytest.mark.parametrize(("q_len", "kv_len", "heads"), [(130, 72, 1), (67, 67, 2), (8, 100, 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_stores_that_are_not_clipped_stay_in_their_rows(q_len, kv_len, heads, batch, monkeypatch):
    """jax copies what has no swizzle as one stretch of memory: what overhangs a row would be written into the next."""
    with stores(monkeypatch) as found:
        x, y = ((jax.ShapeDtypeStruct((batch, n, heads, 64), jnp.bfloat16)) for n in (q_len, kv_len))
        loss = lambda *x: attention(*x, mask=Full(), implementation="pallas_gpu").astype(jnp.float32).sum()
        jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, y, y)
    assert len(found.swizzled) == 4  # out, dq, dk, dv
    (lse,) = found.plain
    consumers = 1 if q_len <= 64 else 2
    tiles = -(-q_len // (64 * consumers))
    assert lse.copied == (64,) and lse.array == (batch, heads, tiles * 64 * consumers)


def test_the_gradient_of_a_plane_gathers_and_never_scatters():
    mask, x = Neighbourhood((64, 64), (13, 13)), jax.ShapeDtypeStruct((1, 4096, 2, 64), jnp.bfloat16)
    assert pallas_gpu.tiles.order(mask, 4096) is not None
    loss = lambda *x: attention(*x, mask=mask, implementation="pallas_gpu").astype(jnp.float32).sum()
    program = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, x, x))
    assert "gather" in program and "scatter" not in program


@pytest.mark.parametrize("mask", [Window(2**31 - 1, 70), Window(70, 2**31 - 300)])
def test_windows_without_an_end_are_cut_to_the_keys(mask):
    """The kernel subtracts where a tile begins from the bounds, which must not wrap."""
    found = pallas_gpu.plan(mask, mask.intervals(200, 200), 200, 200, 64, 64)
    assert found.bounds.min() >= 0 and found.bounds.max() <= 200
    low, high = found.bounds[:, 0, :200]
    keys = np.arange(200)
    seen = (low[:, None] <= keys) & (keys < high[:, None])
    offset = np.arange(200) - np.arange(200)[:, None]
    np.testing.assert_array_equal(seen, (-mask.left <= offset) & (offset <= mask.right))


@pytest.mark.parametrize(("version", "refused"), [((12, 8, 61), True), ((12, 9, 41), True), ((12, 9, 86), False)])
def test_compilers_that_miscompile_masks_are_refused(version, refused, monkeypatch):
    monkeypatch.setattr(pallas_gpu, "_ptxas", lambda: version)
    x = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16)
    run = lambda mask: jax.eval_shape(functools.partial(attention, mask=mask, implementation="pallas_gpu"), x, x, x)
    run(Full())
    if refused:
        with pytest.raises(NotImplementedError, match="ptxas 12"):
            run(Causal())
    else:
        run(Causal())


def test_batches_of_any_size_have_a_grid():
    """CUDA takes 65535 blocks in all but one dimension."""
    x = jax.ShapeDtypeStruct((70000, 8, 1, 64), jnp.bfloat16)
    loss = lambda *x: attention(*x, mask=Full(), implementation="pallas_gpu").astype(jnp.float32).sum()
    assert grids(jax.grad(loss, argnums=(0, 1, 2)), x, x, x) == [(70000,)] * 3


def test_the_work_follows_the_mask():
    """The number of tiles that the kernels are told to visit: of 128 by 128, a triangle of 16 rows has 136, 16 of them
    on its edge."""
    for by_keys in (False, True):
        tests = Causal().intervals(2048, 2048)
        found = pallas_gpu.plan(Causal(), tests, 2048, 2048, 128, 128, by_keys)
        assert found.counts[..., 1].sum() == 136 and found.counts[..., 0].sum() == 120
    # What needs no test comes first: query tile 5 sees tiles 0..4 whole and 5 in part.
    found = pallas_gpu.plan(Window(300, 0), Window(300, 0).intervals(2048, 2048), 2048, 2048, 128, 128)
    assert found.counts[0, 0, 5].tolist() == [1, 4] and found.index[0, 0, 5, :4].tolist() == [4, 2, 3, 5]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": np.float32}, "q is float32"),
        ({"head_dim": 264}, "larger than 256"),
        ({"bias": np.zeros((1, 1, 1, 8), np.float32)}, "bias"),
        ({"scale": -1.0}, "scale"),
        ({"mask": KeyColumns(np.zeros((1, 1, 1, 1), np.int32))}, "KeyColumns"),
        ({"mask": BlockSparse(np.zeros((1, 1, 1, 1), np.int32), None, 64, 32)}, "blocks of 64 by 32"),
    ],
)
def test_refusals(changes, reason):
    changes = {"batch": 1, "dtype": jnp.bfloat16, "head_dim": 64, **changes}
    x = jax.ShapeDtypeStruct((changes.pop("batch"), 8, 1, changes.pop("head_dim")), changes.pop("dtype"))
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(functools.partial(attention, implementation="pallas_gpu", **changes), x, x, x)


LOWERED = {
    "gpt2_small": {},
    "llama3_8b": {},
    "mistral_7b": {},
    "deepseek_v2_lite": {},
    "decode_4k": {},
    "vit_b16": {"dtype": jnp.float16},
    "llama3_8b with blocks": {"mask": BlockSparse(np.tile(np.arange(4), (1, 1, 64, 1)), np.full((1, 1, 64), 3))},
    "window_4k with softcap": {"logit_softcap": 50.0},
    "vit_b16 as neighbourhood": {"mask": Neighbourhood((16, 16), 7), "length": 256},
}


def lowered(f, *arguments, mesh=(("x", 1),)):
    """The program for machines with an H200, where there is none."""
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    names, sizes = zip(*mesh)
    auto = (jax.sharding.AxisType.Auto,) * len(names)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(sizes, names, auto, abstract_device=h200)):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_an_h200(name):
    case, options = REAL[name.split()[0]], dict(LOWERED[name])
    dtype, length = options.pop("dtype", jnp.bfloat16), options.pop("length", None)
    q_len, kv_len = length or case.q_len, length or case.kv_len
    q, k, v = (
        jax.ShapeDtypeStruct((case.batch, rows, heads, size), dtype)
        for rows, heads, size in (
            (q_len, case.heads, case.head_dim),
            (kv_len, case.kv_heads, case.head_dim),
            (kv_len, case.kv_heads, case.v_dim),
        )
    )
    run = functools.partial(attention, **{"mask": case.mask, "implementation": "pallas_gpu", **options})
    loss = lambda *x: run(*x).astype(jnp.float32).sum()
    program = lowered(jax.grad(loss, argnums=(0, 1, 2)), q, k, v)
    assert testing.show_lowered(program, "cuda") == {("attention", "pallas_gpu")}
    sums = ("dk_dv",) if case.head_dim + case.v_dim <= 256 else ("dk", "dv")
    for kernel in ("forward", "dq", *sums):
        assert f"lissom_attention_{kernel}" in program
    assert program.count("@mosaic_gpu_v2") == 2 + len(sums)


def test_remat_runs_the_forward_kernel_again():
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    run = functools.partial(attention, mask=Causal(), implementation="pallas_gpu")
    loss = lambda f: lambda *x: f(*x).astype(jnp.float32).sum()
    kernels = [
        lowered(jax.value_and_grad(loss(f), argnums=(0, 1, 2)), x, x, x).count("@mosaic_gpu_v2")
        for f in (run, jax.checkpoint(lambda *x: jnp.sin(run(*x))))
    ]
    assert kernels == [3, 4]


def test_under_shard_map_a_device_has_its_part():
    x = jax.ShapeDtypeStruct((4, 256, 2, 64), jnp.bfloat16)
    loss = lambda *x: attention(*x, mask=Causal(), implementation="pallas_gpu").astype(jnp.float32).sum()
    with dispatch.partition(batch="data", heads="tensor"):
        program = lowered(jax.grad(loss, argnums=(0, 1, 2)), x, x, x, mesh=(("data", 2), ("tensor", 2)))
    calls = [line for line in program.splitlines() if "@mosaic_gpu_v2" in line]
    assert len(calls) == 3 and all("2x256x1x64xbf16" in line and "4x256x2x64xbf16" not in line for line in calls)


def test_too_much_shared_memory_is_noticed_while_lowering(monkeypatch):
    """So that the tests above say that tiles fit."""
    blocks = pallas_gpu._blocks
    grown = lambda *a: pallas_gpu.Blocks(*(block._replace(stages=8) for block in blocks(*a)))
    monkeypatch.setattr(pallas_gpu, "_blocks", grown)
    x = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="shared memory"):
        lowered(functools.partial(attention, implementation="pallas_gpu"), x, x, x)
