"""What an objective is. The state of training needs no slot beyond params, stats and frozen: all that an objective
carries (projection heads, EMA copies, a teacher) is part of the module it builds."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.tallies import TALLIES
from lissom.models.variables import Parts, Tree, merge, stats_of

Batch = dict[str, jax.Array]
Sums = dict[str, tuple[jax.Array, jax.Array]]


class Objective:
    """Subclasses define `loss` and `judge` (or `evaluate`); the rest has defaults.

    `kinds` are the kinds of data (`data/dataset.py`) it can learn from, empty for any; `path` is where the network
    stands in the module that `build` gives. `single`: of episodes it is given the examples of the training classes one
    by one (`data.single_examples`), and it is judged on episodes as others are. `chosen_by`: of what is measured in
    evaluation, by what a setting is chosen: "accuracy" where losses of different objectives are of different scales
    (the largest; the loss where there is no accuracy), else the least "loss".
    """

    kinds: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    single: bool = False
    chosen_by: str = "loss"

    def prepare(self, facts: Mapping[str, Any]) -> None:
        """Reads from the disk what `build` and `fill` need, and checks that it goes with the data that `facts` are of;
        called once before them, and by nobody who only judges."""

    def build(self, model: nnx.Module, rngs: nnx.Rngs) -> nnx.Module:
        """The module that is trained; called under `eval_shape` first."""
        del rngs
        return model

    def network(self, module: nnx.Module) -> nnx.Module:
        """The part of the module that is measured and exported."""
        for name in self.path:
            module = getattr(module, name)
        return module

    def structure(self, model: nnx.Module) -> nnx.Module:
        """The network that `build` is given, as the objective wants it: another head, inner learning rates. Unlike what
        `build` puts beside it, this is exported with the network."""
        return model

    def answers(self, network: nnx.Module, inputs: jax.Array, **given: jax.Array) -> Any:
        """What the network says of a batch when it is used: what latencies and FLOPs are of. `given` are the further
        fields of the examples (`evaluation/measuring.py`)."""
        return network(inputs, **given)[0]

    def notes(self, network: nnx.Module) -> tuple[str, ...]:
        """Sentences that a reader of the network's rows needs."""
        del network
        return ()

    def fill(self, params: Tree, stats: Tree, frozen: Tree) -> tuple[Tree, Tree, Tree]:
        """Puts values that no initialiser can give (a teacher's weights) into a fresh state."""
        return params, stats, frozen

    def loss(self, module: nnx.Module, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, dict]:
        """Scalar loss and scalar metrics of a training batch; updates the module's `Stat` variables in place."""
        raise NotImplementedError

    def weight(self, batch: Batch) -> jax.Array | float:
        """What `loss` divides by: micro-batches of a step are averaged with it, so that accumulation gives the gradient
        of the whole batch. Rows of a training batch all count, so by default each micro-batch does as much."""
        del batch
        return 1.0

    def evaluate(self, module: nnx.Module, batch: Batch, key: jax.Array) -> Sums:
        """{name: (sum, count)} of an evaluation batch; rows with batch["mask"] == 0 count nothing."""
        return self.judge(self.network(module), batch, key)

    def judge(self, network: nnx.Module, batch: Batch, key: jax.Array) -> Sums:
        """The same for the network alone: what is left of the module once it is exported."""
        raise NotImplementedError

    def gradients(
        self,
        graph: Any,
        params: Tree,
        stats: Tree,
        frozen: Tree,
        batch: Batch,
        key: jax.Array,
        step: jax.Array,
    ) -> tuple[Tree, Tree, dict]:
        """(gradients, new stats, metrics): reverse mode through `loss`; meta-learners override it."""

        def scalar(params):
            module = merge(Parts(graph, params, stats, frozen))
            loss, metrics = self.loss(module, batch, key, step)
            return loss, (stats_of(module), {"loss": loss, **metrics})

        gradients, (stats, metrics) = jax.grad(scalar, has_aux=True)(params)
        return gradients, stats, metrics

    def statistics(
        self, graph: Any, params: Tree, stats: Tree, frozen: Tree, batch: Batch, key: jax.Array, step: jax.Array
    ) -> Tree:
        """The new stats of `gradients`, without gradients: what fills a `StepSum` of micro-batches beforehand."""
        module = merge(Parts(graph, params, stats, frozen))
        self.loss(module, batch, key, step)
        return stats_of(module)


def auxiliary(aux: dict) -> jax.Array:
    """The sum of the losses that layers ask for, weighted by themselves already."""
    return sum((jnp.sum(value) for value in aux["losses"].values()), jnp.zeros(()))


def reported(aux: dict) -> dict[str, jax.Array]:
    """What layers say of themselves (a density, a load), and the losses they ask for: means over the layers that do."""
    told = {**aux["losses"], **aux["metrics"]}
    return {name: jnp.mean(value) for name, value in told.items() if name not in TALLIES}


def reported_sums(aux: dict, count: jax.Array) -> Sums:
    """`reported` of a network's metrics for `judge`: (mean x count, count); of tallies (sum, count)."""
    return {
        name: (value, count) if name in TALLIES else (jnp.mean(value) * count, count)
        for name, value in aux["metrics"].items()
    }


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """-sum_c t_c log softmax(logits)_c [...], float32, with t = (1 - smoothing) one_hot + smoothing / classes."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    return -((1 - smoothing) * picked + smoothing * log_p.mean(-1)) if smoothing else -picked
