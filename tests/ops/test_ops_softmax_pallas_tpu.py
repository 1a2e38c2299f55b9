"""What is special to softmax's TPU kernel, in jax's interpreter of a TPU: rows in parts, rows along sublanes, blocks
that overhang. It passes the tests of test_ops_softmax.py too; test_tpu_compile_softmax.py has it compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.ops import testing
from lissom.ops.interpreting import interpreting
from lissom.ops.softmax import OP, pallas_tpu, softmax
from tests.ops.traced import grids

BF16, F32 = jnp.bfloat16, np.float32


@pytest.fixture(autouse=True)
def interpreted():
    with interpreting():
        yield


def call(implementation, x, axis=-1):
    return softmax(x, axis, implementation=implementation)


def in_parts(patch):
    """Blocks of one tile at most: rows of more than 128 along lanes, 8 (bfloat16: 16) along sublanes, come in parts."""
    patch.setattr(pallas_tpu, "VMEM_BYTES", 0)
    patch.setattr(pallas_tpu, "BLOCK", 0)


# name: shape, axis, the grid (lead, kept, phases, parts) in float32 of blocks of one tile, and of the usual ones.
SHAPES = {
    "lanes": ((2, 11, 300), 2, (2, 2, 2, 3), (1, 1, 1, 1)),
    "sublanes": ((2, 30, 140), 1, (2, 2, 2, 4), (1, 1, 1, 1)),
    "turned": ((128, 30), 1, (1, 1, 2, 4), (1, 1, 1, 1)),
    "whole_rows": ((9, 20, 100), 2, (9, 3, 1, 1), (1, 1, 1, 1)),
    "vector": ((260,), 0, (1, 1, 2, 3), (1, 1, 1, 1)),
}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", SHAPES)
def test_one_tile_at_a_time_equals_reference(name, dtype, monkeypatch):
    shape, axis, of_tiles, usual = SHAPES[name]
    (x,) = testing.normal(0, shape, dtype=dtype)
    assert grids(lambda x: call("pallas_tpu", x, axis), x) == [usual]
    in_parts(monkeypatch)
    if dtype == F32:
        assert grids(lambda x: call("pallas_tpu", x, axis), x) == [of_tiles]
    testing.check_case(OP, lambda i, x: call(i, x, axis), {"x": 3 * x}, "pallas_tpu", dtype)


@pytest.mark.parametrize("axis", [1, 2])
def test_many_blocks_equal_reference(axis):
    """Blocks of the usual size: 131072 elements are 512 rows of 256 along lanes, or 1024 rows of 128 along sublanes."""
    shape = (1, 1100, 256) if axis == 2 else (1, 100, 2500)
    (x,) = testing.normal(1, shape)
    assert grids(lambda x: call("pallas_tpu", x, axis), x) == [(1, 3, 1, 1)]
    testing.check_case(OP, lambda i, x: call(i, x, axis), {"x": 3 * x}, "pallas_tpu", F32)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("axis", [0, 1])
def test_hidden_and_extreme_entries_in_parts(axis, dtype, monkeypatch):
    """Whole parts of -inf at either end, rows of nothing else, a maximum that comes late, and the largest numbers."""
    in_parts(monkeypatch)
    n = 400 if axis else 52
    x = np.full((5, n), -np.inf)
    x[0, -1], x[0, n // 2] = 5, 4
    x[1, 0], x[1, n - 1] = -1e4, 1e4
    x[2, : n // 2] = -3e38
    x[3] = np.linspace(-30, 30, n)
    x = x.astype(np.dtype(dtype))
    wide = x[:4].astype(np.float64)
    expected = np.exp(wide - wide.max(1, keepdims=True))
    expected = np.concatenate([expected / expected.sum(1, keepdims=True), np.zeros((1, n))])
    (dy,) = testing.normal(2, x.shape, dtype=dtype)
    turned = lambda a: np.asarray(a, np.float64) if axis else np.asarray(a, np.float64).T
    given = [jnp.asarray(a if axis else a.T) for a in (x, dy)]
    y, pull = jax.vjp(lambda x: call("pallas_tpu", x, axis), given[0])
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == F32 else {"rtol": 2**-8, "atol": 1e-6}
    np.testing.assert_allclose(turned(y), expected, **close)
    dy = dy.astype(np.float64)
    dx = turned(pull(given[1])[0])
    np.testing.assert_allclose(dx, expected * (dy - (expected * dy).sum(1, keepdims=True)), **close)
    assert (dx[4] == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_entry_spoils_its_row_in_parts(bad, monkeypatch):
    in_parts(monkeypatch)
    x = np.zeros((3, 300), F32)
    x[1, 150] = bad
    y = np.asarray(call("pallas_tpu", x))
    assert np.isnan(y[1]).all()
    np.testing.assert_allclose(y[[0, 2]], 1 / 300, rtol=1e-6)


def test_what_fits_is_read_once():
    """GPT-2's vocabulary fits forward and not backward, where three arrays are in VMEM; Llama 3's comes in parts."""
    for n, forward, backward in ((50257, 1, 2), (128256, 2, 2)):
        x = jax.ShapeDtypeStruct((16, n), F32)
        phases = grids(lambda x, dy: jax.vjp(lambda x: call("pallas_tpu", x), x)[1](dy), x, x)
        assert [grid[2] for grid in phases] == [forward, backward], n


def test_float16_is_refused():
    with pytest.raises(NotImplementedError, match="x is float16"):
        call("pallas_tpu", np.zeros((2, 3), np.float16))


def test_vmap_is_one_kernel():
    """Of six matrices [200, 7], five make a block: 131072 elements are 1024 rows of 128 lanes, of which one has 200."""
    one = lambda x, dy: jax.vjp(lambda x: call("pallas_tpu", x), x)[1](dy)
    x, dy = np.ones((3, 2, 200, 7), F32), np.ones((2, 3, 200, 7), F32)
    assert grids(jax.vmap(one, in_axes=(0, 1)), x, dy) == [(2, 1, 1, 1)] * 2
