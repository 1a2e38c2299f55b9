"""Recipes and overrides: the one loader. It does not import jax: a mistake is answered in a fraction of a second.

--config=configs/vision/digits_vit.py[:mode] --config.train.steps=100 --config.model.mixer=window
"""

import ast
import importlib.util
import json
import pathlib
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from lissom.data import corruptions
from lissom.data.errors import DataError
from lissom.models import ENVIRONMENT_GATES, FFNS, MODELS, NORMS, SET_ENCODERS, SIZES
from lissom.models.mixers import MIXERS
from lissom.models.registry import UnknownName, check_name, nearest
from lissom.models.spiking import ACTIVATIONS, DECODERS, ENCODERS
from lissom.training import OBJECTIVES, OPTIMIZERS, SCHEDULES
from lissom.training.errors import UserError
from lissom.training.fields import DURATIONS, check_fields, check_stage

# Fields that are about watching and keeping a run: they change nothing in it.
WATCHING = ("log.", "checkpoint.", "evaluation.baselines")
CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def recipes() -> dict[str, str]:
    """{"configs/vision/digits_vit.py": first line of its docstring} of every recipe."""
    found = {}
    for path in sorted(CONFIGS.glob("*/*.py")):
        if path.name.startswith("_"):
            continue
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        found[f"configs/{path.relative_to(CONFIGS)}"] = doc.split("\n")[0]
    return found


def load_recipe(spec: str) -> ml_collections.ConfigDict:
    """'path/to/recipe.py' or 'path/to/recipe.py:argument' -> its get_config(argument)."""
    path, argument = recipe_path(spec)
    try:
        spec_ = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
        module = importlib.util.module_from_spec(spec_)
        spec_.loader.exec_module(module)
    except Exception as error:  # a recipe is the user's own code
        raise UserError(f"the recipe {path} can't be read: {_told(error, path)}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} is no recipe: it has no function get_config(arg)")
    try:
        config = module.get_config(argument)
    except Exception as error:
        raise UserError(f"{path}: {_told(error, path)}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{path}: get_config gives a {type(config).__name__}, not an ml_collections.ConfigDict")
    with config.unlocked():
        config.recipe = str(spec)
    return config


def _told(error: Exception, path: pathlib.Path) -> str:
    """A mistake in a recipe's code with its line; what the recipe itself raises for its user is told as it is."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f" (line {lines[-1]})" if lines else ""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}{where}"


def recipe_path(spec: str) -> tuple[pathlib.Path, str]:
    """The file and the argument of a recipe; a path is looked up here first, then beside the package."""
    name, _, argument = str(spec).partition(":")
    for path in (pathlib.Path(name), CONFIGS.parent / name):
        if path.is_file():
            return path, argument
    raise UserError(f"there is no recipe {name}: known are {', '.join(recipes())}{nearest(name, recipes())}")


def default_workdir(spec: str) -> pathlib.Path:
    """runs/<file stem>[_<mode>]."""
    path, argument = recipe_path(spec)
    return pathlib.Path("runs") / (path.stem + (f"_{argument.replace(',', '_').replace('=', '')}" if argument else ""))


def override(config: ml_collections.ConfigDict, key: str, text: Any) -> None:
    """Sets `a.b.c` to a value given as text, read as the type of the present value; unknown fields are an error.

    Below a field named `*kwargs` new entries may be made: `model.mixer_kwargs.window.window=64`; the settings of the
    model's named size may be set one by one: `model.width=96`.
    """
    *parents, last = key.split(".")
    node, free = config, False
    for depth, name in enumerate(parents):
        free = free or name.endswith("kwargs")
        if free and name not in node:
            with config.unlocked():
                node[name] = ml_collections.ConfigDict()
        if not isinstance(node, ml_collections.ConfigDict) or name not in node:
            known = list(node) if isinstance(node, ml_collections.ConfigDict) else []
            raise _unknown(".".join(parents[: depth + 1]), name, known)
        node = node[name]
    if not isinstance(node, ml_collections.ConfigDict):
        raise UserError(f"config.{'.'.join(parents)} is a value, so config.{key} cannot be set")
    present = node.get(last)
    if last not in node and not free:
        sized = SIZES.get(node.get("name"), {}).get(node.get("size"), {}) if parents == ["model"] else {}
        present = sized.get(last)
        if not (parents == ["train"] and last in DURATIONS) and last not in sized:
            raise _unknown(
                key, last, list(dict.fromkeys([*node, *sized, *(DURATIONS if parents == ["train"] else ())]))
            )
    if parents == ["train"] and last in DURATIONS:
        with config.unlocked():  # steps, epochs, examples: the new one takes the place of the recipe's
            for name in DURATIONS:
                if name != last and name in node:
                    del node[name]
    value = _read(key, text, present) if isinstance(text, str) else text
    with config.unlocked(), node.ignore_type():
        node[last] = value


def _unknown(key: str, name: str, known: list[str]) -> UserError:
    return UserError(f"the config has no field {key!r}: there are {', '.join(map(str, known))}{nearest(name, known)}")


def _read(key: str, text: str, present: Any) -> Any:
    try:
        if isinstance(present, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(present, int):
            return int(float(text)) if float(text).is_integer() else float("x")
        if isinstance(present, float):
            return float(text)
        if isinstance(present, str):
            return text
        if isinstance(present, tuple | list):
            return tuple(ast.literal_eval(text)) if text[:1] in ("(", "[") else tuple(map(_literal, _words(text)))
        if isinstance(present, ml_collections.ConfigDict):
            return ml_collections.ConfigDict({**ast.literal_eval(text)})
    except (KeyError, ValueError, SyntaxError, TypeError) as error:
        raise UserError(f"config.{key}={text!r} is not {_article(present)}") from error
    return _literal(text)


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _literal(text: str) -> Any:
    """A Python literal, or the text itself: a name."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _article(present: Any) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        tuple: "a list a,b,c",
        list: "a list a,b,c",
        ml_collections.ConfigDict: "a table of settings {'name': value}",
    }
    return names.get(type(present), f"a {type(present).__name__}")


