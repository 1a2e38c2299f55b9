"""Means over seeds, the interval of a paired difference, a verdict, and the Pareto front.

The 95 % interval of a mean of n values is mean +- t(0.975, n - 1) * sd / sqrt(n) with Student's t, since
three to five seeds are far from normal. Two variants are compared over the seeds they share, by the interval
of the mean of the per-seed differences: what the seeds have in common (data order, initial values) cancels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
MIN_TEST_EXAMPLES = 5000
MIN_SEEDS_TO_SEPARATE = 3
MIN_SEEDS_FOR_HEADLINE = 5


@dataclass(frozen=True)
class Summary:
    """Mean of n values; `sd` (n - 1 in the denominator) and the interval's half width are None for one
    value.
    """

    mean: float
    sd: float | None
    half_width: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of (other - first) over n shared seeds with its interval; `label` says what it means.

    label: "better" or "worse" when the interval leaves out 0, "not separated" when it holds it, "higher" or
    "lower" for a metric without direction, "one seed" (or "no shared seed") when there is no interval: low,
    high are None.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    label: str


@dataclass(frozen=True)
class Verdict:
    """`word`: "shown", "not separated" or "refuted at this size"; `headline`: five seeds; `lacks`: what is
    missing.
    """

    word: str
    headline: bool
    lacks: tuple[str, ...]


def summarize(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and half width of the t-interval of one or more finite values."""
    if len(values) == 0:
        raise ValueError("no values to summarize: unknown stays unknown")
    numbers = np.asarray(values, np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError(f"only finite values can be summarized, not {list(values)}")
    n = len(numbers)
    mean = math.fsum(numbers) / n
    if n == 1:
        return Summary(mean, None, None, 1)
    sd = float(np.std(numbers, ddof=1)) if np.ptp(numbers) else 0.0
    return Summary(mean, sd, float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * sd / math.sqrt(n), n)


def paired_difference(first: Mapping[int, float], other: Mapping[int, float], direction: str | None) -> Difference:
    """`other` minus `first` over the seeds both have; `direction` as in `METRICS`."""
    if direction not in ("higher", "lower", None):
        raise ValueError(f"direction is 'higher', 'lower' or None, not {direction!r}")
    shared = sorted(first.keys() & other.keys())
    if not shared:
        return Difference(None, None, None, 0, "no shared seed")
    summary = summarize([other[seed] - first[seed] for seed in shared])
    if summary.n == 1:
        return Difference(summary.mean, None, None, 1, "one seed")
    low, high = summary.mean - summary.half_width, summary.mean + summary.half_width
    return Difference(summary.mean, low, high, summary.n, _label(low, high, direction))


def _label(low: float, high: float, direction: str | None) -> str:
    if low <= 0 <= high:
        return "not separated"
    if direction is None:
        return "higher" if low > 0 else "lower"
    return "better" if (low > 0) == (direction == "higher") else "worse"


def verdict(
    difference: Difference,
    direction: str,
    *,
    test_examples: int,
    has_floor: bool,
    has_ceiling: bool,
    margin: float = 0.0,
) -> Verdict:
    """Does the difference carry the claim "better than the first by more than `margin`" (in the metric's
    unit)?

    Shown: the whole interval lies beyond the margin. Refuted at this size: the whole interval falls short of
    it. Either needs three seeds, 5,000 test examples, and a floor and a ceiling in the table (design, "What a
    claim needs"); without them, or with the margin inside the interval, the word is "not separated" and
    `lacks` says why.
    """
    if direction not in ("higher", "lower"):
        raise ValueError(f"a claim needs a direction, 'higher' or 'lower', not {direction!r}")
    lacks = []
    if test_examples < MIN_TEST_EXAMPLES:
        lacks.append(f"{test_examples} test examples, a claim needs {MIN_TEST_EXAMPLES}")
    if difference.n < MIN_SEEDS_TO_SEPARATE:
        lacks.append(f"{difference.n} shared seeds, a claim needs {MIN_SEEDS_TO_SEPARATE}")
    if not has_floor:
        lacks.append("no floor in the table")
    if not has_ceiling:
        lacks.append("no ceiling in the table")
    word = "not separated"
    if not lacks:
        low, high = difference.low, difference.high
        worst, best = (low, high) if direction == "higher" else (-high, -low)
        if worst > margin:
            word = "shown"
        elif best < margin:
            word = "refuted at this size"
    return Verdict(word, not lacks and difference.n >= MIN_SEEDS_FOR_HEADLINE, tuple(lacks))


def pareto_front(points: Sequence[tuple[float, float]], directions: tuple[str, str] = ("lower", "higher")) -> list[int]:
    """Indices of the points that no other point beats, ordered along the first coordinate.

    One point beats another when it is at least as good in both coordinates and better in one; equal points
    stay both.
    """
    signs = [1 if direction == "lower" else -1 for direction in directions]
    costs = [(signs[0] * x, signs[1] * y) for x, y in points]
    front, best = [], math.inf
    for index in sorted(range(len(costs)), key=lambda i: costs[i]):
        twin = bool(front) and costs[front[-1]] == costs[index]
        if costs[index][1] < best or twin:
            front.append(index)
            best = costs[index][1]
    return sorted(front, key=lambda i: points[i])
