"""What is special to binary_matmul's TPU kernel, in jax's interpreter of a TPU: blocks that overhang, and words in
parts. It passes the tests of test_ops_binary_matmul.py too; test_tpu_compile_binary_matmul.py has it compiled."""

import jax.numpy as jnp
import numpy as np
import pytest

from lissom.ops.binary_matmul import binary_matmul, pack_signs, pallas_tpu
from lissom.ops.interpreting import interpreting
from tests.ops.traced import grids

# m, length, n: the grid of blocks of 8 rows, 16 columns and 2 words.
CASES = {"whole": (16, 128, 32, (2, 2, 2)), "overhanging": (11, 150, 17, (2, 2, 3)), "one_part": (3, 33, 5, (1, 1, 1))}


@pytest.mark.parametrize("name", CASES)
def test_in_blocks(name, monkeypatch):
    m, length, n, grid = CASES[name]
    for size, value in {"ROWS": 8, "COLUMNS": 16, "WORDS": 2}.items():
        monkeypatch.setattr(pallas_tpu, size, value)
    rng = np.random.default_rng(0)
    x, w = (rng.choice([-1, 1], (rows, length)).astype(np.float32) for rows in (m, n))
    run = lambda x, w: binary_matmul(x, w, length=length, implementation="pallas_tpu")
    with interpreting():
        assert grids(run, pack_signs(x), pack_signs(w)) == [grid]
        y = run(pack_signs(x), pack_signs(w))
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, x @ w.T)
