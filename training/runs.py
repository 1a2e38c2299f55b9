"""A run on the disk: `config.json`, `facts.json`, `provenance.json`, `metrics.jsonl`, `checkpoints/`, `rows.jsonl`."""

import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from lissom.models import MODELS
from lissom.models.registry import resolve, settings_of
from lissom.models.stack import stack_layers, unstack_layers
from lissom.models.variables import Parts, flatten, split
from lissom.training import processes, sharding
from lissom.training.building import build_network, build_objective
from lissom.training.checkpoints import Checkpoints
from lissom.training.config import WATCHING, differences, from_json, to_json
from lissom.training.errors import UserError
from lissom.training.stages import Stage, final_config, replaced

# The facts that a network is built on.
SHAPES = ("kind", "input_shape", "classes", "outputs", "vocab_size", "features", "environments", "interval")
KINDS = ("params", "stats", "frozen")


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def is_run(path: pathlib.Path | str) -> bool:
    """Whether a directory holds a run."""
    return (pathlib.Path(path) / "config.json").is_file()


def read_config(path: pathlib.Path | str):
    """The resolved config of a run."""
    file = pathlib.Path(path) / "config.json"
    if not file.is_file():
        raise UserError(f"{path} holds no run: there is no {file.name} in it")
    try:
        return from_json(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} can't be read: {error}") from error


def read_facts(path: pathlib.Path | str) -> dict[str, Any]:
    """What the data dictates to the model of a run: shapes, classes, and the size of the training set."""
    file = pathlib.Path(path) / "facts.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read: {error}") from error


def changes(path: pathlib.Path, config) -> list[str]:
    """What differs between the config of a run and `config`, but for fields that change nothing in a run."""
    found = differences(read_config(path).to_dict(), from_json(to_json(config)).to_dict())
    return [line for line in found if not line.startswith(WATCHING)]


def check_same(path: pathlib.Path, config) -> None:
    """Raises UserError where a run of another config stands, such as of other flags or of another recipe."""
    if changed := changes(path, config):
        raise UserError(f"{path} holds a run of another config ({'; '.join(changed[:3])}): give another --workdir")


def stands(workdir: pathlib.Path, config, overwrite: bool) -> bool:
    """Whether a run of the same config stands in `workdir`, to be resumed. One of another config is an error unless it
    may be overwritten. Changes nothing."""
    if is_run(workdir):
        if overwrite:
            return False
        changed = changes(workdir, config)
        if changed:
            raise UserError(
                f"{workdir} holds a run of another config ({'; '.join(changed[:5])}"
                f"{' ...' if len(changed) > 5 else ''}): give another --workdir, or --overwrite"
            )
        return True
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file")
    if (workdir / "checkpoints").exists() and not overwrite:
        raise UserError(f"{workdir} holds checkpoints and no config.json: give another --workdir, or --overwrite")
    return False


def check_facts(path: pathlib.Path, facts: Mapping[str, Any], names: Sequence[str] = SHAPES) -> None:
    """Raises UserError where a dataset, by the named facts, is not any more what the run was begun on."""
    before, now = read_facts(path), json.loads(json.dumps(facts, default=str))
    for name in names:
        if before.get(name) != now.get(name):
            raise UserError(
                f"{path} was trained on data with {name} {before.get(name)}, which by now is {now.get(name)}: a run "
                "keeps to its data, so give another --workdir"
            )


def resumed(store: Checkpoints, plan: Sequence[Stage], assemblies: Sequence) -> tuple[dict[str, Any] | None, int]:
    """(state, index of its stage) of the newest checkpoint that is whole in every process, those after it set aside;
    (None, 0) where there is none yet, and a UserError where all are damaged."""
    steps = store.steps()
    for step in steps:
        # A checkpoint at a boundary was written by the stage that ends there.
        current = next(i for i, stage in enumerate(plan) if step <= stage.stop)
        found = store.newest_at(step, assemblies[current].shapes, assemblies[current].stacks, _to_stderr)
        if processes.any_of(found is None):  # damage to one process's shards is damage to all
            continue
        processes.together("read")
        if jax.process_index() == 0:
            store.set_aside_after(step)
            what = "resuming" if step < plan[-1].stop else "nothing is left to train in"
            _to_stderr(f"{what} {store.directory.parent} at step {step} of {plan[-1].stop}")
        processes.together("damaged ones set aside")
        return found, current
    if steps:
        raise UserError(f"every checkpoint of {store.directory.parent} is damaged: --overwrite to start anew")
    return None, 0


