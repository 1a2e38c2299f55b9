"""Stages: a run may change its config on the way. Each entry of `config.stages` is

    dict(name="qat", duration=0.3, overrides={"transforms": ...}, optimizer="keep" | "reset", schedule="run" | "stage",
         converter="package.module:function" or "")

`duration` is a number of steps (int) or a fraction of the run (float); they must fill the run. What a stage may
override is listed in `fields.STAGE_MAY`. At a boundary the module is rebuilt and parameters are carried over by path,
by the transforms that the stage has behind those of the stage before (each fills the network from what it was, and from
training batches), or by the converter, a function (old state, fresh state) -> state. All see layers apart
(`blocks/3/...`), so that a stage may go from a looped to a scanned stack.
"""

import inspect
import itertools
import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lissom.models.registry import resolve
from lissom.models.stack import stack_layers, unstack_layers
from lissom.models.variables import Parts, flatten, merge, split
from lissom.training import sharding
from lissom.training.building import Assembly, assemble, build_objective
from lissom.training.checkpoints import flat
from lissom.training.config import overridden, total_steps
from lissom.training.errors import UserError


class Stage(NamedTuple):
    name: str
    start: int
    stop: int
    config: Any
    optimizer: str
    schedule: str
    converter: str
    added: tuple = ()  # the transforms behind those of the stage before, where no converter is named
    refills: bool = False  # its objective is not that of the stage before, or has other settings


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
            )
        )
        if i:
            learns = [{key: s.config.to_dict()[key] for key in ("objective", "objective_kwargs")} for s in stages[-2:]]
            stages[-1] = stages[-1]._replace(refills=learns[0] != learns[1], added=_added(*stages[-2:]))
        at += length
    if at != total:
        raise UserError(f"the stages last {at} steps in all, the run {total}: durations must fill the run")
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise UserError(f"config.stages: the names {', '.join(names)} are not all different")
    return stages


def assembled(
    config, facts: Mapping[str, Any], examples: int, mesh: Mesh, structure_of
) -> list[tuple[Stage, Assembly]]:
    """Every stage of a run on that many training examples, with what is known of it before an array exists. What can be
    wrong with one of them, or with the step from one to the next, is a UserError here. `structure_of(config)` gives
    the function that applies the transforms of a config."""
    total = total_steps(config, examples)
    stages = plan(config, total)
    pairs = []
    for stage in stages:
        sharding.check_batch(mesh, stage.config.data.batch_size, stage.config.optim.accumulate, jax.process_count())
        # The optimizer's count begins where its state was fresh: at the run's start or at the last reset.
        born = max((s.start for s in stages if s.start <= stage.start and s.optimizer == "reset"), default=0)
        start, length = (0, total) if stage.schedule == "run" else (stage.start, stage.stop - stage.start)
        structure = structure_of(stage.config)
        pairs.append((stage, assemble(stage.config, facts, length, mesh, structure, offset=born - start)))
        _check_given(config, *pairs[-1])
    for (_, before), (stage, after) in itertools.pairwise(pairs):
        if stage.added:
            _check_added(stage, before, after, structure_of)
        check_carry(stage, before, after)
    return pairs


def _check_given(config, stage: Stage, assembly: Assembly) -> None:
    """Raises UserError where a stage's objective learns from other examples than those that the run has loaded."""
    given = build_objective(config).single
    if assembly.objective.single != given:
        names = ("episodes", "single examples")
        raise UserError(
            f"stage {stage.name!r}: objective {stage.config.objective!r} learns from {names[not given]}, and the run's "
            f"{config.objective!r} from {names[given]}: make it a run of its own that begins with config.init_from"
        )


def _check_added(stage: Stage, before: Assembly, after: Assembly, structure_of) -> None:
    """Raises UserError where the transforms that a stage adds do not make its network of that of the stage before."""
    where = f"stage {stage.name!r} adds transforms"
    if jax.process_count() > 1:
        raise UserError(f"{where}, which is for one process")
    if before.stacks or after.stacks:
        raise UserError(f"{where}, which go by layers that stand apart: set config.model.stack to 'loop' in both")
    structure = structure_of(SimpleNamespace(transforms=stage.added))

    def made():
        trees = (before.shapes[kind] for kind in ("params", "stats", "frozen"))
        zeros = (jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree) for tree in trees)
        network = structure(before.objective.network(merge(Parts(before.graph, *zeros))))
        return {kind: getattr(split(network), kind) for kind in ("params", "frozen")}

    inside = "/".join((*after.objective.path, ""))
    for kind, tree in jax.eval_shape(made).items():
        have = {f"{inside}{name}": leaf.shape for name, leaf in flatten(tree).items()}
        want = {name: leaf.shape for name, leaf in flatten(after.shapes[kind]).items() if _of_network(name, after)}
        for name in sorted(have.keys() | want.keys()):
            if have.get(name) != want.get(name):
                raise UserError(
                    f"{where} to a network whose {name} has the shape {have.get(name)} behind them, and by the stage's "
                    f"own settings {want.get(name)}: change the model in a stage of its own"
                )


