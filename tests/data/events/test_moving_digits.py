"""Digits that move: where they are, what is held out, and that nothing but time tells a direction from its opposite."""

import numpy as np
import pytest

from lissom.data import DataError, load
from lissom.data.digits import digits
from lissom.data.events import moving_digits as module
from lissom.data.events.moving_digits import MOTIONS, drawn, linear, moving_digits, recording, saccade

SMALL = {"train_size": 24, "test_size": 16, "size": 16, "steps": 6}


def test_a_picture_is_drawn_at_its_centre_and_round_the_torus():
    picture = np.array([[0.0, 1.0], [0.0, 0.0]])  # ink in its upper right quarter
    made = drawn(picture, np.array([[4.0, 4.0], [0.0, 0.0], [4.5, 4.0]]), 2.0, 8)
    expected = np.zeros((8, 8))
    expected[3, 4] = 1  # pixels 4 = [4, 5) to the right of x = 4, 3 = [3, 4) above y = 4
    np.testing.assert_allclose(made[0], expected)
    np.testing.assert_allclose(made[1], np.roll(expected, (-4, -4), (0, 1)))  # row -1 is row 7
    np.testing.assert_allclose(made[2], (expected + np.roll(expected, 1, 1)) / 2)  # half a pixel to the right


def test_a_picture_keeps_its_ink_in_proportion_to_its_area():
    picture = digits().train["inputs"][0, ..., 0]
    for side in (4.0, 12.0):  # made smaller, and larger
        total = drawn(picture, np.array([[9.3, 14.1]]), side, 24).sum()
        assert total == pytest.approx(picture.sum() * (side / 8) ** 2, rel=0.02)


def test_linear_moves_where_it_says_with_one_velocity():
    times = np.linspace(0, 1, 9)
    for direction, (x, y) in enumerate([(1, 0), (0, 1), (-1, 0), (0, -1)]):  # y downwards: right, down, left, up
        path = linear(np.random.default_rng(direction), direction, times)
        steps = np.diff(path, axis=0)
        np.testing.assert_allclose(steps, steps[:1].repeat(8, 0), atol=1e-12)
        np.testing.assert_allclose(path[4], 0, atol=1e-12)
        along = (path[-1] - path[0]) @ [x, y] / np.linalg.norm(path[-1] - path[0])
        assert along >= np.cos(np.pi / 9) - 1e-12
        assert 0.4 <= np.linalg.norm(path[-1] - path[0]) <= 0.8


def test_saccades_go_round_a_triangle_in_their_sense_and_rest_at_its_corners():
    for direction, sense in ((0, 1), (1, -1)):  # on a screen, y downwards, a positive area is clockwise
        path = saccade(np.random.default_rng(3), direction, np.linspace(0, 1, 301))
        np.testing.assert_allclose(path[0], path[-1], atol=1e-12)
        corners = path[[0, 100, 200]]
        sides = np.linalg.norm(corners - np.roll(corners, 1, 0), axis=1)
        np.testing.assert_allclose(sides, sides[0])
        assert np.sign(np.linalg.det(np.diff(corners, axis=0))) == sense
        speed = np.linalg.norm(np.diff(path, axis=0), axis=1)
        assert speed[[0, 99, 100, 199, 200, 299]].max() < 0.01 * speed.max()


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_path_run_backwards_is_a_path_of_the_opposite_direction(motion):
    path, names, opposite, speed = MOTIONS[motion]
    assert [opposite[opposite[d]] for d in range(len(names))] == list(range(len(names)))
    times = np.linspace(0, 1, 301)
    for direction in range(len(names)):
        one = path(np.random.default_rng(7), direction, times)
        other = path(np.random.default_rng(7), opposite[direction], times)
        np.testing.assert_allclose(one[::-1], other, atol=1e-9)
        assert 300 * np.linalg.norm(np.diff(one, axis=0), axis=1).max() <= speed


def test_what_is_drawn_of_an_example_does_not_depend_on_its_direction():
    """An example made backwards is the stream of the opposite direction, reversed: bin k of one is bin T - 1 - k."""
    picture = digits().train["inputs"][0, ..., 0]
    made = {}
    for backwards in (0, 1):

        class Fixed:
            """The generator, but for the coin that says whether the stream is run backwards."""

            def __init__(self, coin):
                self.rng, self.coins = np.random.default_rng(5), [coin]

            def integers(self, *given):
                drawn = self.rng.integers(*given)
                return self.coins.pop() if self.coins else drawn

            def __getattr__(self, name):
                return getattr(self.rng, name)

        made[backwards] = recording(Fixed(backwards), picture, "linear", 2 * backwards, 16, 6, 0.25, 0.0)
    # The same movement to the right was simulated; one of them was then run backwards and so goes to the left.
    one, other = made[0], made[1]
    np.testing.assert_allclose(one.t, 1 - other.t[::-1])
    assert (one.x == other.x[::-1]).all() and (one.polarity == 1 - other.polarity[::-1]).all() and len(one) > 50


