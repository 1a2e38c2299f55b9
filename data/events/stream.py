"""An event stream as plain arrays, and the simulated sensor that makes one from intensities over time."""

from dataclasses import dataclass

import numpy as np

from lissom.data.errors import require

# Of one threshold: a change that reaches it but for the rounding of floats has reached it.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Events:
    """N events in order of time: at time t brightness at column x, row y rose (ON) or fell (OFF) by one threshold.

    t           [N] float64, ascending; microseconds in recordings
    x, y        [N] int32, from 0
    polarity    [N] uint8, 1 ON, 0 OFF
    """

    t: np.ndarray
    x: np.ndarray
    y: np.ndarray
    polarity: np.ndarray

    def __len__(self) -> int:
        return len(self.t)


def ordered(t: np.ndarray, x: np.ndarray, y: np.ndarray, polarity: np.ndarray) -> Events:
    """The stream of these events, sorted by time; events of one time stay in the order they are given in."""
    order = np.argsort(t, kind="stable")
    types = (np.float64, np.int32, np.int32, np.uint8)
    return Events(*(np.asarray(array)[order].astype(type_) for array, type_ in zip((t, x, y, polarity), types)))


def joined(*streams: Events) -> Events:
    """All events of several streams as one."""
    fields = zip(*((s.t, s.x, s.y, s.polarity) for s in streams))
    return ordered(*(np.concatenate(arrays) for arrays in fields))


def reversed_in_time(events: Events, end: float) -> Events:
    """The stream of [0, end] run backwards: t -> end - t, and what rose falls."""
    t, x, y, polarity = (array[::-1] for array in (events.t, events.x, events.y, events.polarity))
    return Events(end - t, x, y, 1 - polarity)


def simulate(
    intensity: np.ndarray,
    times: np.ndarray,
    *,
    threshold: float,
    log: bool = True,
    offset: np.ndarray | float = 0.0,
) -> Events:
    """The events of intensities [S + 1, H, W] at ascending times [S + 1].

    With brightness L = log intensity (or, with log=False, intensity itself), taken linear in time from each of the
    S + 1 to the next, and a reference level R of each pixel, there is an event of polarity p = +1 or -1

        whenever  p (L(t) - R) reaches the threshold c,  and then  R <- R + p c

    so a step that crosses several levels gives as many events, at the times of the crossings (ESIM: Rebecq, Gehrig &
    Scaramuzza 2018, "ESIM: an Open Event Camera Simulator", section 3; v2e: Hu, Liu & Delbruck 2021, arXiv:2006.07722).
    At the end |L - R| < c, so c times the sum of p is a pixel's whole change of brightness to within c where it began
    at R = L. No refractory time, no leak, one threshold for all pixels.

    offset: R - L at the first time, in thresholds, within (-1, 1), of every pixel: [H, W] or one number. A sensor that
    has been running is somewhere between two events.
    """
    intensity, times = np.asarray(intensity, np.float64), np.asarray(times, np.float64)
    require(threshold > 0, f"events: threshold must be above 0, got {threshold}")
    require(
        intensity.ndim == 3 and len(intensity) == len(times) >= 2,
        f"events: intensities [S + 1, H, W] need two times or more, got {intensity.shape} at {times.shape} times",
    )
    require(bool((np.diff(times) > 0).all()), "events: the times of the intensities must be ascending")
    require(bool((np.abs(offset) < 1).all()), "events: offset must be within (-1, 1) thresholds")
    require(not log or intensity.min() > 0, "events: the logarithm needs intensities above 0; or say log=False")
    brightness = np.log(intensity) if log else intensity
    # In thresholds from the reference at the start: levels are whole numbers, `level` is the one a pixel is at.
    height = (brightness - brightness[0]) / threshold - offset
    level = np.zeros(height.shape)
    for step in range(1, len(height)):
        rise = height[step] - level[step - 1]
        level[step] = level[step - 1] + np.trunc(rise + np.copysign(ROUNDING, rise))
    crossed = np.diff(level, axis=0)
    step, y, x = np.nonzero(crossed)
    signed = crossed[step, y, x].astype(np.int64)
    count = np.abs(signed)
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + 1  # 1 .. count of each
    step, y, x, sign = (np.repeat(array, count) for array in (step, y, x, np.sign(signed)))
    before, after = height[step, y, x], height[step + 1, y, x]
    part = np.clip((level[step, y, x] + sign * number - before) / (after - before), 0, 1)
    return ordered(times[step] + part * (times[step + 1] - times[step]), x, y, sign > 0)


def noise_events(rng: np.random.Generator, rate: float, shape: tuple[int, int], duration: float) -> Events:
    """Background activity of a sensor [H, W] in [0, duration]: Poisson, `rate` events a pixel, of either polarity."""
    count = rng.poisson(rate * shape[0] * shape[1])
    y, x, polarity = (rng.integers(0, top, count) for top in (*shape, 2))
    return ordered(rng.uniform(0, duration, count), x, y, polarity)
