"""`regression_tasks`: functions and small dynamical systems, a task a draw of a family's parameters."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lissom.data import dynamics
from lissom.data.dataset import Dataset, Example
from lissom.data.episodes.drawn import Drawn
from lissom.data.errors import nearest, require


class Curves(NamedTuple):
    """y = curve(x [..., n], p [k, ...]) with x even in `inputs` and p even in `parameters`, (least, largest) of each of
    the k."""

    curve: Callable[[np.ndarray, np.ndarray], np.ndarray]
    parameters: tuple[tuple[float, float], ...]
    inputs: tuple[float, float] = (-5.0, 5.0)


def sinusoid(x: np.ndarray, p: np.ndarray) -> np.ndarray:
    """p0 sin(x - p1)."""
    return p[0] * np.sin(x - p[1])


def ramp(x: np.ndarray, p: np.ndarray) -> np.ndarray:
    """A line, p0 x + p1."""
    return p[0] * x + p[1]


# Of sinusoids those of Finn et al. 2017, arXiv:1703.03400, section 5.1; of ramps, slopes and places that give their
# values about the same variance.
CURVES = {
    "sinusoid": Curves(sinusoid, ((0.1, 5.0), (0.0, np.pi))),
    "ramp": Curves(ramp, ((-1.0, 1.0), (-2.0, 2.0))),
}
FAMILIES = (*CURVES, *dynamics.FAMILIES)


class Task(NamedTuple):
    """What is drawn of a task: the number of its family among those of the source, its parameters [k], the inputs
    [n, dims] in the family's own units, and what is added to the targets of the support."""

    family: int
    parameters: np.ndarray
    x: np.ndarray
    noise: np.ndarray


