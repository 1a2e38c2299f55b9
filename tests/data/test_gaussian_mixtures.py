"""Generated mixtures: what stands beside a set is what it was drawn from."""

import numpy as np
import pytest

from lissom.data import load
from lissom.data.augmentations import augmentations
from lissom.data.errors import DataError
from lissom.data.gaussian_mixtures import gaussian_mixtures

FEW = {"size": 5, "components": 3, "train_size": 4, "test_size": 3}


def test_points_have_the_moments_that_are_said():
    """20,000 points of 3 components: mean and variance of a component's n points within 5 standard errors."""
    content = gaussian_mixtures(size=20_000, components=3, train_size=1, test_size=3, deviations=(0.3, 2.0), seed=2)
    for at in range(3):
        one = {name: array[at] for name, array in content.test.items()}
        weights, variances = np.exp(one["log_weights"]), np.exp(one["log_variances"])
        assert weights.sum() == pytest.approx(1, abs=1e-5)
        assert (np.abs(one["means"]) <= 4).all() and (variances >= 0.09).all() and (variances <= 4.0001).all()
        for c in range(3):
            mine = one["inputs"][one["labels"] == c]
            n = len(mine)
            assert abs(n / 20_000 - weights[c]) < 5 * np.sqrt(weights[c] * (1 - weights[c]) / 20_000) + 1e-6
            if n > 50:
                assert (np.abs(mine.mean(0) - one["means"][c]) < 5 * np.sqrt(variances[c] / n)).all()
                assert (np.abs(mine.var(0) / variances[c] - 1) < 5 * np.sqrt(2 / n)).all()


def test_a_set_depends_on_seed_split_and_place_alone():
    one, more = gaussian_mixtures(**FEW), gaussian_mixtures(**{**FEW, "train_size": 9, "test_size": 5})
    other = gaussian_mixtures(**FEW, seed=1)
    for split, count in (("train", 4), ("test", 3)):
        for name, array in getattr(one, split).items():
            np.testing.assert_array_equal(array, getattr(more, split)[name][:count])
    assert not np.isin(one.train["inputs"], one.test["inputs"]).any()
    assert not np.isin(one.train["inputs"], other.train["inputs"]).any()


def test_smaller_sets_are_the_beginnings_of_larger_ones():
    whole = gaussian_mixtures(**{**FEW, "size": 40, "train_size": 30}).train
    part = gaussian_mixtures(**{**FEW, "size": 40, "train_size": 30}, smallest=10).train
    assert (whole["sizes"] == 40).all() and part["sizes"].min() >= 10 and len(set(part["sizes"])) > 5
    for at, count in enumerate(part["sizes"]):
        np.testing.assert_array_equal(part["inputs"][at, :count], whole["inputs"][at, :count])
        assert not part["inputs"][at, count:].any()


def test_loaded_fields():
    data = load("gaussian_mixtures", **FEW)
    assert data.kind == "set" and data.info["classes"] == 3 and data.info["input_shape"] == (5, 2)
    assert {k: (v.shape, v.dtype) for k, v in data.test[1].items()} == {
        "inputs": ((5, 2), np.float32),
        "labels": ((5,), np.int32),
        "sizes": ((), np.int32),
        "log_weights": ((3,), np.float32),
        "means": ((3, 2), np.float32),
        "log_variances": ((3, 2), np.float32),
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"smallest": 300}, "smallest must be in 0..size=256, got 300"),
        ({"components": 0}, "components must be in 1..256, got 0"),
        ({"dims": 0}, "dims must be at least 1, got 0"),
        ({"reach": -1.0}, "reach must be at least 0, got -1.0"),
        ({"deviations": (0.0, 1.0)}, "deviations must be a least and a largest one above 0"),
        ({"deviations": (0.5,)}, "deviations must be a least and a largest one above 0"),
        ({"concentration": 0.0}, "concentration must be above 0, got 0.0"),
        ({"test_size": 0}, "train_size and test_size must be above 0"),
    ],
)
def test_bad_settings_give_a_sentence(settings, words):
    with pytest.raises(DataError, match=words):
        load("gaussian_mixtures", **settings)


def test_sets_are_not_augmented():
    with pytest.raises(DataError, match="changes images, signals and frames, and this dataset is of sets"):
        augmentations("noise", "set")
