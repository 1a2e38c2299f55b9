"""Temperatures, policies and fronts of early exit, by hand."""

import itertools

import numpy as np
import pytest

from lissom.evaluation import early_exit
from lissom.evaluation.early_exit import Point

# Four examples over three steps.
RIGHT = np.array([[1, 0, 0, 1], [1, 1, 0, 0], [1, 1, 0, 1]], bool)
SURE = np.array([[0.9, 0.4, 0.3, 0.6], [0.9, 0.7, 0.4, 0.5], [0.9, 0.8, 0.9, 0.9]])


def test_a_temperature_by_hand():
    # Two classes, scores 2 and 0, right three times of four: at best sigmoid(2 / temperature) = 3 / 4.
    scores = np.tile(np.array([2.0, 0.0]), (5, 4, 1))
    labels = np.array([0, 0, 1, 0])
    np.testing.assert_allclose(early_exit.temperature(scores, labels), 2 / np.log(3), rtol=1e-6)
    # Scores that are larger by a factor want a temperature larger by it; one a step finds each.
    factors = np.array([1.0, 2.0, 3.0, 0.5, 10.0])[:, None, None]
    found = early_exit.temperature(scores * factors, labels, per_step=True)
    np.testing.assert_allclose(found, factors.ravel() * 2 / np.log(3), rtol=1e-6)
    # What is added to all classes of an example changes nothing.
    moved = scores + np.array([5.0, -3.0, 0.0, 1e3])[:, None]
    np.testing.assert_allclose(early_exit.temperature(moved, labels), 2 / np.log(3), rtol=1e-6)


def test_it_is_the_least_of_the_likelihoods():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 40)
    scores = rng.normal(size=(3, 40, 5)) + 2 * np.eye(5)[labels]

    def loss(temperature):
        x = scores / temperature
        return np.mean(np.log(np.exp(x).sum(-1)) - np.take_along_axis(x, labels[None, :, None], -1)[..., 0])

    best = float(early_exit.temperature(scores, labels))
    grid = np.geomspace(0.01, 100, 2001)
    assert loss(best) <= min(map(loss, grid)) + 1e-9 and 0.3 < best < 3


def test_temperatures_without_a_crossing():
    scores, labels = np.tile(np.array([2.0, 0.0]), (1, 3, 1)), np.zeros(3, int)
    # The larger error of exp(-1e-3 ...) is out of float64's sight: anywhere cold is as good.
    assert early_exit.temperature(scores, labels) < 0.1
    np.testing.assert_allclose(early_exit.temperature(scores, labels + 1), early_exit.HOTTEST, rtol=1e-3)
    assert early_exit.temperature(np.ones((2, 3, 4)), labels) == 1
    with pytest.raises(ValueError, match=r"labels \(2,\) \[N\]"):
        early_exit.temperature(scores, labels[:2])


def test_calibration_error_by_hand():
    # Bins (0, 0.5] and (0.5, 1]: |0 + 1 - 0.9| and |2 - 2.6|, of five examples... 0.5 lies in the lower one.
    sure, right = np.array([0.4, 0.5, 0.8, 0.9, 0.9]), np.array([0, 1, 1, 0, 1])
    assert early_exit.calibration_error(sure, right, bins=2) == pytest.approx((0.1 + 0.6) / 5)
    assert early_exit.calibration_error(np.array([[1.0], [0.0]]), np.array([[1], [0]])) == 0
    with pytest.raises(ValueError, match="must be as many"):
        early_exit.calibration_error(sure, right[:2])


def test_exit_steps_by_hand():
    assert early_exit.exit_steps(SURE, 0.5).tolist() == [1, 2, 3, 1]
    assert early_exit.exit_steps(SURE, 0.85).tolist() == [1, 3, 3, 3]
    # Only what exceeds it stops: 1 stops nobody, 0 all.
    assert early_exit.exit_steps(np.ones((4, 2)), 1.0).tolist() == [4, 4]
    assert early_exit.exit_steps(SURE, 0.0).tolist() == [1, 1, 1, 1]


def test_policies_by_hand():
    assert early_exit.fixed(RIGHT) == [Point(1, 0.5), Point(2, 0.5), Point(3, 0.75)]
    # Steps 1, 2, 3, 1: right, right, wrong, right.
    assert early_exit.dynamic(RIGHT, SURE, 0.5) == Point(7 / 4, 0.75, 0.5)
    # Steps 1, 2, 3 (never right), 1.
    assert early_exit.oracle(RIGHT) == Point(7 / 4, 0.75)


def test_random_is_the_mean_of_all_deals():
    steps = np.array([1, 2, 3, 1])
    deals = [early_exit.judged(RIGHT, np.array(deal)).accuracy for deal in itertools.permutations(steps)]
    found = early_exit.random_exit(RIGHT, steps)
    assert found.accuracy == pytest.approx(np.mean(deals)) and found.steps == 7 / 4


def test_thresholds_lie_between_confidences():
    found = early_exit.thresholds(SURE)
    assert found[0] == 0 and found[-1] == 1 and not set(found) & set(SURE.ravel())
    assert len(found) == len(np.unique(SURE)) + 1
    many = early_exit.thresholds(np.linspace(0.1, 1, 999), most=20)
    assert len(many) == 20 and (np.diff(many) > 0).all()


def test_the_front_and_what_is_read_off_it():
    front = early_exit.validation_front(RIGHT, SURE)
    # 0: all at once; 0.5 .. 0.6: 1, 2, 3, 1. More steps are right no more often.
    assert [point[:2] for point in front] == [(1.0, 0.5), (7 / 4, 0.75)]
    assert 0.5 < front[1].threshold < 0.6
    assert early_exit.cheapest(front, 0.75) == front[1] and early_exit.cheapest(front, 0.5) == front[0]
    assert early_exit.within(front, 1.7) == front[0] and early_exit.within(front, 3) == front[1]
    assert early_exit.within(front, 0.9) is None
    with pytest.raises(ValueError, match=r"no threshold reaches an accuracy of 0\.9"):
        early_exit.cheapest(front, 0.9)
