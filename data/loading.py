"""`load`: a name or a path -> `Dataset`."""

import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from lissom.data import (
    cue_match,
    digits,
    domain_text,
    dynamics,
    gaussian_mixtures,
    glyphs,
    in_context,
    mnist1d,
    mnist5k,
    sequences,
    stdlib_text,
)
from lissom.data.content import Definition
from lissom.data.dataset import Dataset
from lissom.data.episodes import episodes, linear_tasks, regression_tasks
from lissom.data.errors import DataError, nearest, require
from lissom.data.events import moving_digits, pen_strokes
from lissom.data.events.files import is_recordings, load_recordings
from lissom.data.folders import load_folder
from lissom.data.preparation import prepared
from lissom.data.tfds import load_tfds

DATASETS = {
    "digits": Definition(digits.digits),
    "mnist5k": Definition(mnist5k.mnist5k),
    "mnist1d": Definition(mnist1d.mnist1d),
    "glyphs": Definition(glyphs.glyphs, version="1.1.0", facts=glyphs.facts),
    "cue_match": Definition(cue_match.cue_match),
    "dynamics": Definition(dynamics.dynamics),
    "gaussian_mixtures": Definition(gaussian_mixtures.gaussian_mixtures),
    "episodes": Definition(episodes, virtual=True),
    "regression_tasks": Definition(regression_tasks, virtual=True),
    "linear_tasks": Definition(linear_tasks, virtual=True),
    "in_context": Definition(in_context.in_context, virtual=True),
    "moving_digits": Definition(moving_digits.moving_digits),
    "pen_strokes": Definition(pen_strokes.pen_strokes, facts=pen_strokes.facts),
    "sequences": Definition(sequences.sequences, version="1.1.0", choice=("task", sequences.TASKS)),
    "domain_text": Definition(domain_text.domain_text, version="1.1.0", facts=domain_text.facts),
    "stdlib_text": Definition(stdlib_text.stdlib_text, facts=stdlib_text.facts),
}


def load(name: str, *, data_dir: str | None = None, **settings) -> Dataset:
    """The dataset of that name, prepared under `data_dir` on first use.

    name: one of `DATASETS`; `package.module:function` (a callable that takes the settings and returns a
    `Dataset`); a path of a folder of .npz arrays (see `folders.py`) or of recordings of events (`events/files.py`); any
    other name is a TFDS dataset, read from its prepared `array_record` directory (see `tfds.py`).
    data_dir: default the environment's TFDS_DATA_DIR, else ~/.cache/lissom/datasets.

    Raises `DataError`, one sentence, for what is missing or not understood.
    """
    if name in DATASETS:
        definition = DATASETS[name]
        complete = complete_settings(name, definition, settings)
        if definition.virtual:
            return definition.generate(functools.partial(load, data_dir=data_dir), **complete)
        return prepared(name, definition, complete, data_dir)
    if ":" in name and not Path(name).exists():
        return _plug_in(name, settings)
    if "/" in name or "\\" in name or name.startswith((".", "~")) or Path(name).is_dir():
        read = load_recordings if is_recordings(name) else load_folder
        defaults = keywords(read, skip=1)
        check(name, read, settings, skip=1)
        return read(name, **{key: typed(name, key, value, defaults[key]) for key, value in settings.items()})
    return load_tfds(name, data_dir, known=DATASETS, **check(name, load_tfds, settings, skip=3))


def complete_settings(name: str, definition: Definition, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with every default filled in; a setting that the dataset does not take is an error."""
    functions = [definition.generate]
    if definition.choice is not None:
        key, variants = definition.choice
        chosen = settings.get(key, inspect.signature(definition.generate).parameters[key].default)
        require(chosen in variants, f"{name} has no {key} {chosen!r}{nearest(chosen, variants)}")
        functions.append(variants[chosen])
        name = f"{name} ({key}={chosen})"
    defaults, optional = {}, set()
    for function in functions:
        defaults |= keywords(function, skip=1 if definition.virtual else 0)
        optional |= {key for key, p in inspect.signature(function).parameters.items() if _may_be_none(p.annotation)}
    unknown = [setting for setting in settings if setting not in defaults]
    if unknown:
        raise DataError(f"dataset {name} has no setting {unknown[0]!r}{nearest(unknown[0], defaults)}")
    given = {key: value for key, value in settings.items() if value is not None or key not in optional}
    absent = dict.fromkeys(settings.keys() - given.keys())
    return defaults | absent | {key: typed(name, key, value, defaults[key]) for key, value in given.items()}


def _may_be_none(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


def typed(name: str, key: str, value: Any, default: Any) -> Any:
    """The value, if it is of the default's type (an integer also passes for a float, a list for a tuple)."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, list | tuple):
        value = tuple(value)
    fits = default is None or type(value) is type(default)
    require(fits, f"dataset {name}: {key} is of type {type(default).__name__} (default {default!r}), got {value!r}")
    return value


def keywords(function: Callable, skip: int = 0) -> dict[str, Any]:
    """Named arguments of a function with their defaults, without the first `skip`."""
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}


def check(name: str, function: Callable, settings: dict[str, Any], skip: int) -> dict[str, Any]:
    """The settings, if the function takes all of them."""
    known = keywords(function, skip)
    for setting in settings:
        require(setting in known, f"dataset {name!r} has no setting {setting!r}{nearest(setting, known)}")
    return settings


def _plug_in(name: str, settings: dict[str, Any]) -> Dataset:
    module_name, _, attribute = name.partition(":")
    try:
        target = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise DataError(f"dataset {name!r} cannot be imported ({error})") from error
    parameters = inspect.signature(target).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        check(name, target, settings, skip=0)
    try:
        made = target(**settings)
    except TypeError as error:
        raise DataError(f"dataset {name!r} cannot be called with its settings ({error})") from error
    require(
        isinstance(made, Dataset),
        f"dataset {name!r} must return a lissom.data.Dataset, got {type(made).__name__}",
    )
    return made
