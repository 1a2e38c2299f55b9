"""Sequences of tasks: what they are made of, what depends on what, and which tasks the test has."""

import math

import numpy as np
import pytest

from lissom.data import eval_batches, in_context, load, train_batch
from lissom.data.augmentations import augmentations
from lissom.data.dataset import gather
from lissom.data.errors import DataError

FEW = {"classes": 3, "dims": 4, "length": 6, "train_size": 40, "test_size": 20}


def all_of(source):
    return gather(source, np.arange(len(source)))


def known(number, classes=3):
    """A training task of the sizes of FEW."""
    return in_context.task(0, in_context.KNOWN_TASK, number, inputs=4, dims=4, classes=classes)


def test_fields():
    data = load("in_context", **FEW)
    assert data.kind == "stream"
    assert data.info == {
        "classes": 3,
        "features": 7,
        "input_shape": (6, 7),
        "chance": 1 / 3,
        "length": 6,
        "train_examples": 40,
        "test_examples": 20,
    }
    assert (len(data.train), len(data.test)) == (40, 20)
    assert {k: (v.shape, v.dtype) for k, v in data.test[1].items()} == {
        "inputs": ((6, 7), np.float32),
        "labels": ((6,), np.int32),
    }
    assert load("in_context").info["train_examples"] == 1_000_000


def test_the_label_before_stands_behind_the_input():
    """The first has none: zeros."""
    rows = all_of(load("in_context", **FEW).train)
    before = rows["inputs"][..., 4:]
    assert not before[:, 0].any()
    np.testing.assert_array_equal(before[:, 1:].sum(-1), 1)
    np.testing.assert_array_equal(before[:, 1:].argmax(-1), rows["labels"][:, :-1])


def test_a_sequence_is_its_base_projected_and_permuted():
    """By hand: examples of the base at the places that the sequence's own random numbers name."""
    data = load("in_context", **FEW, tasks=5, spread=0.5)
    found = data.train[7]
    rng = in_context.stream(0, in_context.TRAINING, 7)
    which, _ = rng.random(2)
    projection, permutation = known(int(which * 5))
    means = in_context.stream(0, in_context.MEANS, 0).standard_normal((3, 4), np.float32)
    classes = rng.integers(3, size=6)
    noise = rng.standard_normal((6, 4), np.float32)
    points = (means[classes] + 0.5 * noise) / np.sqrt(1.25)
    np.testing.assert_allclose(found["inputs"][:, :4], points @ projection, atol=1e-6)
    np.testing.assert_array_equal(found["labels"], permutation[classes])


def test_projections_have_variance_one_over_the_inputs():
    projection, permutation = in_context.task(3, in_context.UNSEEN_TASK, 1, inputs=400, dims=300, classes=9)
    assert abs(projection.var() * 400 - 1) < 5 * np.sqrt(2 / 120_000) and abs(projection.mean()) < 5 / 20 / 346
    assert sorted(permutation) == list(range(9))
    other, _ = in_context.task(3, in_context.KNOWN_TASK, 1, inputs=400, dims=300, classes=9)
    assert abs(np.corrcoef(projection.ravel(), other.ravel())[0, 1]) < 0.02


def test_a_sequence_depends_on_its_settings_split_and_place_alone():
    one, more = load("in_context", **FEW), load("in_context", **{**FEW, "train_size": 900, "test_size": 30})
    for split, count in (("train", 40), ("test", 20)):
        whole = all_of(getattr(one, split))
        some = gather(getattr(more, split), np.arange(count)[::-1])
        for name, array in whole.items():
            np.testing.assert_array_equal(array, some[name][::-1])
            np.testing.assert_array_equal(array[3], getattr(one, split)[3][name])
    assert not np.isin(all_of(one.train)["inputs"][..., :4], all_of(one.test)["inputs"]).mean() > 0.01
    other = load("in_context", **FEW, seed=1)
    assert not np.isin(all_of(one.train)["inputs"][..., :4], all_of(other.train)["inputs"]).mean() > 0.01


