"""`domain_text`: six kinds of text over one alphabet, in which every symbol is as frequent in each of them.

    python        source of the standard library (the modules of `stdlib_text`)
    c             headers of the interpreter (`Python.h` and what lies beside it)
    english       the topics of Python's help (`pydoc_data.topics`)
    json          one record a character of Unicode (`unicodedata`)
    arithmetic    sums, differences and products of drawn numbers, a line each
    brackets      drawn words of three kinds of brackets, each of which is closed, a line each

Texts of two kinds differ by their bytes alone, so that a router could tell them apart without reading. Therefore the
histogram of every domain is equalised, as that of an image: with F the cumulated frequencies of the bytes in the
domain's training text, byte b becomes

    symbol = floor(levels x u),    u drawn evenly from F(b - 1) .. F(b)

so a frequent byte has several symbols (a homophonic cipher), rare ones share one, and every symbol of the training text
has the frequency 1 / levels in every domain, up to the draw. What tells domains apart is which symbols follow which. No
model can know the draw: a domain's loss is at least `info["drawn_nats"]`, the entropy of a symbol given the domain and
the byte.

Texts are divided by pieces, each of which is there once: a module, a paragraph of a header or of a topic, a character's
record. Within them words recur, as everywhere: field names of records, short sums.
"""

import itertools
import json
import platform
import sysconfig
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lissom.data.content import Content
from lissom.data.errors import nearest, require
from lissom.data.stdlib_text import TEST_MODULES, TRAIN_MODULES, module_bytes, windows

TEST_SHARE = 0.1  # of the headers, topics and characters


def domain_text(
    *,
    length: int = 128,
    levels: int = 64,
    train_size: int = 2700,
    test_size: int = 256,
    domains: tuple[str, ...] = ("python", "c", "english", "json", "arithmetic", "brackets"),
    tested: str = "",
    seed: int = 0,
) -> Content:
    """Windows of T = length symbols of one domain each: `train_size` and `test_size` windows a domain, of pieces
    of text that the two splits have of their own; windows of the domains take turns. Labels are the inputs shifted by
    one; every position scores. `domains` float32 [D] is one-hot: the domain, for what is counted of a network, not for
    the network. `tested` names the one domain of which the test set is then; the training set and the alphabet stay the
    same.
    """
    check_domains("domain_text", domains, tested)
    require(length >= 1, f"domain_text: length must be at least 1, got {length}")
    require(2 <= levels <= 256, f"domain_text: levels must be in 2..256, got {levels}")
    require(train_size >= 1 and test_size >= 1, f"domain_text: sizes must be at least 1, got {train_size}, {test_size}")
    splits = {"train": train_size, "test": test_size}
    found = {split: {} for split in splits}
    drawn = {}
    for name in domains:
        lengths = tuple(size * length + 1 for size in splits.values())
        texts = texts_of(name, seed, lengths)
        for split, text, wanted in zip(splits, texts, lengths, strict=True):
            require(
                len(text) >= wanted,
                f"domain_text: the {split} text of {name!r} holds {(len(text) - 1) // length} windows of {length}, and "
                f"{split}_size={splits[split]} asks for more",
            )
        texts = tuple(text[:wanted] for text, wanted in zip(texts, lengths, strict=True))
        frequencies = np.bincount(texts[0], minlength=256) / len(texts[0])
        drawn[name] = drawn_nats(frequencies, levels)
        for stream, split in enumerate(splits):
            if split == "train" or tested in ("", name):
                symbols = equalized(texts[stream], frequencies, levels, _rng(name, seed, 2 + stream))
                found[split][name] = windows(symbols.tobytes(), length)
    train, test = (by_turns(of_split, domains) for of_split in found.values())
    info = {
        "vocab_size": levels,
        "chance": 1 / levels,
        "domains": list(domains),
        "drawn_nats": {tested: drawn[tested]} if tested else drawn,
        "python": platform.python_version(),
    }
    return Content(kind="tokens", train=train, test=test, info=info)


def check_domains(dataset: str, domains: Sequence[str], tested: str) -> None:
    """DataError, in the name of the dataset, for domains that there are not, and for fewer than two."""
    for name in domains:
        require(name in TEXTS, f"{dataset}: there is no domain {name!r}{nearest(name, TEXTS)}")
    require(len(set(domains)) == len(domains) >= 2, f"{dataset}: domains must be two or more, got {domains}")
    require(tested in ("", *domains), f"{dataset}: tested must be one of {', '.join(domains)}, got {tested!r}")


def texts_of(name: str, seed: int, lengths: tuple[int, int]) -> "Texts":
    """The bytes uint8 [N] of a domain's training and test text; of those that are generated so many."""
    return TEXTS[name]((_rng(name, seed, 0), _rng(name, seed, 1)), lengths)


def by_turns(windows: Mapping[str, np.ndarray], domains: Sequence[str]) -> dict[str, np.ndarray]:
    """{domain: windows [N, T + 1]} -> the fields `text`, the first window of each, then the second of each, ..., and
    `domains`, one-hot."""
    one_hot = np.eye(len(domains), dtype=np.uint8)
    kinds = [np.tile(one_hot[domains.index(name)], (len(rows), 1)) for name, rows in windows.items()]
    in_turns = lambda arrays: np.stack(arrays, 1).reshape(-1, *arrays[0].shape[1:])
    return {"text": in_turns(list(windows.values())), "domains": in_turns(kinds)}


def _rng(name: str, seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, list(TEXTS).index(name), stream])


