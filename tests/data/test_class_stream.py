"""The stream by class: what a task's batches hold, that nothing is left out, that it is a function of (seed, step)."""

from itertools import islice

import numpy as np
import pytest

from lissom.data import ArraySource, ClassStream, DataError, Dataset, train_batch, train_batches
from lissom.data.class_stream import labels_of

COUNTS = (7, 4, 9, 6)  # examples of classes 0 to 3


def numbered(kind="image") -> Dataset:
    """Images whose pixels are all their own number, in an order of labels that is mixed."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4, dtype=np.int32), COUNTS))
    inputs = np.broadcast_to(np.arange(len(labels), dtype=np.float32)[:, None, None, None], (len(labels), 4, 4, 1))
    source = ArraySource(kind, {"inputs": inputs, "labels": labels})
    return Dataset("numbered", kind, source, source, {"classes": 4})


def stream(dataset, **settings):
    return ClassStream(dataset, **{"batch_size": 4, "seed": 3, **settings})


def batches(dataset, order, **settings):
    start = {"start_step": 0, "batch_size": order.batch_size, "seed": order.seed, "order": order}
    return list(train_batches(dataset, **{**start, **settings}))


def numbers(batch):
    return batch["inputs"][:, 0, 0, 0].astype(int)


def test_a_pass_by_hand():
    dataset = numbered()
    order = stream(dataset)
    assert sorted(np.concatenate(order.tasks)) == [0, 1, 2, 3]
    # A class of n examples in batches of 4 takes n / 4 steps, rounded up.
    lengths = {0: 2, 1: 1, 2: 3, 3: 2}
    assert np.diff([0, *order.ends]).tolist() == [lengths[int(task[0])] for task in order.tasks]
    found = batches(dataset, order)
    assert len(found) == order.steps == 8
    for step, batch in enumerate(found):
        assert set(batch["labels"]) == set(order.tasks[order.task_at(step)])
        np.testing.assert_array_equal(batch["mask"], np.ones(4, np.float32))
    assert set(np.concatenate([numbers(batch) for batch in found])) == set(range(26))


def test_frames_take_the_same_places_as_images():
    images, source = numbered(), numbered().train.arrays
    arrays = {"inputs": source["inputs"][:, None], "labels": source["labels"]}  # [N, 1, 4, 4, 1]
    frames = Dataset("frames", "frames", ArraySource("frames", arrays), ArraySource("frames", arrays), {"classes": 4})
    for image, frame in zip(batches(images, stream(images)), batches(frames, stream(frames)), strict=True):
        np.testing.assert_array_equal(image["inputs"], frame["inputs"][:, 0])


def test_rows_behind_a_pass_are_of_a_new_one():
    """7 examples in batches of 4 for 7 steps are 4 whole passes."""
    dataset = numbered()
    order = stream(dataset, task_steps=7)
    task = next(number for number, classes in enumerate(order.tasks) if classes[0] == 0)
    assert np.diff([0, *order.ends]).tolist() == [7] * 4
    rows = np.concatenate([order.indices(step) for step in range(order.ends[task] - 7, order.ends[task])])
    passes = rows.reshape(4, 7)
    members = np.flatnonzero(dataset.train.arrays["labels"] == 0)
    for one in passes:
        assert sorted(one) == sorted(members)
    assert len({tuple(one) for one in passes}) == 4


def test_tasks_of_several_classes():
    order = stream(numbered(), classes_per_task=3)
    assert [len(task) for task in order.tasks] == [3, 1]
    labels = labels_of(numbered().train)
    assert set(labels[order.indices(order.ends[0] - 1)]) <= set(order.tasks[0])
    assert set(labels[order.indices(order.ends[0])]) == set(order.tasks[1])


def test_the_order_of_classes_and_examples_is_the_seeds():
    dataset = numbered()
    orders = [stream(dataset, seed=seed, task_steps=2) for seed in range(6)]
    assert len({tuple(np.concatenate(order.tasks)) for order in orders}) > 1
    for order in orders:
        again = stream(dataset, seed=order.seed, task_steps=2)
        np.testing.assert_array_equal(order.indices(5), again.indices(5))
    assert len({tuple(order.indices(0)) for order in orders}) > 1


def test_resumed_and_on_several_processes():
    dataset = numbered()
    order = stream(dataset, batch_size=6, replay=0.3, replay_size=2)
    settings = {"augment": ("shift", "noise")}
    whole = batches(dataset, order, **settings)
    for step, batch in enumerate(batches(dataset, order, start_step=3, **settings), start=3):
        np.testing.assert_array_equal(batch["inputs"], whole[step]["inputs"])
    for processes in (2, 3):
        parts = [
            batches(dataset, order, process=process, processes=processes, **settings) for process in range(processes)
        ]
        for step, batch in enumerate(whole):
            for name in batch:
                together = np.concatenate([part[step][name] for part in parts])
                np.testing.assert_array_equal(batch[name], together)
    one = train_batch(dataset, step=4, batch_size=6, seed=3, order=order, **settings)
    np.testing.assert_array_equal(one["inputs"], whole[4]["inputs"])


def test_replayed_rows_are_a_share_and_of_the_memory_only():
    dataset = numbered()
    order = stream(dataset, batch_size=8, replay=0.25, replay_size=2)
    labels = labels_of(dataset.train)
    # The first task has nothing to be replayed: all 8 rows are its own. Behind it 6 of 8 are new.
    lengths = [-(-COUNTS[int(task[0])] // (8 if number == 0 else 6)) for number, task in enumerate(order.tasks)]
    assert np.diff([0, *order.ends]).tolist() == lengths
    drawn, seen = {}, []
    for step in range(order.steps):
        task, rows = order.task_at(step), order.indices(step)
        own = set(order.tasks[task])
        if task == 0:
            assert set(labels[rows]) == own
            seen.extend(rows)
            continue
        assert set(labels[rows[:6]]) == own
        seen.extend(rows[:6])
        earlier = set(np.concatenate(order.tasks[:task]))
        assert set(labels[rows[6:]]) <= earlier
        assert len(set(rows[6:])) == 2  # without repetition, where the memory is large enough
        for row in rows[6:]:
            drawn.setdefault(int(labels[row]), set()).add(int(row))
    assert set(seen) == set(range(26))
    assert all(len(rows) <= 2 for rows in drawn.values())
    for label, rows in drawn.items():  # the first two of the class that were shown
        assert rows <= set([row for row in seen if labels[row] == label][:2])


def test_a_memory_holds_only_what_was_shown():
    """One step of 2 examples a task: the memory of 3 has 2, and 3 rows of it repeat one."""
    order = stream(numbered(), batch_size=5, task_steps=1, replay=0.6, replay_size=3)
    assert [len(kept) for kept in order._memory] == [3, 2, 2, 2]  # the first task has 5 rows a step, then 2
    assert len(set(order.indices(1)[2:])) == 3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"classes_per_task": 0}, "classes_per_task=0 must be at least 1"),
        ({"task_steps": -1}, "task_steps=-1 must be at least 0"),
        ({"replay": 1.0, "replay_size": 1}, "replay=1.0 must be at least 0 and below 1"),
        ({"replay": 0.5}, "replay_size=0 (a class): both are 0, or none"),
        ({"replay_size": 5}, "replay=0.0 (a share of each batch)"),
        ({"replay": 0.01, "replay_size": 5}, "is 0 rows: at least 1 must be replayed"),
        ({"replay": 0.99, "replay_size": 5}, "is 4 rows: at least 1 must be replayed, and 1 must be new"),
    ],
)
def test_bad_settings_are_one_sentence(settings, sentence):
    with pytest.raises(DataError) as error:
        stream(numbered(), **settings)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_what_has_no_stream_by_class():
    tokens = ArraySource("tokens", {"text": np.zeros((3, 5), np.uint8)})
    with pytest.raises(DataError, match="one label an example, and dataset 't' is tokens data"):
        stream(Dataset("t", "tokens", tokens, tokens))
    dataset = numbered()
    order = stream(dataset)
    with pytest.raises(DataError, match=r"has steps 0\.\.7, and not 8"):
        train_batch(dataset, step=8, batch_size=4, seed=3, order=order)
    with pytest.raises(DataError, match="made for batch_size=4 and seed=3"):
        train_batch(dataset, step=0, batch_size=2, seed=3, order=order)
    assert len(list(islice(train_batches(dataset, start_step=6, batch_size=4, seed=3, order=order), 9))) == 2


def test_a_source_that_is_read_row_by_row():
    class Rows:
        def __init__(self, source):
            self.source = source

        def __len__(self):
            return len(self.source)

        def __getitem__(self, index):
            return self.source[index]

    dataset = numbered()
    plain = Dataset("plain", "image", Rows(dataset.train), Rows(dataset.test), dataset.info)
    for step in range(8):
        np.testing.assert_array_equal(stream(plain).indices(step), stream(dataset).indices(step))
