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


def test_targets_have_variance_one_and_clusters_share():
    """Without noise and with nothing of their own, tasks of a cluster are one function: with one cluster alone no task
    is told from another, and a fit that knows the rule's phases would be exact."""
    drawn = task_clusters(size=20_000, noise=0.0)
    assert drawn.targets.var() == pytest.approx(1, abs=0.1)
    one = lambda shared, tasks: task_clusters(size=500, clusters=1, tasks=tasks, shared=shared, noise=0.0, seed=3)
    # The functions are drawn before the codes: those of a cluster of one task and of two tasks are the same.
    same, apart = one(1.0, 1), one(0.0, 2)
    assert same.targets.std() > 0.5 and not np.allclose(same.targets, apart.targets)


@pytest.mark.parametrize("settings", [{"size": 0}, {"shared": 1.5}, {"noise": -1.0}, {"code": 0}])
def test_bad_settings(settings):
    with pytest.raises(DataError, match="task_clusters"):
        task_clusters(**settings)
