"""The Hopper kernels of the grouped matmul, interpreted against the float64 reference, and lowered for CUDA. No GPU is
needed, and none is used: what the interpreter does not see is said in `ops/grouped_matmul/pallas_gpu.py`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.ops import testing
from lissom.ops.grouped_matmul import OP, grouped_matmul, pallas_gpu, pallas_gpu_kernels, transposed_grouped_matmul
from lissom.ops.grouped_matmul.cases import REAL, SPREADS, Case, sizes
from lissom.ops.grouped_matmul.differentiable import ACTIVATIONS
from lissom.ops.hopper import consumer_registers
from lissom.ops.interpreting import interpreting
from tests.ops.traced import grids, stores

BF16, F16 = jnp.bfloat16, jnp.float16
LOW = "its edges"

# name: case, dtype, multiprocessors (with two a block of threads makes several tiles), forms
CASES = {
    "random_in_eights": (Case(45, 64, 64, 5, "random", LOW), BF16, 2, "rows"),
    "one_of_two_columns": (Case(72, 64, 128, 4, "one", LOW), F16, 132, "rows"),
    "two_consumers": (Case(264, 128, 64, 2, "short", LOW), BF16, 2, "rows"),
    "some_empty": (Case(150, 64, 64, 4, "some_empty", LOW), BF16, 2, "sums"),
    "two_consumers_share_y": (Case(101, 128, 128, 2, "short", LOW), F16, 2, "sums"),
}


def inputs(case, dtype, seed=0):
    x, w, y = testing.normal(seed, (case.m, case.k), (case.g, case.k, case.n), (case.m, case.n), dtype=dtype)
    return {"rows": {"x": x, "w": w}, "sums": {"x": x, "y": y}}, jnp.asarray(sizes(case, seed))


def call(of, implementation, x, w=None, y=None, **options):
    f, other = (transposed_grouped_matmul, y) if w is None else (grouped_matmul, w)
    return f(x, other, of, implementation=implementation, **options)


@pytest.fixture
def no_races(capfd):
    """The interpreter reports a race on stdout and goes on."""
    yield
    assert "RACE" not in capfd.readouterr().out


def with_few(patch, multiprocessors):
    """Blocks of threads make several tiles, and use the stages of the shortest ring again."""
    patch.setattr(pallas_gpu, "MULTIPROCESSORS", multiprocessors)
    patch.setattr(pallas_gpu, "MOST_STAGES", pallas_gpu.LEAST_STAGES)


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name, no_races, monkeypatch):
    """Each is differentiated, so that it runs `rows` with w as it is and transposed, and `sums`."""
    case, dtype, multiprocessors, form = CASES[name]
    with_few(monkeypatch, multiprocessors)
    arrays, of = inputs(case, dtype)
    with interpreting():
        testing.check_case(OP, functools.partial(call, of), arrays[form], "pallas_gpu", dtype)


@pytest.mark.parametrize(("activation", "wide"), [("relu", F16), ("gelu", jnp.float32)])
def test_activations_in_the_kernel(activation, wide, no_races):
    """Forward: a differentiated pass takes them outside of the kernel. And results of another dtype."""
    arrays, of = inputs(Case(21, 64, 64, 3, "short", LOW), BF16)
    run = functools.partial(call, of, activation=activation, preferred_element_type=wide)
    with interpreting():
        testing.check_forward(OP, run, arrays["rows"], "pallas_gpu", BF16)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_exp2(name):
    x = np.array([-np.inf, -1e30, -90.0, *np.linspace(-12, 12, 97), 90.0, 1e30, np.inf, np.nan], np.float32)
    ours, theirs = pallas_gpu_kernels._FAST[ACTIVATIONS[name]](jnp.asarray(x)), ACTIVATIONS[name](x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def both(implementation, x, w, y, of):
    return (
        grouped_matmul(x, w, of, implementation=implementation),
        transposed_grouped_matmul(x, y, of, implementation=implementation),
    )


def test_sizes_are_values(no_races, monkeypatch):
    """One program for every spread, and for sizes beyond the rows. A NaN stays in its row, its matrix and its group.
    Both consumers clear parts of what both read."""
    with_few(monkeypatch, 2)
    case = Case(37, 128, 128, 4, "random", LOW)
    arrays, _ = inputs(case, BF16)
    x, w, y = (jnp.asarray(a) for a in (*arrays["rows"].values(), arrays["sums"]["y"]))
    run = {name: jax.jit(functools.partial(both, name)) for name in ("reference", "pallas_gpu")}
    spreads = [sizes(dataclasses.replace(case, spread=spread), 3) for spread in ("some_empty", "short")]
    spreads += [np.array(of, np.int32) for of in ([0, 0, 0, 0], [30, 0, 40, 5])]
    with interpreting():
        for of in spreads:
            for ours, theirs in zip(run["pallas_gpu"](x, w, y, of), run["reference"](x, w, y, of)):
                np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), rtol=0.01, atol=0.01)
        of = np.array([9, 3, 0, 17], np.int32)
        x, w, y = x.at[3].set(np.nan), w.at[1].set(np.nan), y.at[4].set(np.nan).at[33].set(np.nan)
        rows, sums = (np.isnan(a) for a in run["pallas_gpu"](x, w, y, of))
    assert np.flatnonzero(rows.any(1)).tolist() == [3, 9, 10, 11]
    assert np.flatnonzero(sums.any((1, 2))).tolist() == [0]


def test_vmap_is_a_loop():
    x, w = jax.ShapeDtypeStruct((2, 16, 64), BF16), jax.ShapeDtypeStruct((3, 64, 64), BF16)
    run = lambda x, w, of: jax.vmap(lambda x, of: grouped_matmul(x, w, of, implementation="pallas_gpu"))(x, of)
    assert jax.eval_shape(run, x, w, jax.ShapeDtypeStruct((2, 3), jnp.int32)).shape == (2, 16, 64)


@pytest.mark.parametrize("height", [8, 32, 128])
@pytest.mark.parametrize("spread", SPREADS)
def test_tables_name_each_group_of_each_block_once(spread, height):
    m, g = 500, 9
    of = sizes(Case(m, 1, 1, g, spread, LOW), 1)
    entries, blocks = map(np.asarray, pallas_gpu._tables(jnp.asarray(of), m, height))
    group = np.repeat(np.arange(g), of)
    for block in range(-(-m // height)):
        there = group[block * height : (block + 1) * height]
        first, count = blocks[:, block]
        named = [entry for entry in entries[:, first : first + count].T if entry[1] > entry[0]]
        assert [entry[2] for entry in named] == sorted(set(there.tolist())) and count == max(1, len(named))
        for low, high, number in named:
            assert low == of[:number].sum() and high - low == of[number]
        # What is kept of the tile before is kept of nothing: the first of a block begins there, or has no rows.
        assert entries[0, first] <= block * height


@pytest.mark.parametrize(("tall", "wide"), [(3, 2), (4, 8), (5, 19), (1, 8 * 3)])
def test_tiles_are_made_once_in_panels(tall, wide):
    order = [tuple(map(int, pallas_gpu_kernels._place(jnp.int32(i), tall, wide))) for i in range(tall * wide)]
    assert sorted(order) == [(row, column) for row in range(tall) for column in range(wide)]
    assert order == sorted(order, key=lambda at: (at[1] // pallas_gpu_kernels.PANEL, at))


@pytest.mark.parametrize(("low", "high"), [(0, 0), (5, 5), (0, 64), (3, 9), (5, 69), (8, 136), (60, 260), (64, 128)])
def test_steps_take_each_row_once_and_test_those_that_need_it(low, high):
    steps = jax.tree.map(int, pallas_gpu_kernels._steps_of(jnp.int32(low), jnp.int32(high)))
    firsts = [int(steps.row(step)) for step in range(steps.count)]
    assert sorted(firsts) == list(range(low // 8 * 8, high, 64)) * (high > low)
    for step, first in enumerate(firsts):
        assert first % 8 == 0 and (step >= steps.whole) == (first < low or first + 64 > high)


@pytest.mark.parametrize("consumers", [1, 2])
@pytest.mark.parametrize("n", [64, 192, 320, 768, 2048, 14336])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("others", [1, 2048])
def test_tiles_fit(consumers, n, itemsize, others):
    tile = pallas_gpu._tile(consumers, n, others, itemsize)
    rows = 64 * consumers
    assert tile.rows == rows and tile.columns % 64 == 0 and 3 <= tile.stages <= 6
    assert 2 * 64 * tile.stages * (rows + tile.columns) + itemsize * rows * tile.columns <= 224 * 1024
    assert tile.columns / 2 + 32 + 48 <= consumer_registers(consumers)
    assert -(-n // tile.columns) * tile.columns < n + 256


def test_sizes_of_tiles():
    assert [pallas_gpu._height(m, g) for m, g in ((262144, 128), (16384, 8), (8000, 128), (512, 128), (1, 3))] == [
        128, 128, 32, 8, 8,
    ]  # fmt: skip
    assert pallas_gpu._tile(2, 768, 2048, 2) == (2, 256, 3)
    assert pallas_gpu._tile(2, 768, 2048, 4) == (2, 192, 3)
    assert pallas_gpu._tile(1, 768, 64, 2) == (1, 256, 4)  # 512 rows for 128 groups: a tile for each multiprocessor
    assert pallas_gpu._tile(2, 2048, 2, 2).columns == 64


def test_stores_are_clipped(monkeypatch):
    """Only what is swizzled is written by a map of the array, and cut at its ends."""
    x, w, of = (jax.ShapeDtypeStruct(s, BF16) for s in ((37, 64), (3, 64, 192), (3,)))
    with stores(monkeypatch) as found:
        loss = lambda x, w, of: grouped_matmul(x, w, of, implementation="pallas_gpu").astype(jnp.float32).sum()
        jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(x, w, jax.ShapeDtypeStruct(of.shape, jnp.int32))
    assert len(found.swizzled) == 3 and not found.plain


@pytest.mark.parametrize(
    ("shape", "dtype", "wide", "reason"),
    [
        ((8, 64, 64), jnp.float32, None, "x is float32"),
        ((8, 64, 64), BF16, jnp.float8_e4m3fn, "preferred_element_type float8_e4m3fn"),
        ((8, 72, 64), BF16, None, "k 72 is not a multiple of 64"),
        ((8, 64, 100), F16, None, "n 100 is not a multiple of 64"),
    ],
)
def test_refusals(shape, dtype, wide, reason):
    m, k, n = shape
    x, w, y, of = (jax.ShapeDtypeStruct(s, dtype) for s in ((m, k), (3, k, n), (m, n), (3,)))
    of = jax.ShapeDtypeStruct(of.shape, jnp.int32)
    for f, other in ((grouped_matmul, w), (transposed_grouped_matmul, y)):
        with pytest.raises(NotImplementedError, match=reason):
            run = functools.partial(f, preferred_element_type=wide, implementation="pallas_gpu")
            jax.eval_shape(run, x, other, of)


def lowered(f, *arguments):
    """The program for a machine with an H200, where there is none."""
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    auto = (jax.sharding.AxisType.Auto,)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), auto, abstract_device=h200)):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)


@pytest.mark.parametrize("name", ["qwen3_up", "qwen3_down", "mixtral_up"])
def test_lowers_for_an_h200(name):
    """With an activation: without a gradient it is the kernel's, with one the product is kept."""
    case = REAL[name]
    x, w = (jax.ShapeDtypeStruct(s, BF16) for s in ((case.m, case.k), (case.g, case.k, case.n)))
    of = jax.ShapeDtypeStruct((case.g,), jnp.int32)
    run = functools.partial(grouped_matmul, activation="silu", implementation="pallas_gpu")
    loss = lambda x, w, of: run(x, w, of).astype(jnp.float32).sum()
    for f, kernels in ((run, 1), (jax.grad(loss, argnums=(0, 1)), 3)):
        program = lowered(f, x, w, of)
        assert testing.show_lowered(program, "cuda") == {("grouped_matmul", "pallas_gpu")}
        assert program.count("@mosaic_gpu_v2") == kernels
        assert "lissom_grouped_matmul_rows" in program and ("lissom_grouped_matmul_sums" in program) == (kernels > 1)
    assert grids(jax.grad(loss, argnums=(0, 1)), x, w, of) == [(132,)] * 3


def test_too_much_shared_memory_is_noticed_while_lowering(monkeypatch):
    """So that the test above says that tiles fit."""
    monkeypatch.setattr(pallas_gpu, "SHARED_BYTES", 300 * 1024)
    x, w, of = (jax.ShapeDtypeStruct(s, BF16) for s in ((4096, 64), (8, 64, 2048), (8,)))
    with pytest.raises(ValueError, match="shared memory"):
        of = jax.ShapeDtypeStruct(of.shape, jnp.int32)
        lowered(functools.partial(grouped_matmul, implementation="pallas_gpu"), x, w, of)
