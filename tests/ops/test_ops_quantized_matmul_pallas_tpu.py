"""The TPU kernel of the product with few bits, in jax's interpreter of a TPU, where memory that nobody wrote is NaN.
test_tpu_compile_quantized_matmul.py has it compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.ops import testing
from lissom.ops.interpreting import interpreting
from lissom.ops.quantized_matmul import pallas_tpu, quantized_matmul
from lissom.ops.quantized_matmul.cases import REAL, TINY, Case, arrays
from tests.ops.test_ops_quantized_matmul import check, given
from tests.ops.traced import grids

BF16, F32 = jnp.bfloat16, np.float32


@pytest.fixture(autouse=True)
def interpreted():
    # An interpreted kernel is a long program that runs once or twice.
    jax.config.update("jax_disable_most_optimizations", True)
    with interpreting():
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def in_blocks(patch):
    """Several blocks of each axis, the last of which overhangs along rows and channels."""
    for name, size in {"MOST_ROWS": 4, "MOST_CHANNELS": 128, "PART": 256}.items():
        patch.setattr(pallas_tpu, name, size)


LOW = "its edges"

# case, dtype of x where it is float, grid in blocks
CASES = {
    "channels": (Case(5, 512, 150, "int8", "float32", None, LOW), BF16, (2, 2, 2)),
    "groups": (Case(3, 512, 150, "int8", "float32", 128, LOW), F32, (1, 2, 2)),
    "groups_share_registers": (Case(1, 256, 20, "int8", "float32", 32, LOW), F32, (1, 1, 1)),
    "registers_do_not_divide": (Case(2, 192, 9, "int8", "float32", 64, LOW), F32, (1, 1, 1)),
    "int4": (Case(5, 512, 20, "int4", "float32", 128, LOW), BF16, (2, 1, 1)),
    "int4_channels": (Case(2, 1024, 20, "int4", "float32", None, LOW), F32, (1, 1, 2)),
    "integers": (Case(5, 512, 150, "int8", "int8", None, LOW), None, (2, 2, 2)),
    "integers_in_groups": (Case(5, 512, 20, "int8", "int8", 256, LOW), None, (2, 1, 2)),
    "int4_integers": (Case(1, 512, 20, "int4", "int8", 256, LOW), None, (1, 1, 1)),
    "float8": (Case(5, 256, 20, "float8_e4m3fn", "float8_e5m2", 128, LOW), None, (2, 1, 1)),
    "float8_codes": (Case(5, 256, 20, "float8_e5m2", "float32", None, LOW), BF16, (2, 1, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name, monkeypatch):
    in_blocks(monkeypatch)
    case, dtype, grid = CASES[name]
    x, codes, scale, *x_scale = given(case)
    run = lambda: call(case, x, codes, scale, *x_scale)
    assert grids(run) == [grid]
    check(case, "pallas_tpu", dtype)


def call(case, x, codes, scale, x_scale=None):
    return quantized_matmul(x, codes, scale, bits=case.bits, x_scale=x_scale, implementation="pallas_tpu")


@pytest.mark.parametrize("name", ["int8_row", "int4", "int8_int8"])
def test_equals_reference_of_less_than_a_register(name):
    check(TINY[name], "pallas_tpu")


def test_integers_are_summed_exactly(monkeypatch):
    """Over parts, where float32 would round: sums of 1024 products of up to 2^14 and a few small ones."""
    in_blocks(monkeypatch)
    rng = np.random.default_rng(0)
    x, codes = rng.integers(-128, 128, (2, 2, 2048), np.int8)
    x[:, :1024], codes[0, :1024] = -128, -128
    sums = x.astype(np.int64) @ codes.astype(np.int64).T
    assert sums.max() > 2**24
    y = quantized_matmul(x, codes, np.ones((2, 1), F32), x_scale=F32(1), implementation="pallas_tpu")
    np.testing.assert_array_equal(y, sums.astype(F32))


def test_a_nan_stays_in_its_row_and_channel():
    case = Case(5, 256, 20, "float8_e4m3fn", "float32", 64, LOW)
    x, codes, scale = (a.copy() for a in given(case))
    x[3, 7], codes[4, 200] = np.nan, np.nan
    found = np.isnan(call(case, x, codes, scale))
    assert found[3].all() and found[:, 4].all() and found.sum() == 20 + 5 - 1


def test_batches_are_rows():
    """Also of scales of x; a batch of codes is a loop."""
    case = Case(2, 128, 9, "int8", "int8", None, LOW)
    sets = [arrays(case, jax.random.key(seed)) for seed in range(2)]
    x, codes, scale, x_scale = (jnp.stack(a) for a in zip(*sets))
    f = functools.partial(call, case)
    rows = jax.vmap(f, in_axes=(0, None, None, None))
    assert grids(rows, x, codes[0], scale[0], x_scale[0]) == [(1, 1, 1)]
    for i, y in enumerate(rows(x, codes[0], scale[0], x_scale[0])):
        np.testing.assert_allclose(y, f(x[i], codes[0], scale[0], x_scale[0]), rtol=1e-6)
    for i, y in enumerate(jax.vmap(f)(x, codes, scale, x_scale)):
        np.testing.assert_allclose(y, f(x[i], codes[i], scale[i], x_scale[i]), rtol=1e-6)


REFUSED = {
    "x is float16": (Case(2, 128, 8, "int8", "float16", None, LOW), F32),
    "scale is float64": (Case(2, 128, 8, "int8", "int8", None, LOW), np.float64),
    "scale: groups of 48 numbers neither fill registers of 128": (Case(2, 96, 8, "int8", "float32", 48, LOW), F32),
    "codes: parts of 30001 numbers along k": (Case(256, 30001, 512, "int8", "float32", None, LOW), F32),
    "codes: parts of 65536 numbers along k, .* in groups of 65536": (
        Case(256, 131072, 512, "int8", "float32", 65536, LOW),
        F32,
    ),
}


@pytest.mark.parametrize("said", REFUSED)
def test_refusals(said):
    case, dtype = REFUSED[said]
    with jax.enable_x64(dtype == np.float64):
        given = list(jax.eval_shape(lambda: arrays(case, jax.random.key(0))))
        given[2:] = [jax.ShapeDtypeStruct(a.shape, dtype) for a in given[2:]]
        with pytest.raises(NotImplementedError, match=said):
            jax.eval_shape(functools.partial(call, case), *given)


def test_is_forward_only():
    x, codes, scale = given(TINY["int8"])
    loss = lambda x: call(TINY["int8"], x, codes, scale).sum()
    with pytest.raises(NotImplementedError, match="pallas_tpu of quantized_matmul is forward only"):
        jax.eval_shape(jax.grad(loss), x)


@pytest.mark.parametrize("name", REAL)
def test_parts_are_whole_groups_and_registers(name):
    case = REAL[name]
    codes = (case.n, case.k * case.bits // 8)
    for dtype in (F32, BF16, np.int8):
        plan = pallas_tpu._plan(case.m, codes, case.groups, case.bits, jnp.dtype(dtype))
        assert plan.lanes * plan.parts == codes[1] and plan.lanes % plan.group * (case.groups > 1) == 0
        assert plan.lanes % 128 == 0 and 512 <= plan.lanes <= 1024


def test_facts(monkeypatch):
    """What the interpreter showed stands in docs/support.json under the platform of the kernel."""
    check(TINY["int8_row"], "pallas_tpu")
    assert testing.Fact("quantized_matmul", "pallas_tpu", "tpu", "interpreted") in testing.shown
