"""Ceilings: positive, raised but never lowered, and a limit that is the largest of its terms."""

import jax.numpy as jnp
import numpy as np
import pytest

from lissom.evaluation import ceilings
from lissom.evaluation.ceilings import Ceilings, Limit, Work
from lissom.evaluation.latency import Recycled, in_turns
from lissom.evaluation.memory import compiled_memory

ROUND = Ceilings(bandwidth=10.0, matmul={"float32": 100.0, "int8": 400.0}, exp=5.0, fma=100.0, dispatch=1e-6)


def test_measured():
    found = ceilings.measure_ceilings(tiny=True, repeats=2)
    assert set(found.matmul) == set(ceilings.DTYPES)
    assert all(rate > 0 for rate in found.rates().values()) and 0 < found.dispatch < 1
    names = [entry.name for entry in found.measurements()]
    assert names == ["bandwidth", *["matmul_rate"] * 3, "exp_rate", "fma_rate", "dispatch_seconds"]


@pytest.mark.parametrize(
    ("work", "limit"),
    [
        (Work(flops=200, bytes=10, exps=5, dtype="float32"), Limit(2.0, "flops")),  # 200 / 100
        (Work(flops=200, bytes=10, exps=5, dtype="int8"), Limit(1.0, "bytes")),  # 10 / 10, before 200 / 400
        (Work(flops=200, bytes=10, exps=15, dtype="int8"), Limit(3.0, "exps")),  # 15 / 5
    ],
)
def test_limit_is_the_largest_term(work, limit):
    assert ROUND.limit(work) == limit


def test_raised_never_lowers():
    found = ROUND.raised({"bandwidth": 20.0, "float32": 50.0}, "torch")
    assert (found.bandwidth, found.matmul["float32"], found.by) == (20.0, 100.0, {"bandwidth": "torch"})
    assert found.measurements()[0].conditions == {"by": "torch"}


def test_recycled_results_take_no_new_memory():
    function = Recycled(lambda x: {"twice": 2 * x, "sum": x.sum()}, jnp.ones(1024))
    plan = compiled_memory(function.compiled)
    # Results of 1024 floats and 1 float (the table of pointers to them can't be aliased).
    assert plan.aliased == 4 * 1024 + 4
    for start in range(3):  # the values are those of the new call, wherever they lie
        x = jnp.arange(start, start + 1024, dtype=jnp.float32)
        results = function(x)
        np.testing.assert_array_equal(results["twice"], 2 * np.asarray(x))
        assert results["sum"] == x.sum()


def test_in_turns_interleaves_and_drops_what_ends():
    calls = []

    def timer(name, last):
        def sample(number):
            calls.append(name)
            return None if number > last else 1.0 + number

        return sample

    found = in_turns({"a": timer("a", 9), "b": timer("b", 1)}, repeats=4)
    assert calls == ["a", "b", "a", "b", "a", "b", "a"]  # b says None at its third call
    assert found.keys() == {"a"} and found["a"].samples == (1.0, 2.0, 3.0, 4.0)
    # quartiles of 1 2 3 4 are 1.75 and 3.25, the median is 2.5
    assert found["a"].spread == pytest.approx(1.5 / 2.5)
