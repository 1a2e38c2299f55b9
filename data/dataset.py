"""What every dataset looks like to the rest of the house: two random-access sources and the facts about them.

Fields of one example, by kind (H height, W width, C channels, L length, T tokens, states or frames):

    image    inputs [H, W, C] float32, usually in [0, 1];  labels int32 scalar
    signal   inputs [L, C] float32;                        labels int32 scalar
    frames   inputs [T, H, W, C] float32, T frames in order of time, often counts of events;  labels int32 scalar
    tokens   inputs [T] int32;  labels [T] int32;  weights [T] float32 (0 where a position does not score);
             pauses [P] int32, where the dataset names places for meta-tokens (`meta_tokens.py`);
             domains [D] float32, where it knows which of D kinds of text the tokens are of: their shares
    set      inputs [N, D] float32, their order without meaning;  labels [N] int32, the component of each;
             sizes int32 scalar: how many of the N count, zeros stand behind them;  of the mixture of C Gaussians
             that it was drawn from log_weights [C], means [C, D], log_variances [C, D] float32
    trajectory   inputs [T, D] float32, the states of a system at T times;  environment int32 scalar, which system it
             is;  families [F] float32, one-hot: which of F families the system is of, for judging alone
    episode  support_inputs [S, ...] float32 with support_labels [S] int32 (a class of the episode each) or [S, D]
             float32 (a target each): what is given;  inputs [Q, ...] with labels [Q] or [Q, D]: what is asked;
             classes [N] int32, which training (or test) classes the N of the episode are, where it has classes that
             others share
    stream   inputs [T, D + C] float32: D features of an example and, one-hot, the label of the one before, of C (zeros
             at first);  labels [T] int32
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lissom.data.errors import DataError

KINDS = ("image", "signal", "frames", "tokens", "set", "trajectory", "episode", "stream")

Example = dict[str, np.ndarray]


class Source(Protocol):
    """Random access. `gather(indices)` is optional: where it exists, a batch is one call instead of many."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class Dataset:
    """A named dataset with a training and a test source.

    `info` holds `classes` (image, signal, frames, set, stream; of one episode), `outputs` (of an episode of regression:
    numbers in a target), `vocab_size` (tokens), `features` (stream: numbers at a position) or `environments` and
    `interval` (trajectory: how many systems there are, and the time from one state to the next), `input_shape` (of one
    example), `train_examples`, `test_examples`, and where they are known `chance` (accuracy of guessing), `systems`
    (the equation of each environment), `anchors` (name -> published or exact accuracy) and facts that belong into a
    row, such as `sha256`.
    """

    name: str
    kind: str
    train: Source
    test: Source
    info: dict[str, Any] = field(default_factory=dict)

    def split(self, name: str) -> Source:
        """The source of split "train" or "test"."""
        if name not in ("train", "test"):
            raise DataError(f"dataset {self.name!r} has no split {name!r}; known: train, test")
        return self.train if name == "train" else self.test


def finish(kind: str, stored: Mapping[str, np.ndarray]) -> Example:
    """Stored fields -> the fields above; works on one example and on a stack of them.

    Stored arrays may be compact: uint8 images and signals (0..255 become [0, 1]), frames of any type (values stay as
    they are: integers are counts), tokens and weights of any integer type, and for running text one field `text` of T +
    1 tokens, whose inputs and labels are the two shifted views.
    """
    if kind == "tokens":
        if "text" in stored:
            text = np.asarray(stored["text"]).astype(np.int32)
            inputs, labels = text[..., :-1], text[..., 1:]
            domains = {"domains": np.asarray(stored["domains"]).astype(np.float32)} if "domains" in stored else {}
            return {"inputs": inputs, "labels": labels, "weights": np.ones(labels.shape, np.float32), **domains}
        labels = np.asarray(stored["labels"]).astype(np.int32)
        weights = np.asarray(stored["weights"]) if "weights" in stored else np.ones(labels.shape)
        pauses = {"pauses": np.asarray(stored["pauses"]).astype(np.int32)} if "pauses" in stored else {}
        return {
            "inputs": np.asarray(stored["inputs"]).astype(np.int32),
            "labels": labels,
            "weights": weights.astype(np.float32),
            **pauses,
        }
    if kind in ("set", "trajectory"):
        whole = ("labels", "sizes", "environment")
        return {name: np.asarray(x).astype(np.int32 if name in whole else np.float32) for name, x in stored.items()}
    inputs = np.asarray(stored["inputs"])
    picture = inputs.dtype == np.uint8 and kind != "frames"
    scaled = inputs.astype(np.float32) / np.float32(255) if picture else inputs
    return {
        "inputs": scaled.astype(np.float32, copy=False),
        "labels": np.asarray(stored["labels"]).astype(np.int32),
    }


class ArraySource:
    """A source over arrays in memory, stacked along the first axis, in stored (compact) form. A single example may be a
    view of them, and of those that `load` gives nothing can be written to."""

    def __init__(self, kind: str, arrays: Mapping[str, np.ndarray]):
        self.kind = kind
        self.arrays = dict(arrays)
        lengths = {name: len(array) for name, array in self.arrays.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"the arrays of a split must have one length, got {lengths}")
        self.length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        return finish(self.kind, {name: array[index] for name, array in self.arrays.items()})

    def gather(self, indices: np.ndarray) -> Example:
        """The examples at `indices`, stacked."""
        return finish(self.kind, {name: array[indices] for name, array in self.arrays.items()})


def gather(source: Source, indices: np.ndarray) -> Example:
    """The examples of any source at `indices`, stacked along a new first axis."""
    if hasattr(source, "gather"):
        return source.gather(np.asarray(indices))
    rows = [source[int(index)] for index in indices]
    return {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}
