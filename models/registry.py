"""Names to classes: one rule for what is built in and for plug-ins.

A visible dict holds {"name": "module:Class"}; a config may also write "my_package.module:Class" itself. The import
happens when the name is used, so that the dicts can be checked before jax is imported.
"""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any


class UnknownName(ValueError):
    """A name or a setting that does not exist; the message is one sentence for the user."""


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
            raise UnknownName(f"{what} {name!r}: there is no module {error.name!r} to import") from error
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


def construct(
    table: Mapping[str, str],
    name: str,
    kwargs: Mapping[str, Mapping[str, Any]] | None,
    what: str,
    **fixed: Any,
) -> Any:
    """Builds what `name` stands for with `kwargs[name]` (its own settings) and `fixed` (what the caller provides).

    A plug-in's settings stand under the name of its class (a config's keys have no dots). Every entry of `kwargs` is
    checked against its own constructor, also those of names that were not chosen.
    """
    kwargs = dict(kwargs or {})
    own = name if name in table else name.rpartition(":")[2]
    for entry, settings in kwargs.items():
        target = resolve(table, name if entry == own else entry, what)
        check_settings(target, settings, f"{what} {entry!r}", reserved=tuple(fixed))
    target, given = resolve(table, name, what), {**fixed, **dict(kwargs.get(own, {}))}
    missing = [
        key
        for key, parameter in settings_of(target).items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and key not in given
    ]
    if missing:
        raise UnknownName(f"{what} {name!r} needs {', '.join(missing)}: set it in {what}_kwargs.{own}")
    return target(**given)
