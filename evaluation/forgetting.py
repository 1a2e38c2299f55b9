"""How much of earlier tasks is lost while later ones are learned."""

from collections.abc import Sequence

import numpy as np


def forgetting(accuracies: Sequence[Sequence[float]]) -> float | None:
    """accuracies [evaluations, tasks], tasks in the order in which they were learned, the last evaluation at the end

        F = mean over tasks but the last of (max over evaluations but the last of a[e, task]  -  a[last, task])

    A fraction, from -1 to 1: below 0 where later tasks helped. Chaudhry et al. 2018, arXiv:1801.10112, who evaluate
    once behind each task. The last task, behind which nothing was learned, has no part in it. None where there are
    fewer than two tasks or evaluations.
    """
    table = np.asarray(accuracies, np.float64)
    if table.ndim != 2 or min(table.shape) < 2:
        return None
    return float((table[:-1, :-1].max(0) - table[-1, :-1]).mean())
