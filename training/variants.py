"""Variants of a recipe, as compare.py and training_steps.py take them from the command line.

    --vary=model.mixer=attention,none --vary=model.depth=2,4     axes of a grid
    --also="wide: model.ffn=mlp model.width=128"                 one variant behind it

The field `mode` is that of the recipe, what stands behind its colon.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lissom.training.config import check, overridden
from lissom.training.errors import UserError

MODE = "mode"


class Variant(NamedTuple):
    """A point of the grid: its label in the table and what it sets."""

    label: str
    overrides: tuple[tuple[str, Any], ...]


def grid(axes: Sequence[str], also: Sequence[str] = ()) -> list[Variant]:
    """['model.mixer=attention,none', 'model.depth=2,4'] -> the variants of the product, the first one first; behind
    them those of `also`, 'wide: model.ffn=mlp model.width=128'."""
    parsed = dict(axis_of(axis, "--vary") for axis in axes)
    if len(parsed) < len(axes):
        raise UserError(f"--vary={' --vary='.join(axes)} varies one field twice: give its values in one list")
    last = [key.split(".")[-1] for key in parsed]
    names = {key: key if last.count(name) > 1 else name for key, name in zip(parsed, last, strict=True)}
    variants: dict[str, Variant] = {}
    for values in itertools.product(*parsed.values()):
        point = tuple(zip(parsed, values, strict=True))
        label = " ".join(f"{names[key]}={value}" for key, value in point) or "recipe"
        # The directory's name tells less apart than the label: a,b and a;b are one.
        other = variants.setdefault(directory_of(label), Variant(label, point))
        if other.overrides != point:
            raise UserError(
                f"the variants {other.label!r} and {label!r} would lie in one directory {directory_of(label)}"
            )
    if len(variants) < math.prod(map(len, parsed.values())):
        raise UserError(f"--vary={' --vary='.join(axes)} names one variant twice")
    for variant in named(also):
        if variants.setdefault(directory_of(variant.label), variant) is not variant:
            raise UserError(f"--also={variant.label!r}: there is a variant of this name already")
    return list(variants.values())


def named(also: Sequence[str]) -> list[Variant]:
    """['wide: model.ffn=mlp model.width=128', ...] -> its variants, whose names are directories of their own."""
    found: dict[str, Variant] = {}
    for text in also:
        label, colon, settings = text.partition(": ")
        pairs = [pair.partition("=") for pair in _parts(settings, " ") if pair]
        if not (colon and label.strip() and pairs and all(key and equals and value for key, equals, value in pairs)):
            raise UserError(f"--also={text!r} must be 'name: field=value field=value'")
        variant = Variant(label.strip(), tuple((key, value) for key, _, value in pairs))
        other = found.setdefault(directory_of(variant.label), variant)
        if other is not variant:
            raise UserError(f"--also={text!r}: there is a variant {other.label!r} already")
    return list(found.values())


def with_baselines(axes: Sequence[str], also: Sequence[str], baselines: Sequence[str]) -> list[Variant]:
    """The variants of `grid`, and behind them the recipe's `baselines`, each at all points of the axes that it does not
    set itself; those that are variants already are left out."""
    variants = grid(axes, also)
    known = {frozenset(variant.overrides) for variant in variants}
    added = []
    for baseline in grid((), baselines)[1:]:
        points = grid([axis for axis in axes if axis_of(axis, "--vary")[0] not in dict(baseline.overrides)])
        for point in points:
            label = baseline.label if len(points) == 1 else f"{baseline.label} {point.label}"
            added.append(Variant(label, (*point.overrides, *baseline.overrides)))
    return [*variants, *(extra for extra in added if frozenset(extra.overrides) not in known)]


def axis_of(text: str, flag: str) -> tuple[str, list[str]]:
    """'field=a,b' -> ('field', ['a', 'b'])."""
    key, _, values = text.partition("=")
    if not (key and values and all(_parts(values))):
        raise UserError(f"{flag}={text} must be field=value,value")
    return key, _parts(values)


def _parts(text: str, at: str = ",") -> list[str]:
    """Splits at the letters `at` that stand outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == at and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def directory_of(label: str) -> str:
    """The label as the name of a directory."""
    return "".join(letter if letter.isalnum() or letter in "._=-" else "_" for letter in label)


def config_of(variant: Variant, config, of_mode: Callable[[str], Any] | None = None):
    """The config of a variant, which `check` has seen. `of_mode(mode)`: that of another mode of the recipe."""
    settings = [(key, value) for key, value in variant.overrides if key != MODE]
    modes = [value for key, value in variant.overrides if key == MODE]
    if modes and of_mode is None:
        raise UserError(f"{variant.label}: the mode of a recipe is varied where the recipe is known")
    changed = overridden(of_mode(modes[-1]) if modes else config, settings)
    check(changed)
    return changed
