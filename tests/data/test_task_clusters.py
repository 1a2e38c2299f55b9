"""Tasks of known clusters: what is shared is shared, and codes say nothing of clusters."""

import numpy as np
import pytest

from lissom.data.errors import DataError
from lissom.data.task_clusters import task_clusters


def test_shapes_tasks_and_draws():
    drawn = task_clusters(size=100, clusters=3, tasks=2, dims=4, code=5)
    assert drawn.inputs.shape == (100, 9) and drawn.targets.shape == (100,)
    assert set(drawn.task) == set(range(6)) and (drawn.cluster == drawn.task // 2).all()
    codes = {tuple(row[4:]) for row in drawn.inputs}
    assert len(codes) == 6  # one a task
    other = task_clusters(size=100, clusters=3, tasks=2, dims=4, code=5, draw=1)
    assert {tuple(row[4:]) for row in other.inputs} == codes and not np.array_equal(other.inputs, drawn.inputs)


def test_targets_have_variance_one():
    assert task_clusters(size=20_000, noise=0.0).targets.var() == pytest.approx(1, abs=0.1)


def neighbours(shared, fitted_on, tested_on):
    """Squared error, as a share of the variance, of the nearest example of one task for examples of another."""
    drawn = task_clusters(size=40_000, clusters=2, tasks=2, dims=2, shared=shared, noise=0.0)
    x, y = drawn.inputs[:, :2], drawn.targets
    known, asked = np.flatnonzero(drawn.task == fitted_on), np.flatnonzero(drawn.task == tested_on)[:300]
    nearest = known[np.square(x[asked, None] - x[known]).sum(-1).argmin(1)]
    return np.square(y[asked] - y[nearest]).mean() / y.var()


def test_tasks_of_a_cluster_are_one_function_and_others_are_not():
    """Tasks 0 and 1 are of one cluster, 2 of the other."""
    assert neighbours(1.0, 0, 1) < 0.02 and neighbours(1.0, 0, 2) > 0.5
    assert neighbours(0.0, 0, 1) > 0.5 and neighbours(0.0, 0, 0) < 0.02


@pytest.mark.parametrize("settings", [{"size": 0}, {"shared": 1.5}, {"noise": -1.0}, {"code": 0}])
def test_bad_settings(settings):
    with pytest.raises(DataError, match="task_clusters"):
        task_clusters(**settings)
