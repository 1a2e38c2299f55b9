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

    measured: by a clock or a counter, on the machine of the row (what training cost: on the machine that
    trained). compiled: read from the compiler's plan.
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
    """Where numbers came from; None is unknown. `hardware`: see `hardware()`; `versions`: package to
    version; `data`: {"sha256": ...} of the data's bytes, where its dataset tells.
    """

    commit: str | None = None
    dirty: bool | None = None
    hardware: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    date: str | None = None
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """`provenance` is that of the measurement. `trained` is that of the training, where anything but the date was
    another then (None: the same, or nothing was trained). `notes` are sentences that a reader of the table needs.
    """

    identity: Identity
    provenance: Provenance
    measurements: tuple[Measurement, ...]
    trained: Provenance | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "measurements", tuple(self.measurements))
        object.__setattr__(self, "notes", tuple(self.notes))


# ---- JSON lines --------------------------------------------------------------------------------------------


def to_json(row: Row) -> str:
    """One line of JSON without a line break."""
    return json.dumps(dataclasses.asdict(row), allow_nan=False, ensure_ascii=False)


def from_json(line: str) -> Row:
    """The inverse of `to_json`; unknown fields and unknown metric names are errors. Rows written before there were
    `trained`, `notes` and the `data` of a provenance lack them.
    """
    data = json.loads(line)
    data["identity"] = Identity(**data["identity"])
    data["provenance"] = Provenance(**data["provenance"])
    data["measurements"] = tuple(Measurement(**entry) for entry in data["measurements"])
    if data.get("trained") is not None:
        data["trained"] = Provenance(**data["trained"])
    return Row(**data)


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


def provenance_of(data: Mapping[str, object]) -> Provenance:
    """What `dataclasses.asdict` made of a provenance; a ValueError where it is none."""
    try:
        found = Provenance(**data)
        machine_name(found.hardware), dict(found.versions), dict(found.data)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"it is no provenance ({error})") from error
    return found


def machine_name(hardware: Mapping[str, object]) -> str:
    """The hardware of a row in a few words, "unknown machine" where the row does not say."""
    if hardware.get("accelerator"):
        return f"{hardware.get('accelerators') or '?'} x {hardware['accelerator']}"
    if not hardware.get("cpu"):
        return "unknown machine"
    cores = hardware.get("cores") or "?"
    return f"{hardware['cpu']}, {cores} core{'' if cores == 1 else 's'}"


def elsewhere(trained: Provenance, measured: Provenance) -> Provenance | None:
    """`trained`, unless it differs from `measured` in nothing but the date."""
    return None if dataclasses.replace(trained, date=measured.date) == measured else trained


def trained_note(row: Row) -> str | None:
    """In which ways the training of a row was done elsewhere than its measurement; None where it was not."""
    then, now = row.trained, row.provenance
    if then is None:
        return None
    words = []
    if (then.commit, then.dirty) != (now.commit, now.dirty):
        words.append(f"at commit {commit_name(then)} (measured at {commit_name(now)})")
    if then.hardware != now.hardware:
        name = machine_name(then.hardware)
        words.append(f"on another {name}" if name == machine_name(now.hardware) else f"on {name}")
    versions = {
        name: f"{name} {then.versions.get(name) or 'unknown'} (measured with {now.versions.get(name) or 'unknown'})"
        for name in sorted({*then.versions, *now.versions})
        if then.versions.get(name) != now.versions.get(name)
    }
    if versions:
        words.append(f"with {', '.join(versions.values())}")
    if then.data != now.data:
        words.append(f"on data of {data_name(then)} (measured on {data_name(now)})")
    return f"trained {', '.join(words)}" if words else None


def commit_name(found: Provenance) -> str:
    """Nine letters of the commit, and whether the sources differed from it."""
    if not found.commit:
        return "unknown"
    return found.commit[:9] + (" with changes" if found.dirty else "")


def data_name(found: Provenance) -> str:
    """The checksum of the data in short."""
    return f"sha256 {found.data['sha256'][:9]}" if found.data.get("sha256") else "unknown sha256"


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
