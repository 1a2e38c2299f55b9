"""Letters as a pen writes them: its way, its speed, and that backwards is forwards run backwards."""

import importlib.util

import numpy as np
import pytest

from lissom.data import DataError, load
from lissom.data.events import pen_strokes as module
from lissom.data.events.binning import counts
from lissom.data.events.pen_strokes import evenly_spaced, pen_strokes, strokes_of, writing

SMALL = {"glyphs": "abc", "train_size": 18, "test_size": 12, "size": 16, "steps": 6}


def written(letter: int, seed: int, backwards: bool, **settings):
    strokes = strokes_of("abc", ("futural",))[0][letter]
    plain = {"size": 24, "jitter": 1.0, "noise": 0.05, "backwards": backwards}
    return writing(np.random.default_rng(seed), strokes, **{**plain, **settings})


def test_points_are_evenly_spaced_along_strokes_in_a_row():
    # Lengths 1 and 1 with a gap between them, 4 points a unit: at 1/8, 3/8, 5/8, 7/8 of each.
    strokes = [np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([[5.0, 5.0], [5.0, 6.0]])]
    points = evenly_spaced(strokes)
    np.testing.assert_allclose(points[:4], [[x, 0] for x in (0.125, 0.375, 0.625, 0.875)])
    np.testing.assert_allclose(points[4:], [[5, y] for y in (5.125, 5.375, 5.625, 5.875)])
    # A corner, and a point that repeats: length 3.
    bent = evenly_spaced([np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 2.0]])])
    assert len(bent) == 12
    np.testing.assert_allclose(bent[[3, 4, 11]], [[0.875, 0], [1, 0.125], [1, 1.875]])


@pytest.mark.parametrize("steps", [6, 7])
def test_backwards_is_forwards_run_backwards(steps):
    for letter in range(3):
        for seed in range(10):
            one, other = written(letter, seed, False), written(letter, seed, True)
            forwards, backwards = (counts(e, (24, 24), steps, 0.0, 1.0).sum(-1) for e in (one, other))
            np.testing.assert_array_equal(forwards[::-1], backwards)
            np.testing.assert_array_equal(forwards.sum(0), backwards.sum(0))
            assert (forwards != backwards).any()


def test_the_pen_follows_the_font():
    # Without jitter and noise: futural's c goes from its upper right end over the left to its lower right end.
    events = written(2, 0, False, jitter=0.0, noise=0.0)
    assert np.hypot(*np.diff(np.stack([events.x, events.y]), axis=1)).max() < 2  # one stroke: no leap
    quarter = len(events) // 4
    assert events.x[0] > 16 and events.x[-1] > 16 and events.x[2 * quarter] < 10
    assert events.y[quarter] < 8 and events.y[3 * quarter] > 16  # y downwards
    assert 0.5 / len(events) == pytest.approx(events.t[0]) and np.ptp(np.diff(events.t)) < 1e-9  # constant speed
    assert (written(2, 0, True, jitter=0.0, noise=0.0).x == events.x[::-1]).all()


def test_times_are_symmetric_about_the_middle():
    for seed in range(5):
        events = written(0, seed, False, noise=0.0, jitter=0.9)
        np.testing.assert_allclose(events.t, 1 - events.t[::-1], atol=1e-12)
        assert 0.7 < np.ptp(events.t) < 1


def test_labels_take_letters_and_directions_in_turn():
    made = pen_strokes(**SMALL)
    assert np.bincount(made.train["labels"]).tolist() == [3] * 6
    assert made.info["classes"] == 6 and made.info["letters"] == "abc"
    assert made.info["directions"] == ["forwards", "backwards"]
    assert made.train["inputs"].shape[1:] == (6, 16, 16, 1)


def test_a_label_is_its_letter_and_its_direction():
    """Without jitter the first of both directions differ by their noise only, and that is little."""
    made = pen_strokes(**{**SMALL, "jitter": 0.0, "noise": 0.01, "fonts": ("futural",)}).train
    inputs = made["inputs"].astype(int)
    for letter in range(3):
        one, other = inputs[2 * letter], inputs[2 * letter + 1]
        assert np.abs(one[::-1] - other).sum() < 20 < np.abs(one - other).sum()
        assert np.abs(inputs[2 * letter + 6] - one).sum() < 20  # six classes on, the same one comes again


def test_examples_depend_on_seed_split_and_place_alone():
    one, two = pen_strokes(**SMALL), pen_strokes(**{**SMALL, "train_size": 9})
    assert one.train["inputs"].tobytes() == pen_strokes(**SMALL).train["inputs"].tobytes()
    np.testing.assert_array_equal(one.train["inputs"][:9], two.train["inputs"])
    assert not {x.tobytes() for x in one.train["inputs"]} & {x.tobytes() for x in one.test["inputs"]}


def test_controls_take_the_order_of_the_same_frames():
    plain, shuffled, single = (
        pen_strokes(**SMALL, control=control).test["inputs"] for control in ("none", "shuffled", "single")
    )
    for x, y, z in zip(plain, shuffled, single):
        assert sorted(frame.tobytes() for frame in x) == sorted(frame.tobytes() for frame in y)
        assert len({frame.tobytes() for frame in z}) == 1 and z[0].tobytes() in {x[2].tobytes(), x[3].tobytes()}
    assert (plain != shuffled).any()


def test_fonts_have_strokes_of_their_own():
    futural, scripts = strokes_of("ab", ("futural", "scripts"))
    assert len(futural[0]) == 2 and len(scripts[0]) == 1  # a: a stem and a bowl; one line
    assert futural[0][0][[0, -1]].tolist() != scripts[0][0][[0, -1]].tolist()
    assert futural[0][0][:, 0].tolist() == [6, 6]  # the stem is upright


def test_loaded_frames_are_the_counts_that_were_made():
    data = load("pen_strokes", **SMALL)
    found = data.test.gather(np.arange(12))
    assert data.kind == "frames" and data.info["input_shape"] == (6, 16, 16, 1)
    np.testing.assert_array_equal(found["inputs"], pen_strokes(**SMALL).test["inputs"].astype("f"))


def test_a_missing_package_is_one_sentence(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "HersheyFonts" else find(name))
    with pytest.raises(
        DataError, match="pen_strokes needs the package Hershey-Fonts, which holds its strokes: uv sync"
    ):
        pen_strokes(**SMALL)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"fonts": ("futura",)}, "unknown font 'futura'; did you mean 'futuram'"),
        ({"fonts": ()}, "fonts must name at least one font"),
        ({"glyphs": "aba"}, "glyphs holds a letter twice: 'aba'"),
        ({"glyphs": "aé"}, "font 'futural' has no strokes for 'é'"),
        ({"glyphs": ""}, "glyphs must hold at least one letter"),
        ({"size": 200}, "size must be in 16..128"),
        ({"jitter": 2.0}, "jitter must be in 0..1.5"),
        ({"jitter": 0.0, "noise": 0.0}, "the test repeats training examples"),
        ({"noise": -0.1}, "noise must be in 0..100"),
        ({"train_size": 0}, "must be above 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"tau": 2.0}, "tau=2.0 belongs to binning='surface'"),
        ({"polarity": "both"}, "has no setting 'polarity'"),
    ],
)
def test_bad_settings_are_one_sentence(settings, sentence):
    with pytest.raises(DataError) as error:
        load("pen_strokes", **settings)
    assert sentence in str(error.value) and "\n" not in str(error.value)
