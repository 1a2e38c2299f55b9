"""Bounds of settings: a value that no network can have is one sentence from the constructor that takes it.

`where` is the table of the config that the setting stands in: "model", "mixer", "ffn".
"""

from collections.abc import Sequence
from typing import Any


class UnsupportedForm(ValueError):
    """What a layer is called for and has no form of: another mask, a grid, more tokens. The choice of a config, so the
    training step says it in one sentence."""


def at_least_one(where: str, **settings: int | Sequence[int] | None) -> None:
    """Raises ValueError for a number below 1, and for a sequence that is empty or has one. None passes."""
    for name, value in settings.items():
        if isinstance(value, Sequence):
            if not value or min(value) < 1:
                raise _out_of_bounds(where, name, tuple(value), "hold one number or more, each at least 1")
        elif value is not None and value < 1:
            raise _out_of_bounds(where, name, value, "be at least 1")


def rate(where: str, **settings: float) -> None:
    """Raises ValueError for a probability of dropping that is negative, or that leaves nothing (1 and above)."""
    for name, value in settings.items():
        if not 0 <= value < 1:
            raise _out_of_bounds(where, name, value, "be at least 0 and below 1")


def shape_of(model: str, input_shape: Sequence[int], names: str) -> tuple[int, ...]:
    """The shape of an example, where it has as many axes as the model reads; `names` are theirs."""
    if len(input_shape) != len(names.split(", ")):
        raise ValueError(f"the model {model} reads examples [{names}], and those of the data are {list(input_shape)}")
    return tuple(input_shape)


def _out_of_bounds(where: str, name: str, value: Any, bound: str) -> ValueError:
    return ValueError(f"{where}.{name}={value!r} must {bound}")
