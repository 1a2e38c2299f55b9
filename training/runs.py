"""A run on the disk: `config.json`, `facts.json`, `provenance.json`, `metrics.jsonl`, `checkpoints/`, `rows.jsonl`."""

import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from lissom.models.stack import stacks
from lissom.models.variables import Parts, flatten, split
from lissom.training.building import build_network, build_objective
from lissom.training.checkpoints import Checkpoints
from lissom.training.config import differences, from_json, to_json
from lissom.training.errors import UserError
from lissom.training.stages import final_config, place


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


def claim(workdir: pathlib.Path, config, overwrite: bool) -> bool:
    """Makes `workdir` the run of `config`; True where a run of the same config stands there to be resumed.

    A directory that holds another config is an error, or is emptied of its run where `overwrite` is given.
    """
    if is_run(workdir):
        changed = differences(read_config(workdir).to_dict(), from_json(to_json(config)).to_dict())
        if not changed and not overwrite:
            return True
        if not overwrite:
            raise UserError(
                f"{workdir} holds a run of another config ({'; '.join(changed[:5])}"
                f"{' ...' if len(changed) > 5 else ''}): give another --workdir, or --overwrite"
            )
        _remove_run(workdir)
    elif workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(to_json(config))
    except OSError as error:
        raise UserError(f"--workdir={workdir} can't be written: {error.strerror}") from error
    return False


def _remove_run(workdir: pathlib.Path) -> None:
    for name in ("config.json", "facts.json", "provenance.json", "metrics.jsonl", "rows.jsonl"):
        (workdir / name).unlink(missing_ok=True)
    for name in ("checkpoints", "tensorboard", "exports", "profile"):
        shutil.rmtree(workdir / name, ignore_errors=True)


def as_loop(config):
    """The config with its layers apart, where the model has a stack."""
    if "stack" in config.model:
        config = config.copy_and_resolve_references()
        with config.ignore_type():
            config.model.stack = "loop"
    return config


def load_network(path: pathlib.Path | str, structure=lambda module: module, looped: bool = False, say=print) -> Parts:
    """The trained network of a run, from its newest whole checkpoint, on the first device; `structure` applies the
    transforms it was trained with, `looped` builds its layers apart."""
    config, facts = final_config(read_config(path)), read_facts(path)
    config = as_loop(config) if looped else config
    objective = build_objective(config)

    def build():
        rngs = nnx.Rngs(0)
        return objective.build(structure(build_network(config, facts, rngs)), rngs)

    module = nnx.eval_shape(build)
    parts = split(module)
    store = Checkpoints(pathlib.Path(path) / "checkpoints")
    if not store.steps():
        raise UserError(f"{path} has no checkpoint: the run was stopped before its first save")
    shapes = {"params": parts.params, "stats": parts.stats, "frozen": parts.frozen}
    found = store.newest(shapes, stacks(module), say)
    if found is None:
        raise UserError(f"{path} has no whole checkpoint: every one is damaged")
    state = jax.tree.map(jax.numpy.asarray, found[1])
    whole = nnx.merge(parts.graph, state["params"], state["stats"], state["frozen"])
    return split(objective.network(whole))


def init_from(state: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """A fresh state whose parameters and statistics come from a finished run, or are the mean of several runs'
    (a uniform soup: Wortsman et al. 2022, arXiv:2203.05482)."""
    if isinstance(paths, str):
        paths = (paths,)
    networks = [load_network(path) for path in paths]
    for kind in ("params", "stats"):
        want = flatten(state[kind])
        have = [flatten(getattr(network, kind)) for network in networks]
        for path, values in zip(paths, have, strict=True):
            wrong = [name for name in want if name not in values or values[name].shape != want[name].shape]
            if wrong and kind == "params":
                raise UserError(f"init_from: the run {path} has no {wrong[0]} of the shape that this model needs")
        mean = {
            name: sum(values[name] for values in have) / len(have)
            for name in want
            if all(name in values and values[name].shape == want[name].shape for values in have)
        }
        state = {**state, kind: place(state[kind], mean)}
    return state
