"""The transform interface.

    structure(module) -> module              from the settings alone; runs under `eval_shape`
    values(module, source, data) -> module   fills it from `source`, the module before `structure`, and calibration data

Reload = build, `structure` in order, restore. Rules are (path regex, settings) pairs, the first match wins, and a
rule that matches nothing is an error.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax import nnx

from lissom.compression import TRANSFORMS
from lissom.models.registry import check_settings, check_types, required, resolve
from lissom.models.stack import stacks
from lissom.models.variables import merge, path_name, split
from lissom.training.errors import UserError


class Transform:
    """The identity; subclasses override one half or both. `knows_quantizers`: whether it leaves alone what stands in
    the place of products (compression/quantization), or changes it knowingly."""

    knows_quantizers = False

    def structure(self, module: nnx.Module) -> nnx.Module:
        return module

    def values(self, module: nnx.Module, source: nnx.Module, data: Iterable[dict]) -> nnx.Module:
        del source, data
        return module


def build_transforms(entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, Transform]]:
    """[dict(name=..., **settings), ...] -> [(name, transform), ...]."""
    built = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise UserError(f"a transform is written dict(name=..., ...), not {entry!r}")
        settings = dict(entry)
        if "name" not in settings:
            raise UserError(f"a transform needs a name: known are {', '.join(TRANSFORMS)}")
        name = settings.pop("name")
        kind = resolve(TRANSFORMS, name, "transform")
        check_settings(kind, settings, f"transform {name!r}")
        check_types(kind, settings, f"transform {name!r}")
        missing = required(kind, settings)
        if missing:
            raise UserError(f"transform {name!r} needs {', '.join(missing)}")
        try:
            built.append((name, kind(**settings)))
        except UserError:  # which says of what it speaks
            raise
        except ValueError as error:  # what it says of its settings
            raise UserError(f"transform {name!r}: {error}") from error
    return built


def structured(module: nnx.Module, transforms: Sequence[tuple[str, Transform]]) -> nnx.Module:
    """The module after the `structure` of every transform, in order. They go by the paths of layers that stand apart:
    UserError for a stack that is scanned."""
    if transforms and stacks(module):
        raise UserError(f"transform {transforms[0][0]!r} changes layers one by one: set config.model.stack to 'loop'")
    for name, transform in transforms:
        module = _structure(name, transform, module)
    return module


def _structure(name: str, transform: Transform, module: nnx.Module) -> nnx.Module:
    has_quantizers = any(getattr(node, "quantizer", None) is not None for _, node in nnx.iter_graph(module))
    if has_quantizers and not transform.knows_quantizers:
        raise UserError(
            f"transform {name!r} changes kernels, and those of this network are quantized: it must come before that"
        )
    try:
        return transform.structure(module)
    except UserError:  # which says of what it speaks
        raise
    except ValueError as error:  # what a module says of its settings
        raise UserError(f"transform {name!r}: {error}") from error


def applied(network: nnx.Module, transforms: Sequence[tuple[str, Transform]], data: Iterable[dict]) -> nnx.Module:
    """The trained network after every transform, in order: each is filled from what was before it, and from `data`."""
    for name, transform in transforms:
        source = merge(split(network))
        network = transform.values(_structure(name, transform, network), source, data)
    return network


def match_rules(rules: Sequence[tuple[str, Mapping]], paths: Iterable[str], what: str) -> dict[str, dict]:
    """{path: settings of the first rule that matches it}; a rule that is the first match of no path is an error."""
    matched, used, paths = {}, set(), list(paths)
    for pattern, _ in rules:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(f"transform {what!r}: the rule {pattern!r} is no pattern of paths: {error}") from error
    for path in paths:
        for i, (pattern, settings) in enumerate(rules):
            if re.search(pattern, path):
                matched[path] = dict(settings)
                used.add(i)
                break
    for i, (pattern, _) in enumerate(rules):
        if i not in used:
            if any(re.search(pattern, path) for path in paths):
                why = "matches no layer that a rule before it does not match"
            else:
                why = f"matches no layer: there are {', '.join(paths[:8])}{', ...' if paths[8:] else ''}"
            raise UserError(f"transform {what!r}: the rule {pattern!r} {why}")
    return matched


def replace_layers(module: nnx.Module, kinds: tuple[type, ...], function: Callable[[str, Any], Any]) -> nnx.Module:
    """Replaces in place every submodule of the given classes by function(path, submodule)."""
    for path, node in list(nnx.iter_graph(module)):
        if isinstance(node, kinds):
            parent: Any = module
            for key in path[:-1]:
                parent = parent[key] if isinstance(parent, nnx.List) else getattr(parent, key)
            new = function(path_name(path), node)
            if isinstance(parent, nnx.List):
                parent[path[-1]] = new
            else:
                setattr(parent, path[-1], new)
    return module


def layer_paths(module: nnx.Module, kinds: tuple[type, ...]) -> dict[str, Any]:
    """{path: submodule} of every submodule of the given classes."""
    return {path_name(path): node for path, node in nnx.iter_graph(module) if isinstance(node, kinds)}
