"""scripts/gate_trials.py: what it trains learns, and what it says of it."""

import numpy as np
import pytest

from lissom.data.task_clusters import task_clusters
from lissom.evaluation.rows import read_rows
from lissom.training.errors import UserError
from scripts import gate_trials


def test_rows_of_a_gate_and_of_the_known_clusters(tmp_path):
    rows = gate_trials.run(["hash"], seeds=1, tiny=True, out=tmp_path / "out")
    assert [row.identity.variant for row in read_rows(tmp_path / "out" / "rows.jsonl")] == [
        "known clusters",
        "no clusters",
        "hash",
        "hash + search",
    ]
    known = {(m.name, *m.conditions.values()): m.value for m in rows[0].measurements}
    assert known["purity", "mean"] == 1
    assert [row.identity.role for row in rows] == ["ceiling", "floor", "variant", "variant"]
    # More trials are never worse for what they are chosen by, and here nearly so for the test.
    assert known["trial_loss", 2] < known["trial_loss", 1] + 0.05


def test_known_clusters_are_worth_knowing():
    """After a few hundred steps the variance left is well below that of the targets."""
    data = task_clusters(size=1024)
    graph, states = gate_trials.trained("known clusters", 0, 300, data, 4, 0)
    errors, purities = gate_trials.judged(graph, states, data)
    assert errors.shape == (4,) and errors.min() < 0.85 and (purities == 1).all()
    assert len(np.unique(errors)) == 4  # every trial its own rate and start


def test_settings_are_checked():
    with pytest.raises(UserError, match="'soft' is none of top_k"):
        gate_trials.run(["soft"])
    with pytest.raises(UserError, match="--steps=1 must be at least 10"):
        gate_trials.run(steps=1)
