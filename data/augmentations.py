"""Random changes of training examples. Each is `f(inputs, rng) -> inputs` on one example, same shape and
dtype.

The generator is keyed by (seed, position in the stream of examples), never by process: the same example is
changed in the same way on any number of hosts.
"""

from collections.abc import Sequence

import numpy as np

from lissom.data.errors import DataError, nearest


def shift(inputs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves by up to an eighth of each spatial axis, zeros moving in. Image [H, W, C], signal [L, C], or
    frames [T, H, W, C], all of them alike: time is not moved."""
    out = inputs
    for axis in range(int(inputs.ndim == 4), inputs.ndim - 1):
        reach = inputs.shape[axis] // 8
        out = moved(out, int(rng.integers(-reach, reach + 1)), axis)
    return out


def moved(inputs: np.ndarray, step: int, axis: int) -> np.ndarray:
    """By `step` places along an axis, zeros moving in."""
    out, size = np.zeros_like(inputs), inputs.shape[axis] - abs(step)
    target, origin = [slice(None)] * inputs.ndim, [slice(None)] * inputs.ndim
    target[axis] = slice(max(step, 0), max(step, 0) + size)
    origin[axis] = slice(max(-step, 0), max(-step, 0) + size)
    out[tuple(target)] = inputs[tuple(origin)]
    return out


def flip(inputs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors the last spatial axis (the width of an image or of frames, a signal's length) with probability 1/2."""
    return inputs[..., ::-1, :] if rng.integers(2) else inputs


def noise(inputs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds independent normal noise of standard deviation 0.05."""
    return inputs + 0.05 * rng.standard_normal(inputs.shape, dtype=np.float32)


AUGMENTATIONS = {"shift": shift, "flip": flip, "noise": noise}


def augmentations(names: str | Sequence[str] | None, kind: str) -> list:
    """The functions of one name or several, in order; none of them takes tokens, sets, trajectories or streams."""
    names = [names] if isinstance(names, str) else list(names or ())
    for name in names:
        if name not in AUGMENTATIONS:
            raise DataError(f"unknown augmentation {name!r}{nearest(name, AUGMENTATIONS)}")
        if kind not in ("image", "signal", "frames"):
            of = {"tokens": "tokens", "trajectory": "trajectories"}.get(kind, f"{kind}s")
            raise DataError(f"augmentation {name!r} changes images, signals and frames, and this dataset is of {of}")
    return [AUGMENTATIONS[name] for name in names]
