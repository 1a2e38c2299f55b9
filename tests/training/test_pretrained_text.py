"""Text in a checkpoint's tokens."""

import numpy as np
import pytest

from lissom import data
from lissom.data.errors import DataError
from lissom.data.stdlib_text import TEST_MODULES, module_bytes
from lissom.models.pretrained import read
from tests.models import pretrained_files as files

pytest.importorskip("tokenizers")
NAME = "lissom.training.pretrained_text:stdlib_tokens"
DOMAINS = "lissom.training.pretrained_text:domain_tokens"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "checkpoint"
    files.write_byte_level(folder)
    return str(folder)


def test_windows_are_the_text(checkpoint):
    found = data.load(NAME, checkpoint=checkpoint, length=64)
    assert found.info["vocab_size"] == 257 and found.info["input_shape"] == (64,)
    assert (len(found.train), len(found.test)) == (found.info["train_examples"], found.info["test_examples"])
    one, two = found.test[0], found.test[1]
    assert one["labels"][-1] == two["inputs"][0] and np.array_equal(one["inputs"][1:], one["labels"][:-1])
    text = read(checkpoint).tokenizer().decode(np.concatenate([one["inputs"], two["inputs"]]).tolist())
    assert module_bytes(TEST_MODULES[:1]).decode().startswith(text) and len(text) >= 128


def test_some_windows_of_the_test_text(checkpoint):
    every, some = (data.load(NAME, checkpoint=checkpoint, length=64, test_windows=n).test for n in (0, 3))
    assert len(some) == 3
    for number, place in enumerate((0, (len(every) - 1) // 2, len(every) - 1)):
        np.testing.assert_array_equal(some[number]["inputs"], every[place]["inputs"])


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"length": 10**8}, "is longer than the train text"),
        ({"test_windows": 10**6}, "test_windows=1000000, and there are"),
        ({"test_windows": -1}, "test_windows must be at least 0"),
    ],
)
def test_bad_settings(settings, words, checkpoint):
    with pytest.raises(DataError, match=words):
        data.load(NAME, checkpoint=checkpoint, **settings)


def test_domains_take_turns(checkpoint):
    few = {"checkpoint": checkpoint, "length": 32, "train_windows": 5, "test_windows": 3}
    found = data.load(DOMAINS, **few)
    assert (len(found.train), len(found.test)) == (10, 6) and found.info["domains"] == ["python", "english"]
    domains = [found.train[number]["domains"].tolist() for number in range(10)]
    assert domains == [[1, 0], [0, 1]] * 5
    read_back = read(checkpoint).tokenizer().decode
    text = read_back(np.concatenate([found.test[n]["inputs"] for n in (0, 2, 4)]).tolist())
    assert module_bytes(TEST_MODULES[:1]).decode().startswith(text)
    english = data.load(DOMAINS, **few, tested="english").test
    assert len(english) == 3
    for number in range(3):
        np.testing.assert_array_equal(english[number]["inputs"], found.test[2 * number + 1]["inputs"])


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"domains": ("python", "englisch")}, "there is no domain 'englisch'; did you mean 'english'"),
        ({"domains": ("python",)}, "domains must be two or more"),
        ({"tested": "json"}, "tested must be one of python, english, got 'json'"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"test_windows": 0}, "test_windows must be at least 1, got 0"),
        ({"test_windows": 10**6}, "windows of 128, and test_windows=1000000 asks for more"),
    ],
)
def test_bad_domains(settings, words, checkpoint):
    with pytest.raises(DataError, match=words):
        data.load(DOMAINS, checkpoint=checkpoint, **{"train_windows": 5, "test_windows": 3} | settings)
