"""Rows: what one run x one transform x one seed gave, with where it came from, kept as JSON lines.

Unknown is None (null), never 0; NaN and infinities are refused. Means and intervals are made when a table is
rendered (`tables.py`), so a row holds single numbers only.
"""

import dataclasses
import datetime
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lissom.evaluation import metrics

KINDS = ("measured", "compiled", "modelled", "simulated")
ROLES = ("variant", "floor", "ceiling")
PACKAGES = ("lissom", "jax", "jaxlib", "flax", "optax", "numpy")


@dataclass(frozen=True)
class Measurement:
    """`value` (in `unit`, or None when unknown) of the metric `name`, obtained as `kind` says.

    measured: by a clock or a counter, on the machine of the row. compiled: read from the compiler's plan.
    modelled: from a formula or cost model. simulated: the arithmetic was imitated (fake quantization, masks),
    not run. `conditions` (batch, length, precision, ...) are part of what the number means: measurements
    under different conditions never share a column.
    """

    name: str
    value: float | int | None
    unit: str
    kind: str = "measured"
    conditions: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    def __post_init__(self):
        unit = metrics.metric(self.name).unit
        if self.unit != unit:
            raise ValueError(f"{self.name} is kept in {unit!r}, not in {self.unit!r}")
        if self.kind not in KINDS:
            raise ValueError(f"a measurement is one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.value is not None:
            if isinstance(self.value, bool) or not isinstance(self.value, int | float):
                raise TypeError(f"{self.name} must be a Python number or None, not {type(self.value).__name__}")
            if not math.isfinite(self.value):
                raise ValueError(f"{self.name} is {self.value}: a row holds finite numbers, or None for unknown")
        for key, value in self.conditions.items():
            if not isinstance(value, str | int | float | bool):
                raise TypeError(f"condition {key} of {self.name} must be a string or a number, not {value!r}")


def measure(name: str, value, kind: str = "measured", **conditions) -> Measurement:
    """A `Measurement` with its unit from `METRICS`; numpy and jax scalars become Python numbers."""
    if hasattr(value, "item"):
        value = value.item()
    return Measurement(name, value, metrics.metric(name).unit, kind, conditions)


@dataclass(frozen=True)
class Identity:
    """Which run, as a reader would name it. Rows that differ in `seed` only are one line of a table.

    `variant` is the label in tables (default: recipe and overrides), `transform` the evaluation transform
    (None: the model as trained), `role` sets trivial methods ("floor") and oracles ("ceiling") apart.
    """

    recipe: str
    task: str
    seed: int | None = None
    overrides: Mapping[str, object] = field(default_factory=dict)
    transform: str | None = None
    variant: str | None = None
    role: str = "variant"

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"a row's role is one of {', '.join(ROLES)}, not {self.role!r}")
        if not self.task:
            raise ValueError("a row needs a task: tables are of one task each")

    @property
    def label(self) -> str:
        """`variant`, or the recipe followed by its overrides."""
        if self.variant:
            return self.variant
        return " ".join([self.recipe, *(f"{key}={value}" for key, value in self.overrides.items())])


@dataclass(frozen=True)
class Provenance:
    """Where a row came from; None is unknown. `hardware`: see `hardware()`; `versions`: package to
    version.
    """

    commit: str | None = None
    dirty: bool | None = None
    hardware: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    date: str | None = None


@dataclass(frozen=True)
class Row:
    identity: Identity
    provenance: Provenance
    measurements: tuple[Measurement, ...]

    def __post_init__(self):
        object.__setattr__(self, "measurements", tuple(self.measurements))


# ---- JSON lines --------------------------------------------------------------------------------------------


def to_json(row: Row) -> str:
    """One line of JSON without a line break."""
    return json.dumps(dataclasses.asdict(row), allow_nan=False, ensure_ascii=False)


def from_json(line: str) -> Row:
    """The inverse of `to_json`; unknown fields and unknown metric names are errors."""
    data = json.loads(line)
    measurements = tuple(Measurement(**entry) for entry in data["measurements"])
    return Row(Identity(**data["identity"]), Provenance(**data["provenance"]), measurements)


def read_rows(path: str | os.PathLike) -> list[Row]:
    """All rows of a JSON-lines file; a line that is no row is a ValueError with the file and the line
    number.
    """
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(from_json(line))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {number}, is not a row: {error}") from error
    return rows


def write_rows(path: str | os.PathLike, rows: Iterable[Row]) -> None:
    """Replaces the file as a whole: a reader sees the old or the new one, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(to_json(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def append_row(path: str | os.PathLike, row: Row) -> None:
    """Adds one line, whole or not at all, also when several processes append to the same file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (to_json(row) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        before = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, line)
        except OSError:
            os.ftruncate(descriptor, before)
            raise
        if written != len(line):  # a disk that fills takes what fits
            os.ftruncate(descriptor, before)
            raise OSError(f"only {written} of {len(line)} bytes fitted at the end of {path}: the row was taken back")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- provenance --------------------------------------------------------------------------------------------


def provenance(directory: str | os.PathLike | None = None) -> Provenance:
    """Commit and dirty flag of the code in `directory` (default: where this package lies), machine, versions,
    date.
    """
    commit, dirty = git_state(directory or Path(__file__).resolve().parent.parent)
    versions = {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Provenance(commit, dirty, hardware(), versions, date)


def git_state(directory: str | os.PathLike) -> tuple[str | None, bool | None]:
    """(commit, dirty) of the sources in `directory`, (None, None) where git does not track them.

    Dirty means: a Python file or pyproject.toml differs from the commit or is new. Results and notes do not
    count, since writing a table must not make the next row look as if its code were unknown.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True)
        except FileNotFoundError:  # a machine without git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside some other project's repository, whose commit says nothing about this
    # code.
    if not git("ls-files", "*.py"):
        return None, None
    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=all", "--", "*.py", "pyproject.toml")
    return commit, None if commit is None or changes is None else bool(changes)


def package_version(name: str) -> str | None:
    """The installed version, or None where the package is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware() -> dict[str, str | int | None]:
    """CPU model, cores this process may use, memory; accelerator kind and count, both None on a CPU
    backend.
    """
    import jax  # here, so that reading and rendering rows does not wait for jax
    import psutil

    devices = jax.devices()
    accelerated = devices[0].platform != "cpu"
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerator": devices[0].device_kind if accelerated else None,
        "accelerators": len(devices) if accelerated else None,
    }


def cpu_model() -> str | None:
    """The model name as Linux tells it, else what the platform module knows, else None."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except FileNotFoundError:  # not Linux
        pass
    return platform.processor() or None
