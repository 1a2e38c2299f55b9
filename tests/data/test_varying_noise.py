"""Images of uneven noise: none by default, drawn once, as much as was asked for."""

import numpy as np
import pytest

from lissom.data import DataError, load
from lissom.data.content import Content
from lissom.data.digits import digits
from lissom.data.varying_noise import with_varying_noise


def grey(dtype, value, count=400):
    inputs = np.full((count, 16, 16, 1), value, dtype)
    return Content("image", *2 * [{"inputs": inputs, "labels": np.zeros(count, np.int32)}], {"classes": 1})


@pytest.mark.parametrize(("dtype", "value", "unit"), [(np.float32, 0.5, 1), (np.uint8, 128, 255)])
def test_deviations_are_uniform(dtype, value, unit):
    noisy = with_varying_noise(grey(dtype, value), 0.12)
    assert noisy.train["inputs"].dtype == dtype
    found = (noisy.train["inputs"].astype(float) / unit).std((1, 2, 3))
    # Uniform in [0, 0.12]: half of them below the middle, none far above.
    assert found.max() < 0.15 and found.min() < 0.003
    np.testing.assert_allclose([found.mean(), np.median(found)], 0.06, atol=0.009)  # 400 of standard deviation 0.035
    assert abs(noisy.train["inputs"].mean() / unit - value / unit) < 0.002
    assert (noisy.train["inputs"] != noisy.test["inputs"]).any()


def test_it_is_drawn_once_and_clipped():
    one, two = (digits(noise_up_to=0.5) for _ in range(2))
    plain = digits()
    for split in ("train", "test"):
        first, second, before = (getattr(x, split) for x in (one, two, plain))
        np.testing.assert_array_equal(first["inputs"], second["inputs"])
        np.testing.assert_array_equal(first["labels"], before["labels"])
        assert first["inputs"].min() == 0 and first["inputs"].max() == 1 and first["inputs"].dtype == np.float32
        assert (first["inputs"] != before["inputs"]).any((1, 2, 3)).all()


def test_none_changes_nothing():
    content = grey(np.uint8, 7)
    assert with_varying_noise(content, 0.0) is content
    with pytest.raises(DataError, match=r"noise_up_to=-0\.1 must be at least 0"):
        load("digits", noise_up_to=-0.1)
