"""`in_context`: sequences of labelled examples, each of a task of its own, which only the sequence itself tells.

Kirsch et al. 2022, "General-Purpose In-Context Learning by Meta-Learning Transformers", arXiv:2212.04458, section 3. A
task is a random linear projection of the inputs of one base set of examples and a permutation of its labels. What is
read at position t is (A x_t, y_{t-1}), what is to be said y_t:

    A [inputs, D] normal, variance 1 / inputs        y = permutation[class of x]        y_{-1} = 0, else one-hot

With few training tasks a model can memorise them, with some more it may find out which of them a sequence is of, and
with many it has to learn from the sequence: then it does so on unseen tasks, and on those of another base set.

Left open by the paper or chosen otherwise here: D is a setting, where the paper keeps the size of the inputs;
inputs are centred feature by feature and divided by one standard deviation of all features, so that rare
features do not grow; examples are drawn with replacement; a fixed permutation is the identity.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lissom.data.dataset import Dataset, Example, gather
from lissom.data.errors import nearest, require

TESTED = ("unseen", "seen", "other")
GAUSSIANS = "gaussians"
LABELLED = ("image", "signal", "frames")
# What random numbers are for. Of one purpose and number they depend on the seed alone.
MEANS, KNOWN_TASK, UNSEEN_TASK, TRAINING, TEST = range(5)


def in_context(
    load: Callable[..., Dataset],
    *,
    base: str = GAUSSIANS,
    classes: int = 5,
    dims: int = 16,
    spread: float = 1.0,
    length: int = 50,
    tasks: int = 0,
    tested: str = "unseen",
    other_base: str = GAUSSIANS,
    fixed_permutation: float = 0.0,
    train_size: int = 1_000_000,
    test_size: int = 5_000,
    seed: int = 0,
) -> Dataset:
    """Sequences of `length` examples [length, dims + classes], made when they are asked for.

    base: "gaussians", points around `classes` means in `dims` dimensions (`spread` is the standard deviation of the
    noise / that of the means), or a labelled dataset by name, of which the first `classes` classes are taken.
    tasks: number K of training tasks, which sequences are drawn from; 0: every training sequence has a new one.
    tested: the tasks of the test sequences: "unseen" ones, "seen" ones, drawn from those that training draws from (a
    run meets a part of them, and with tasks=0 few) on a fresh draw of examples, or unseen ones of `other_base`
    ("gaussians" of other means, or a labelled dataset). Test examples are never training examples.
    fixed_permutation: share of the training sequences whose labels are not permuted.

    Sequence i of a split depends on (settings, split, i) alone, and task k on (seed, k).
    """
    where = "in_context"
    for name, value, least in (
        *(("classes", classes, 2), ("dims", dims, 1), ("length", length, 2), ("tasks", tasks, 0)),
        *(("train_size", train_size, 1), ("test_size", test_size, 1), ("seed", seed, 0)),
    ):
        require(value >= least, f"{where}: {name} must be at least {least}, got {value}")
    require(0 < spread < math.inf, f"{where}: spread must be a number above 0, got {spread}")
    require(seed < 2**64, f"{where}: seed must be below 2**64, got {seed}")
    require(0 <= fixed_permutation <= 1, f"{where}: fixed_permutation must be in 0..1, got {fixed_permutation}")
    require(tested in TESTED, f"{where}: tested={tested!r} is not known{nearest(tested, TESTED)}")
    other = tested == "other"
    drawn = base == GAUSSIANS or (other and other_base == GAUSSIANS)
    require(spread == 1.0 or drawn, f"{where}: spread={spread} is of Gaussians, and base={base!r} is stored")
    require(
        other or other_base == GAUSSIANS,
        f"{where}: other_base={other_base!r} is what tested='other' is of, and tested={tested!r}",
    )
    require(
        not other or base != other_base or base == GAUSSIANS,
        f"{where}: tested='other' needs an other_base than base={base!r}",
    )

    def bases(name: str, number: int) -> tuple[Base, Base]:
        if name == GAUSSIANS:
            made = Gaussians(stream(seed, MEANS, number).standard_normal((classes, dims), np.float32), spread)
            return made, made  # its examples are fresh draws
        return stored(load, name, classes)

    train, test = bases(base, 0)
    test = bases(other_base, 1)[1] if other else test
    shared = {"classes": classes, "dims": dims, "length": length, "seed": seed}
    known = tasks or train_size
    return Dataset(
        name=where,
        kind="stream",
        train=Sequences(
            train, train_size, TRAINING, known, new=tasks == 0, fixed_permutation=fixed_permutation, **shared
        ),
        test=Sequences(test, test_size, TEST, known, unseen=tested != "seen", **shared),
        info={
            "classes": classes,
            "features": dims + classes,
            "input_shape": (length, dims + classes),
            "chance": 1 / classes,
            "length": length,
            "train_examples": train_size,
            "test_examples": test_size,
        },
    )


def stream(seed: int, purpose: int, number: int) -> np.random.Generator:
    """The random numbers of one purpose and number. (A third of the time of a generator seeded by a list.)"""
    return np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, 0, purpose]))


def task(seed: int, purpose: int, number: int, *, inputs: int, dims: int, classes: int):
    """(projection [inputs, dims], permutation [classes]) of a task; the purpose is KNOWN_TASK or UNSEEN_TASK."""
    rng = stream(seed, purpose, number)
    permutation = rng.permutation(classes)
    return rng.standard_normal((inputs, dims), np.float32) * np.float32(inputs**-0.5), permutation


class Base(Protocol):
    """A set of labelled examples of `inputs` features."""

    inputs: int

    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(examples [length, inputs] float32, their classes [length])."""