def claim(workdir: pathlib.Path, config, overwrite: bool) -> None:
    """Makes `workdir` the run of `config`; with `overwrite` it is emptied of what another run left in it."""
    try:
        if overwrite:
            _remove_run(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(to_json(config))
    except OSError as error:
        raise UserError(f"--workdir={workdir} can't be written: {error.strerror}") from error


def _remove_run(workdir: pathlib.Path) -> None:
    for name in ("config.json", "facts.json", "provenance.json", "metrics.jsonl", "rows.jsonl"):
        (workdir / name).unlink(missing_ok=True)
    for name in ("checkpoints", "frozen", "checksums", "tensorboard", "exports", "profile"):
        shutil.rmtree(workdir / name, ignore_errors=True)


def as_loop(config):
    """The config with its layers apart, where the model has a stack."""
    if "stack" in settings_of(resolve(MODELS, config.model.name, "model")):
        config = config.copy_and_resolve_references()
        with config.unlocked(), config.ignore_type():
            config.model.stack = "loop"
    return config


def load_network(path: pathlib.Path | str, structure_of: Callable | None = None, say=_to_stderr) -> Parts:
    """The trained network of a finished run, from its newest whole checkpoint, on the first device, with its layers
    apart; where that is not of the run's last step, it is an error. `structure_of(config)` gives the function that
    applies the transforms which the run was trained with."""
    config, facts = as_loop(final_config(read_config(path))), read_facts(path)
    if config.transforms and structure_of is None:
        raise UserError(f"{path} was trained with transforms, which a network that is taken from it can't have")
    structure = structure_of(config) if structure_of else lambda module: module
    parts = split(nnx.eval_shape(lambda: structure(build_network(config, facts, nnx.Rngs(0)))))
    store = Checkpoints(pathlib.Path(path) / "checkpoints")
    if not store.steps():
        raise UserError(f"{path} has no checkpoint: the run was stopped before its first save")
    # Of the module that was trained only the network is read: what stands beside it may not exist any more.
    inside = build_objective(config).path
    shapes = {kind: nested(getattr(parts, kind), inside) for kind in KINDS}
    found = store.newest(shapes, {}, say)
    if found is None:
        raise UserError(f"{path} has no whole checkpoint: every one is damaged")
    if found[0] < facts.get("steps", 0):
        raise UserError(
            f"{path} is not finished: its newest whole checkpoint is of step {found[0]} of {facts['steps']}"
        )
    return Parts(parts.graph, *(jax.tree.map(jax.numpy.asarray, within(found[1][kind], inside)) for kind in KINDS))


def nested(tree: dict, path: Sequence[str]) -> dict:
    """{"a": {"b": tree}} for the path ("a", "b"), and no dict at all for an empty tree."""
    for name in reversed(path):
        tree = {name: tree} if tree else {}
    return tree


def within(tree: dict, path: Sequence[str]) -> dict:
    """The inverse of `nested`."""
    for name in path:
        tree = tree.get(name, {})
    return tree


def starting_values(
    shapes: Mapping, stacks: Mapping, inside: Sequence[str], network: Parts, paths: str
) -> dict[str, dict]:
    """{"params" | "stats" | "frozen": {path: value}} of a network, layers apart, for a module of the given shapes whose
    network stands at `inside`. UserError where the network, which errors call `paths`, has not every parameter in its
    shape, or has one that the module has no place for: half a model means another function."""
    shapes = jax.eval_shape(lambda tree: unstack_layers(tree, dict(stacks)), dict(shapes))
    values = {}
    for kind in KINDS:
        want, have = flatten(within(shapes[kind], inside)), flatten(getattr(network, kind))
        fits = {name for name in want if name in have and have[name].shape == want[name].shape}
        if kind != "stats":
            for name in sorted(want.keys() - fits):
                raise UserError(f"config.init_from: {paths} has no {name} of the shape that this model needs")
            for name in sorted(have.keys() - want.keys()):
                raise UserError(f"config.init_from: {paths} has {name}, for which this model has no place")
        values[kind] = {"/".join((*inside, name)): have[name].astype(want[name].dtype) for name in sorted(fits)}
    return values


def started(state: Mapping[str, Any], stacks: Mapping, values: Mapping[str, Mapping]) -> dict[str, Any]:
    """A fresh state with `starting_values` in it."""
    places = jax.tree.map(lambda leaf: leaf.sharding, dict(state))
    apart = unstack_layers(dict(state), dict(stacks))
    apart |= {kind: replaced(apart[kind], values[kind]) for kind in values}
    return sharding.put(stack_layers(apart, dict(stacks)), places)
