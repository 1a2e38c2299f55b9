"""Domains over one alphabet: equal histograms, and the part of the loss that no model can learn."""

import json
import math

import numpy as np
import pytest

from lissom.data import load
from lissom.data.domain_text import TEXTS, drawn_nats, equalized

DOMAINS = ("python", "c", "english", "json", "arithmetic", "brackets")


@pytest.fixture(scope="module")
def data():
    return load("domain_text", length=64, levels=16, train_size=400, test_size=40)


def test_every_symbol_is_as_frequent_in_every_domain(data):
    examples = data.train.gather(np.arange(len(data.train)))
    domain = examples["domains"].argmax(1)
    assert data.info["domains"] == list(DOMAINS) and np.bincount(domain).tolist() == [400] * 6
    np.testing.assert_array_equal(examples["domains"].sum(1), 1)
    for number in range(6):
        share = np.bincount(examples["inputs"][domain == number].ravel(), minlength=16) / (400 * 64)
        # Draws of 1 / 16 among 25,600: a standard deviation of 0.0015; the draw within bytes makes less.
        np.testing.assert_allclose(share, 1 / 16, atol=0.005)


def test_splits_are_windows_of_their_own_text(data):
    for source, size in ((data.train, 400), (data.test, 40)):
        rows = source.gather(np.arange(len(source)))
        for number in range(6):
            inputs, labels = (rows[name][number::6] for name in ("inputs", "labels"))
            assert len(inputs) == size
            np.testing.assert_array_equal(inputs[:, 1:], labels[:, :-1])
            np.testing.assert_array_equal(labels[:-1, -1], inputs[1:, 0])


def test_the_splits_share_no_text():
    """By the bytes: of what is read, not drawn, no 200 bytes of the test text stand in the training text."""
    for name in ("python", "c", "english", "json"):
        train, test = (part.tobytes() for part in TEXTS[name]((None, None), (200_000, 16_000)))
        assert len(test) >= 16_000
        shared = [at for at in range(0, len(test) - 200, 200) if test[at : at + 200] in train]
        assert not shared, (name, test[shared[0] : shared[0] + 200])


def test_one_domain_is_tested(data):
    one = load("domain_text", length=64, levels=16, train_size=400, test_size=40, tested="json")
    rows = data.test.gather(np.arange(3, 6 * 40, 6))
    for name, array in one.test.gather(np.arange(40)).items():
        np.testing.assert_array_equal(array, rows[name])
    assert len(one.test) == 40 and len(one.train) == len(data.train)


def test_equalized_and_its_entropy_by_hand():
    # p(a) = 3/4, p(b) = 1/4, four symbols: a is 0, 1 or 2, evenly, and b is 3.
    frequencies = np.zeros(256)
    frequencies[[97, 98]] = 0.75, 0.25
    text = np.frombuffer(b"aaab" * 2000, np.uint8)
    symbols = equalized(text, frequencies, 4, np.random.default_rng(0))
    assert set(symbols[text == 98]) == {3}
    np.testing.assert_allclose(np.bincount(symbols[text == 97]) / 6000, 1 / 3, atol=0.02)
    assert drawn_nats(frequencies, 4) == pytest.approx(0.75 * math.log(3))
    # p = 1/2 each, three symbols: a is 0 (2/3 of it) or 1, b is 1 or 2.
    frequencies[[97, 98]] = 0.5
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert drawn_nats(frequencies, 3) == pytest.approx(entropy)


def test_arithmetic_is_right_and_brackets_close():
    rngs = np.random.default_rng(0), np.random.default_rng(1)
    text = TEXTS["arithmetic"](rngs, (600, 60))[0].tobytes().decode()
    assert len(text) >= 600
    for line in text.splitlines():
        left, right = line.split("=")
        assert eval(left) == int(right), line
    words = TEXTS["brackets"](rngs, (2000, 60))[0].tobytes().decode().splitlines()
    assert sum(map(len, words)) >= 2000
    for word in words[:-1]:
        assert len(word) >= 16
        while word != (word := word.replace("()", "").replace("[]", "").replace("{}", "")):
            pass
        assert not word


def test_json_is_json():
    lines = TEXTS["json"]((None, None), (3000, 600))[1].tobytes().decode().splitlines()
    assert all(json.loads(line)["name"] for line in lines)
