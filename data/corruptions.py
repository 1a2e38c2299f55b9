"""Corrupted test sets: seven corruptions of images [H, W, C] and signals [L, C], each of five severities.

The protocol is that of Hendrycks & Dietterich 2019, arXiv:1903.12261: training sees none of them, and a network is
judged on each at each severity. Theirs are fifteen, made for photographs (fog, frost, JPEG); these are simpler, and the
same for anything with axes of space. With s the standard deviation and [a, b] the range of the first 1,000 training
examples, n places along an axis of space and d such axes, z normal and m the mean of an example:

    gaussian_noise   x + c s z                                                      c = 0.2, 0.4, 0.6, 0.8, 1
    impulse_noise    a number is a or b, each with probability c / 2                c = 0.02, 0.05, 0.1, 0.15, 0.2
    blur             a Gaussian of c n places along each axis, weights of sum 1     c = 0.02, 0.04, 0.06, 0.08, 0.1
    contrast         m + c (x - m)                                                  c = 0.75, 0.5, 0.4, 0.3, 0.15
    brightness       x + c s                                                        c = 0.25, 0.5, 0.75, 1, 1.5
    erase            0 in a block of ceil(c^(1/d) n) places of each axis, anywhere  c = 0.04, 0.1, 0.2, 0.3, 0.4
    shift            ceil(c n) places along each axis, up or down, zeros moving in  c = 0.05, 0.1, 0.15, 0.2, 0.25

and then cut off to [a, b]. The numbers are ours, chosen before any network was measured. Where n is small, two
severities of `shift` are the same number of places.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from lissom.data.augmentations import moved
from lissom.data.dataset import Dataset, Example, Source, gather
from lissom.data.errors import nearest, require

SEVERITIES = (1, 2, 3, 4, 5)
KINDS = ("image", "signal")
SCALED_BY = 1000  # training examples


class Scale(NamedTuple):
    """Of the training inputs: their standard deviation, the least and the largest number."""

    deviation: float
    least: float
    most: float


Draw = Callable[[Callable[[np.random.Generator], np.ndarray]], np.ndarray]
"""draw(f) stacks f(generator) of each example's own generator."""


def gaussian_noise(x: np.ndarray, c: float, draw: Draw, scale: Scale) -> np.ndarray:
    return x + c * scale.deviation * draw(lambda rng: rng.standard_normal(x.shape[1:], np.float32))


def impulse_noise(x: np.ndarray, c: float, draw: Draw, scale: Scale) -> np.ndarray:
    u = draw(lambda rng: rng.random(x.shape[1:], np.float32))
    return np.where(u < c / 2, scale.least, np.where(u >= 1 - c / 2, scale.most, x))


def blur(x: np.ndarray, c: float, draw: Draw, scale: Scale) -> np.ndarray:
    for axis, size in _space(x):
        places = np.arange(size)
        weights = np.exp(-0.5 * ((places[:, None] - places) / (c * size)) ** 2)
        weights /= weights.sum(1, keepdims=True)  # beyond an edge there is nothing to be averaged
        x = np.moveaxis(np.tensordot(weights, x, axes=(1, axis)), 0, axis)
    return x


def contrast(x: np.ndarray, c: float, draw: Draw, scale: Scale) -> np.ndarray:
    mean = x.mean(tuple(range(1, x.ndim)), keepdims=True)
    return mean + c * (x - mean)


def brightness(x: np.ndarray, c: float, draw: Draw, scale: Scale) -> np.ndarray:
    return x + c * scale.deviation


def erase(x: np.ndarray, c: float, draw: Draw, scale: Scale) -> np.ndarray:
    axes = _space(x)
    corners, erased = draw(lambda rng: rng.random(len(axes))), True
    for (axis, size), corner in zip(axes, corners.T, strict=True):
        side = math.ceil(c ** (1 / len(axes)) * size)
        first = np.floor(corner * (size - side + 1))[:, None]
        inside = (np.arange(size) >= first) & (np.arange(size) < first + side)
        erased = erased & np.expand_dims(inside, [a for a in range(1, x.ndim) if a != axis])
    return np.where(erased, 0, x)


