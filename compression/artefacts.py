"""An exported network: a directory with the config, the facts of the data, the transforms and one checkpoint.

Its size is that of the directory; what is said of a compressed network is measured on the network that `reload` gives.
"""

import functools
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.compression.quantization.ranges import check_warm_up
from lissom.compression.transforms import applied, build_transforms, structured
from lissom.models.variables import Parts, merge, split
from lissom.training.building import build_network
from lissom.training.checkpoints import Checkpoints
from lissom.training.config import from_json, to_json
from lissom.training.errors import UserError
from lissom.training.runs import as_loop, load_network, read_config, read_facts
from lissom.training.stages import final_config


def export(
    run: pathlib.Path | str,
    directory: pathlib.Path | str,
    transforms: Sequence[Mapping[str, Any]] = (),
    data: Iterable[dict] = (),
) -> pathlib.Path:
    """Applies `transforms` to the trained network of a run and writes the result; returns the directory.

    Layers are told apart by their paths, so the network is built as a loop whatever the run trained with.
    """
    config, facts = final_config(read_config(run)), read_facts(run)
    parts = split(applied(merge(load_network(run, structure_of)), build_transforms(transforms), data))
    directory = pathlib.Path(directory)
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(to_json(as_loop(config)))
    (directory / "facts.json").write_text(json.dumps(facts, default=str))
    (directory / "transforms.json").write_text(json.dumps([dict(entry) for entry in transforms], default=list))
    store = Checkpoints(directory / "checkpoints", keep=1)
    store.save(0, _state(parts), {}, {})
    store.close()
    return directory


def structure_of(config) -> Callable[[nnx.Module], nnx.Module]:
    """The function that gives a fresh network the structure of `config.transforms`."""
    return functools.partial(structured, transforms=build_transforms(config.transforms))


def check_transforms(config, facts: Mapping[str, Any]) -> None:
    """Raises UserError where a transform of `config.evaluation` would find nothing to do, or could not do it: found
    before training on the shapes of the network, and not when it is over."""
    staged, config = bool(config.stages), as_loop(final_config(config))
    trained, entries = build_transforms(config.transforms), build_transforms(config.evaluation.transforms)
    # Of a network that was trained before ranges are measured at once.
    if not (staged or config.init_from) and any(name == "packed" for name, _ in entries):
        late = nnx.eval_shape(lambda: structured(build_network(config, facts, nnx.Rngs(0)), trained))
        # Each micro-batch is a call.
        check_warm_up(late, facts["steps"] * config.optim.accumulate if "steps" in facts else None)
    for entry in entries:
        nnx.eval_shape(lambda entry=entry: structured(build_network(config, facts, nnx.Rngs(0)), [*trained, entry]))


def reload(directory: pathlib.Path | str) -> Parts:
    """The network of an exported directory: build, structure in order, restore. A damaged checkpoint is an error."""
    directory = pathlib.Path(directory)
    try:
        config = from_json((directory / "config.json").read_text())
        facts = json.loads((directory / "facts.json").read_text())
        entries = json.loads((directory / "transforms.json").read_text())
    except OSError as error:
        beside = sorted(path.parent.name for path in directory.parent.glob("*/transforms.json"))
        raise UserError(
            f"{directory} holds no exported network: {error.strerror} ({error.filename})"
            + (f"; beside it are {', '.join(map(repr, beside))}" if beside else "")
        ) from error
    transforms = build_transforms(config.transforms) + build_transforms(entries)
    parts = split(nnx.eval_shape(lambda: structured(build_network(config, facts, nnx.Rngs(0)), transforms)))
    found = Checkpoints(directory / "checkpoints").newest(
        _state(parts), {}, say=lambda text: print(text, file=sys.stderr)
    )
    if found is None:
        raise UserError(f"{directory} has no whole checkpoint")
    state = jax.tree.map(jnp.asarray, found[1])
    return Parts(parts.graph, state["params"], state["stats"], state["frozen"])


def _state(parts: Parts) -> dict[str, Any]:
    return {"params": parts.params, "stats": parts.stats, "frozen": parts.frozen}
