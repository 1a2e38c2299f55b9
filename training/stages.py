"""Stages: a run may change its config on the way. Each entry of `config.stages` is

    dict(name="qat", duration=0.3, overrides={"transforms": ...}, optimizer="keep" | "reset", schedule="run" | "stage",
         converter="package.module:function" or "")

`duration` is a number of steps (int) or a fraction of the run (float); they must fill the run. What a stage may
override is listed in `fields.STAGE_MAY`. At a boundary the module is rebuilt and parameters are carried over by path,
or by the converter, a function (old state, fresh state) -> state. Both see layers apart (`blocks/3/...`), so that a
stage may go from a looped to a scanned stack.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from lissom.models.registry import resolve
from lissom.models.stack import stack_layers, unstack_layers
from lissom.models.variables import flatten
from lissom.training import sharding
from lissom.training.checkpoints import flat
from lissom.training.config import overridden
from lissom.training.errors import UserError


class Stage(NamedTuple):
    name: str
    start: int
    stop: int
    config: Any
    optimizer: str
    schedule: str
    converter: str
    refills: bool = False  # it names another objective, or other settings of it


def plan(config, total: int) -> list[Stage]:
    """The stages of a run of `total` steps, from a config that `config.check` has seen; one without stages is one."""
    if not config.stages:
        return [Stage("train", 0, total, config, "keep", "run", "")]
    stages, at = [], 0
    durations = [entry["duration"] for entry in config.stages]
    whole = [isinstance(duration, int) for duration in durations]
    # Fractions are shares of the run and must add up; where they round, the last stage takes the step that is left.
    if not any(whole) and abs(sum(durations) - 1) > 1e-6:
        raise UserError(f"the fractions of the stages add up to {sum(durations):g}: durations must fill the run")
    for i, entry in enumerate(config.stages):
        length = durations[i] if whole[i] else round(durations[i] * total)
        if i == len(durations) - 1 and not whole[i] and abs(total - at - length) <= len(durations):
            length = total - at
        if length < 1:
            raise UserError(f"config.stages[{i}] would last {length} of the run's {total} steps")
        stages.append(
            Stage(
                entry.get("name", f"stage{i}"),
                at,
                at + length,
                overridden(config, list(dict(entry.get("overrides", {})).items())),
                entry.get("optimizer", "keep"),
                entry.get("schedule", "run"),
                entry.get("converter", ""),
                any(key.startswith("objective") for key in entry.get("overrides", {})),
            )
        )
        at += length
    if at != total:
        raise UserError(f"the stages last {at} steps in all, the run {total}: durations must fill the run")
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise UserError(f"config.stages: the names {', '.join(names)} are not all different")
    return stages


def final_config(config):
    """The config in force at the end of the run."""
    entry = dict(config.stages[-1]) if config.stages else {}
    return overridden(config, list(dict(entry.get("overrides", {})).items()))


def check_carry(
    old: Mapping[str, Any], fresh: Mapping[str, Any], stage: Stage, before: Mapping, after: Mapping
) -> None:
    """Raises UserError where `carry` would not know how to fill the stage's module: half a model must not be
    re-initialised without a word. Shapes will do for arrays."""
    if stage.converter:
        resolve({}, stage.converter, "converter")
        return
    apart = lambda tree, stacks: jax.eval_shape(lambda t: unstack_layers(t, dict(stacks)), tree)
    old, fresh = apart(dict(old), before), apart(dict(fresh), after)
    have = flatten(old["params"])
    for path, leaf in flatten(fresh["params"]).items():
        if path not in have or have[path].shape != leaf.shape:
            raise UserError(
                f"stage {stage.name!r}: parameter {path} has no counterpart of its shape in the stage "
                "before, and no converter is named"
            )
    shapes = lambda tree: {name: leaf.shape for name, leaf in flat(tree["opt"]).items()}
    if stage.optimizer == "keep" and shapes(old) != shapes(fresh):
        raise UserError(
            f"stage {stage.name!r}: the optimizer's state does not fit the new model or optimizer: say "
            "optimizer='reset'"
        )


def carry(
    old: Mapping[str, Any], fresh: Mapping[str, Any], stage: Stage, before: Mapping, after: Mapping
) -> dict[str, Any]:
    """The state that opens a stage: values of the old one where path and shape agree, the rest fresh. `before` and
    `after` are the stacks (`models.stack.stacks`) of the two modules."""
    places = jax.tree.map(lambda leaf: leaf.sharding, dict(fresh))
    old, fresh = unstack_layers(dict(old), dict(before)), unstack_layers(dict(fresh), dict(after))
    if stage.converter:
        state = dict(resolve({}, stage.converter, "converter")(old, fresh))
    else:
        # An objective that changed has filled its frozen part (a teacher) itself.
        kinds = ("params", "stats") if stage.refills else ("params", "stats", "frozen")
        state = {**fresh, "step": old["step"]}
        state |= {kind: replaced(fresh[kind], flatten(old[kind])) for kind in kinds}
        if stage.optimizer == "keep":
            values = flat(old["opt"])
            state["opt"] = jax.tree.unflatten(
                jax.tree.structure(fresh["opt"]), [values[name] for name in flat(fresh["opt"])]
            )
    return sharding.put(stack_layers(state, dict(after)), places)


def replaced(tree: Mapping, values: Mapping[str, Any], prefix: tuple = ()) -> dict:
    """The tree with the leaves that `values` names in their shape; the others as they are."""
    out = {}
    for key, leaf in tree.items():
        name = "/".join(map(str, (*prefix, key)))
        if isinstance(leaf, dict):
            out[key] = replaced(leaf, values, (*prefix, key))
        else:
            out[key] = values[name] if name in values and values[name].shape == leaf.shape else leaf
    return out
