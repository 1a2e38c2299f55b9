"""The one error of this room: a sentence for the person who asked for data that cannot be had."""

import difflib
from collections.abc import Iterable


class DataError(ValueError):
    """One sentence: what is wrong with the request for data, and what is allowed or how to prepare it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'? known: a, b, x"`: the tail of a sentence about an unknown name."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    guess = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{guess} known: {', '.join(known) or 'none'}"


def require(condition: bool, sentence: str) -> None:
    """Raise `DataError(sentence)` unless the condition holds."""
    if not condition:
        raise DataError(sentence)