def overridden(config: ml_collections.ConfigDict, overrides: Iterable[tuple[str, Any]]) -> ml_collections.ConfigDict:
    """A copy of the config with every (key, value) set."""
    config = config.copy_and_resolve_references()
    for key, value in overrides:
        override(config, key, value)
    return config


def check(config: ml_collections.ConfigDict) -> None:
    """Everything that can be known to be wrong before jax is imported, in the config and in that of each stage."""
    _check_one(config)
    for number, entry in enumerate(config.stages):
        check_stage(number, entry)
        if config.data.order == "by_class" and "data.batch_size" in entry.get("overrides", {}):
            raise UserError(
                f"config.stages[{number}] overrides data.batch_size, by which config.data.order='by_class' cuts tasks"
            )
        try:
            _check_one(overridden(config, dict(entry.get("overrides", {})).items()))
        except (UserError, UnknownName) as error:
            raise UserError(f"config.stages[{number}]: {error}") from error


def _check_one(config: ml_collections.ConfigDict) -> None:
    check_fields(config)
    check_name(MODELS, config.model.name, "model")
    if config.model.size and config.model.name in SIZES and config.model.size not in SIZES[config.model.name]:
        sizes = SIZES[config.model.name]
        raise UserError(
            f"model {config.model.name!r} has no size {config.model.size!r}: it has "
            f"{', '.join(sizes)}{nearest(config.model.size, sizes)}"
        )
    tables = {
        "mixer": MIXERS,
        "ffn": FFNS,
        "norm": NORMS,
        "encoder": SET_ENCODERS,
        "gate": ENVIRONMENT_GATES,
        "neuron": ACTIVATIONS,
        "encoding": ENCODERS,
        "decoding": DECODERS,
    }
    for field, table in tables.items():
        value = config.model.get(field)
        for name in (value,) if isinstance(value, str) else value or ():
            check_name(table, name, field)
    _check_decode_length(config)
    _check_corruptions(config.evaluation)
    check_name(OBJECTIVES, config.objective, "objective")
    check_name(OPTIMIZERS, config.optim.name, "optimizer")
    check_name(SCHEDULES, config.optim.schedule, "schedule")


def _check_decode_length(config: ml_collections.ConfigDict) -> None:
    decoded = config.evaluation.decode_length
    if not decoded:
        return
    settings = model_settings(config)
    learned, period = settings.get("learned_positions", 0), settings.get("block_length", 1)
    if decoded <= period:
        raise UserError(
            f"config.evaluation.decode_length={decoded} must be 0 or at least {period + 1}: a token in front, and "
            f"{period} to be timed"
        )
    if 0 < learned < decoded:
        raise UserError(
            f"config.evaluation.decode_length={decoded} must be at most config.model.learned_positions={learned}: the "
            "table has no position beyond"
        )


def _check_corruptions(evaluation: Mapping) -> None:
    try:
        corruptions.check(evaluation["corruptions"], evaluation["severities"])
    except DataError as error:
        raise UserError(f"config.evaluation: {error}") from error


def model_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The settings of the model's named size, and what is set on top: None leaves a field to the size."""
    given = {key: value for key, value in config.model.to_dict().items() if value is not None}
    return {**SIZES.get(config.model.name, {}).get(config.model.get("size"), {}), **given}


def total_steps(config: ml_collections.ConfigDict, examples: int) -> int:
    """The number of steps that train.steps | epochs | examples asks for, rounded up. `examples`: of an epoch."""
    if "steps" in config.train:
        return int(config.train.steps)
    wanted = config.train.examples if "examples" in config.train else config.train.epochs * examples
    return max(1, -(-int(wanted) // config.data.batch_size))


def to_json(config: ml_collections.ConfigDict) -> str:
    """The resolved config as text; equal configs give equal text."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True, default=list)


def from_json(text: str) -> ml_collections.ConfigDict:
    """The inverse of `to_json`, lists as tuples."""
    return ml_collections.ConfigDict(_tuples(json.loads(text)))


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def differences(one: Mapping, other: Mapping, prefix: str = "") -> list[str]:
    """['model.width: 64 -> 128', ...] of two configs."""
    found = []
    for key in sorted({*one, *other}, key=str):
        a, b = one.get(key, "unset"), other.get(key, "unset")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b and (list(a) if isinstance(a, tuple) else a) != (list(b) if isinstance(b, tuple) else b):
            found.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return found
