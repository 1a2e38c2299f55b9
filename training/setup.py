"""What is known of a run before an array exists and before anything is written: its data, and its stages on them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from lissom import data
from lissom.data.dataset import Example
from lissom.training import sharding, stages
from lissom.training.building import Assembly, class_stream, epoch_examples, load_dataset
from lissom.training.config import total_steps
from lissom.training.stages import Stage
from lissom.training.step import trace_step


@dataclass(frozen=True)
class Setup:
    """A config on its data. `facts` are what the data and the config dictate to whatever is built, `steps` among them;
    `assemblies` are those of the stages of `plan`."""

    config: Any
    mesh: Mesh
    dataset: data.Dataset
    classes: data.ClassStream | None
    facts: dict[str, Any]
    plan: tuple[Stage, ...]
    assemblies: tuple[Assembly, ...]

    @property
    def steps(self) -> int:
        """Of all stages."""
        return self.facts["steps"]

    def batches(self, stage: Stage, step: int) -> Iterator[Example]:
        """This process's rows of the batches of a stage, from that of a step on."""
        return data.train_batches(self.dataset, start_step=step, **self._picked(stage))

    def traced(self, index: int, key: jax.Array, counted: Callable[[], None] = lambda: None) -> tuple[Any, Any]:
        """(the traced step of a stage, where its batches go); `counted` is called once a trace."""
        stage, assembly = self.plan[index], self.assemblies[index]
        batch = data.train_batch(self.dataset, step=stage.start, **self._picked(stage))
        where = sharding.batch_shardings(self.mesh, batch)
        shapes = sharding.global_shapes(batch, where, jax.process_count())
        return trace_step(assembly, stage.config.optim.accumulate, shapes, key, counted), where

    def _picked(self, stage: Stage) -> dict[str, Any]:
        """What picks the batches of a stage."""
        batches = {"batch_size": stage.config.data.batch_size, "augment": stage.config.data.augment}
        ours = {"process": jax.process_index(), "processes": jax.process_count()}
        return {**batches, **ours, "order": self.classes, "seed": self.config.seed}


def set_up(
    config,
    structure_of: Callable,
    check: Callable[[data.Dataset, dict[str, Any]], None] = lambda dataset, facts: None,
) -> Setup:
    """A config's data are loaded, check(dataset, facts) is called, and the stages are assembled by `structure_of` (see
    `stages.assembled`). What can be wrong with the data is a DataError or a UserError, with the stages a UserError."""
    mesh, dataset = sharding.make_mesh(config.mesh), load_dataset(config)
    classes = class_stream(config, dataset)
    epoch = epoch_examples(config, dataset, classes)
    sizes = {"examples": len(dataset.train), "steps": total_steps(config, epoch)}
    facts = {**dataset.info, "kind": dataset.kind, **sizes}
    check(dataset, facts)
    plan, assemblies = zip(*stages.assembled(config, facts, epoch, mesh, structure_of), strict=True)
    return Setup(config, mesh, dataset, classes, facts, plan, assemblies)
