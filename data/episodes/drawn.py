"""What all sources of drawn tasks share: task i of a split is drawn by (seed, split, i) alone."""

import numpy as np

SPLITS = {"train": 0, "test": 1}


class Drawn:
    """A source of `count` tasks."""

    def __init__(self, *, count: int, split: str, seed: int):
        self.count, self.split, self.seed = count, split, seed

    def __len__(self) -> int:
        return self.count

    def stream(self, index: int) -> np.random.Generator:
        """The random numbers of a task; an IndexError behind the last one, which is what ends a loop over them."""
        if not 0 <= index < self.count:
            raise IndexError(f"task {index} of {self.count}")
        return np.random.default_rng([self.seed, SPLITS[self.split], int(index)])