def shift(x: np.ndarray, c: float, draw: Draw, scale: Scale) -> np.ndarray:
    axes = _space(x)
    ups = draw(lambda rng: rng.integers(2, size=len(axes)) > 0)
    for (axis, size), up in zip(axes, ups.T, strict=True):
        step = math.ceil(c * size)
        x = np.where(np.expand_dims(up, list(range(1, x.ndim))), moved(x, step, axis), moved(x, -step, axis))
    return x


def _space(x: np.ndarray) -> list[tuple[int, int]]:
    """(axis, size) of the axes of space of stacked examples [N, *space, C]."""
    return list(enumerate(x.shape))[1:-1]


@dataclass(frozen=True)
class Corruption:
    """`change(x [N, *space, C], c, draw, scale) -> x`, and c by severity."""

    change: Callable[[np.ndarray, float, Draw, Scale], np.ndarray]
    strengths: tuple[float, float, float, float, float]


CORRUPTIONS = {
    "gaussian_noise": Corruption(gaussian_noise, (0.2, 0.4, 0.6, 0.8, 1.0)),
    "impulse_noise": Corruption(impulse_noise, (0.02, 0.05, 0.1, 0.15, 0.2)),
    "blur": Corruption(blur, (0.02, 0.04, 0.06, 0.08, 0.1)),
    "contrast": Corruption(contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "brightness": Corruption(brightness, (0.25, 0.5, 0.75, 1.0, 1.5)),
    "erase": Corruption(erase, (0.04, 0.1, 0.2, 0.3, 0.4)),
    "shift": Corruption(shift, (0.05, 0.1, 0.15, 0.2, 0.25)),
}


def corrupted(
    dataset: Dataset, names: Sequence[str], severities: Sequence[int] = SEVERITIES
) -> list[tuple[dict[str, str | int], Dataset]]:
    """[({"corruption": name, "severity": severity}, the dataset with its test examples corrupted so)] for each pair.
    DataError as `check` has it, and for other data than images and signals."""
    check(names, severities)
    if not names:
        return []
    require(
        dataset.kind in KINDS,
        f"corruptions are of images and signals, and dataset {dataset.name!r} is of kind {dataset.kind!r}",
    )
    scale = scale_of(dataset.train)
    return [
        (
            {"corruption": name, "severity": severity},
            replace(dataset, test=CorruptedSource(dataset.test, name, severity, scale)),
        )
        for name in names
        for severity in severities
    ]


def check(names: Sequence[str], severities: Sequence[int]) -> None:
    """DataError for names and severities that there are not, for one that stands there twice, and for names without a
    severity."""
    for name in names:
        require(name in CORRUPTIONS, f"there is no corruption {name!r}{nearest(name, CORRUPTIONS)}")
    for severity in severities:
        require(severity in SEVERITIES, f"the severity of a corruption is 1, 2, 3, 4 or 5, not {severity!r}")
    for values in map(list, (names, severities)):
        twice = [value for value in values if values.count(value) > 1]
        require(not twice, f"corruptions: {twice[:1] and twice[0]!r} stands there twice")
    require(bool(severities) or not names, "corruptions need at least one severity")


def scale_of(source: Source) -> Scale:
    """Of the first `SCALED_BY` examples."""
    inputs = gather(source, np.arange(min(len(source), SCALED_BY)))["inputs"]
    return Scale(float(inputs.std()), float(inputs.min()), float(inputs.max()))


class CorruptedSource:
    """A source whose inputs are corrupted. What is drawn depends on the corruption and the example's index, so that a
    more severe corruption is more of the same."""

    def __init__(self, source: Source, name: str, severity: int, scale: Scale):
        self.source, self.name, self.severity, self.scale = source, name, severity, scale

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return {name: array[0] for name, array in self.gather(np.array([index])).items()}

    def gather(self, indices: np.ndarray) -> Example:
        """The examples at `indices`, stacked."""
        examples, corruption = gather(self.source, indices), CORRUPTIONS[self.name]
        draw = lambda of: np.stack([of(self._generator(int(index))) for index in indices])
        inputs = corruption.change(examples["inputs"], corruption.strengths[self.severity - 1], draw, self.scale)
        inputs = np.clip(inputs, self.scale.least, self.scale.most).astype(np.float32)
        return {**examples, "inputs": inputs}

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[zlib.crc32(self.name.encode()), index]))
