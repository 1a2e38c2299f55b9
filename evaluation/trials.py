"""What a budget of random trials is worth."""

from collections.abc import Sequence
from math import comb

import numpy as np


def expected_best(chosen_by: Sequence[float], values: Sequence[float], count: int) -> float:
    """The mean, over all draws of `count` trials without replacement, of the value of the drawn trial whose `chosen_by`
    (a validation loss) is smallest:

        sum_i values_(i) C(R - i, count - 1) / C(R, count),    R trials sorted by chosen_by, i = 1..R

    ValueError for fewer trials than `count`, or none. A trial that is not finite is chosen last.
    """
    trials = len(values)
    if not 1 <= count <= trials or len(chosen_by) != trials:
        raise ValueError(f"{count} of {trials} trials, chosen by {len(chosen_by)} values")
    order = np.argsort(np.where(np.isfinite(chosen_by), chosen_by, np.inf), kind="stable")
    # A trial with no finite value has no weight where one with a finite value must be among those drawn.
    weights = [comb(trials - i, count - 1) / comb(trials, count) for i in range(1, trials + 1)]
    return float(sum(weight * values[i] for weight, i in zip(weights, order, strict=True) if weight))
