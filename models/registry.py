"""Names to classes: one rule for what is built in and for plug-ins.

A visible dict holds {"name": "module:Class"}; a config may also write "my_package.module:Class" itself. The import
happens when the name is used, so that the dicts can be checked before jax is imported.
"""

import difflib
import importlib
import inspect
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin

UNIONS = (Union, types.UnionType)
SEQUENCES = (Sequence, list, tuple)
MAPPINGS = (Mapping, dict)
WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", type(None): "None"}


class UnknownName(ValueError):
    """A name or a setting that does not exist; the message is one sentence for the user."""


class WrongType(ValueError):
    """A setting of another type than its constructor is annotated with; the message is one sentence for the user."""


def nearest(word: str, known: Any) -> str:
    """'; did you mean "x"?' or an empty string."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_name(table: Mapping[str, str], name: str, what: str) -> None:
    """Raises UnknownName unless `name` is in the table or has the form package.module:Class. Imports nothing."""
    if name in table:
        return
    module, _, attribute = str(name).partition(":")
    if not (module and attribute):
        raise UnknownName(
            f"unknown {what} {name!r}: known are {', '.join(table)}, or package.module:Class{nearest(name, table)}"
        )


def resolve(table: Mapping[str, str], name: str, what: str) -> Any:
    """The object that a name of the table, or 'package.module:Class', stands for."""
    check_name(table, name, what)
    module, _, attribute = table.get(name, name).partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise UnknownName(
                f"{what} {name!r}: there is no module {error.name!r} to import (a file in this folder: PYTHONPATH=.)"
            ) from error
        raise
    except AttributeError as error:
        raise UnknownName(f"{what} {name!r}: module {module} has no {attribute!r}") from error


def settings_of(target: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a class's constructor or of a function. (nnx classes hide their own behind a metaclass;
    a constructor that hands `**kwargs` on takes those of its parent class as well.)"""
    if not inspect.isclass(target):
        return inspect.signature(target).parameters
    found: dict[str, inspect.Parameter] = {}
    for kind in target.__mro__:
        if "__init__" in vars(kind) and kind is not object:
            own = inspect.signature(kind.__init__).parameters
            found |= {
                name: p
                for name, p in own.items()
                if name not in found and name != "self" and p.kind is not inspect.Parameter.VAR_KEYWORD
            }
            if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values()):
                break
    return found


def check_settings(target: Any, settings: Mapping[str, Any], what: str, reserved: tuple[str, ...] = ()) -> None:
    """Raises UnknownName for a setting that the constructor does not take; `reserved` are those the caller fills."""
    known = [name for name in settings_of(target) if name not in reserved and name != "rngs"]
    for name in settings:
        if name not in known:
            raise UnknownName(
                f"{what} has no setting {name!r}: it takes {', '.join(known) or 'none'}{nearest(name, known)}"
            )


def required(target: Any, given: Iterable[str]) -> list[str]:
    """The settings without a default that are not among those given."""
    return [
        name
        for name, parameter in settings_of(target).items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in (*given, "rngs")
    ]


def check_types(target: Any, settings: Mapping[str, Any], what: str) -> None:
    """Raises WrongType for a setting that does not fit the annotation of the constructor's parameter.

    Read are bool, int, float (a whole number fits too), str, None, mappings, sequences (a list or a tuple) and unions
    of these. Any other annotation, one given as text, and none at all let every value pass.
    """
    taken = settings_of(target)
    for name, value in settings.items():
        if name in taken and not _fits(value, taken[name].annotation):
            raise WrongType(f"{what}: {name}={value!r} must be {_words(taken[name].annotation)}")


def _fits(value: Any, annotation: Any) -> bool:
    kind, parts = get_origin(annotation) or annotation, get_args(annotation)
    if kind in UNIONS:
        return any(_fits(value, part) for part in parts)
    if kind in SEQUENCES:
        return isinstance(value, list | tuple) and (not _alike(parts) or all(_fits(one, parts[0]) for one in value))
    if kind in MAPPINGS:
        return hasattr(value, "keys")  # a ConfigDict does not count as a Mapping
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return kind not in (bool, str, type(None)) or isinstance(value, kind)


def _words(annotation: Any) -> str:
    kind, parts = get_origin(annotation) or annotation, get_args(annotation)
    if kind in UNIONS:
        return " or ".join(_words(part) for part in parts)
    if kind in SEQUENCES:
        return f"a list, each entry {_words(parts[0])}" if _alike(parts) else "a list"
    return "a mapping" if kind in MAPPINGS else WORDS.get(kind, str(kind))


def _alike(parts: tuple) -> bool:
    """Whether `Sequence[int]` or `tuple[int, ...]` was written: all entries have the first part's type."""
    return len(parts) == 1 or parts[1:] == (...,)


def construct(
    table: Mapping[str, str],
    name: str,
    kwargs: Mapping[str, Mapping[str, Any]] | None,
    what: str,
    *,
    is_field: bool = True,
    **fixed: Any,
) -> Any:
    """Builds what `name` stands for with `kwargs[name]` (its own settings) and `fixed` (what the caller provides).

    A plug-in's settings stand under the name of its class (a config's keys have no dots). Names and types of every
    entry of `kwargs` are checked against its own constructor, also those of names that were not chosen. An entry with a
    capital letter belongs to a plug-in: where that was not chosen (another layer of a pattern has it, or another run of
    a comparison) it is passed over. A ValueError that begins with one of its settings ("mixer.window=0 ...") says where
    that was set; is_field: that place is `what`_kwargs.
    """
    kwargs = dict(kwargs or {})
    own = name if name in table else name.rpartition(":")[2]
    for entry, settings in kwargs.items():
        if entry not in table and entry != own and entry[:1].isupper():
            continue
        target = resolve(table, name if entry == own else entry, what)
        check_settings(target, settings, f"{what} {entry!r}", reserved=tuple(fixed))
        check_types(target, settings, f"{what} {entry!r}")
    target, given = resolve(table, name, what), {**fixed, **dict(kwargs.get(own, {}))}
    missing = required(target, given)
    if missing:
        raise UnknownName(f"{what} {name!r} needs {', '.join(missing)}: give it among the settings of {own!r}")
    try:
        return target(**given)
    except ValueError as error:
        # Names of what it stands for ("neuron.decay") are no fields of a config: this says where the field is.
        named = re.match(r"(\w+)\.(\w+)=", str(error))
        is_own = named is not None and named[1] != "model" and named[2] in kwargs.get(own, {})
        if not (is_field and is_own and type(error) is ValueError):
            raise
        raise ValueError(f"{error} (set in {what}_kwargs.{own})") from error
