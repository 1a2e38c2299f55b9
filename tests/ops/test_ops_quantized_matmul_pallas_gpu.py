"""The Hopper kernels of the product with few bits, interpreted against the float64 reference, and lowered for CUDA. No
GPU is needed, and none is used: what the interpreter does not see is said in `ops/quantized_matmul/pallas_gpu.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.ops import testing
from lissom.ops.hopper import SHARED_BYTES, consumer_registers
from lissom.ops.interpreting import interpreting
from lissom.ops.quantized_matmul import pallas_gpu, pallas_gpu_kernels, quantized_matmul
from lissom.ops.quantized_matmul.cases import REAL, Case, arrays
from tests.ops.test_ops_quantized_matmul import check, given
from tests.ops.traced import grids, stores

BF16, F16 = jnp.bfloat16, jnp.float16
LOW = "its edges"

# case, dtype of x where it is float; every ring of stages is gone around once
CASES = {
    "int8_groups": (Case(5, 640, 72, "int8", "float16", 320, LOW), F16),
    "int8_rows": (Case(70, 64, 8, "int8", "bfloat16", None, LOW), BF16),
    "int4_groups": (Case(1, 1280, 72, "int4", "bfloat16", 128, LOW), BF16),
    "int4": (Case(40, 128, 64, "int4", "float16", None, LOW), F16),
    "integers": (Case(5, 512, 288, "int8", "int8", None, LOW), None),
    "integers_in_groups": (Case(130, 768, 160, "int8", "int8", 256, LOW), None),
    "float8": (Case(5, 256, 96, "float8_e4m3fn", "float8_e5m2", None, LOW), None),
    "float8_groups": (Case(8, 256, 32, "float8_e5m2", "float8_e4m3fn", 128, LOW), None),
}


@pytest.fixture
def no_races(capfd):
    """The interpreter reports a race on stdout and goes on."""
    yield
    assert "RACE" not in capfd.readouterr().out


def call(case, x, codes, scale, x_scale=None):
    return quantized_matmul(x, codes, scale, bits=case.bits, x_scale=x_scale, implementation="pallas_gpu")


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name, no_races):
    case, dtype = CASES[name]
    with interpreting():
        check(case, "pallas_gpu", dtype)


def test_integers_are_summed_exactly(no_races):
    """Beyond what float32 holds: 2048 products of -128 * -128, less some."""
    rng = np.random.default_rng(0)
    x, codes = rng.integers(-128, 128, (2, 32, 2048), np.int8)
    x[:2, :2000], codes[0, :2000] = -128, -128
    sums = x.astype(np.int64) @ codes.astype(np.int64).T
    assert sums.max() > 2**24
    with interpreting():
        y = quantized_matmul(x, codes, np.ones((32, 1), np.float32), x_scale=np.float32(1), implementation="pallas_gpu")
    np.testing.assert_array_equal(y, sums.astype(np.float32))


def test_every_byte_is_two_numbers():
    """The low and the high halves, 16 times as large, in both types: exact."""
    byte = np.arange(256, dtype=np.uint8)
    for dtype in (BF16, F16):
        low, high = pallas_gpu_kernels._operands(jnp.asarray(byte.view(np.int8)), 2, dtype)
        assert low.dtype == high.dtype == dtype
        for found, nibble in ((low, byte & 15), (high, byte >> 4)):
            nibble = nibble.astype(int)
            np.testing.assert_array_equal(found.astype(np.float32), 16 * (nibble - 16 * (nibble > 7)))


@pytest.mark.parametrize(("tall", "wide"), [(3, 2), (4, 8), (5, 19), (1, 24)])
def test_tiles_are_made_once_in_panels(tall, wide, monkeypatch):
    order = []
    for i in range(tall * wide):
        monkeypatch.setattr(jax.lax, "axis_index", lambda _, i=i: jnp.int32(i))
        order.append(tuple(map(int, pallas_gpu_kernels._place(tall, wide))))
    assert sorted(order) == [(row, column) for row in range(tall) for column in range(wide)]
    assert order == sorted(order, key=lambda at: (at[1] // pallas_gpu_kernels.PANEL, at))


def test_tiles_fit():
    """Into shared memory and registers: the sums, of groups twice, and 64 columns of what is written."""
    of = pallas_gpu_kernels
    for columns, stages in of.STAGES.items():
        stage = of.WIDE_STEP * (of.CONSUMERS * 64 + columns)
        assert stages >= 3 and stages * stage + 4 * of.CONSUMERS * 64 * of.PIECE <= SHARED_BYTES
        sums = 1 if columns == of.COLUMNS else 2
        assert sums * columns // 2 + of.PIECE // 2 + 48 <= consumer_registers(of.CONSUMERS)
    most = pallas_gpu.MOST_ROWS
    assert of.WEIGHT_STAGES * 64 * (64 + 2 * 2 * most) + 4 * 64 * most <= SHARED_BYTES


def test_stores_are_clipped(monkeypatch):
    """Only what is swizzled is written by a map of the array, and cut at its ends."""
    for case in (Case(5, 256, 96, "int8", "int8", None, LOW), Case(5, 128, 72, "int4", "bfloat16", None, LOW)):
        with stores(monkeypatch) as found:
            jax.make_jaxpr(functools.partial(call, case))(*arrays(case, jax.random.key(0)))
        assert found.swizzled and not found.plain


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(2, 128, 32, "int8", "float32", None, LOW), "x is float32"),
        (Case(2, 128, 32, "int4", "int8", None, LOW), "codes of 4 bits with x of int8 have no kernel"),
        (Case(2, 128, 32, "float8_e5m2", "bfloat16", None, LOW), "codes of float8_e5m2 with x of bfloat16"),
        (Case(2, 192, 32, "int8", "int8", None, LOW), "a group of 192 numbers is not a multiple of 128"),
        (Case(2, 192, 32, "int8", "int8", 64, LOW), "a group of 64 numbers is not a multiple of 128"),
        (Case(2, 256, 32, "int4", "bfloat16", 64, LOW), "a group of 64 numbers is not a multiple of 128"),
        (Case(2, 64, 32, "int8", "bfloat16", 32, LOW), "a group of 32 numbers is not a multiple of 64"),
        (Case(2, 128, 40, "int8", "int8", None, LOW), "codes have 40 rows, not a multiple of 32"),
        (Case(2, 128, 30, "int8", "bfloat16", None, LOW), "codes have 30 rows, not a multiple of 8"),
    ],
)
def test_refusals(case, reason):
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(functools.partial(call, case), *jax.eval_shape(lambda: arrays(case, jax.random.key(0))))


def test_is_forward_only():
    case = Case(2, 128, 32, "int8", "bfloat16", None, LOW)
    x, codes, scale = given(case)
    loss = lambda x: call(case, x, codes, scale).astype(jnp.float32).sum()
    with pytest.raises(NotImplementedError, match="pallas_gpu of quantized_matmul is forward only"):
        jax.eval_shape(jax.grad(loss), x)


def test_batches_are_rows():
    case = Case(4, 128, 64, "int8", "bfloat16", None, LOW)
    x, codes, scale = arrays(case, jax.random.key(0))
    rows = jax.vmap(functools.partial(call, case), in_axes=(0, None, None))
    assert grids(rows, jnp.stack([x] * 3), codes, scale) == [(1,)]


def lowered(f, *arguments):
    """The program for a machine with an H200, where there is none."""
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    auto = (jax.sharding.AxisType.Auto,)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), auto, abstract_device=h200)):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)


LOWERED = {
    "int8_8192": (REAL["int8_8192"], "products", (64 * 32,)),
    "integers_in_groups": (Case(300, 4096, 1024, "int8", "int8", 128, LOW), "products", (3 * 8,)),
    "fp8_8192": (REAL["fp8_8192"], "products", (64 * 64,)),
    "gpu_gemv_int8": (REAL["gpu_gemv_int8"], "weights", (172,)),
    "gpu_gemv_int4": (REAL["gpu_gemv_int4"], "weights", (172,)),
    "gpu_m16_int4": (REAL["gpu_m16_int4"], "weights", (172,)),
    "many_rows": (Case(500, 4096, 11008, "int8", "float16", None, LOW), "weights", (172 * 8,)),
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_an_h200(name):
    case, kernel, grid = LOWERED[name]
    shapes = jax.eval_shape(lambda: arrays(case, jax.random.key(0)))
    f = functools.partial(call, case)
    program = lowered(f, *shapes)
    assert testing.show_lowered(program, "cuda") == {("quantized_matmul", "pallas_gpu")}
    assert program.count("@mosaic_gpu_v2") == 1 and f"lissom_quantized_matmul_{kernel}" in program
    assert grids(f, *shapes) == [grid]


def test_too_much_shared_memory_is_noticed_while_lowering(monkeypatch):
    """So that the test above says that tiles fit."""
    monkeypatch.setattr(pallas_gpu_kernels, "STAGES", {256: 5, 128: 8})
    case = REAL["int8_8192"]
    with pytest.raises(ValueError, match="shared memory"):
        lowered(functools.partial(call, case), *jax.eval_shape(lambda: arrays(case, jax.random.key(0))))
