"""The fields that every config has: their types and bounds, and what a stage may change. Imports no jax.

`config.model` also holds the settings of its network, which the network's constructor checks.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lissom.models.registry import nearest
from lissom.training.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
DURATIONS = ("steps", "epochs", "examples")
ORDERS = ("shuffled", "by_class")


class Field(NamedTuple):
    """`kind` is a type; a number lies in least..most, an entry of a list is of type `entry` and at least `least`."""

    kind: type
    least: float = -math.inf
    most: float = math.inf
    entry: type | None = None


TABLE = Field(Mapping)
TABLES = Field(Mapping, entry=Mapping)  # settings by the name that they belong to
FIELDS = {
    "recipe": Field(str),
    "seed": Field(int, 0, 2**32 - 1),
    "data.name": Field(str),
    "data.data_dir": Field(str),
    "data.batch_size": Field(int, 1),
    "data.augment": Field(tuple, entry=str),
    "data.order": Field(str),
    "data.classes_per_task": Field(int, 1),
    "data.task_steps": Field(int, 0),
    "data.replay": Field(float, 0, 1),
    "data.replay_size": Field(int, 0),
    "data.meta_tokens": Field(str),
    "data.meta_fraction": Field(float, 0),
    "data.kwargs": TABLES,
    "model.name": Field(str),
    "model.size": Field(str),
    "model.dtype": Field(str),
    "objective": Field(str),
    "objective_kwargs": TABLES,
    "transforms": Field(tuple, entry=Mapping),
    "optim.name": Field(str),
    "optim.optim_kwargs": TABLES,
    "optim.learning_rate": Field(float, 0),
    "optim.schedule": Field(str),
    "optim.warmup": Field(float, 0, 1),
    "optim.final_fraction": Field(float, 0, 1),
    "optim.weight_decay": Field(float, 0),
    "optim.decay": Field(str),
    "optim.clip_norm": Field(float, 0),
    "optim.accumulate": Field(int, 1),
    "train": TABLE,
    "stages": Field(tuple, entry=Mapping),
    "init_from": Field(tuple, entry=str),
    "mesh.data": Field(int, -1),
    "mesh.fsdp": Field(int, -1),
    "mesh.tensor": Field(int, -1),
    "mesh.sequence": Field(int, -1),
    "mesh.expert": Field(int, -1),
    "checkpoint.every": Field(int, 0),
    "checkpoint.keep": Field(int, 1),
    "log.every": Field(int, 1),
    "evaluation.every": Field(int, 0),
    "evaluation.batch_size": Field(int, 1),
    "evaluation.transforms": Field(tuple, entry=Mapping),
    "evaluation.data": Field(tuple, entry=Mapping),
    "evaluation.corruptions": Field(tuple, entry=str),
    "evaluation.severities": Field(tuple, 1, entry=int),
    "evaluation.latency_batches": Field(tuple, 1, entry=int),
    "evaluation.latency_repeats": Field(int, 2),
    "evaluation.decode_length": Field(int, 0),
    "evaluation.floor": Field(bool),
    "evaluation.baselines": Field(tuple, entry=str),
}
BY_CLASS = {"classes_per_task": 1, "task_steps": 0, "replay": 0, "replay_size": 0}  # what does nothing elsewhere
OPEN = ("model",)  # groups whose further fields are checked elsewhere
DURATION = {"steps": Field(int, 1), "epochs": Field(float, 0), "examples": Field(float, 0)}

STAGE = {
    "name": Field(str),
    "duration": Field(float, 0),
    "overrides": TABLE,
    "optimizer": Field(str),
    "schedule": Field(str),
    "converter": Field(str),
}
STAGE_CHOICES = {"optimizer": ("keep", "reset"), "schedule": ("run", "stage")}
# A run has one dataset, one mesh, one seed and one length: what a stage changes is the model and how it learns.
STAGE_MAY = ("model", "objective", "objective_kwargs", "transforms", "optim", "data.batch_size", "data.augment")

WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a name",
    tuple: "a list a,b,c",
    Mapping: "a table of settings",
}


def fits(value: Any, kind: type) -> bool:
    """Whether the value is of the type: whole numbers are numbers, lists are tuples, booleans are neither."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    if kind is tuple:
        return isinstance(value, tuple | list)
    return isinstance(value, Mapping | ConfigDict) if kind is Mapping else isinstance(value, kind)


def check_field(name: str, value: Any, field: Field) -> None:
    """One sentence where the value is of another type, or out of bounds."""
    if not fits(value, field.kind):
        raise UserError(f"{name}={_shown(value)} is not {WORDS[field.kind]}")
    if field.entry:
        for entry in value.values() if field.kind is Mapping else value:
            if not fits(entry, field.entry) or (field.entry is int and entry < field.least):
                bound = f" of at least {field.least:g}" if field.entry is int else ""
                raise UserError(f"{name} holds {_shown(entry)}, which is not {WORDS[field.entry]}{bound}")
    elif field.kind in (int, float) and not field.least <= value <= field.most:
        bound = f"at least {field.least:g}" if value < field.least else f"at most {field.most:g}"
        raise UserError(f"{name}={value} must be {bound}")


