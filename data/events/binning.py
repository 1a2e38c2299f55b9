"""From an event stream to frames, and the controls that take the order of time away.

The recording [start, stop] is cut into T bins of one length; channel 0 is OFF, 1 is ON, or both are merged into one.

    counts    [T, H, W, C] uint8: events of each bin, pixel and polarity, at most 255; merged: their sum
    binary    [T, H, W, C] uint8: 1 where there is one or more
    surface   [T, H, W, C] float16: exp(-(end of the bin - time of the pixel's last event) / tau), which may lie in an
              earlier bin; 0 where there was none (time surfaces: Lagorce et al. 2017, "HOTS: A Hierarchy of Event-Based
              Time-Surfaces", equations 2 and 3, for the whole sensor at the end of a bin); merged: the larger one

A frame of counts does not know in which order its events came; one of a surface does.
"""

from dataclasses import dataclass

import numpy as np

from lissom.data.errors import nearest, require
from lissom.data.events.stream import Events

BINNINGS = ("counts", "binary", "surface")
POLARITIES = ("both", "merged")
CONTROLS = ("none", "shuffled", "single")
TAU = 1.0


def counts(events: Events, shape: tuple[int, int], steps: int, start: float, stop: float) -> np.ndarray:
    """int64 [T, H, W, 2], T = steps: the events of each bin. All lie within [start, stop] and the sensor [H, W]."""
    where = (_bins(events, steps, start, stop), events.y, events.x, events.polarity)
    flat = np.ravel_multi_index(where, (steps, *shape, 2))
    return np.bincount(flat, minlength=steps * shape[0] * shape[1] * 2).reshape(steps, *shape, 2)


def time_surfaces(
    events: Events, shape: tuple[int, int], steps: int, start: float, stop: float, *, tau: float
) -> np.ndarray:
    """float64 [T, H, W, 2] in [0, 1], T = steps: see the top of this file; tau in the stream's unit of time."""
    last = np.full((steps, *shape, 2), -np.inf)
    where = (_bins(events, steps, start, stop), events.y, events.x, events.polarity)
    np.maximum.at(last, where, events.t)
    last = np.maximum.accumulate(last, axis=0)
    ends = start + (stop - start) * np.arange(1, steps + 1) / steps
    return np.exp((last - ends[:, None, None, None]) / tau)


def controlled(frames: np.ndarray, control: str, rng: np.random.Generator) -> np.ndarray:
    """Frames [T, ...] of one example whose time says less.

    none       as they are
    shuffled   in a random order
    single     the middle one T times; of an even number, either of the two in the middle
    """
    if control == "shuffled":
        return frames[rng.permutation(len(frames))]
    if control == "single":
        middle = (len(frames) - 1 + int(rng.integers(2))) // 2
        return np.repeat(frames[middle][None], len(frames), axis=0)
    return frames


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """The settings of a dataset that say how its streams become frames; `dataset` is its name, for sentences.

    steps: T. tau: of surfaces only, in bins, default 1.
    """

    dataset: str
    steps: int
    binning: str
    polarity: str
    tau: float | None
    control: str

    def __post_init__(self):
        name = self.dataset
        require(self.steps >= 1, f"{name}: steps must be at least 1, got {self.steps}")
        for setting, known in (("binning", BINNINGS), ("polarity", POLARITIES), ("control", CONTROLS)):
            value = getattr(self, setting)
            require(value in known, f"{name} has no {setting} {value!r}{nearest(value, known)}")
        require(
            self.tau is None or self.binning == "surface",
            f"{name}: tau={self.tau!r} belongs to binning='surface', and binning is {self.binning!r}",
        )
        number = isinstance(self.tau, int | float) and not isinstance(self.tau, bool) and 0 < self.tau < np.inf
        require(self.tau is None or number, f"{name}: tau must be a number above 0, in bins, got {self.tau!r}")

    def frames(
        self, events: Events, shape: tuple[int, int], start: float, stop: float, rng: np.random.Generator
    ) -> np.ndarray:
        """[T, H, W, C] in stored form; `rng` serves the control alone."""
        if self.binning == "surface":
            tau = (self.tau or TAU) * (stop - start) / self.steps
            made = time_surfaces(events, shape, self.steps, start, stop, tau=tau)
            made = (made if self.polarity == "both" else made.max(-1, keepdims=True)).astype(np.float16)
        else:
            made = counts(events, shape, self.steps, start, stop)
            made = made if self.polarity == "both" else made.sum(-1, keepdims=True)
            made = np.minimum(made, 255 if self.binning == "counts" else 1).astype(np.uint8)
        return controlled(made, self.control, rng)


def _bins(events: Events, steps: int, start: float, stop: float) -> np.ndarray:
    """int64 [N]: the bin of each event; one at the very end is of the last."""
    return np.minimum(((events.t - start) / (stop - start) * steps).astype(np.int64), steps - 1)
