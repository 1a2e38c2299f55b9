"""What a benchmark entry yields: a problem, with everything that is needed to check, time and judge it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from lissom.evaluation.ceilings import Work


def this_platform() -> str:
    """Of this process, as ops name it: "cpu", "cuda", "tpu"."""
    return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


@dataclass(frozen=True)
class InProcess:
    """A reference in jax. `run` takes what `prepare` (untimed: layouts) makes of the inputs, which lie on the device.

    `same`: False for what solves another problem on the same inputs (a mask left out), which no gate checks."""

    run: Callable[..., Any]
    prepare: Callable[..., tuple] = lambda *inputs: inputs
    same: bool = True


@dataclass(frozen=True)
class InWorker:
    """A reference that scripts/reference_worker.py runs: a name of its `CASES` and the options of that case.

    The harness adds the option "device"."""

    case: str
    options: Mapping[str, Any] = field(default_factory=dict)
    same: bool = True


@dataclass(frozen=True)
class Oracle:
    """What is right. The results of the very program that is timed are compared, on input set 0.

    `compute(inputs, dtype)`: the op's reference in that dtype, on the part of the results that is checked.
    `part(results)`: that part of a candidate's results. `note`: which part, where it is not the whole.
    """

    compute: Callable[[tuple[np.ndarray, ...], Any], list[np.ndarray]]
    part: Callable[[Any], list[np.ndarray]]
    note: str | None = None


@dataclass(frozen=True)
class Problem:
    """One shape of one op.

    `name` is unique in the op; `setting` says what it is ({"batch": 1, "length": 4096, "dtype": "float32", ...}).
    `make_inputs(key)`: one set of inputs, independent and iid normal. `ours(implementation)`: the function of
    these that is timed, where the implementation has that name (None: what the platform takes by default).
    `implementations`: those to time. `references`: name -> how to run it; it gets the same inputs.

    `walks`: implementation -> how often it reads or writes all of the data in main memory, by its algorithm.

    Problems of one `family` are timed in turns with each other, and their times are compared over `size`.
    """

    op: str
    name: str
    setting: Mapping[str, str | int | float | bool]
    make_inputs: Callable[[jax.Array], tuple[jax.Array, ...]]
    ours: Callable[[str | None], Callable[..., Any]]
    implementations: tuple[str, ...]
    references: Mapping[str, InProcess | InWorker]
    work: Work
    oracle: Oracle
    family: str | None = None
    size: int | None = None
    walks: Mapping[str, int] = field(default_factory=dict)
