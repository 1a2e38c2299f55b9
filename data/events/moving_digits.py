"""`moving_digits`: handwritten digits that move before a simulated event sensor; class = digit, direction, or both.

A digit is ink on a canvas that is closed like a torus: what leaves on one side comes in on the other. Its log-intensity
is +ink (bright on dark) or -ink (dark on bright), and `stream.simulate` gives the events of its movement.

What one frame tells of the direction, by construction:

    place      the digit's centre is even on the canvas at every time, whatever the direction
    polarity   bright and dark digits are equally frequent, so a leading edge is ON as often as OFF
    sensor     a pixel's reference lags behind what it sees, and so the events of a movement are not quite those of the
               opposite one run backwards; half of all examples are therefore made as just that: the opposite movement
               is simulated, then the stream is run backwards, which is a recording of the movement asked for

By the third, the stream of a direction has the same distribution as that of the opposite direction run backwards, but
for ON and OFF, which the second makes equal. So frames of counts, or binary ones, in random order (control="shuffled")
or the middle one alone (control="single") have one distribution for both, and whatever is made of them is right on at
most half of the examples, where the class holds a direction. What is left to see in them is the digit, and the axis of
its movement. A time surface tells the order of time within a frame: neither control takes it away.
"""

import numpy as np

from lissom.data import digits, mnist5k
from lissom.data.content import Content
from lissom.data.errors import nearest, require
from lissom.data.events.binning import Rendering
from lissom.data.events.drawing import check_drawn, drawn_splits
from lissom.data.events.stream import Events, joined, noise_events, reversed_in_time, simulate

CLASSES = ("digit", "direction", "digit_direction")
SOURCES = {"digits": digits.digits, "mnist5k": mnist5k.mnist5k}
SIDE = (0.45, 0.6)  # of a digit, in sides of the canvas
DISTANCE = (0.4, 0.8)  # of a linear movement, in sides of the canvas
RADIUS = (0.15, 0.25)  # of the circle round the triangle of the saccades, in sides of the canvas
TURN = np.pi / 9  # a linear movement is off its direction by up to 20 degrees
FINE = 0.5  # pixels that a digit moves at most from one simulated intensity to the next


def linear(rng: np.random.Generator, direction: int, times: np.ndarray) -> np.ndarray:
    """[S + 1, 2] of (x, y) in sides of the canvas: a straight movement of constant velocity, 0 at time 1/2."""
    angle = direction * np.pi / 2 + rng.uniform(-TURN, TURN)
    distance = rng.uniform(*DISTANCE)
    return distance * (times - 0.5)[:, None] * [np.cos(angle), np.sin(angle)]


def saccade(rng: np.random.Generator, direction: int, times: np.ndarray) -> np.ndarray:
    """[S + 1, 2] of (x, y) in sides of the canvas: three saccades of one duration round an equilateral triangle, whose
    first corner is at any angle (N-MNIST moves its sensor along a triangle too: Orchard et al. 2015, arXiv:1507.07629).

    Each follows the course of least jerk, 10 u^3 - 15 u^4 + 6 u^5 (Flash & Hogan 1985), and rests at its ends.
    """
    start, radius = rng.uniform(0, 2 * np.pi), rng.uniform(*RADIUS)
    angles = start + (1 - 2 * direction) * 2 * np.pi / 3 * np.arange(4)
    corners = radius * np.stack([np.cos(angles), np.sin(angles)], -1)
    number = np.minimum((3 * times).astype(int), 2)
    u = 3 * times - number
    course = (u**3 * (10 - 15 * u + 6 * u**2))[:, None]
    return corners[number] + course * (corners[number + 1] - corners[number])


# How a digit moves: its path, the names of its directions, the opposite of each, its top speed in sides a recording.
MOTIONS = {
    "linear": (linear, ("right", "down", "left", "up"), (2, 3, 0, 1), DISTANCE[1]),
    "saccade": (saccade, ("clockwise", "anticlockwise"), (1, 0), 3 * 1.875 * 3**0.5 * RADIUS[1]),
}


