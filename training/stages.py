"""Stages: a run may change its config on the way. Each entry of `config.stages` is

    dict(name="qat", duration=0.3, overrides={"transforms": ...}, optimizer="keep" | "reset", schedule="run" | "stage",
         converter="package.module:function" or "")

`duration` is a number of steps (int) or a fraction of the run (float); they must fill the run. At a boundary the module
is rebuilt and parameters are carried over by path, or by the converter, a function (old state, new shapes) -> state.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from lissom.models.registry import resolve
from lissom.models.variables import flatten
from lissom.training.checkpoints import flat
from lissom.training.config import check, overridden
from lissom.training.errors import UserError

FIELDS = ("name", "duration", "overrides", "optimizer", "schedule", "converter")


class Stage(NamedTuple):
    name: str
    start: int
    stop: int
    config: Any
    optimizer: str
    schedule: str
    converter: str


def plan(config, total: int) -> list[Stage]:
    """The stages of a run of `total` steps; a config without stages is one stage."""
    if not config.stages:
        return [Stage("train", 0, total, config, "keep", "run", "")]
    stages, at = [], 0
    for i, entry in enumerate(config.stages):
        entry = dict(entry)
        unknown = [key for key in entry if key not in FIELDS]
        if unknown or "duration" not in entry:
            raise UserError(f"config.stages[{i}] has {unknown or 'no duration'}: its fields are {', '.join(FIELDS)}")
        length = entry["duration"]
        length = round(length * total) if isinstance(length, float) else int(length)
        if i == len(config.stages) - 1 and isinstance(entry["duration"], float):
            length = total - at  # fractions round; the last stage takes what is left
        changed = overridden(config, list(dict(entry.get("overrides", {})).items()))
        check(changed)
        stages.append(
            Stage(
                entry.get("name", f"stage{i}"),
                at,
                at + length,
                changed,
                entry.get("optimizer", "keep"),
                entry.get("schedule", "run"),
                entry.get("converter", ""),
            )
        )
        at += length
    if at != total:
        raise UserError(f"the stages last {at} steps in all, the run {total}: durations must fill the run")
    return stages


def final_config(config):
    """The config in force at the end of the run."""
    entry = dict(config.stages[-1]) if config.stages else {}
    return overridden(config, list(dict(entry.get("overrides", {})).items()))


def carry(old: Mapping[str, Any], fresh: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """The state that opens a stage: values of the old one where path and shape agree, the rest fresh.

    A parameter of the new module that the old one lacks, or has in another shape, is an error unless a converter
    is named: half a model must not be re-initialised without a word.
    """
    if stage.converter:
        return resolve({}, stage.converter, "converter")(old, fresh)
    state = dict(fresh)
    for kind in ("params", "stats", "frozen"):
        have, want = flatten(old[kind]), flatten(fresh[kind])
        for path, leaf in want.items():
            if kind == "params" and (path not in have or have[path].shape != leaf.shape):
                raise UserError(
                    f"stage {stage.name!r}: parameter {path} has no counterpart of its shape in the stage "
                    "before, and no converter is named"
                )
        state[kind] = place(fresh[kind], {p: v for p, v in have.items() if p in want and v.shape == want[p].shape})
    if stage.optimizer == "keep":
        have, want = flat(old["opt"]), flat(fresh["opt"])
        if {n: v.shape for n, v in have.items()} != {n: v.shape for n, v in want.items()}:
            raise UserError(
                f"stage {stage.name!r}: the optimizer's state does not fit the new model or optimizer: say "
                "optimizer='reset'"
            )
        leaves = [jax.device_put(have[name], leaf.sharding) for name, leaf in want.items()]
        state["opt"] = jax.tree.unflatten(jax.tree.structure(fresh["opt"]), leaves)
    state["step"] = jax.device_put(old["step"], fresh["step"].sharding)
    return state


def place(tree: dict, values: Mapping[str, Any], prefix: tuple = ()) -> dict:
    """The tree with the leaves named in `values` replaced, each laid where the old leaf lay."""
    out = {}
    for key, leaf in tree.items():
        name = "/".join(map(str, (*prefix, key)))
        if isinstance(leaf, dict):
            out[key] = place(leaf, values, (*prefix, key))
        else:
            out[key] = jax.device_put(values[name], leaf.sharding) if name in values else leaf
    return out
