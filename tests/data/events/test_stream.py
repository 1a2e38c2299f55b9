"""The simulated sensor against crossings computed by hand."""

import numpy as np
import pytest

from lissom.data import DataError
from lissom.data.events.stream import joined, noise_events, ordered, reversed_in_time, simulate


def pixel(values, times=None, **settings):
    """The events of one pixel with these intensities."""
    times = np.arange(len(values)) if times is None else times
    return simulate(np.reshape(values, (-1, 1, 1)), times, **{"threshold": 0.25, "log": False, **settings})


def test_a_ramp_crosses_four_levels():
    events = pixel([0.0, 1.0])
    assert events.t.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert events.polarity.tolist() == [1, 1, 1, 1]


def test_up_and_down_lags_by_one_level():
    # Up to 0.6: events at the levels 0.25 and 0.5, a quarter and a half of 1 / 0.6 on the way. Down to 0: the reference
    # is at 0.5, so the next levels are 0.25 and 0, and 0.6 - 0.35 is where the first of them lies.
    events = pixel([0.0, 0.6, 0.0], [0.0, 1.0, 3.0])
    np.testing.assert_allclose(events.t, [0.25 / 0.6, 0.5 / 0.6, 1 + 2 * 0.35 / 0.6, 3.0], rtol=1e-12)
    assert events.polarity.tolist() == [1, 1, 0, 0]


def test_levels_outlast_steps_that_do_not_reach_them():
    # 0.2 a step: levels 0.25, 0.5, 0.75 are reached in the steps 2, 3 and 4, at (level - before) / 0.2 of each.
    events = pixel([0.0, 0.2, 0.4, 0.6, 0.8])
    np.testing.assert_allclose(events.t, [1.25, 2.5, 3.75], rtol=1e-12)


def test_rounding_loses_no_event():
    # Ten steps of 0.1 sum to a little less than 1, and each is a threshold.
    assert len(pixel(np.cumsum([0.0] + [0.1] * 10), threshold=0.1)) == 10


def test_log_brightness_depends_on_the_ratio():
    # log 8 / log 2 = 3 thresholds, whatever the intensity is; taken linear in its logarithm.
    for scale in (1.0, 1000.0):
        events = pixel([scale, 8 * scale], threshold=np.log(2), log=True)
        np.testing.assert_allclose(events.t, [1 / 3, 2 / 3, 1.0], rtol=1e-9)


def test_offset_moves_the_first_level():
    # The reference lies half a threshold above: levels 0.375 and 0.625 in place of 0.25, 0.5, 0.75.
    assert pixel([0.0, 0.7], offset=0.5).t.tolist() == pytest.approx([0.375 / 0.7, 0.625 / 0.7])
    assert pixel([0.0, 0.7], offset=-0.5).t.tolist() == pytest.approx([0.125 / 0.7, 0.375 / 0.7, 0.625 / 0.7])


def test_signed_events_reproduce_the_change_to_within_a_threshold():
    rng = np.random.default_rng(0)
    brightness = np.cumsum(rng.normal(0, 0.3, (20, 5, 7)), axis=0)
    times = np.cumsum(rng.uniform(0.1, 1, 20))
    events = simulate(brightness, times, threshold=0.2, log=False)
    assert (np.diff(events.t) >= 0).all() and events.t[0] >= times[0] and events.t[-1] <= times[-1]
    for stop in range(1, 20):
        change = np.zeros((5, 7))
        past = events.t <= times[stop]
        np.add.at(change, (events.y[past], events.x[past]), 0.2 * (2.0 * events.polarity[past] - 1))
        assert np.abs(brightness[stop] - brightness[0] - change).max() < 0.2 + 1e-9


def test_every_event_stands_at_a_crossing():
    """At its time an event's brightness is a whole number of thresholds from the first one."""
    rng = np.random.default_rng(1)
    brightness = np.cumsum(rng.normal(0, 0.5, (12, 3, 3)), axis=0)
    events = simulate(brightness, np.arange(12.0), threshold=0.2, log=False)
    for t, x, y in zip(events.t, events.x, events.y):
        height = np.interp(t, np.arange(12.0), brightness[:, y, x]) - brightness[0, y, x]
        assert abs(height / 0.2 - round(height / 0.2)) < 1e-6


def test_reversing_swaps_order_and_polarity():
    events = ordered([3.0, 1.0, 1.0], [5, 6, 7], [0, 1, 2], [1, 0, 1])
    assert (events.t.tolist(), events.x.tolist()) == ([1, 1, 3], [6, 7, 5])
    back = reversed_in_time(events, 4.0)
    assert back.t.tolist() == [1, 3, 3] and back.x.tolist() == [5, 7, 6]
    assert back.y.tolist() == [0, 2, 1] and back.polarity.tolist() == [0, 0, 1]


def test_joined_streams_are_in_order():
    one, two = ordered([1.0, 4.0], [0, 1], [0, 0], [1, 1]), ordered([2.0], [2], [0], [0])
    both = joined(one, two)
    assert both.t.tolist() == [1, 2, 4] and both.x.tolist() == [0, 2, 1] and both.polarity.tolist() == [1, 0, 1]


def test_noise_has_its_rate():
    events = noise_events(np.random.default_rng(0), 0.5, (100, 200), 2.0)
    assert abs(len(events) - 10000) < 400  # Poisson of mean 10,000: four standard deviations
    assert abs(events.polarity.mean() - 0.5) < 0.02 and events.t[0] >= 0 and events.t[-1] <= 2
    assert events.y.max() == 99 and events.x.max() == 199


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"threshold": 0.0}, "threshold must be above 0"),
        ({"times": [0.0, 0.0]}, "must be ascending"),
        ({"times": [0.0]}, "need two times or more"),
        ({"log": True}, "the logarithm needs intensities above 0"),
        ({"offset": 1.0}, "offset must be within"),
    ],
)
def test_bad_requests_are_one_sentence(settings, sentence):
    with pytest.raises(DataError, match=sentence):
        pixel([0.0, 1.0], **settings)