def _added(before: Stage, stage: Stage) -> tuple:
    """The transforms of a stage that stand behind all of those of the stage before."""
    had, has = (json.loads(json.dumps([dict(entry) for entry in s.config.transforms])) for s in (before, stage))
    return () if stage.converter or has[: len(had)] != had else tuple(has[len(had) :])


def final_config(config):
    """The config in force at the end of the run."""
    entry = dict(config.stages[-1]) if config.stages else {}
    return overridden(config, list(dict(entry.get("overrides", {})).items()))


def check_carry(stage: Stage, before: Assembly, after: Assembly) -> None:
    """Raises UserError where `carry` would not know how to fill the stage's module: half a model must not be
    re-initialised without a word."""
    if stage.converter:
        try:
            inspect.signature(resolve({}, stage.converter, "converter")).bind("old state", "fresh state")
        except (TypeError, ValueError) as error:
            raise UserError(
                f"stage {stage.name!r}: converter {stage.converter} is no function (old state, fresh state): {error}"
            ) from error
        return
    apart = lambda assembly: jax.eval_shape(lambda tree: unstack_layers(tree, dict(assembly.stacks)), assembly.shapes)
    old, fresh = apart(before), apart(after)
    for kind, what in (("params", "parameter"), ("frozen", "frozen array")):
        have = _moved(flatten(old[kind]), before, after)
        for path, leaf in flatten(fresh[kind]).items():
            # What an objective froze itself it also fills itself, and the transforms that a stage adds the network.
            kept = kind == "params" or _of_network(path, after)
            if stage.added and _of_network(path, after):
                continue
            if kept and (path not in have or have[path].shape != leaf.shape):
                raise UserError(
                    f"stage {stage.name!r}: {what} {path} has no counterpart of its shape in the stage "
                    "before, and no converter is named"
                )
    shapes = lambda tree: {name: leaf.shape for name, leaf in flat(tree["opt"]).items()}
    if stage.optimizer == "keep" and shapes(old) != shapes(fresh):
        raise UserError(
            f"stage {stage.name!r}: the optimizer's state does not fit the new model or optimizer: say "
            "optimizer='reset'"
        )


def carry(
    stage: Stage,
    before: Assembly,
    after: Assembly,
    old: Mapping[str, Any],
    fresh: Mapping[str, Any],
    network: Parts | None = None,
) -> dict[str, Any]:
    """The state that opens a stage: values of the old one where path and shape agree, the rest fresh. Where the network
    stands elsewhere in the module (a student beside its teacher), its values move there. `network` is what the
    transforms made that the stage adds, where it does."""
    places = jax.tree.map(lambda leaf: leaf.sharding, dict(fresh))
    old, fresh = unstack_layers(dict(old), dict(before.stacks)), unstack_layers(dict(fresh), dict(after.stacks))
    if stage.converter:
        state = dict(resolve({}, stage.converter, "converter")(old, fresh))
    else:
        values = {kind: _moved(flatten(old[kind]), before, after) for kind in ("params", "stats", "frozen")}
        if network is not None:
            for kind, found in values.items():
                beside = {path: leaf for path, leaf in found.items() if not _of_network(path, after)}
                named = flatten(getattr(network, kind))
                values[kind] = beside | {"/".join((*after.objective.path, name)): leaf for name, leaf in named.items()}
        if stage.refills:
            values["frozen"] = {path: leaf for path, leaf in values["frozen"].items() if _of_network(path, after)}
        state = {**fresh, "step": old["step"]}
        state |= {kind: replaced(fresh[kind], values[kind]) for kind in values}
        if stage.optimizer == "keep":
            moments = flat(old["opt"])
            state["opt"] = jax.tree.unflatten(
                jax.tree.structure(fresh["opt"]), [moments[name] for name in flat(fresh["opt"])]
            )
    if jax.tree.map(jnp.shape, state) != jax.tree.map(jnp.shape, dict(fresh)):
        raise UserError(f"stage {stage.name!r}: {stage.converter} does not give the state that the stage needs")
    return sharding.put(stack_layers(state, dict(after.stacks)), places)


def _of_network(path: str, assembly: Assembly) -> bool:
    inside = assembly.objective.path
    return path.split("/")[: len(inside)] == list(inside)


def _moved(values: Mapping[str, Any], before: Assembly, after: Assembly) -> dict[str, Any]:
    """Paths of the old module -> paths of the new one, for what belongs to the network."""
    out, into = before.objective.path, after.objective.path
    move = lambda path: "/".join((*into, *path.split("/")[len(out) :])) if _of_network(path, before) else path
    return {move(path): leaf for path, leaf in values.items()}


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
