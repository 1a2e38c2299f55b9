"""What a run starts from: finished runs and pretrained checkpoints, with the transforms that they have not yet."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lissom.compression.artefacts import structure_of
from lissom.compression.transforms import applied, build_transforms
from lissom.models import MODELS, NORMS
from lissom.models.mixers import MIXERS
from lissom.models.pretrained import llama, read
from lissom.models.pretrained.errors import CheckpointError
from lissom.models.registry import resolve, settings_of
from lissom.models.variables import Parts, flatten, merge, split
from lissom.training.building import Assembly
from lissom.training.config import model_settings
from lissom.training.errors import UserError
from lissom.training.runs import KINDS, load_network, read_config
from lissom.training.stages import final_config

PRETRAINED = "pretrained:"
READINGS = {
    "mixer": (MIXERS, ("rope_theta", "rope_factors", "rope_dim", "window", "dilation", "stride")),
    "norm": (NORMS, ("epsilon",)),
}
"""Settings that no parameter's shape tells: with others, the values of a checkpoint mean another function."""


def starting_network(config, data: Iterable[dict] = ()) -> Parts:
    """The network that `config.init_from` names, layers apart: a directory of a finished run, or
    "pretrained:NAME_OR_PATH" for a checkpoint of the Llama family (docs/pretrained.md); of several the mean (a uniform
    soup: Wortsman et al. 2022, arXiv:2203.05482; equal entries count as often as they stand there).

    The transforms of a run must be the first of `config.transforms`; the others are applied here, to the mean, in
    order, `structure` and `values` with `data`: they see the network that was trained. A mixer may be another one than
    was trained, if its parameters are the same; settings by which values are read otherwise (`READINGS`) may not.
    UserError says what does not fit.
    """
    has, found = _plain(config.transforms), []
    for path in config.init_from:
        if path.startswith(PRETRAINED):
            parts, had = _pretrained(config, path), ()
        else:
            theirs = final_config(read_config(path))
            parts, had = load_network(path, structure_of), _plain(theirs.transforms)
            _check_readings(config, path, model_settings(theirs))
        if has[: len(had)] != had:
            raise UserError(
                f"config.init_from: {path} was trained with the transforms {_names(had)}, which are not the first of "
                f"config.transforms, {_names(has)}"
            )
        if found and had != found[0][1]:
            raise UserError(f"config.init_from: {path} was trained with other transforms than {config.init_from[0]}")
        found.append((parts, had))
    network = merge(_mean([parts for parts, _ in found], config.init_from))
    return split(applied(network, build_transforms(has[len(found[0][1]) :]), data))


def transformed_network(stage, before: Assembly, state: Mapping[str, Any], data: Iterable[dict]) -> Parts | None:
    """The network of `state`, of a module `before`, behind the transforms that the stage adds; None if it adds none."""
    if not stage.added:
        return None
    network = before.objective.network(merge(Parts(before.graph, *(state[kind] for kind in KINDS))))
    return split(applied(network, build_transforms(stage.added), data))


def _mean(networks: Sequence[Parts], paths: Sequence[str]) -> Parts:
    """Of every parameter and statistic. What is frozen must be the same in all: integers have no mean."""
    first, *others = networks
    leaves = [{kind: flatten(getattr(network, kind)) for kind in KINDS} for network in networks]
    for path, other in zip(paths[1:], leaves[1:], strict=True):
        for kind in KINDS:
            for name in sorted(leaves[0][kind].keys() | other[kind].keys()):
                one, two = leaves[0][kind].get(name), other[kind].get(name)
                if one is None or two is None or one.shape != two.shape:
                    raise UserError(f"config.init_from: {path} and {paths[0]} differ in {name}")
                if kind == "frozen" and not bool((one == two).all()):
                    raise UserError(f"config.init_from: {path} and {paths[0]} have other frozen values in {name}")
    mean = lambda *values: sum(values) / len(values)
    params, stats = (jax.tree.map(mean, *(getattr(network, kind) for network in networks)) for kind in KINDS[:2])
    return first._replace(params=params, stats=stats) if others else first


def _plain(entries: Iterable[Mapping[str, Any]]) -> tuple[dict, ...]:
    """Transforms as a config that was read again has them: tuples and lists are one."""
    return tuple(_listed(dict(entry)) for entry in entries)


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def _names(entries: tuple[dict, ...]) -> str:
    return ", ".join(entry.get("name", "?") for entry in entries) or "none"


def _pretrained(config, path: str) -> Parts:
    try:
        checkpoint = read(path.removeprefix(PRETRAINED))
        _check_readings(config, path, llama.language_settings(checkpoint.settings))
        return split(llama.build(checkpoint, dtype=jnp.float32, stack="loop"))
    except CheckpointError as error:
        raise UserError(f"config.init_from: {error}") from error


def _check_readings(config, path: str, theirs: Mapping[str, Any]) -> None:
    """UserError where the config's model would read values otherwise than the model that they were trained in."""
    ours, defaults = model_settings(config), settings_of(resolve(MODELS, config.model.name, "model"))
    if "embedding_multiplier" in defaults:
        usual = defaults["embedding_multiplier"].default
        here, wanted = (settings.get("embedding_multiplier", usual) for settings in (ours, theirs))
        _check_reading(path, "embedding_multiplier", wanted, "config.model.embedding_multiplier", here)
    for kind, (registry, keys) in READINGS.items():
        if kind not in theirs or kind not in defaults:  # a network without that choice
            continue
        named = _several(ours.get(kind, defaults[kind].default))
        there = [_read(registry, kind, name, theirs, keys) for name in _several(theirs[kind])]
        for number in range(math.lcm(len(named), len(there))):
            name, wanted = named[number % len(named)], there[number % len(there)]
            here = _read(registry, kind, name, ours, keys)
            for key in here.keys() & wanted.keys():
                _check_reading(path, key, wanted[key], f"config.model.{kind}_kwargs.{name}.{key}", here[key])


def _check_reading(path: str, key: str, wanted: Any, field: str, here: Any) -> None:
    if here != wanted:
        raise UserError(
            f"config.init_from: {path} has {key} {wanted}, and {field} is {here}: its values would mean another "
            "function"
        )


def _several(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _read(registry: Mapping[str, str], kind: str, name: str, settings: Mapping[str, Any], keys: Sequence[str]) -> dict:
    """{key: value} of those of the keys that the chosen class takes."""
    taken = settings_of(resolve(registry, name, kind))
    own = name if name in registry else name.rpartition(":")[2]  # a plug-in's settings stand under its class
    given = (settings.get(f"{kind}_kwargs") or {}).get(own, {})
    return {key: _listed(given.get(key, taken[key].default)) for key in keys if key in taken}
