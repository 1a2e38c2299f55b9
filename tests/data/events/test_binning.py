"""Frames of a few events by hand, and what the controls do to them."""

import numpy as np
import pytest

from lissom.data import DataError
from lissom.data.events.binning import Rendering, controlled, counts, time_surfaces
from lissom.data.events.stream import ordered

# Two pixels of a sensor [1, 2] over [0, 4]: (t, x, polarity).
FEW = ordered([0.0, 0.5, 1.0, 3.5, 4.0], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 1])


def rendering(**settings):
    plain = {"steps": 4, "binning": "counts", "polarity": "both", "tau": None, "control": "none"}
    return Rendering(dataset="some", **{**plain, **settings})


def frames(events=FEW, shape=(1, 2), start=0.0, stop=4.0, seed=0, **settings):
    return rendering(**settings).frames(events, shape, start, stop, np.random.default_rng(seed))


def test_counts_by_hand():
    expected = np.zeros((4, 1, 2, 2), int)
    expected[0, 0, 0, 1] = 2  # 0 and 0.5
    expected[1, 0, 1, 0] = 1  # 1.0 opens the second bin
    expected[3, 0, 0, 0] = expected[3, 0, 1, 1] = 1  # 4.0, the very end, is of the last
    np.testing.assert_array_equal(counts(FEW, (1, 2), 4, 0.0, 4.0), expected)
    np.testing.assert_array_equal(frames(), expected)
    np.testing.assert_array_equal(frames(binning="binary"), np.minimum(expected, 1))
    np.testing.assert_array_equal(frames(polarity="merged")[..., 0], expected.sum(-1))


def test_time_surfaces_by_hand():
    made = time_surfaces(FEW, (1, 2), 4, 0.0, 4.0, tau=2.0)
    # Pixel 0, ON: last at 0.5; seen from the ends 1, 2, 3, 4 of the bins.
    np.testing.assert_allclose(made[:, 0, 0, 1], np.exp([-0.25, -0.75, -1.25, -1.75]))
    np.testing.assert_allclose(made[:, 0, 0, 0], [0, 0, 0, np.exp(-0.25)])
    np.testing.assert_allclose(made[:, 0, 1, 0], [0, np.exp(-0.5), np.exp(-1), np.exp(-1.5)])
    np.testing.assert_allclose(made[:, 0, 1, 1], [0, 0, 0, 1])
    # In units of a bin, here 1, and merged: the later of both polarities.
    merged = frames(binning="surface", polarity="merged", tau=2)
    assert merged.dtype == np.float16
    np.testing.assert_allclose(merged[:, 0, 0, 0], np.exp([-0.25, -0.75, -1.25, -0.25]), rtol=1e-3)
    np.testing.assert_allclose(frames(binning="surface")[0, 0, 0, 1], np.exp(-0.5), rtol=1e-3)  # tau is 1


def test_tau_is_in_bins_whatever_the_unit_of_time():
    late = ordered(1e6 * FEW.t + 5e6, FEW.x, FEW.y, FEW.polarity)
    slow = frames(late, start=5e6, stop=9e6, binning="surface", tau=0.7)
    np.testing.assert_array_equal(slow, frames(binning="surface", tau=0.7))


def test_frames_sum_to_the_number_of_events_up_to_255():
    rng = np.random.default_rng(0)
    events = ordered(rng.uniform(2, 3, 999), rng.integers(0, 5, 999), rng.integers(0, 4, 999), rng.integers(0, 2, 999))
    for polarity in ("both", "merged"):
        assert frames(events, (4, 5), 2.0, 3.0, polarity=polarity).sum() == 999
    once = ordered(np.zeros(300), *np.zeros((3, 300), int))
    assert frames(once).max() == 255


def test_shuffled_keeps_the_frames_and_changes_their_order():
    made = np.arange(8.0).reshape(8, 1)
    orders = [controlled(made, "shuffled", np.random.default_rng(seed))[:, 0].tolist() for seed in range(20)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len({tuple(order) for order in orders}) == 20


def test_single_is_one_of_the_two_in_the_middle():
    drawn = [controlled(np.arange(8.0)[:, None], "single", np.random.default_rng(seed)) for seed in range(20)]
    assert all(len(made) == 8 and np.ptp(made) == 0 for made in drawn)
    assert {float(made[0, 0]) for made in drawn} == {3.0, 4.0}
    odd = {float(controlled(np.arange(7.0)[:, None], "single", np.random.default_rng(s))[0, 0]) for s in range(9)}
    assert odd == {3.0}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 0}, "some: steps must be at least 1, got 0"),
        ({"binning": "count"}, "some has no binning 'count'; did you mean 'counts'"),
        ({"polarity": "merge"}, "some has no polarity 'merge'; did you mean 'merged'"),
        ({"control": "shuffle"}, "some has no control 'shuffle'; did you mean 'shuffled'"),
        ({"tau": 1.0}, "tau=1.0 belongs to binning='surface', and binning is 'counts'"),
        ({"binning": "surface", "tau": 0.0}, "tau must be a number above 0"),
        ({"binning": "surface", "tau": "long"}, "tau must be a number above 0"),
    ],
)
def test_bad_settings_are_one_sentence(settings, sentence):
    with pytest.raises(DataError) as error:
        rendering(**settings)
    assert sentence in str(error.value) and "\n" not in str(error.value)
