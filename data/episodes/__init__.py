"""Few-shot episodes: a task, its support (what is given) and its queries (what is asked). Example i of a split is a
pure function of the settings, the split and i, and is made when it is asked for."""

from lissom.data.episodes.labelled import ExampleSource, episodes, nearest_of_all, single_examples
from lissom.data.episodes.linear import linear_tasks
from lissom.data.episodes.regression import regression_tasks

__all__ = ["ExampleSource", "episodes", "linear_tasks", "nearest_of_all", "regression_tasks", "single_examples"]
