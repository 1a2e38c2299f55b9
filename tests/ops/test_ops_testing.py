"""The gate itself: what it lets through and what it stops."""

import jax.numpy as jnp
import numpy as np
import pytest

from lissom.ops import testing


def rows(seed=0):
    """300 rows of 16 entries, of size 1 down to 1/300, and the same rounded to bfloat16."""
    truth = testing.normal(seed, (300, 16))[0] / np.arange(1, 301)[:, None]
    return truth.astype(np.float64), np.asarray(jnp.asarray(truth, jnp.bfloat16), np.float64)


def test_rounding_passes():
    truth, naive = rows()
    testing.compare("rounded", truth, naive, naive)
    testing.compare("nearly right", truth, naive, truth + 2 * (naive - truth))


def test_small_rows_are_judged_by_small_rows():
    """A row that is 4 % off is wrong by less than the rounding of the first rows."""
    truth, naive = rows()
    ours = naive.copy()
    ours[290] *= 1.04
    assert np.abs(ours - truth).max() <= np.abs(naive - truth).max()
    with pytest.raises(AssertionError, match="row 290 of 300"):
        testing.compare("late", truth, naive, ours)


def test_no_row_may_be_further_off_than_the_array_allows():
    truth, naive = rows()
    ours = naive.copy()
    largest = np.abs(naive - truth).max()
    ours[0, 0] = truth[0, 0] + 2.1 * largest
    with pytest.raises(AssertionError, match="row 0 of 300"):
        testing.compare("first", truth, naive, ours)


def test_few_rows_are_judged_together():
    """Up to 64 rows: one bound, 2 x 0.01 + 1e-5."""
    truth = np.ones((3, 2))
    off = lambda row, by: truth + np.array([[by * (r == row), 0] for r in range(3)])
    testing.compare("all", truth, off(0, 0.01), off(1, 0.02))
    with pytest.raises(AssertionError, match=r"error 0.021, allowed 0.02 \(row 1 of 3"):
        testing.compare("all", truth, off(0, 0.01), off(1, 0.021))


def test_infinities_and_nan():
    truth = np.array([[1.0, -np.inf], [2.0, 3.0]])
    testing.compare("same", truth, truth, truth)
    with pytest.raises(AssertionError, match="infinities differ"):
        testing.compare("finite", truth, truth, np.where(np.isinf(truth), 0, truth))
    with pytest.raises(AssertionError, match="1 of 4 entries are NaN"):
        testing.compare("nan", truth, truth, np.array([[1.0, -np.inf], [2.0, np.nan]]))
    everywhere = np.full((2, 2), -np.inf)
    testing.compare("nothing finite", everywhere, everywhere, everywhere)
    with pytest.raises(AssertionError):
        testing.compare("more infinities", truth, truth, np.array([[1.0, -np.inf], [2.0, np.inf]]))