def test_events_stand_where_the_digit_goes():
    """The centre of the events goes to the right by the distance of the movement, give or take a pixel and a half."""
    rng = np.random.default_rng(0)
    events = recording(rng, np.ones((8, 8)), "linear", 0, 24, 16, 0.25, 0.0)
    phase = np.exp(2j * np.pi * (events.x + 0.5) / 24)  # places on a circle, since the canvas is a torus
    bins = np.minimum((events.t * 16).astype(int), 15)
    angles = np.unwrap([np.angle(phase[bins == k].sum()) for k in range(16)])
    moved = (angles[-1] - angles[0]) / (2 * np.pi) * 24
    assert 24 * 0.4 * 15 / 16 * np.cos(np.pi / 9) - 1.5 < moved < 24 * 0.8 + 1.5


def test_labels_name_digit_and_direction():
    both, digit, direction = (
        moving_digits(**SMALL, classes_of=name).train for name in ("digit_direction", "digit", "direction")
    )
    np.testing.assert_array_equal(both["inputs"], digit["inputs"])
    np.testing.assert_array_equal(both["labels"], 4 * digit["labels"] + direction["labels"])
    assert np.bincount(direction["labels"]).tolist() == [6, 6, 6, 6]
    info = moving_digits(**SMALL).info
    assert info["classes"] == 40 and info["chance"] == 1 / 40 and info["directions"] == ["right", "down", "left", "up"]
    assert moving_digits(**SMALL, motion="saccade", classes_of="direction").info["classes"] == 2


def test_test_digits_are_other_pictures_than_training_digits(monkeypatch):
    seen = []
    plain = module.ink
    monkeypatch.setattr(module, "ink", lambda picture: seen.append(picture.tobytes()) or plain(picture))
    moving_digits(**SMALL)
    known = {split: {x.tobytes() for x in digits().__dict__[split]["inputs"]} for split in ("train", "test")}
    assert set(seen[:24]) <= known["train"] and set(seen[24:]) <= known["test"] and len(seen) == 40
    assert not set(seen[:24]) & set(seen[24:])


def test_examples_depend_on_seed_split_and_place_alone():
    one, two = moving_digits(**SMALL), moving_digits(**{**SMALL, "train_size": 12})
    assert one.train["inputs"].tobytes() == moving_digits(**SMALL).train["inputs"].tobytes()
    np.testing.assert_array_equal(one.train["inputs"][:12], two.train["inputs"])
    np.testing.assert_array_equal(one.test["inputs"], two.test["inputs"])
    assert (one.train["inputs"][:16] != one.test["inputs"]).any(axis=(1, 2, 3, 4)).all()


def test_controls_take_the_order_of_the_same_frames():
    plain, shuffled, single = (
        moving_digits(**SMALL, control=control).test["inputs"] for control in ("none", "shuffled", "single")
    )
    for x, y, z in zip(plain, shuffled, single):
        assert sorted(frame.tobytes() for frame in x) == sorted(frame.tobytes() for frame in y)
        assert len({frame.tobytes() for frame in z}) == 1 and z[0].tobytes() in {x[2].tobytes(), x[3].tobytes()}
    assert (plain != shuffled).any()


def test_loaded_frames_are_the_counts_that_were_made():
    data = load("moving_digits", **SMALL)
    made = moving_digits(**SMALL)
    assert data.kind == "frames" and data.info["input_shape"] == (6, 16, 16, 2)
    found = data.test.gather(np.arange(16))
    assert found["inputs"].dtype == np.float32 and found["inputs"].max() > 1  # counts: not divided by 255
    np.testing.assert_array_equal(found["inputs"], made.test["inputs"])
    np.testing.assert_array_equal(found["labels"], made.test["labels"])
    surface = load("moving_digits", **SMALL, binning="surface", polarity="merged")
    made = moving_digits(**SMALL, binning="surface", polarity="merged")
    np.testing.assert_array_equal(surface.test.gather(np.arange(16))["inputs"], made.test["inputs"].astype("f"))


def test_mnist5k_moves_too():
    made = moving_digits(**SMALL, source="mnist5k", classes_of="digit", noise=0.0)
    events = made.train["inputs"].sum(axis=(1, 2, 3, 4), dtype=int)
    # Each of the 28 x 28 pictures has ink, which gives events wherever it comes and goes; a 1 has the least.
    assert (events > 20).all() and made.info["classes"] == 10
    ones = made.train["labels"] == 1
    assert 0 < ones.sum() < 24 and events[ones].mean() < events[~ones].mean()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"classes_of": "digits"}, "has no class 'digits'; did you mean 'digit'"),
        ({"source": "mnist"}, "has no source 'mnist'; did you mean 'mnist5k'"),
        ({"motion": "saccades"}, "has no motion 'saccades'; did you mean 'saccade'"),
        ({"size": 8}, "size must be in 16..128, got 8"),
        ({"threshold": 0.0}, "threshold must be at least 0.01"),
        ({"noise": -1.0}, "noise must be in 0..100"),
        ({"test_size": 0}, "must be above 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"tau": 2.0}, "tau=2.0 belongs to binning='surface'"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_bad_settings_are_one_sentence(settings, sentence):
    with pytest.raises(DataError) as error:
        load("moving_digits", **settings)
    assert sentence in str(error.value) and "\n" not in str(error.value)
