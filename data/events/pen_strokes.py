"""`pen_strokes`: letters as a pen writes them, forwards or backwards in time; class = letter x writing direction.

The strokes are those of the Hershey fonts (A. V. Hershey, 1967), in the order and sense that the font has, from the
package Hershey-Fonts. The pen's tip goes along them, and the pixel under it fires; between two strokes the pen is in
the air, which takes no time and gives no events. One channel: there is no polarity.

Backwards is forwards with its time reversed, of the same points, since all that sets their times is symmetric about the
middle. So with the same jitter the frames of counts of one direction are those of the other in reverse order, and their
sum over time is the same: only the order of time tells the direction. Whatever is made of frames in random order
(control="shuffled") or of the middle one alone (control="single") is right on at most half of the examples. A time
surface tells the order of time within a frame: neither control takes it away.
"""

import importlib.util
from importlib import metadata

import numpy as np

from lissom.data.content import Content
from lissom.data.errors import nearest, require
from lissom.data.events.binning import Rendering
from lissom.data.events.drawing import check_drawn, drawn_splits
from lissom.data.events.stream import Events, joined, noise_events, ordered, reversed_in_time

DIRECTIONS = ("forwards", "backwards")
EXTENT = 0.6  # of a letter's longer side, in sides of the canvas
DENSITY = 4  # events a pixel of the pen's way