class RegressionTasks(Drawn):
    """`count` tasks; task i is drawn by (seed, split, i) alone: a family, its parameters, then the examples."""

    def __init__(self, *, families, shots, queries, noise, interval, count: int, split: str, seed: int):
        self.families, self.shots, self.queries = families, shots, queries
        self.noise, self.interval = noise, interval
        super().__init__(count=count, split=split, seed=seed)

    def __getitem__(self, index: int) -> Example:
        return {name: array[0] for name, array in self.gather(np.array([index])).items()}

    def gather(self, indices: np.ndarray) -> Example:
        """The tasks at `indices`, stacked. All of a family are computed together: a system takes hundreds of calls."""
        tasks = [self._drawn(int(index)) for index in indices]
        x, family = np.stack([task.x for task in tasks]), np.array([task.family for task in tasks])
        y = np.empty_like(x)
        for number in np.unique(family):
            mine, name = family == number, self.families[number]
            p = np.stack([task.parameters for task in tasks if task.family == number], -1)[..., None]
            x[mine], y[mine] = _of_curve(name, x[mine], p) if name in CURVES else self._of_system(name, x[mine], p)
        cut = self.shots
        y[:, :cut] += np.stack([task.noise for task in tasks])
        x, y = x.astype(np.float32), y.astype(np.float32)
        return {
            "inputs": x[:, cut:],
            "labels": y[:, cut:],
            "support_inputs": x[:, :cut],
            "support_labels": y[:, :cut],
            "family": np.array([FAMILIES.index(self.families[number]) for number in family], np.int32),
        }

    def _drawn(self, index: int) -> Task:
        rng, count = self.stream(index), self.shots + self.queries
        number = int(rng.integers(len(self.families)))
        name = self.families[number]
        if name in CURVES:
            family, dims = CURVES[name], 1
            x = rng.uniform(*family.inputs, (count, dims))
            parameters = rng.uniform(*np.transpose(family.parameters))
        else:
            family, dims = dynamics.FAMILIES[name], 2
            parameters = rng.uniform(*np.transpose(family.parameters))
            x = rng.uniform(*family.start, (count, dims))
        return Task(number, parameters, x, self.noise * rng.standard_normal((self.shots, dims)))

    def _of_system(self, name: str, first: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """States, standardised as `dynamics` does it, and what they become."""
        family = dynamics.FAMILIES[name]
        after = dynamics.integrated(lambda x: family.field(x, p), first, 2, self.interval)[:, 1]
        standard = lambda states: (states - family.mean) / np.asarray(family.deviation)
        return standard(first), standard(after)


def _of_curve(name: str, x: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x, CURVES[name].curve(x[..., 0], p)[..., None]


def regression_tasks(
    load: Callable[..., Dataset],
    *,
    families: tuple = ("sinusoid",),
    shots: int = 10,
    queries: int = 20,
    noise: float = 0.0,
    interval: float | None = None,
    train_size: int = 1_000_000,
    test_size: int = 1_000,
    seed: int = 0,
) -> Dataset:
    """Regression from `shots` examples of a task to `queries` others: support_inputs [shots, dims] with support_labels
    [shots, outputs], inputs [queries, dims] with labels [queries, outputs].

    families: names of `CURVES` (x on a line, y = f(x)) or of `dynamics.FAMILIES` (x a state of a system in the plane,
    even in the family's square; y the state an `interval` later, None: 0.5; both standardised by constants of the
    family), all of one kind. A task is an even draw of a family and of its parameters. noise: standard deviation of
    what is added to the support's targets; queries have the true ones.
    """
    del load
    require(len(families) >= 1, "regression_tasks: families must name at least one family")
    for at, name in enumerate(families):
        require(name in FAMILIES, f"regression_tasks has no family {name!r}{nearest(name, FAMILIES)}")
        require(name not in families[:at], f"regression_tasks: families names {name!r} twice")
    curves = [name in CURVES for name in families]
    require(
        all(curves) or not any(curves),
        f"regression_tasks: families={families} mixes functions of a line with systems in the plane",
    )
    least = {"shots": (shots, 1), "queries": (queries, 1), "train_size": (train_size, 1), "test_size": (test_size, 1)}
    least["seed"] = (seed, 0)
    for name, (value, bound) in least.items():
        require(value >= bound, f"regression_tasks: {name} must be at least {bound}, got {value}")
    require(0 <= noise < np.inf, f"regression_tasks: noise must not be negative, got {noise}")
    require(
        interval is None or not curves[0],
        f"regression_tasks: interval={interval} is of systems in the plane, and families={families} are functions",
    )
    interval = 0.5 if interval is None else interval
    require(0 < interval < np.inf, f"regression_tasks: interval must be above 0, got {interval}")
    settings = {"families": families, "shots": shots, "queries": queries, "noise": noise, "interval": interval}
    sizes = {"train": train_size, "test": test_size}
    sources = {split: RegressionTasks(**settings, count=n, split=split, seed=seed) for split, n in sizes.items()}
    dims = 1 if curves[0] else 2
    info = {
        "input_shape": (dims,),
        "outputs": dims,
        "families": list(families),
        "shots": shots,
        "train_examples": train_size,
        "test_examples": test_size,
    }
    return Dataset(name="regression_tasks", kind="episode", info=info, **sources)


def solve(tasks: RegressionTasks) -> list[np.ndarray]:
    """For every task of `CURVES` the targets [Q, 1] of its queries by least squares in its true family, all of whose
    curves are linear in two numbers."""
    bases = {"sinusoid": lambda x: np.concatenate([np.sin(x), np.cos(x)], 1), "ramp": lambda x: x ** np.array([1, 0])}
    found = []
    for index in range(len(tasks)):
        task = tasks[index]
        basis = bases[FAMILIES[int(task["family"])]]
        x, y = task["support_inputs"].astype(np.float64), task["support_labels"].astype(np.float64)
        found.append(basis(task["inputs"].astype(np.float64)) @ np.linalg.lstsq(basis(x), y, rcond=None)[0])
    return found