@dataclass(frozen=True)
class Gaussians:
    """(m + spread x noise) / sqrt(1 + spread^2) around means m [classes, inputs]: all entries have variance 1."""

    means: np.ndarray
    spread: float

    @property
    def inputs(self) -> int:
        return self.means.shape[1]

    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        classes = rng.integers(len(self.means), size=length)
        points = rng.standard_normal((length, self.inputs), np.float32)
        points *= np.float32(self.spread)
        points += self.means[classes]
        points *= np.float32((1 + self.spread**2) ** -0.5)
        return points, classes


@dataclass(frozen=True)
class Stored:
    """Examples [N, inputs] and their classes [N] in memory."""

    examples: np.ndarray
    classes: np.ndarray

    @property
    def inputs(self) -> int:
        return self.examples.shape[1]

    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = rng.integers(len(self.classes), size=length)
        return self.examples[chosen], self.classes[chosen]


def stored(load: Callable[..., Dataset], name: str, classes: int) -> tuple[Stored, Stored]:
    """The first `classes` classes of both splits of a labelled dataset, standardised by its training examples."""
    dataset = load(name)
    require(
        dataset.kind in LABELLED,
        f"in_context: a base set has one label an example, and dataset {name!r} is {dataset.kind} data",
    )
    found = dataset.info["classes"]
    require(found >= classes, f"in_context: classes={classes} are more than dataset {name!r} has, {found}")
    splits = []
    for source in (dataset.train, dataset.test):
        rows = gather(source, np.arange(len(source)))
        mine = rows["labels"] < classes
        require(mine.any(), f"in_context: a split of dataset {name!r} has no example of its first {classes} classes")
        splits.append((rows["inputs"][mine].reshape(mine.sum(), -1), rows["labels"][mine]))
    mean = splits[0][0].mean(0, dtype=np.float64)
    scale = np.sqrt(np.square(splits[0][0] - mean).mean())
    require(scale > 0, f"in_context: all training examples of dataset {name!r} are the same")
    return tuple(Stored(((inputs - mean) / scale).astype(np.float32), labels) for inputs, labels in splits)


@dataclass(frozen=True)
class Sequences:
    """A source of `size` sequences of kind "stream". Their tasks: drawn from `known` ones; with `new` sequence i has
    the i-th of these, with `unseen` one that no training sequence has."""

    base: Base
    size: int
    purpose: int
    known: int
    classes: int
    dims: int
    length: int
    seed: int
    new: bool = False
    unseen: bool = False
    fixed_permutation: float = 0.0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        return {name: array[0] for name, array in self.gather(np.array([index])).items()}

    def gather(self, indices: np.ndarray) -> Example:
        """The sequences at `indices`, stacked."""
        count, identity = len(indices), np.arange(self.classes)
        points = np.empty((count, self.length, self.base.inputs), np.float32)
        projections = np.empty((count, self.base.inputs, self.dims), np.float32)
        labels = np.empty((count, self.length), np.int32)
        for row, index in enumerate(map(int, indices)):
            if not 0 <= index < self.size:  # also what ends a loop over the source
                raise IndexError(f"sequence {index} of {self.size}")
            rng = stream(self.seed, self.purpose, index)
            # Drawn whether they are needed or not, so that the examples are the same whatever the tasks are.
            which, fixed = rng.random(2)
            number = index if self.new or self.unseen else int(which * self.known)
            purpose = UNSEEN_TASK if self.unseen else KNOWN_TASK
            sizes = {"inputs": self.base.inputs, "dims": self.dims, "classes": self.classes}
            projections[row], permutation = task(self.seed, purpose, number, **sizes)
            points[row], classes = self.base.draw(rng, self.length)
            labels[row] = (identity if fixed < self.fixed_permutation else permutation)[classes]
        inputs = np.zeros((count, self.length, self.dims + self.classes), np.float32)
        np.matmul(points, projections, out=inputs[..., : self.dims])
        inputs[:, 1:, self.dims :] = labels[:, :-1, None] == identity
        return {"inputs": inputs, "labels": labels}
