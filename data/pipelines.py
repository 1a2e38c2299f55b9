"""Input pipelines on `grain.MapDataset`: batch = f(step, process, processes), a pure function.

Training: indices -> shuffled anew each epoch -> repeated without end -> cut into batches of b = B / processes
-> every processes-th of them -> examples -> augmented. The global batch of a step is rows step*B ..
(step+1)*B of one endless stream, and process p takes rows p*b .. (p+1)*b of it: the same examples for any
number of processes, and a run resumed at step s goes on as if it had never stopped. A batch may be larger
than the dataset.

By class (`class_stream.py`): the examples that a step has are named by a `ClassStream` in place of the first three
links of this chain, and all else is the same; such a stream has an end.

Evaluation: every example exactly once over all processes, every batch of one shape, as many batches on each
process; `mask` [B] float32 is 0 on rows that only fill the last batches up.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from lissom.data.augmentations import augmentations
from lissom.data.class_stream import ClassStream
from lissom.data.dataset import Dataset, Example, gather
from lissom.data.errors import DataError

Names = str | Sequence[str] | None


def train_batch(
    dataset: Dataset,
    *,
    step: int,
    batch_size: int,
    seed: int,
    process: int = 0,
    processes: int = 1,
    augment: Names = None,
    order: ClassStream | None = None,
) -> Example:
    """This process's rows of the global batch of `step`: fields [batch_size / processes, ...], `mask` of
    ones. `order` None is the shuffled one."""
    if order is not None:
        order.task_at(step)  # grain would begin anew behind the end
    return _train_map(dataset, batch_size, seed, process, processes, augment, order)[step]


def train_batches(
    dataset: Dataset,
    *,
    start_step: int,
    batch_size: int,
    seed: int,
    process: int = 0,
    processes: int = 1,
    augment: Names = None,
    order: ClassStream | None = None,
    prefetch: int = 2,
) -> Iterator[Example]:
    """`train_batch` of start_step, start_step + 1, ... without end, or to that of `order`.

    prefetch: batches made ahead by one background thread; 0 makes them when asked.
    """
    import grain

    batches = _train_map(dataset, batch_size, seed, process, processes, augment, order)
    if start_step < 0:
        raise DataError(f"start_step must be at least 0, got {start_step}")
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return iter(batches[start_step:].to_iter_dataset(options))


def eval_batches(
    dataset: Dataset,
    *,
    split: str = "test",
    batch_size: int,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Example]:
    """This process's part of one pass over a split, in stored order; see the top of this file."""
    rows = rows_per_process(batch_size, process, processes)
    source = dataset.split(split)
    return _evaluate(source, batch_size, rows, process)


def _evaluate(source, batch_size: int, rows: int, process: int) -> Iterator[Example]:
    total = len(source)
    for start in range(0, total, batch_size):
        indices = start + process * rows + np.arange(rows)
        # Rows that only fill up repeat the batch's own: a mean that a layer takes over all rows is little changed.
        own = start + (indices - start) % min(batch_size, total - start)
        batch = _batch(source, own)
        yield batch | {"mask": (indices < total).astype(np.float32)}


def _batch(source, indices: np.ndarray) -> Example:
    """The examples that a network is given: places for meta-tokens are not for it."""
    return {name: array for name, array in gather(source, indices).items() if name != "pauses"}


def rows_per_process(batch_size: int, process: int, processes: int) -> int:
    """Rows of the global batch that one process holds; one sentence when they do not come out even."""
    if not 0 <= process < processes:
        raise DataError(f"process must be in 0..{processes - 1}, got {process}")
    if batch_size < 1 or batch_size % processes:
        raise DataError(f"batch_size={batch_size} cannot be divided among {processes} processes")
    return batch_size // processes


def stream_seed(seed: int) -> int:
    """A well mixed 32-bit seed. Grain shuffles epoch e with seed + e, so raw seeds 0, 1, 2 would share
    orders."""
    return int(np.random.SeedSequence([seed, 0x6C697373]).generate_state(1)[0])


# Examples in an endless stream: grain's own endless repeat has a length that overflows in batches of one.
ENDLESS = 2**48


def _train_map(
    dataset, batch_size: int, seed: int, process: int, processes: int, augment: Names, order: ClassStream | None
):
    """The grain dataset whose element `step` is this process's batch of that step."""
    import grain

    rows = rows_per_process(batch_size, process, processes)
    changes = augmentations(augment, dataset.kind)
    source = dataset.train

    def batch_at(index: int, indices: np.ndarray) -> Example:
        batch = _batch(source, indices)
        if changes:
            inputs = batch["inputs"].copy()
            for row in range(rows):
                rng = np.random.Generator(np.random.Philox(key=[seed, index * rows + row]))
                for change in changes:
                    inputs[row] = change(inputs[row], rng)
            batch["inputs"] = inputs
        return batch | {"mask": np.ones(rows, np.float32)}

    if order is not None:
        if (order.batch_size, order.seed) != (batch_size, seed):
            raise DataError(
                f"the stream by class was made for batch_size={order.batch_size} and seed={order.seed}, and is asked "
                f"for batch_size={batch_size} and seed={seed}"
            )
        own = slice(process * rows, (process + 1) * rows)
        at = lambda step: batch_at(step * processes + process, order.indices(int(step))[own])
        return grain.MapDataset.range(order.steps).map(at)
    return (
        grain.MapDataset.range(len(source))
        .shuffle(seed=stream_seed(seed))
        .repeat(max(1, ENDLESS // len(source)))
        .batch(rows)
        .map_with_index(batch_at)
        .slice(slice(process, None, processes))
    )
