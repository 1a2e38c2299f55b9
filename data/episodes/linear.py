"""`linear_tasks`: random linear classification, a task a draw of the classes' directions."""

from collections.abc import Callable

import numpy as np

from lissom.data.dataset import Dataset, Example
from lissom.data.episodes.drawn import Drawn
from lissom.data.errors import require

DRAWN = 16  # times as many points as a task needs


class LinearTasks(Drawn):
    """`count` tasks; task i is drawn by (seed, split, i) alone."""

    def __init__(self, *, dims, ways, shots, queries, count: int, split: str, seed: int):
        self.dims, self.ways, self.shots, self.queries = dims, ways, shots, queries
        super().__init__(count=count, split=split, seed=seed)

    def __getitem__(self, index: int) -> Example:
        rng = self.stream(index)
        each = self.shots + self.queries
        places: list[np.ndarray] = []
        while not places or min(map(len, places)) < each:
            directions = rng.standard_normal((self.dims, self.ways))
            directions /= np.linalg.norm(directions, axis=0)
            points = rng.standard_normal((DRAWN * self.ways * each, self.dims))
            labels = (points @ directions).argmax(1)
            places = [np.flatnonzero(labels == label)[:each] for label in range(self.ways)]
        points = points[np.array(places)].astype(np.float32)
        flat = lambda part: part.reshape(-1, self.dims)
        labels = np.arange(self.ways, dtype=np.int32)
        return {
            "inputs": flat(points[:, self.shots :]),
            "labels": np.repeat(labels, self.queries),
            "support_inputs": flat(points[:, : self.shots]),
            "support_labels": np.repeat(labels, self.shots),
            "directions": directions.astype(np.float32),
        }


def linear_tasks(
    load: Callable[..., Dataset],
    *,
    dims: int = 8,
    ways: int = 2,
    shots: int = 5,
    queries: int = 15,
    train_size: int = 1_000_000,
    test_size: int = 1_000,
    seed: int = 0,
) -> Dataset:
    """Classes of x ~ N(0, I) in `dims` dimensions: label = argmax_c w_c . x, with directions w_c even on the sphere,
    new ones in every task, which `directions` [dims, ways] names for judging alone. Each of the `ways` has `shots` in
    the support and `queries` queries; a task in which one is so rare that of 16 times as many points there are fewer is
    drawn again."""
    del load
    least = {"dims": (dims, 2), "ways": (ways, 2), "shots": (shots, 1), "queries": (queries, 1)}
    least |= {"train_size": (train_size, 1), "test_size": (test_size, 1), "seed": (seed, 0)}
    for name, (value, bound) in least.items():
        require(value >= bound, f"linear_tasks: {name} must be at least {bound}, got {value}")
    settings = {"dims": dims, "ways": ways, "shots": shots, "queries": queries, "seed": seed}
    sizes = {"train": train_size, "test": test_size}
    sources = {split: LinearTasks(**settings, count=count, split=split) for split, count in sizes.items()}
    info = {
        "classes": ways,
        "chance": 1 / ways,
        "input_shape": (dims,),
        "shots": shots,
        "train_examples": train_size,
        "test_examples": test_size,
    }
    return Dataset(name="linear_tasks", kind="episode", info=info, **sources)
