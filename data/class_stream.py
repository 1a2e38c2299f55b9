"""Class-incremental training data: the classes one after the other, without those that came before, or with a few.

The classes are put into an order by the seed and cut into tasks of `classes_per_task` of them. A task lasts
`task_steps` steps, or as many as one pass over its examples takes (0); every batch of it holds its classes only. Where
a pass ends in the middle of a batch, the batch is filled with examples of the task once more: all have one shape.

With a memory, a share `replay` of each batch behind the first task comes from tasks before: drawn evenly, at each
step anew, from the first `replay_size` examples of each of their classes (experience replay with a memory a class:
Chaudhry et al. 2019, arXiv:1902.10486, whose ring buffer keeps the last examples in place of the first).

Which examples a step has is a function of (seed, step): a resumed run, and any number of processes, see the same.
"""

import numpy as np

from lissom.data.dataset import Dataset, Source
from lissom.data.errors import DataError, require

# Streams of random numbers, apart from each other and from those of the shuffled order.
CLASSES, EXAMPLES, MEMORY = 0x636C6173, 0x6578616D, 0x6D656D6F


class ClassStream:
    """The steps of one pass through the tasks of a dataset whose examples have one label each.

    tasks     the classes of each task, in the order in which they are learned
    ends      the step behind the last one of each task
    steps     of the whole stream; there are none behind
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        classes_per_task: int = 1,
        task_steps: int = 0,
        replay: float = 0.0,
        replay_size: int = 0,
    ):
        require(
            dataset.kind in ("image", "signal", "frames"),
            f"order='by_class' needs one label an example, and dataset {dataset.name!r} is {dataset.kind} data",
        )
        require(batch_size >= 1, f"batch_size={batch_size} must be at least 1")
        require(classes_per_task >= 1, f"classes_per_task={classes_per_task} must be at least 1")
        require(task_steps >= 0, f"task_steps={task_steps} must be at least 0 (0: one pass over each task)")
        self.batch_size, self.seed, self.replay_size = batch_size, seed, replay_size
        self.replayed = replayed_rows(batch_size, replay, replay_size)
        labels = labels_of(dataset.train)
        classes = np.random.default_rng([seed, CLASSES]).permutation(np.unique(labels))
        self.tasks = [classes[at : at + classes_per_task] for at in range(0, len(classes), classes_per_task)]
        self._labels = labels
        self._members = [np.flatnonzero(np.isin(labels, task)) for task in self.tasks]
        lengths = [
            task_steps or -(-len(rows) // (batch_size - self._replayed(task)))
            for task, rows in enumerate(self._members)
        ]
        self.ends = [int(end) for end in np.cumsum(lengths)]
        self.steps = self.ends[-1]
        self._memory = [self._kept(task, length) for task, length in enumerate(lengths)] if self.replayed else []

    def task_at(self, step: int) -> int:
        """The number of the task that a step belongs to."""
        if not 0 <= step < self.steps:
            raise DataError(f"the stream by class has steps 0..{self.steps - 1}, and not {step}")
        return int(np.searchsorted(self.ends, step, side="right"))

    def indices(self, step: int) -> np.ndarray:
        """int64 [batch_size]: the examples of a step's global batch, those of the task first, those replayed last."""
        task = self.task_at(step)
        replayed = self._replayed(task)
        rows = self.batch_size - replayed
        first = (step - (self.ends[task - 1] if task else 0)) * rows
        new = self._shown(task, first, first + rows)
        if not replayed:
            return new
        memory = np.concatenate(self._memory[:task])
        rng = np.random.default_rng([self.seed, MEMORY, step])
        return np.concatenate([new, rng.choice(memory, replayed, replace=replayed > len(memory))])

    def _replayed(self, task: int) -> int:
        """Rows of a batch of this task that come from tasks before."""
        return self.replayed if task else 0

    def _shown(self, task: int, start: int, stop: int) -> np.ndarray:
        """The task's examples start .. stop of its own endless stream, which is shuffled anew in each pass."""
        members = self._members[task]
        passes = range(start // len(members), -(-stop // len(members)))
        order = [np.random.default_rng([self.seed, EXAMPLES, task, number]).permutation(members) for number in passes]
        offset = passes.start * len(members)
        return np.concatenate(order)[start - offset : stop - offset]

    def _kept(self, task: int, length: int) -> np.ndarray:
        """What the memory has of a task that lasted `length` steps: of each class the first examples that were seen."""
        rows = self.batch_size - self._replayed(task)
        seen = self._shown(task, 0, min(length * rows, len(self._members[task])))
        of_class = self._labels[seen]
        return np.concatenate([seen[of_class == label][: self.replay_size] for label in self.tasks[task]])


def replayed_rows(batch_size: int, replay: float, replay_size: int) -> int:
    """How many rows of a batch are replayed; DataError where share and memory do not go together."""
    require(0 <= replay < 1, f"replay={replay} must be at least 0 and below 1")
    require(replay_size >= 0, f"replay_size={replay_size} must be at least 0")
    require(
        (replay > 0) == (replay_size > 0),
        f"replay={replay} (a share of each batch) and replay_size={replay_size} (a class): both are 0, or none",
    )
    rows = round(replay * batch_size)
    require(
        rows < batch_size and (rows > 0 or not replay),
        f"replay={replay} of batch_size={batch_size} is {rows} rows: at least 1 must be replayed, and 1 must be new",
    )
    return rows


def labels_of(source: Source) -> np.ndarray:
    """int [N]: the label of every example."""
    arrays = getattr(source, "arrays", None)
    if arrays is not None:  # in memory: the inputs need not be touched
        return np.asarray(arrays["labels"])
    return np.array([int(source[index]["labels"]) for index in range(len(source))])
