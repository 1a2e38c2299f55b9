"""Corruptions by hand, on images and signals: what each does, how much more of it a severity is, what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from lissom.data import ArraySource, DataError, Dataset, corrupted, eval_batches
from lissom.data.corruptions import CORRUPTIONS, SEVERITIES, Scale, scale_of
from lissom.data.dataset import gather

SCALE = Scale(deviation=2.0, least=-100.0, most=100.0)
SHAPES = {"image": (9, 12, 2), "signal": (40, 1)}


def dataset(kind, count=50):
    """Random walks along the axes of space: what is near is alike."""
    rng = np.random.default_rng(0)

    def source(n):
        inputs = rng.normal(0.1, 1, (n, *SHAPES[kind]))
        for axis in range(1, inputs.ndim - 1):
            inputs = inputs.cumsum(axis)
        return ArraySource(kind, {"inputs": inputs.astype(np.float32), "labels": np.arange(n, dtype=np.int32)})

    return Dataset("made", kind, source(300), source(count), {"classes": count})


def changed(name, x, c, seed=0, scale=SCALE):
    rngs = [np.random.default_rng([seed, number]) for number in range(len(x))]
    return CORRUPTIONS[name].change(x, c, lambda of: np.stack([of(rng) for rng in rngs]), scale)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_more_severe_is_further_from_what_it_was(kind, name):
    """Of one shape, type and label, within the range of the training data, the same in any batch and at any time."""
    plain = dataset(kind)
    sets = corrupted(plain, (name,))
    assert [settings for settings, _ in sets] == [{"corruption": name, "severity": s} for s in SEVERITIES]
    before, everyone = gather(plain.test, np.arange(50)), np.arange(50)
    scale, distances = scale_of(plain.train), []
    for _, other in sets:
        assert other.train is plain.train and other.info is plain.info
        after = gather(other.test, everyone)
        assert after["inputs"].shape == before["inputs"].shape and after["inputs"].dtype == np.float32
        np.testing.assert_array_equal(after["labels"], before["labels"])
        assert after["inputs"].min() >= scale.least and after["inputs"].max() <= scale.most
        for index in (3, 49):
            np.testing.assert_array_equal(other.test[index]["inputs"], after["inputs"][index])
        distances.append(np.square(after["inputs"] - before["inputs"]).mean())
    assert distances[0] > 0 and (np.diff(distances) > 0).all(), distances
    again = gather(corrupted(dataset(kind), (name,), (5,))[0][1].test, everyone)
    np.testing.assert_array_equal(again["inputs"], after["inputs"])


def test_noise_is_of_the_datas_own_deviation():
    x = np.zeros((20, 30, 30, 1), np.float32)
    noisy = changed("gaussian_noise", x, 0.4)
    assert abs(noisy.std() - 0.4 * 2.0) < 0.01 and abs(noisy.mean()) < 0.03
    np.testing.assert_allclose(changed("brightness", x + 1, 0.75), 1 + 0.75 * 2.0)


def test_impulses_are_the_least_and_the_largest_number():
    x = np.ones((20, 30, 30, 1), np.float32)
    found = changed("impulse_noise", x, 0.1)
    # 18,000 numbers, a twentieth each: 4.5 standard deviations are 0.0073.
    for value in (SCALE.least, SCALE.most):
        assert abs((found == value).mean() - 0.05) < 0.0073
    assert set(np.unique(found)) == {-100.0, 1.0, 100.0}


def test_blur_by_hand():
    """Weights exp(-k^2 / 2) of a standard deviation of one place, of sum 1 also at the edge; twice in a plane."""
    x = np.zeros((1, 5, 1))
    x[0, 2] = 1
    weight = np.exp(-0.5 * np.arange(5) ** 2)
    middle, edge = weight[:3].sum() + weight[1:3].sum(), weight.sum()
    found = changed("blur", x, 1 / 5)[0, :, 0]
    np.testing.assert_allclose(found[2], 1 / middle)
    np.testing.assert_allclose(found[0], weight[2] / edge)
    plane = np.zeros((1, 5, 5, 1))
    plane[0, 2, 2] = 1
    np.testing.assert_allclose(changed("blur", plane, 1 / 5)[0, ..., 0], np.outer(found, found))
    np.testing.assert_allclose(changed("blur", np.full((1, 5, 5, 2), 3.0), 1 / 5), 3)


def test_contrast_keeps_the_mean_of_an_example():
    x = np.asarray([[1.0, 3.0], [10.0, 30.0]])[..., None]
    np.testing.assert_allclose(changed("contrast", x, 0.5)[..., 0], [[1.5, 2.5], [15, 25]])


@pytest.mark.parametrize(("shape", "side"), [((10, 1), 4), ((10, 10, 3), 7)])
def test_erased_is_one_block(shape, side):
    """40 % of the places: 4 of 10; in a plane ceil(sqrt(0.4) 10) = 7 along each axis."""
    found = changed("erase", np.ones((200, *shape)), 0.4)
    firsts = set()
    for example in found:
        places = np.argwhere(example == 0)
        low, high = places.min(0), places.max(0) + 1
        assert (high - low)[:-1].tolist() == [side] * (len(shape) - 1) and (high - low)[-1] == shape[-1]
        assert len(places) == side ** (len(shape) - 1) * shape[-1]
        firsts.add(tuple(low[:-1]))
    assert len(firsts) == (10 - side + 1) ** (len(shape) - 1)  # anywhere that it fits


def test_shifted_up_or_down():
    x = np.arange(1, 9, dtype=np.float32).reshape(1, 8, 1).repeat(50, 0)
    found = {tuple(example[:, 0].astype(int)) for example in changed("shift", x, 0.2)}
    assert found == {(0, 0, 1, 2, 3, 4, 5, 6), (3, 4, 5, 6, 7, 8, 0, 0)}
    plane = changed("shift", np.ones((200, 4, 4, 1)), 0.25)
    assert {tuple(np.argwhere(example[..., 0]).min(0)) for example in plane} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_draws_are_an_examples_own_and_the_same_at_each_severity():
    plain = dataset("signal", 40)
    alike = ArraySource("signal", {name: array[:1].repeat(40, 0) for name, array in plain.test.arrays.items()})
    sets = corrupted(replace(plain, test=alike), ("erase",), (1, 5))
    mild, severe = (gather(other.test, np.arange(40))["inputs"] for _, other in sets)
    assert len(np.unique(mild, axis=0)) > 5
    # The corner of a block is the same share of the places where it fits.
    first = lambda x, side: np.argmax(x[..., 0] == 0, 1) / (40 - side + 1)
    np.testing.assert_allclose(first(mild, 2), first(severe, 16), atol=1 / 25)


def test_batches_are_those_of_the_test_set():
    plain = dataset("signal", 7)
    ((_, other),) = corrupted(plain, ("brightness",), (5,))
    batches = list(eval_batches(other, batch_size=4))
    np.testing.assert_array_equal(np.concatenate([b["labels"] for b in batches])[:7], np.arange(7))
    assert [b["mask"].sum() for b in batches] == [4, 3]


def test_mistakes_are_one_sentence():
    with pytest.raises(DataError, match="no corruption 'blurr'; did you mean 'blur'"):
        corrupted(dataset("image"), ("blurr",))
    for severity in (0, 6):
        with pytest.raises(DataError, match=f"is 1, 2, 3, 4 or 5, not {severity}"):
            corrupted(dataset("image"), ("blur",), (severity,))
    for names, severities in ((("blur", "blur"), (1,)), (("blur",), (1, 1))):
        with pytest.raises(DataError, match="stands there twice"):
            corrupted(dataset("image"), names, severities)
    with pytest.raises(DataError, match="at least one severity"):
        corrupted(dataset("image"), ("blur",), ())
    rows = np.zeros((3, 5), np.int32)
    tokens = ArraySource("tokens", {"inputs": rows, "labels": rows})
    with pytest.raises(DataError, match="of images and signals, and dataset 'text' is of kind 'tokens'"):
        corrupted(Dataset("text", "tokens", tokens, tokens, {}), ("blur",))
    assert corrupted(Dataset("text", "tokens", tokens, tokens, {}), ()) == []
