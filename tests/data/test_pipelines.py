"""batch = f(step, process, processes): the same examples for any number of processes and after any
interruption."""

from itertools import islice

import numpy as np
import pytest

from lissom.data import (
    AUGMENTATIONS,
    ArraySource,
    DataError,
    Dataset,
    eval_batches,
    train_batch,
    train_batches,
)
from lissom.data.pipelines import stream_seed


def numbered(examples: int, test: int = 7) -> Dataset:
    """Images whose label is their own number, so that an example can be followed through the pipeline."""

    def split(count):
        inputs = np.random.default_rng(count).random((count, 8, 8, 1), np.float32)
        return ArraySource("image", {"inputs": inputs, "labels": np.arange(count, dtype=np.int32)})

    return Dataset("numbered", "image", split(examples), split(test), {"classes": examples})


class RowByRow:
    """A source without `gather`, as a plug-in would write it."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index]


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])
        assert left[name].dtype == right[name].dtype


@pytest.mark.parametrize("processes", [2, 3, 6])
@pytest.mark.parametrize("augment", [None, ("shift", "flip", "noise")])
def test_the_global_batch_is_the_same_for_any_number_of_processes(processes, augment):
    dataset = numbered(20)
    for step in (0, 1, 5):
        settings = {"step": step, "batch_size": 12, "seed": 3, "augment": augment}
        whole = train_batch(dataset, **settings)
        parts = [train_batch(dataset, **settings, process=p, processes=processes) for p in range(processes)]
        same(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_resumed_stream_is_the_stream_that_never_stopped(prefetch):
    dataset = numbered(20)
    settings = {"batch_size": 6, "seed": 1, "augment": "shift", "prefetch": prefetch}
    whole = list(islice(train_batches(dataset, start_step=0, **settings), 9))
    resumed = list(islice(train_batches(dataset, start_step=4, **settings), 5))
    for step, (left, right) in enumerate(zip(whole[4:], resumed, strict=True), start=4):
        same(left, right)
        same(left, train_batch(dataset, step=step, batch_size=6, seed=1, augment="shift"))


def test_an_epoch_has_each_example_once_in_a_new_order_each_time():
    dataset = numbered(20)
    labels = [train_batch(dataset, step=s, batch_size=4, seed=0)["labels"] for s in range(10)]
    first, second = np.concatenate(labels[:5]), np.concatenate(labels[5:])
    assert sorted(first) == sorted(second) == list(range(20))
    assert (first != second).any()
    assert (first != np.arange(20)).any()


def test_neighbouring_seeds_do_not_share_orders():
    """Grain shuffles epoch e of seed s like epoch 0 of seed s + e; ours are mixed first."""
    dataset = numbered(20)
    second_epoch = [train_batch(dataset, step=1, batch_size=20, seed=s)["labels"].tolist() for s in (0, 1, 2)]
    first_epoch = [train_batch(dataset, step=0, batch_size=20, seed=s)["labels"].tolist() for s in (0, 1, 2)]
    orders = [tuple(order) for order in first_epoch + second_epoch]
    assert len(set(orders)) == 6
    assert len({stream_seed(seed) for seed in range(1000)}) == 1000


def test_a_batch_may_be_larger_than_the_dataset():
    batch = train_batch(numbered(5), step=0, batch_size=12, seed=0)
    assert batch["inputs"].shape == (12, 8, 8, 1)
    assert sorted(batch["labels"][:5]) == sorted(batch["labels"][5:10]) == list(range(5))
    np.testing.assert_array_equal(batch["mask"], np.ones(12, np.float32))


def test_a_source_without_gather_gives_the_same_batches():
    dataset = numbered(9)
    plain = Dataset("plain", "image", RowByRow(dataset.train), RowByRow(dataset.test), dataset.info)
    settings = {"step": 2, "batch_size": 4, "seed": 5}
    same(train_batch(dataset, **settings), train_batch(plain, **settings))
    for left, right in zip(eval_batches(dataset, batch_size=4), eval_batches(plain, batch_size=4), strict=True):
        same(left, right)


@pytest.mark.parametrize(("batch_size", "processes", "batches"), [(4, 1, 2), (4, 2, 2), (2, 2, 4), (16, 4, 1)])
def test_evaluation_has_each_example_once_over_all_processes(batch_size, processes, batches):
    dataset, seen = numbered(3, test=7), []
    for process in range(processes):
        part = list(eval_batches(dataset, batch_size=batch_size, process=process, processes=processes))
        assert len(part) == batches
        for batch in part:
            assert batch["inputs"].shape == (batch_size // processes, 8, 8, 1)
            assert batch["mask"].dtype == np.float32
            seen.extend(batch["labels"][batch["mask"] == 1])
            np.testing.assert_array_equal(
                batch["inputs"], dataset.test.arrays["inputs"][batch["labels"]]
            )  # padding rows hold a real example
    assert sorted(seen) == list(range(7))


def test_a_last_batch_is_filled_with_its_own_rows():
    """A mean over all rows, as layers report it, is then of the examples that count."""
    full, last = eval_batches(numbered(3, test=6), batch_size=4)
    assert full["labels"].tolist() == [0, 1, 2, 3]
    assert (last["labels"].tolist(), last["mask"].tolist()) == ([4, 5, 4, 5], [1, 1, 0, 0])
    parts = [next(eval_batches(numbered(3, test=3), batch_size=8, process=p, processes=2)) for p in range(2)]
    assert [part["labels"].tolist() for part in parts] == [[0, 1, 2, 0], [1, 2, 0, 1]]
    assert [part["mask"].sum() for part in parts] == [3, 0]


def test_evaluation_of_the_training_split_and_fields_as_in_training():
    dataset = numbered(5)
    [batch] = eval_batches(dataset, split="train", batch_size=5)
    assert batch["labels"].tolist() == [0, 1, 2, 3, 4]
    trained = train_batch(dataset, step=0, batch_size=5, seed=0)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (v.shape, v.dtype) for k, v in trained.items()}


def test_augmentations_change_examples_and_differ_by_epoch_and_seed():
    dataset = numbered(4)
    for name in AUGMENTATIONS:
        drawn = {
            train_batch(dataset, step=s, batch_size=4, seed=seed, augment=name)["inputs"].tobytes()
            for s in range(2)
            for seed in range(2)
        }
        assert len(drawn) == 4


def test_shift_moves_the_picture_and_fills_with_zeros():
    image = np.ones((8, 8, 1), np.float32)
    sums = {float(AUGMENTATIONS["shift"](image, np.random.default_rng(seed)).sum()) for seed in range(50)}
    assert sums == {64.0, 56.0, 49.0}  # by at most one pixel an axis: 8*8, 8*7, 7*7


def test_frames_are_changed_alike_at_all_times():
    frames = np.zeros((16, 8, 8, 1), np.float32)
    frames[np.arange(16), 2, 3, 0] = np.arange(16)  # each with its number at one place
    expected = {
        "shift": {(row, column, 0) for row in (1, 2, 3) for column in (2, 3, 4)},  # by at most an eighth of 8
        "flip": {(2, 3, 0), (2, 4, 0)},
    }
    for name, places in expected.items():
        seen = set()
        for seed in range(100):
            changed = AUGMENTATIONS[name](frames, np.random.default_rng(seed))
            assert changed.sum((1, 2, 3)).tolist() == list(range(16))  # no frame has moved in time
            at = {tuple(np.argwhere(frame)[0].tolist()) for frame in changed[1:]}
            assert len(at) == 1
            seen |= at
        assert seen == places


def test_frames_take_augmentations():
    source = ArraySource("frames", {"inputs": np.ones((3, 2, 4, 4, 1), np.uint8), "labels": np.zeros(3, np.int32)})
    dataset = Dataset("f", "frames", source, source)
    inputs = train_batch(dataset, step=0, batch_size=3, seed=0, augment="noise")["inputs"]
    assert abs(inputs.std() - 0.05) < 0.02 and abs(inputs.mean() - 1) < 0.02


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"batch_size": 5, "processes": 2}, "batch_size=5 cannot be divided among 2 processes"),
        ({"batch_size": 4, "process": 2, "processes": 2}, "process must be in 0..1, got 2"),
        ({"batch_size": 4, "augment": "shfit"}, "unknown augmentation 'shfit'; did you mean 'shift'"),
    ],
)
def test_bad_requests_are_one_sentence(settings, sentence):
    with pytest.raises(DataError) as error:
        train_batch(numbered(5), step=0, seed=0, **settings)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_tokens_take_no_augmentation():
    tokens = ArraySource("tokens", {"text": np.zeros((3, 5), np.uint8)})
    with pytest.raises(DataError, match="of tokens"):
        train_batch(Dataset("t", "tokens", tokens, tokens), step=0, batch_size=2, seed=0, augment="flip")
