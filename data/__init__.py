"""Datasets and input pipelines. `load` a name, then `train_batches` and `eval_batches`."""

from lissom.data.augmentations import AUGMENTATIONS
from lissom.data.class_stream import ClassStream
from lissom.data.corruptions import corrupted
from lissom.data.dataset import ArraySource, Dataset
from lissom.data.episodes import single_examples
from lissom.data.errors import DataError
from lissom.data.loading import DATASETS, load
from lissom.data.meta_tokens import with_meta_tokens
from lissom.data.pipelines import eval_batches, train_batch, train_batches

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "ArraySource",
    "ClassStream",
    "DataError",
    "Dataset",
    "corrupted",
    "eval_batches",
    "load",
    "single_examples",
    "train_batch",
    "train_batches",
    "with_meta_tokens",
]