def solved(rows, projection, permutation, base):
    """The share of inputs that the inverse of the task brings back to noise-free means of their class."""
    points = rows["inputs"][..., : projection.shape[1]] @ np.linalg.inv(projection)
    classes = np.argsort(permutation)[rows["labels"]]
    return np.isclose(points, base.means[classes] / np.sqrt(1 + base.spread**2), atol=1e-2).all(-1)


@pytest.mark.parametrize(("tested", "found"), [("seen", 1), ("unseen", 0), ("other", 0)])
def test_which_tasks_the_test_has(tested, found):
    """Of examples without noise a task of training undoes exactly its own sequences: all test sequences of "seen" are
    of one of the 2, none of the others is; and the training sequences are of both."""
    data = load("in_context", **FEW, tasks=2, spread=1e-5, tested=tested)
    tasks = [known(k) for k in range(2)]
    base = data.train.base
    told = [
        np.stack([solved(all_of(split), *task, base).all(1) for task in tasks]) for split in (data.train, data.test)
    ]
    np.testing.assert_array_equal(told[0].sum(0), 1)
    assert told[0].any(1).all()
    np.testing.assert_array_equal(told[1].sum(0), found)
    assert (data.test.base is base) == (tested != "other")


def test_seen_and_unseen_have_the_same_examples_in_other_tasks():
    seen, unseen = (load("in_context", **FEW, tasks=2, spread=1e-5, tested=name).test for name in ("seen", "unseen"))
    other = [in_context.task(0, in_context.UNSEEN_TASK, i, inputs=4, dims=4, classes=3) for i in range(20)]
    for i in range(20):
        row = {name: array[None] for name, array in unseen[i].items()}
        assert solved(row, *other[i], unseen.base).all()
        # Which positions are of one class is the same.
        a, b = seen[i]["labels"], unseen[i]["labels"]
        np.testing.assert_array_equal(a[:, None] == a, b[:, None] == b)


def test_without_a_number_of_tasks_every_training_sequence_is_a_new_one():
    data = load("in_context", **FEW, spread=1e-5)
    for i in (0, 39):
        row = {name: array[None] for name, array in data.train[i].items()}
        task = known(i)
        assert solved(row, *task, data.train.base).all()
    # Seen tasks are those of training sequences.
    seen = all_of(load("in_context", **FEW, spread=1e-5, tested="seen").test)
    tasks = [known(k) for k in range(40)]
    told = np.stack([solved(seen, *task, data.train.base).all(1) for task in tasks])
    np.testing.assert_array_equal(told.sum(0), 1)


def test_a_share_of_the_permutations_is_fixed():
    """In the training sequences alone: 400 of them, binomial."""
    settings = {**FEW, "train_size": 400, "test_size": 400, "spread": 1e-5, "tasks": 3, "classes": 5}
    shares = {}
    for share in (0.0, 0.25, 1.0):
        data = load("in_context", **settings, fixed_permutation=share)
        tasks = [known(k, classes=5) for k in range(3)]
        assert not any((permutation == np.arange(5)).all() for _, permutation in tasks)
        plain = np.stack([solved(all_of(data.train), a, np.arange(5), data.train.base).all(1) for a, _ in tasks])
        shares[share] = plain.any(0).mean()
        np.testing.assert_array_equal(
            all_of(data.test)["labels"], all_of(load("in_context", **settings).test)["labels"]
        )
    assert shares[0.0] == 0 and shares[1.0] == 1
    assert abs(shares[0.25] - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 400)


