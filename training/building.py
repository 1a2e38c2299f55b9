"""From a config to the arrays of training: shapes first, then shardings, then arrays."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from lissom import data
from lissom.models import MODELS, SIZES
from lissom.models.registry import check_settings, check_types, construct, required, resolve, settings_of
from lissom.models.stack import stacks
from lissom.models.variables import Tree, logical_axes, split
from lissom.training import OBJECTIVES, sharding
from lissom.training.config import total_steps
from lissom.training.errors import UserError
from lissom.training.fields import BY_CLASS
from lissom.training.objectives.base import Objective
from lissom.training.optimizers import build_optimizer

FACTS = ("input_shape", "classes", "outputs", "vocab_size", "length", "features", "environments", "interval")


class Assembly(NamedTuple):
    """Everything about a stage that is known before an array exists."""

    objective: Objective
    graph: nnx.GraphDef
    make: Any  # key -> (params, stats, frozen)
    shapes: dict[str, Any]  # the state as ShapeDtypeStructs, each with its sharding
    optimizer: optax.GradientTransformation
    stacks: dict[tuple, tuple[int, int]]
    mesh: Mesh


def data_settings(config) -> dict[str, Any]:
    """The settings of the dataset that `config.data` names: under its name, those of a folder or a function under the
    last part of theirs (a config's keys have no dots)."""
    name = config.data.name
    for key in (name, name.rpartition(":")[2], pathlib.PurePath(name).name):
        if key in config.data.kwargs:
            return config.data.kwargs[key].to_dict()
    return {}


def load_dataset(config, **other) -> data.Dataset:
    """The dataset that `config.data` names, with its own settings (`other` on top), as the config learns from it."""
    return as_learned(config, load_plain(config, **other))


def load_plain(config, **other) -> data.Dataset:
    """The same as the task has it."""
    settings = {**data_settings(config), **other}
    return data.load(config.data.name, data_dir=config.data.data_dir or None, **settings)


def as_learned(config, dataset: data.Dataset) -> data.Dataset:
    """A plain dataset with what is a part of the method and not of the task: single training examples in the place of
    episodes where the objective is `single`, and the config's meta-tokens."""
    if dataset.kind == "episode" and build_objective(config).single:
        dataset = data.single_examples(dataset)
    return data.with_meta_tokens(dataset, config.data.meta_tokens, config.data.meta_fraction)


def class_stream(config, dataset: data.Dataset) -> data.ClassStream | None:
    """The stream by class that `config.data` asks for, or None: the shuffled one."""
    if config.data.order != "by_class":
        return None
    settings = {name: config.data[name] for name in BY_CLASS}
    return data.ClassStream(dataset, batch_size=config.data.batch_size, seed=config.seed, **settings)


def epoch_examples(config, dataset: data.Dataset, stream: data.ClassStream | None) -> int:
    """The training examples of an epoch: the dataset once; by class, the rows of the stream. UserError for a run that
    is longer than its stream."""
    if stream is None:
        return len(dataset.train)
    total = total_steps(config, stream.steps * stream.batch_size)
    if total > stream.steps:
        raise UserError(
            f"config.train asks for {total} steps, and the stream by class has {stream.steps}: train.epochs=1 is all "
            "of it, and config.data.task_steps makes it longer"
        )
    return stream.steps * stream.batch_size


# The facts that a network is built for. A decoder takes any length; the examples of a task have one shape.
SAME = ("classes", "vocab_size", "features", "environments", "interval")
SHAPES = ("input_shape", "outputs")


def further_tests(config, dataset: data.Dataset) -> list[tuple[dict[str, Any], data.Dataset]]:
    """[(settings, the dataset with them)] for each entry of `config.evaluation.data`, and for each of
    `config.evaluation.corruptions` at each severity: test sets beside that of `dataset`, which a network of its
    vocabulary, classes, features or environments can be judged on."""
    found = []
    for settings in map(dict, config.evaluation.data):
        if any(settings == earlier for earlier, _ in found):
            raise UserError(f"config.evaluation.data holds {settings} twice")
        other = load_dataset(config, **settings)
        for name in SAME + (SHAPES if dataset.kind == "episode" else ()):
            ours, theirs = dataset.info.get(name), other.info.get(name)
            if ours != theirs:
                raise UserError(
                    f"config.evaluation.data holds {settings}, with which {config.data.name!r} has {name} {theirs}; "
                    f"the network is for {ours}"
                )
        found.append((settings, other))
    try:
        return found + data.corrupted(dataset, config.evaluation.corruptions, config.evaluation.severities)
    except data.DataError as error:
        raise UserError(f"config.evaluation: {error}") from error


def build_objective(config) -> Objective:
    """The objective that `config.objective` names, with its own settings."""
    try:
        return construct(OBJECTIVES, config.objective, config.objective_kwargs.to_dict(), "objective")
    except ValueError as error:
        raise UserError(str(error)) from error


def build_network(config, facts: Mapping[str, Any], rngs: nnx.Rngs) -> nnx.Module:
    """The network of `config.model`: the named size, fields that are set on top, and what the data dictates; with the
    structure that the objective gives it."""
    settings = config.model.to_dict()
    name, size = settings.pop("name"), settings.pop("size", None)
    network = resolve(MODELS, name, "model")
    settings = {key: value for key, value in settings.items() if value is not None}
    check_settings(network, settings, f"model {name!r}", reserved=FACTS)
    check_types(network, settings, f"model {name!r}")
    if "dtype" in settings:
        settings["dtype"] = jnp.dtype(settings["dtype"])
    if "meta_token" in facts and "meta" not in settings_of(network.__call__):
        raise UserError(f"config.data.meta_tokens: model {name!r} does not take meta-tokens")
    taken = settings_of(network)
    fixed = {key: facts[key] for key in FACTS if key in taken and key in facts}
    given = {**SIZES.get(name, {}).get(size, {}), **settings, **fixed}
    missing = required(network, given)
    if set(missing) & set(FACTS):
        raise UserError(
            f"model {name!r} needs {', '.join(missing)}, which data {config.data.name!r} does not have: "
            f"it is not made for this kind of data"
        )
    if missing:
        sizes = f", or config.model.size to one of {', '.join(SIZES[name])}" if name in SIZES else ""
        raise UserError(f"model {name!r} needs {', '.join(missing)}: set config.model.{missing[0]}{sizes}")
    try:
        return build_objective(config).structure(network(**given, rngs=rngs))
    except ValueError as error:
        raise UserError(str(error)) from error


def assemble(
    config, facts: Mapping[str, Any], total: int, mesh: Mesh, structure=lambda module: module, offset: int = 0
) -> Assembly:
    """Builds everything but the arrays; `structure` applies the training transforms of the config,
    `offset` is the step at which a fresh optimizer's count begins."""
    objective = build_objective(config)
    if objective.kinds and facts.get("kind", objective.kinds[0]) not in objective.kinds:
        raise UserError(
            f"objective {config.objective!r} learns from {' or '.join(objective.kinds)} data, and "
            f"{config.data.name!r} is {facts['kind']} data"
        )

    objective.prepare(facts)

    def build(key: jax.Array) -> nnx.Module:
        model_key, own_key = jax.random.split(key)
        network = structure(build_network(config, facts, nnx.Rngs(model_key)))
        if "meta_token" in facts and "meta" not in settings_of(type(network).__call__):
            raise UserError("config.data.meta_tokens: the network behind config.transforms does not take meta-tokens")
        return objective.build(network, nnx.Rngs(own_key))

    def make(key: jax.Array) -> tuple[Tree, Tree, Tree]:
        return tuple(split(build(key))[1:])

    abstract = nnx.eval_shape(lambda: build(jax.random.key(0)))
    parts, axes = split(abstract), logical_axes(abstract)
    optimizer = build_optimizer(config.optim, total, offset)
    trees = {"params": parts.params, "stats": parts.stats, "frozen": parts.frozen}
    places = {name: sharding.tree_shardings(tree, axes, mesh) for name, tree in trees.items()}
    opt = jax.eval_shape(optimizer.init, parts.params)
    trees |= {"opt": opt, "step": jax.ShapeDtypeStruct((), jnp.int32)}
    places |= {
        "opt": sharding.optimizer_shardings(optimizer, opt, places["params"], mesh),
        "step": sharding.replicated(mesh),
    }
    shapes = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), trees, places
    )
    return Assembly(objective, parts.graph, make, shapes, optimizer, stacks(abstract), mesh)


def shardings_of(shapes: Any) -> Any:
    """The sharding of each ShapeDtypeStruct."""
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


def fresh_state(assembly: Assembly, key: jax.Array) -> dict[str, Any]:
    """The state at step 0, each array made where it lies."""
    places = shardings_of(assembly.shapes)
    trees = jax.jit(assembly.make, out_shardings=tuple(places[n] for n in ("params", "stats", "frozen")))(key)
    filled = assembly.objective.fill(*trees)
    params, stats, frozen = (
        sharding.put(tree, places[name]) for name, tree in zip(("params", "stats", "frozen"), filled, strict=True)
    )
    # Without out_shardings the moments of a sharded parameter would all lie on the first device.
    opt = jax.jit(assembly.optimizer.init, out_shardings=places["opt"])(params)
    step = sharding.put(jnp.zeros((), jnp.int32), places["step"])
    return {"params": params, "stats": stats, "frozen": frozen, "opt": opt, "step": step}
