"""What a dataset's own file returns: its arrays and facts, before they are written to disk."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Content:
    """Arrays of both splits in stored form (see `dataset.finish`), and JSON-able facts for `Dataset.info`."""

    kind: str
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Definition:
    """How a dataset is made. The keyword arguments of `generate` are the dataset's settings.

    `version` is raised whenever the code changes what `generate` returns. `facts()` names what else the
    content depends on (the patch version of Python, of Pillow). Settings, version and facts together name the
    prepared directory, so that a stale one is never read. `choice` is (setting, its values): the chosen
    function's keyword arguments are settings too.

    A `virtual` dataset is not written to disk: its examples are made when they are asked for, and `generate(load,
    **settings)` returns a `Dataset`; `load(name, **settings)` gives it others that it is made of.
    """

    generate: Callable[..., Any]
    version: str = "1.0.0"
    facts: Callable[[], dict[str, Any]] = dict
    choice: tuple[str, dict[str, Callable[..., Content]]] | None = None
    virtual: bool = False