def moving_digits(
    *,
    classes_of: str = "digit_direction",
    source: str = "digits",
    motion: str = "linear",
    size: int = 24,
    steps: int = 16,
    binning: str = "counts",
    polarity: str = "both",
    tau: float | None = None,
    control: str = "none",
    threshold: float = 0.25,
    noise: float = 0.05,
    train_size: int = 10000,
    test_size: int = 5000,
    seed: int = 0,
) -> Content:
    """Frames [steps, size, size, 2], or of one channel with polarity="merged".

    classes_of: the label is the digit, the direction, or digit x directions + direction; `info["directions"]` names
    them, each as frequent up to one example. source: `digits` (8x8) or `mnist5k` (28x28); the digits of its test
    split are in the test only. motion: `linear` (right, down, left, up) or `saccade` (round a triangle, clockwise or
    anticlockwise). binning, polarity, tau, control: see `binning.py`. threshold: c of the sensor; ink is 1 at most.
    noise: events a pixel that come of themselves.

    Example i of a split depends on (seed, split, i) and the settings alone.
    """
    for setting, value, known in (
        ("class", classes_of, CLASSES),
        ("source", source, SOURCES),
        ("motion", motion, MOTIONS),
    ):
        require(value in known, f"moving_digits has no {setting} {value!r}{nearest(value, known)}")
    check_drawn("moving_digits", size=size, noise=noise, train_size=train_size, test_size=test_size, seed=seed)
    require(0.01 <= threshold < np.inf, f"moving_digits: threshold must be at least 0.01, got {threshold}")
    rendering = Rendering(
        dataset="moving_digits", steps=steps, binning=binning, polarity=polarity, tau=tau, control=control
    )
    pictures = SOURCES[source]()
    names = MOTIONS[motion][1]

    def example(rng: np.random.Generator, split: int, index: int) -> tuple[np.ndarray, int]:
        stored = (pictures.train, pictures.test)[split]
        which, direction = int(rng.integers(len(stored["labels"]))), index % len(names)
        events = recording(rng, ink(stored["inputs"][which]), motion, direction, size, steps, threshold, noise)
        frames, digit = rendering.frames(events, (size, size), 0.0, 1.0, rng), int(stored["labels"][which])
        return frames, {"digit": digit, "direction": direction}.get(classes_of, digit * len(names) + direction)

    train, test = drawn_splits(example, (train_size, test_size), seed)
    classes = {"digit": 10, "direction": len(names)}.get(classes_of, 10 * len(names))
    info = {"classes": classes, "chance": 1 / classes, "directions": list(names)}
    return Content(kind="frames", train=train, test=test, info=info)


def ink(picture: np.ndarray) -> np.ndarray:
    """[n, n] in [0, 1] of a stored picture [n, n, 1]."""
    return picture[..., 0] / (255 if picture.dtype == np.uint8 else 1)


def recording(
    rng: np.random.Generator,
    picture: np.ndarray,
    motion: str,
    direction: int,
    size: int,
    steps: int,
    threshold: float,
    noise: float,
) -> Events:
    """The events in [0, 1] of ink [n, n] that moves in one direction over a canvas [size, size]."""
    path, _, opposite, speed = MOTIONS[motion]
    times = np.linspace(0, 1, steps * int(np.ceil(speed * size / (FINE * steps))) + 1)
    backwards, contrast = rng.integers(2), 2 * rng.integers(2) - 1
    side = size * rng.uniform(*SIDE)
    centre = rng.uniform(0, size, 2)
    centres = centre + size * path(rng, opposite[direction] if backwards else direction, times)
    # The logarithm of the intensities, so it is not taken again.
    brightness = contrast * drawn(picture, centres, side, size)
    offset = rng.uniform(-0.5, 0.5, (size, size))
    events = simulate(brightness, times, threshold=threshold, log=False, offset=offset)
    if backwards:
        events = reversed_in_time(events, 1.0)
    return joined(events, noise_events(rng, noise, (size, size), 1.0)) if noise else events


def drawn(picture: np.ndarray, centres: np.ndarray, side: float, size: int) -> np.ndarray:
    """[S, size, size]: ink [n, n] enlarged to `side` pixels round each of the centres [S, 2] = (x, y), on a torus.

    Interpolated linearly between the picture's pixels, whose surround is 0; where it is made smaller, each pixel is a
    mean over a triangle as wide as one of them.
    """
    n = len(picture)
    width = max(1.0, n / side)

    def weights(centre: np.ndarray) -> np.ndarray:  # [S, size, n]: what each of the picture's pixels adds to each here
        apart = (np.arange(size) + 0.5 - centre[:, None] + size / 2) % size - size / 2
        place = apart * n / side + n / 2 - 0.5
        return np.maximum(0, 1 - np.abs(place[..., None] - np.arange(n)) / width) / width

    return weights(centres[:, 1]) @ picture @ weights(centres[:, 0]).transpose(0, 2, 1)
