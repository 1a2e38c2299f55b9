"""Text in the tokens of a pretrained checkpoint: `lissom.training.pretrained_text:stdlib_tokens` in a recipe, or
`...:domain_tokens`.

It stands here since `data` may not import the tokenizers of `models`."""

import functools
import hashlib
from typing import Any

import numpy as np

from lissom.data import Dataset
from lissom.data.dataset import ArraySource
from lissom.data.domain_text import by_turns, check_domains, texts_of
from lissom.data.errors import DataError, require
from lissom.data.stdlib_text import TEST_MODULES, TRAIN_MODULES, module_bytes
from lissom.models.pretrained import read
from lissom.models.pretrained.errors import CheckpointError

LONGEST = 16  # bytes of text that are encoded for a token that is wanted


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
        sources[split] = ArraySource("tokens", {"text": _windows(tokens, starts, length)})
        found[f"{split}_examples"] = len(starts)
    digest = hashlib.sha256(module_bytes(TRAIN_MODULES) + module_bytes(TEST_MODULES)).hexdigest()
    info = {"vocab_size": vocab_size, "input_shape": (length,), "sha256": digest, **found}
    return Dataset("stdlib_tokens", "tokens", sources["train"], sources["test"], info)


def domain_tokens(
    *,
    checkpoint: str = "smollm2",
    length: int = 128,
    train_windows: int = 500,
    test_windows: int = 48,
    domains: tuple[str, ...] = ("python", "english"),
    tested: str = "",
    seed: int = 0,
) -> Dataset:
    """Kinds of text (`data/domain_text.py` has them; here their bytes are as they are) in the tokens of a checkpoint's
    tokenizer: of each domain the first windows of `length` of its training and of its test text, the domains by turns.
    `domains` float32 [D] is one-hot, and `tested` names the one domain of which the test set is then; every position
    scores. Losses are nats a token, so they compare models of one tokenizer only.
    """
    check_domains("domain_tokens", domains, tested)
    counts = {"length": length, "train_windows": train_windows, "test_windows": test_windows}
    for name, count in counts.items():
        require(count >= 1, f"domain_tokens: {name} must be at least 1, got {count}")
    splits = {"train": train_windows, "test": test_windows}
    found, digest = {split: {} for split in splits}, hashlib.sha256()
    tokenizer, vocab_size = _tokenizer(checkpoint, "domain_tokens")
    lengths = tuple(LONGEST * (count * length + 1) for count in splits.values())
    for domain in domains:
        texts = texts_of(domain, seed, lengths)
        for (split, count), text, most in zip(splits.items(), texts, lengths, strict=True):
            part = bytes(text[:most])
            tokens = np.asarray(tokenizer.encode(part.decode(errors="replace"), ends=False), np.int32)
            require(
                len(tokens) > count * length,
                f"domain_tokens: the {split} text of {domain!r} holds {(len(tokens) - 1) // length} windows of "
                f"{length}, and {split}_windows={count} asks for more",
            )
            digest.update(tokens[: count * length + 1].tobytes())
            if split == "train" or tested in ("", domain):
                found[split][domain] = _windows(tokens, np.arange(count) * length, length)
    sources = {split: ArraySource("tokens", by_turns(windows, domains)) for split, windows in found.items()}
    info = {
        "vocab_size": vocab_size,
        "input_shape": (length,),
        "domains": list(domains),
        "sha256": digest.hexdigest(),
        **{f"{split}_examples": len(source) for split, source in sources.items()},
    }
    return Dataset("domain_tokens", "tokens", sources["train"], sources["test"], info)


def _windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """[starts, length + 1]."""
    return tokens[starts[:, None] + np.arange(length + 1)]


@functools.cache
def module_tokens(checkpoint: str, modules: tuple[str, ...]) -> tuple[np.ndarray, int]:
    """(int32 tokens of the modules' sources one behind the other, the size of the vocabulary)."""
    tokenizer, vocab_size = _tokenizer(checkpoint, "stdlib_tokens")
    pieces = [tokenizer.encode(module_bytes((name,)).decode(errors="replace"), ends=False) for name in modules]
    return np.concatenate([np.asarray(piece, np.int32) for piece in pieces]), vocab_size


def _tokenizer(checkpoint: str, dataset: str) -> tuple[Any, int]:
    """(tokenizer, size of the vocabulary); DataError names the dataset that asks."""
    try:
        found = read(checkpoint)
        tokenizer = found.tokenizer()
    except CheckpointError as error:
        raise DataError(f"{dataset}: {error}") from error
    require(tokenizer is not None, f"{dataset}: the checkpoint {checkpoint} has no tokenizer that is understood")
    return tokenizer, found.settings.vocab_size
