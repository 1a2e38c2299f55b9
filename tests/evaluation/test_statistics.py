"""Intervals, labels and verdicts against numbers worked out by hand."""

import math

import pytest

from lissom.evaluation.statistics import Difference, paired_difference, pareto_front, summarize, verdict


def test_summary_by_hand():
    # 1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.302653 (any t table), half width 4.302653 / sqrt(3).
    summary = summarize([1.0, 2.0, 3.0])
    assert (summary.mean, summary.sd, summary.n) == (2.0, 1.0, 3)
    assert summary.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert summarize([5.0]).sd is None and summarize([5.0]).half_width is None
    assert summarize([0.1] * 3).sd == 0.0
    with pytest.raises(ValueError):
        summarize([])
    with pytest.raises(ValueError):
        summarize([1.0, math.nan])


def test_paired_difference_cancels_what_seeds_share():
    first = {0: 0.10, 1: 0.50, 2: 0.90}
    other = {0: 0.11, 1: 0.52, 2: 0.93, 7: 0.0}
    # Differences 0.01, 0.02, 0.03: far smaller than the spread over seeds, sd 0.01; seed 7 has no partner.
    difference = paired_difference(first, other, "higher")
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert difference.n == 3 and difference.mean == pytest.approx(0.02)
    assert (difference.low, difference.high) == pytest.approx((0.02 - half, 0.02 + half), rel=1e-5)
    assert difference.label == "not separated"  # 0.02 - 0.0248 < 0


@pytest.mark.parametrize("direction, label", [("higher", "better"), ("lower", "worse"), (None, "higher")])
def test_label_follows_the_direction(direction, label):
    first, other = {0: 1.0, 1: 1.0, 2: 1.0}, {0: 2.0, 1: 2.1, 2: 1.9}
    assert paired_difference(first, other, direction).label == label
    opposite = {"better": "worse", "worse": "better", "higher": "lower"}[label]
    assert paired_difference(other, first, direction).label == opposite


def test_too_few_seeds_have_no_interval():
    one = paired_difference({0: 1.0, 1: 2.0}, {0: 3.0}, "higher")
    assert (one.label, one.mean, one.low) == ("one seed", 2.0, None)
    assert paired_difference({0: 1.0}, {1: 3.0}, "higher").label == "no shared seed"


def claim(low, high, n=5, direction="higher", examples=5000, floor=True, ceiling=True, margin=0.0):
    difference = Difference((low + high) / 2, low, high, n, "")
    return verdict(difference, direction, test_examples=examples, has_floor=floor, has_ceiling=ceiling, margin=margin)


def test_verdicts():
    assert claim(0.1, 0.3).word == "shown" and claim(0.1, 0.3).headline
    assert claim(0.1, 0.3, direction="lower").word == "refuted at this size"
    assert claim(-0.3, -0.1, direction="lower").word == "shown"
    assert claim(-0.1, 0.3).word == "not separated"
    assert claim(0.1, 0.3, margin=0.2).word == "not separated"
    assert claim(0.1, 0.3, margin=0.4).word == "refuted at this size"
    assert claim(0.1, 0.3, n=3).word == "shown" and not claim(0.1, 0.3, n=3).headline


@pytest.mark.parametrize("missing", [{"n": 2}, {"examples": 360}, {"floor": False}, {"ceiling": False}])
def test_a_claim_that_lacks_something_is_not_separated(missing):
    result = claim(0.1, 0.3, **missing)
    assert result.word == "not separated" and not result.headline and len(result.lacks) == 1


def test_pareto_front():
    #          fast    dominated  twin of 0   slow, best  slower, worse
    points = [(1, 5), (2, 4), (1, 5), (3, 9), (4, 8)]
    assert pareto_front(points) == [0, 2, 3]
    assert pareto_front(points, ("lower", "lower")) == [0, 2, 1]
    assert pareto_front([(1, 5), (1, 6)]) == [1]
    assert pareto_front([]) == []