def test_stored_bases_are_cut_to_their_classes_and_standardised(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    digits = load("digits")
    data = load("in_context", **FEW, base="digits")
    train, test = data.train.base, data.test.base
    plain = all_of(digits.train)
    mine = plain["labels"] < 3
    assert len(train.classes) == mine.sum() and set(train.classes) == {0, 1, 2} and train.inputs == 64
    np.testing.assert_allclose(train.examples.mean(0), 0, atol=1e-5)
    assert np.square(train.examples).mean() == pytest.approx(1, abs=1e-5)
    # One scale for all features, and the same for the test.
    pixels = plain["inputs"][mine].reshape(-1, 64)
    scale = np.ptp(pixels[:, 20]) / np.ptp(train.examples[:, 20])
    assert scale == pytest.approx(np.ptp(pixels[:, 42]) / np.ptp(train.examples[:, 42]), rel=1e-4)
    judged = all_of(digits.test)
    own = judged["inputs"][judged["labels"] < 3].reshape(-1, 64)
    np.testing.assert_allclose(test.examples, (own - pixels.mean(0)) / scale, atol=1e-4)
    assert data.info["input_shape"] == (6, 7)
    other = load("in_context", **FEW, tested="other", other_base="digits")
    assert other.test.base.inputs == 64 and other.train.base.inputs == 4
    np.testing.assert_array_equal(all_of(other.train)["inputs"], all_of(load("in_context", **FEW).train)["inputs"])


def test_pipelines_ask_for_what_they_need(monkeypatch):
    """An epoch of a million sequences is no array: a batch is made of its own, whose numbers are all that is asked."""
    data, asked = load("in_context"), []
    draw = in_context.Gaussians.draw
    monkeypatch.setattr(in_context.Gaussians, "draw", lambda *given: asked.append(1) or draw(*given))
    batch = train_batch(data, step=3, batch_size=4, seed=0)
    assert batch["inputs"].shape == (4, 50, 21) and batch["mask"].tolist() == [1] * 4
    assert len(asked) == 4
    judged = next(eval_batches(load("in_context", **FEW), batch_size=32))
    assert judged["mask"].sum() == 20 and judged["labels"].shape == (32, 6)
    with pytest.raises(IndexError):
        data.test[5000]
    assert sum(1 for _ in load("in_context", **FEW).test) == 20


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"classes": 1}, "classes must be at least 2, got 1"),
        ({"dims": 0}, "dims must be at least 1, got 0"),
        ({"length": 1}, "length must be at least 2, got 1"),
        ({"tasks": -1}, "tasks must be at least 0, got -1"),
        ({"spread": 0.0}, "spread must be a number above 0, got 0.0"),
        ({"spread": math.inf}, "spread must be a number above 0, got inf"),
        ({"spread": 2.0, "base": "digits"}, "spread=2.0 is of Gaussians, and base='digits'"),
        ({"other_base": "digits"}, "other_base='digits' is what tested='other' is of, and tested='unseen'"),
        ({"seed": 2**70}, r"seed must be below 2\*\*64"),
        (
            {"spread": 2.0, "base": "digits", "tested": "other", "other_base": "mnist5k"},
            "spread=2.0 is of Gaussians, and base='digits'",
        ),
        ({"fixed_permutation": 1.5}, r"fixed_permutation must be in 0\.\.1, got 1.5"),
        ({"tested": "sen"}, "tested='sen' is not known; did you mean 'seen'"),
        ({"train_size": 0}, "train_size must be at least 1, got 0"),
        ({"test_size": 0}, "test_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"base": "sequences"}, "a base set has one label an example, and dataset 'sequences' is tokens data"),
        ({"base": "in_context"}, "dataset 'in_context' is stream data"),
        ({"base": "digits", "classes": 11}, "classes=11 are more than dataset 'digits' has, 10"),
        (
            {"base": "digits", "tested": "other", "other_base": "digits"},
            "tested='other' needs an other_base than base='digits'",
        ),
        ({"bse": "digits"}, "has no setting 'bse'; did you mean 'base'"),
    ],
)
def test_bad_settings_give_a_sentence(settings, words, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=words):
        load("in_context", **settings)


def test_streams_are_not_augmented():
    with pytest.raises(DataError, match="changes images, signals and frames, and this dataset is of streams"):
        augmentations("noise", "stream")