def pen_strokes(
    *,
    glyphs: str = "abcdefghij",
    fonts: tuple = ("futural", "scripts"),
    size: int = 24,
    steps: int = 16,
    binning: str = "counts",
    tau: float | None = None,
    control: str = "none",
    jitter: float = 1.0,
    noise: float = 0.05,
    train_size: int = 10000,
    test_size: int = 5000,
    seed: int = 0,
) -> Content:
    """Frames [steps, size, size, 1]; label = 2 x place of the letter in `glyphs`, + 1 where it is written backwards.

    fonts: of the package, each example in one of them drawn evenly. binning, tau, control: see `binning.py`. jitter: at
    1 a letter is turned within 15 degrees, scaled within 15 % an axis and shifted within 10 % of the side, the writing
    takes the middle 70 to 100 % of the time, and the pen's speed varies within 50 %, symmetrically about the middle;
    ink that leaves the canvas gives no events. noise: events a pixel that come of themselves. Training and test differ
    by their jitter; classes are equally frequent up to one.

    Example i of a split depends on (seed, split, i) and the settings alone.
    """
    require(
        importlib.util.find_spec("HersheyFonts") is not None,
        "pen_strokes needs the package Hershey-Fonts, which holds its strokes: uv sync --extra datasets",
    )
    check_drawn("pen_strokes", size=size, noise=noise, train_size=train_size, test_size=test_size, seed=seed)
    require(0 <= jitter <= 1.5, f"pen_strokes: jitter must be in 0..1.5, got {jitter}")
    require(
        jitter > 0 or noise > 0, "pen_strokes: with jitter=0 and noise=0 the test repeats training examples; raise one"
    )
    rendering = Rendering(
        dataset="pen_strokes", steps=steps, binning=binning, polarity="merged", tau=tau, control=control
    )
    letters = strokes_of(glyphs, fonts)
    classes = 2 * len(glyphs)

    def example(rng: np.random.Generator, split: int, index: int) -> tuple[np.ndarray, int]:
        label = index % classes
        strokes = letters[int(rng.integers(len(fonts)))][label // 2]
        events = writing(rng, strokes, size=size, jitter=jitter, noise=noise, backwards=bool(label % 2))
        return rendering.frames(events, (size, size), 0.0, 1.0, rng), label

    train, test = drawn_splits(example, (train_size, test_size), seed)
    info = {"classes": classes, "chance": 1 / classes, "letters": glyphs, "directions": list(DIRECTIONS)}
    return Content(kind="frames", train=train, test=test, info=info)


def facts() -> dict[str, str]:
    """The strokes are the package's."""
    try:
        return {"Hershey-Fonts": metadata.version("Hershey-Fonts")}
    except metadata.PackageNotFoundError:  # said by pen_strokes, in one sentence
        return {}


def strokes_of(glyphs: str, fonts: tuple) -> list[list[list[np.ndarray]]]:
    """[font][letter]: its strokes, each [points, 2] of (x, y), y downwards, in the font's units."""
    from HersheyFonts import HersheyFonts

    package = HersheyFonts()
    require(len(fonts) >= 1, "pen_strokes: fonts must name at least one font")
    require(len(glyphs) >= 1, "pen_strokes: glyphs must hold at least one letter")
    require(len(set(glyphs)) == len(glyphs), f"pen_strokes: glyphs holds a letter twice: {glyphs!r}")
    found = []
    for font in fonts:
        known = package.default_font_names
        require(font in known, f"pen_strokes: unknown font {font!r}{nearest(str(font), known)}")
        package.load_default_font(font)
        letters = []
        for glyph in glyphs:
            strokes = package.all_glyphs[glyph].strokes if glyph in package.all_glyphs else []
            strokes = [np.asarray(list(stroke), np.float64) for stroke in strokes]
            strokes = [stroke for stroke in strokes if np.ptp(stroke, axis=0).any()]
            require(len(strokes) > 0, f"pen_strokes: font {font!r} has no strokes for {glyph!r}")
            letters.append(strokes)
        found.append(letters)
    return found


def writing(
    rng: np.random.Generator, strokes: list[np.ndarray], *, size: int, jitter: float, noise: float, backwards: bool
) -> Events:
    """The events in [0, 1] of one letter under a random jitter, which does not depend on `backwards`.

    Point i of M, evenly spaced along all strokes, has u = (i + 1/2) / M, and its time is

        t = 1/2 + d (w(u) - 1/2),    w(u) = u + a sin(2 pi u) / (2 pi),    d in 1 - 0.3 jitter .. 1,  |a| <= jitter / 2

    Since w(1 - u) = 1 - w(u), the times of a letter written backwards, t -> 1 - t, are times that it has forwards too.
    """
    corners = np.concatenate(strokes)
    low, high = corners.min(0), corners.max(0)
    scale = EXTENT * size / (high - low).max()
    angle = jitter * rng.uniform(-np.pi / 12, np.pi / 12)
    stretch = scale * (1 + 0.15 * jitter * rng.uniform(-1, 1, 2))
    shift = size * (0.5 + 0.1 * jitter * rng.uniform(-1, 1, 2))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = evenly_spaced([((stroke - (low + high) / 2) * stretch) @ turn.T + shift for stroke in strokes])
    duration, sway = 1 - 0.3 * jitter * rng.uniform(), 0.5 * jitter * rng.uniform(-1, 1)
    u = (np.arange(len(points)) + 0.5) / len(points)
    t = 0.5 + duration * (u + sway * np.sin(2 * np.pi * u) / (2 * np.pi) - 0.5)
    x, y = np.floor(points).astype(np.int32).T
    seen = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    events = ordered(t[seen], x[seen], y[seen], np.ones(seen.sum()))
    if noise:
        events = joined(events, noise_events(rng, noise, (size, size), 1.0))
    return reversed_in_time(events, 1.0) if backwards else events


def evenly_spaced(strokes: list[np.ndarray]) -> np.ndarray:
    """[M, 2]: points evenly spaced along strokes in a row, at (i + 1/2) / M of their whole length, `DENSITY` a unit.

    M is even: no point is in the very middle, which is neither before nor behind it.
    """
    ends = [np.diff(stroke, axis=0) for stroke in strokes]
    starts, steps = np.concatenate([stroke[:-1] for stroke in strokes]), np.concatenate(ends)
    lengths = np.hypot(*steps.T)
    behind = np.cumsum(lengths)
    count = 2 * max(1, round(DENSITY * behind[-1] / 2))
    way = (np.arange(count) + 0.5) / count * behind[-1]
    at = np.searchsorted(behind, way)
    part = (way - behind[at] + lengths[at]) / lengths[at]
    return starts[at] + part[:, None] * steps[at]