def equalized(text: np.ndarray, frequencies: np.ndarray, levels: int, rng: np.random.Generator) -> np.ndarray:
    """Bytes [N] -> symbols uint8 [N], as this module says; `frequencies` [256] sum to 1."""
    ends = np.cumsum(frequencies)
    u = ends[text] - frequencies[text] * rng.random(len(text))
    return np.clip(np.floor(levels * u), 0, levels - 1).astype(np.uint8)


def drawn_nats(frequencies: np.ndarray, levels: int) -> float:
    """Mean over bytes of the entropy of a symbol given its byte (nats): the symbols' shares of the byte's interval."""
    ends = np.cumsum(frequencies)
    cuts = np.unique(np.concatenate([[0.0], ends, np.arange(1, levels + 1) / levels]).clip(0, 1))
    # Every piece between cuts is of one byte and one symbol.
    pieces = np.diff(cuts)
    owners = np.searchsorted(ends, (cuts[1:] + cuts[:-1]) / 2).clip(0, 255)
    kept = pieces > 1e-15
    return float(-(pieces[kept] * np.log(pieces[kept] / frequencies[owners[kept]])).sum())


def facts() -> dict[str, str]:
    """What the text depends on besides its settings."""
    return {"python": platform.python_version()}


Rngs = tuple[np.random.Generator, np.random.Generator]
Texts = tuple[np.ndarray, np.ndarray]


def python_text(rngs: Rngs, lengths: tuple[int, int]) -> Texts:
    del rngs, lengths
    return _bytes(module_bytes(TRAIN_MODULES)), _bytes(module_bytes(TEST_MODULES))


def c_text(rngs: Rngs, lengths: tuple[int, int]) -> Texts:
    del rngs, lengths
    folder = Path(sysconfig.get_path("include"))
    headers = [part for path in sorted(folder.rglob("*.h")) for part in path.read_bytes().split(b"\n\n")]
    require(
        len(headers) >= 100,
        f"domain_text: domain 'c' is the headers of Python, and {folder} has none; install them (on Debian "
        "python3-dev), or leave it out of `domains`",
    )
    return _divided(headers)


def english_text(rngs: Rngs, lengths: tuple[int, int]) -> Texts:
    del rngs, lengths
    from pydoc_data.topics import topics

    # Topics repeat whole sections of each other.
    return _divided([part.encode() for name in sorted(topics) for part in topics[name].split("\n\n")])


def json_text(rngs: Rngs, lengths: tuple[int, int]) -> Texts:
    del rngs
    # Records have some 150 bytes, and a tenth of them is for the test.
    wanted = 100 + sum(lengths) // 100 + lengths[1] // 10
    named = (number for number in itertools.count(32) if unicodedata.name(chr(number), ""))
    return _divided([json.dumps(_record(chr(number))).encode() for number in itertools.islice(named, wanted)])


def _record(letter: str) -> dict:
    return {
        "code": f"U+{ord(letter):04X}",
        "name": unicodedata.name(letter),
        "category": unicodedata.category(letter),
        "bidirectional": unicodedata.bidirectional(letter),
        "combining": unicodedata.combining(letter),
        "mirrored": bool(unicodedata.mirrored(letter)),
        "decomposition": unicodedata.decomposition(letter).split() or None,
        "value": unicodedata.numeric(letter, None),
    }


def arithmetic_text(rngs: Rngs, lengths: tuple[int, int]) -> Texts:
    """a + b, a - b, a * b = result, numbers of one to three digits."""

    def lines(rng: np.random.Generator, length: int) -> str:
        # A line has at least "1+1=2" and its end.
        count = length // 6 + 1
        a, b = (rng.integers(0, 10 ** rng.integers(1, 4, count)) for _ in range(2))
        signs = rng.integers(0, 3, count)
        results = np.select([signs == 0, signs == 1], [a + b, a - b], a * b)
        return "".join(f"{x}{'+-*'[s]}{y}={r}\n" for x, s, y, r in zip(a, signs, b, results, strict=True))

    return _generated(lines, rngs, lengths)


def brackets_text(rngs: Rngs, lengths: tuple[int, int]) -> Texts:
    """A word opens or closes evenly, at most 8 deep, and ends where nothing is open, from 16 brackets on."""

    def lines(rng: np.random.Generator, length: int) -> str:
        draws = zip(rng.random(2 * length).tolist(), rng.integers(0, 3, 2 * length).tolist(), strict=True)
        text, opened, begun = [], [], 0
        for chance, kind in draws:
            if not opened and len(text) - begun >= 16:
                text.append("\n")
                begun = len(text)
            if opened and (len(opened) == 8 or chance < 0.5):
                text.append(")]}"[opened.pop()])
            else:
                opened.append(kind)
                text.append("([{"[kind])
        return "".join(text)

    return _generated(lines, rngs, lengths)


def _generated(lines: Callable[[np.random.Generator, int], str], rngs: Rngs, lengths: tuple[int, int]) -> Texts:
    return tuple(_bytes(lines(rng, length).encode()) for rng, length in zip(rngs, lengths, strict=True))


def _divided(pieces: list[bytes]) -> Texts:
    """A piece, each once, goes to the test text where that holds less than its share of the bytes so far, else to the
    training text; a line between them."""
    parts, whole = ([], []), 0
    held = 0
    for piece in dict.fromkeys(pieces):
        whole += len(piece)
        tested = held + len(piece) <= TEST_SHARE * whole
        held += len(piece) * tested
        parts[tested].append(piece)
    return tuple(_bytes(b"\n".join(part)) for part in parts)


def _bytes(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)


TEXTS = {
    "python": python_text,
    "c": c_text,
    "english": english_text,
    "json": json_text,
    "arithmetic": arithmetic_text,
    "brackets": brackets_text,
}
