"""Text in the tokens of a pretrained checkpoint: `lissom.training.pretrained_text:stdlib_tokens` in a recipe.

It stands here since `data` may not import the tokenizers of `models`."""

import functools
import hashlib

import numpy as np

from lissom.data import Dataset
from lissom.data.dataset import ArraySource
from lissom.data.errors import DataError, require
from lissom.data.stdlib_text import TEST_MODULES, TRAIN_MODULES, module_bytes
from lissom.models.pretrained import read
from lissom.models.pretrained.errors import CheckpointError


def stdlib_tokens(*, checkpoint: str = "smollm2", length: int = 512, test_windows: int = 0) -> Dataset:
    """`stdlib_text` (the sources of Python's standard library; held-out modules are the test) in the tokens of a
    checkpoint's tokenizer, in windows of `length` that follow one another; every position scores.

    checkpoint: as `models.pretrained.load` takes it. test_windows: so many windows of the test text, evenly spaced
    (0: all). Losses are nats a token, so they compare models of one tokenizer only.
    """
    require(length >= 1, f"stdlib_tokens: length must be at least 1, got {length}")
    require(test_windows >= 0, f"stdlib_tokens: test_windows must be at least 0, got {test_windows}")
    found, sources, vocab_size = {}, {}, 0
    for split, modules in (("train", TRAIN_MODULES), ("test", TEST_MODULES)):
        tokens, vocab_size = module_tokens(checkpoint, modules)
        count = (len(tokens) - 1) // length
        require(count > 0, f"stdlib_tokens: length={length} is longer than the {split} text ({len(tokens)} tokens)")
        starts = np.arange(count) * length
        if split == "test" and test_windows:
            require(test_windows <= count, f"stdlib_tokens: test_windows={test_windows}, and there are {count}")
            starts = starts[np.linspace(0, count - 1, test_windows).astype(int)]
        found[f"{split}_tokens"] = len(tokens)
        sources[split] = ArraySource("tokens", {"text": tokens[starts[:, None] + np.arange(length + 1)]})
        found[f"{split}_examples"] = len(starts)
    digest = hashlib.sha256(module_bytes(TRAIN_MODULES) + module_bytes(TEST_MODULES)).hexdigest()
    info = {"vocab_size": vocab_size, "input_shape": (length,), "sha256": digest, **found}
    return Dataset("stdlib_tokens", "tokens", sources["train"], sources["test"], info)


@functools.cache
def module_tokens(checkpoint: str, modules: tuple[str, ...]) -> tuple[np.ndarray, int]:
    """(int32 tokens of the modules' sources one behind the other, the size of the vocabulary)."""
    try:
        found = read(checkpoint)
        tokenizer = found.tokenizer()
    except CheckpointError as error:
        raise DataError(f"stdlib_tokens: {error}") from error
    require(tokenizer is not None, f"stdlib_tokens: the checkpoint {checkpoint} has no tokenizer that is understood")
    pieces = [tokenizer.encode(module_bytes((name,)).decode(errors="replace"), ends=False) for name in modules]
    return np.concatenate([np.asarray(piece, np.int32) for piece in pieces]), found.settings.vocab_size
