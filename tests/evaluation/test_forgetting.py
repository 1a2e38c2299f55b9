"""Forgetting on a table made by hand."""

import pytest

from lissom.evaluation.forgetting import forgetting


def test_forgetting_by_hand():
    table = [
        [0.9, 0.0, 0.0],  # behind the first task
        [0.5, 0.8, 0.0],
        [0.3, 0.7, 1.0],  # at the end
    ]
    # (0.9 - 0.3 + 0.8 - 0.7) / 2; the last task has had no time to be forgotten
    assert forgetting(table) == pytest.approx(0.35)
    # The best need not be the one right behind the task, and what is better at the end counts against it.
    assert forgetting([[0.2, 0.1], [0.6, 0.9], [0.7, 0.9]]) == pytest.approx(-0.1)
    assert forgetting([[1.0, 0.0], [0.0, 1.0]]) == 1
    for few in ([], [[0.5, 0.5]], [[0.5], [0.4]]):
        assert forgetting(few) is None
