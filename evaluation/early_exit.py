"""Dynamic Confidence (Li, Jones & Furber 2023, arXiv:2303.10276) on what a network says after each step: how sure it
is, when it may stop, and what that is worth beside stopping all examples alike, as luck would have it, or at best.

Scores are float [T, N, C]: of N examples the C classes after each of T steps. `right` is bool [T, N], whether the
largest score is that of the label. An example that stops at the first step has taken 1, and no example takes more than
T. Policies:

    fixed      all after t steps
    dynamic    each at the first step whose confidence exceeds a threshold (`lissom.models.spiking.early_exit`)
    oracle     each at the first step at which it is right; those that never are take T. It reads the labels: no policy
               that stops once is right more often, and no other that is as often right takes fewer steps of those that
               are right
    random     each at a step drawn from those of `dynamic`, whoever it is: what knowing how sure the answer is adds
               nothing to. Its mean over all draws without replacement needs none of them: sum_t p_t accuracy_t

The paper leaves open whether each step has a temperature of its own, how it is found, and at which point of the front
a threshold is read off. Here one temperature serves all steps, of scores that are as they are or, where they are means
over the steps, of their sums, which say less at first (the paper's "accumulated output"); or there is one temperature a
step (`per_step`); it is that of least negative
log-likelihood; and the threshold is the cheapest that is right often enough, on examples that nothing is judged on.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lissom.evaluation.statistics import pareto_front

COLDEST, HOTTEST = 1e-3, 1e3


class Point(NamedTuple):
    """Mean steps and accuracy of a policy; `threshold` where it has one."""

    steps: float
    accuracy: float
    threshold: float | None = None


# ---- how sure ----------------------------------------------------------------------------------------------


def temperature(scores: np.ndarray, labels: np.ndarray, *, per_step: bool = False) -> np.ndarray:
    """float32, a scalar or with `per_step` [T]: the temperature of least negative log-likelihood

        L(b) = mean over t, n of  log sum_c exp(b scores[t, n, c]) - b scores[t, n, labels[n]],    b = 1 / temperature

    L is convex in b (Guo et al. 2017, arXiv:1706.04599, scale by one b too), so that its derivative, the mean of
    scores as softmax(b scores) weighs them less that of the labels, crosses 0 once: 60 halvings of log b between
    b = 0.001 and 1,000. Where it does not cross, because all examples are right with room to spare or no more than by
    luck, the end that is less wrong is taken; scores that are equal for all classes say nothing, and get 1.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.ndim != 3 or labels.shape != scores.shape[1:2] or 0 in scores.shape:
        raise ValueError(f"scores {scores.shape} must be [T, N, C] and labels {labels.shape} [N], and not empty")
    found = [_temperature(part, labels) for part in (scores[:, None] if per_step else [scores])]
    return np.float32(found if per_step else found[0])


def _temperature(scores: np.ndarray, labels: np.ndarray) -> float:
    """Of scores [T, N, C]."""
    if not np.ptp(scores, -1).any():
        return 1.0
    of_labels = np.take_along_axis(scores, labels[None, :, None], -1)[..., 0].mean()

    def slope(b: float) -> float:
        weights = np.exp(b * (scores - scores.max(-1, keepdims=True)))
        return float(((weights * scores).sum(-1) / weights.sum(-1)).mean() - of_labels)

    low, high = np.log(1 / HOTTEST), np.log(1 / COLDEST)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(np.exp(middle)) < 0 else (low, middle)
    return float(np.exp(-(low + high) / 2))


def calibration_error(confidence: np.ndarray, right: np.ndarray, *, bins: int = 15) -> float:
    """The expected calibration error of examples of any shape: the mean over examples of |accuracy - mean confidence|
    of their bin, one of `bins` of equal width, each with its upper end (Guo et al. 2017, arXiv:1706.04599)."""
    confidence, right = np.ravel(confidence).astype(np.float64), np.ravel(right).astype(np.float64)
    if len(confidence) == 0 or len(confidence) != len(right):
        raise ValueError(f"{len(confidence)} confidences and {len(right)} answers must be as many, and one at least")
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(bin_of, right - confidence, bins)
    return float(np.abs(gap).sum() / len(confidence))


# ---- policies ----------------------------------------------------------------------------------------------


def exit_steps(confidence: np.ndarray, threshold: float) -> np.ndarray:
    """int [N]: the steps that each example takes, those up to the first whose confidence[T, N] exceeds the threshold,
    or all T."""
    # In float32, as the program that stops compares them.
    sure = np.asarray(confidence, np.float32) > np.float32(threshold)
    return np.where(sure.any(0), sure.argmax(0) + 1, len(sure))


def judged(right: np.ndarray, steps: np.ndarray, threshold: float | None = None) -> Point:
    """Examples that took `steps` int [N], by what they said then."""
    return Point(float(np.mean(steps)), float(right[steps - 1, np.arange(len(steps))].mean()), threshold)


def fixed(right: np.ndarray) -> list[Point]:
    """After 1, 2, ... T steps."""
    return [Point(float(t), float(row.mean())) for t, row in enumerate(right, 1)]


def dynamic(right: np.ndarray, confidence: np.ndarray, threshold: float) -> Point:
    """Each example at its first confident step."""
    return judged(right, exit_steps(confidence, threshold), threshold)


def oracle(right: np.ndarray) -> Point:
    """Each example at the first step at which it is right: an upper bound, which knows the labels."""
    return judged(right, np.where(right.any(0), right.argmax(0) + 1, len(right)))


def random_exit(right: np.ndarray, steps: np.ndarray) -> Point:
    """The mean of all ways to deal `steps` int [N] out to the examples."""
    share = np.bincount(steps, minlength=len(right) + 1)[1:] / len(steps)
    return Point(float(np.mean(steps)), float(share @ right.mean(1)))


# ---- thresholds --------------------------------------------------------------------------------------------


def thresholds(confidence: np.ndarray, *, most: int = 200) -> np.ndarray:
    """At most so many thresholds that tell examples apart, rising: 0 (nobody waits) and 1 (nobody stops early) at the
    ends, between them middles of two confidences that follow each other, evenly over the sorted ones."""
    known = np.unique(np.asarray(confidence, np.float64))
    middles = (known[1:] + known[:-1]) / 2
    if len(middles) > most - 2:
        middles = middles[np.linspace(0, len(middles) - 1, most - 2).round().astype(int)]
    return np.unique(np.concatenate([[0.0], middles, [1.0]]))


def validation_front(right: np.ndarray, confidence: np.ndarray, *, most: int = 200) -> list[Point]:
    """The points of `dynamic` that no other threshold beats, by rising steps; one of those that say the same."""
    tried = [dynamic(right, confidence, float(threshold)) for threshold in thresholds(confidence, most=most)]
    points = list({point[:2]: point for point in tried}.values())
    return [points[at] for at in pareto_front([point[:2] for point in points])]


def cheapest(front: Sequence[Point], accuracy: float) -> Point:
    """The first point of a front that is right at least that often; ValueError where none is."""
    for point in front:
        if point.accuracy >= accuracy:
            return point
    raise ValueError(f"no threshold reaches an accuracy of {accuracy:.4f}")


def within(front: Sequence[Point], steps: float) -> Point | None:
    """The best point of a front of no more than that many mean steps; None where all take more."""
    return next((point for point in reversed(front) if point.steps <= steps), None)