def check_fields(config: Mapping) -> None:
    """Every field of `FIELDS` is there and of its type, and no other field is, but for those of open groups."""
    groups = {name.rpartition(".")[0] for name in FIELDS} - {""}
    for group in sorted(groups):
        if group not in config:
            raise UserError(f"config.{group} is missing: recipes begin with configs.base.base()")
        check_field(f"config.{group}", config[group], TABLE)
    known: dict[str, list[str]] = {group: [] for group in ("", *groups)}
    for name, field in FIELDS.items():
        group, _, last = name.rpartition(".")
        known[group].append(last)
        node = config[group] if group else config
        if last not in node:
            raise UserError(f"config.{name} is missing: recipes begin with configs.base.base()")
        check_field(f"config.{name}", node[last], field)
    known[""] += groups
    for group, names in known.items():
        for name in config[group] if group else config:
            if name not in names and group not in OPEN:
                raise UserError(
                    f"config.{group + '.' if group else ''}{name} is a field that nothing reads{nearest(name, names)}"
                )
    _check_values(config)


def _check_values(config: Mapping) -> None:
    if config["model"]["dtype"] not in DTYPES:
        raise UserError(f"config.model.dtype={config['model']['dtype']!r} must be one of {', '.join(DTYPES)}")
    for name, value in config["model"].items():
        if name.endswith("_kwargs") and value is not None:
            check_field(f"config.model.{name}", value, TABLES)
    for name in ("mixer", "ffn", "norm"):
        value = config["model"].get(name)
        if value is not None and not isinstance(value, str):
            check_field(f"config.model.{name}", value, Field(tuple, entry=str))
    try:
        re.compile(config["optim"]["decay"])
    except re.error as error:
        raise UserError(f"config.optim.decay={config['optim']['decay']!r} is no pattern: {error}") from error
    given = list(config["train"])
    if len(given) != 1 or given[0] not in DURATION:
        raise UserError(f"config.train must have exactly one of {', '.join(DURATIONS)}, not {given or 'none'}")
    length = config["train"][given[0]]
    check_field(f"config.train.{given[0]}", length, DURATION[given[0]])
    if length <= 0:
        raise UserError(f"config.train.{given[0]}={length} must be over 0")
    for text in config["evaluation"]["baselines"]:
        if not all(text.partition(": ")):
            raise UserError(f"config.evaluation.baselines holds {text!r}: each is 'name: field=value field=value'")
    sizes = list(config["mesh"].values())
    if 0 in sizes or sizes.count(-1) > 1:
        raise UserError(f"config.mesh={dict(config['mesh'])}: sizes are positive, and one of them may be -1 (the rest)")
    _check_order(config["data"])
    batch, parts = config["data"]["batch_size"], config["optim"]["accumulate"]
    if batch % parts:
        raise UserError(f"config.data.batch_size={batch} must be a multiple of config.optim.accumulate={parts}")


def _check_order(data: Mapping) -> None:
    """The order of the training examples, and what goes with it."""
    if data["order"] not in ORDERS:
        raise UserError(
            f"config.data.order={data['order']!r} must be one of {', '.join(ORDERS)}{nearest(data['order'], ORDERS)}"
        )
    changed = [name for name, off in BY_CLASS.items() if data[name] != off]
    if data["order"] != "by_class" and changed:
        name = changed[0]
        raise UserError(f"config.data.{name}={data[name]} does nothing without config.data.order='by_class'")
    if (data["replay"] > 0) != (data["replay_size"] > 0):
        raise UserError(
            f"config.data.replay={data['replay']} (a share of each batch) and replay_size={data['replay_size']} "
            "(examples a class) must be set together: both 0, or both over it"
        )


def check_stage(number: int, entry: Mapping) -> None:
    """One entry of `config.stages`, before its overrides are applied."""
    where = f"config.stages[{number}]"
    for key, value in entry.items():
        if key not in STAGE:
            raise UserError(f"{where} has {key!r}: its fields are {', '.join(STAGE)}{nearest(key, STAGE)}")
        check_field(f"{where}.{key}", value, STAGE[key])
        if key in STAGE_CHOICES and value not in STAGE_CHOICES[key]:
            raise UserError(f"{where}.{key}={value!r} must be one of {', '.join(STAGE_CHOICES[key])}")
    if "duration" not in entry:
        raise UserError(f"{where} has no duration: a number of steps, or a fraction of the run")
    length = entry["duration"]
    if length <= 0 or (isinstance(length, float) and length > 1):
        raise UserError(f"{where}.duration={length} must be a number of steps from 1 on, or a fraction up to 1.0")
    for key in map(str, entry.get("overrides", {})):
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in STAGE_MAY):
            raise UserError(f"{where} overrides {key}: a stage may change {', '.join(STAGE_MAY)}")


def _shown(value: Any) -> str:
    return repr(value.to_dict() if hasattr(value, "to_dict") else value)[:80]
