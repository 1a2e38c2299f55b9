"""The expected best of n random trials, against all draws."""

import itertools
import math

import numpy as np
import pytest

from lissom.evaluation.trials import expected_best


def test_it_is_the_mean_over_all_draws():
    rng = np.random.default_rng(0)
    chosen_by, values = rng.random(6), rng.random(6)
    for count in range(1, 7):
        draws = [list(draw) for draw in itertools.combinations(range(6), count)]
        mean = np.mean([values[draw][np.argmin(chosen_by[draw])] for draw in draws])
        assert expected_best(chosen_by, values, count) == pytest.approx(mean)


def test_a_trial_that_failed_is_chosen_where_there_is_no_other():
    assert expected_best([math.nan, 1.0], [math.nan, 5.0], 2) == 5
    assert math.isnan(expected_best([math.nan, 1.0], [math.nan, 5.0], 1))


@pytest.mark.parametrize("count", [0, 3])
def test_bad_counts(count):
    with pytest.raises(ValueError, match=f"{count} of 2 trials"):
        expected_best([1, 2], [1, 2], count)
