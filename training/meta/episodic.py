"""What all objectives that learn from episodes share: tasks under one vmap, and the one episode evaluator."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models import transductive
from lissom.models.variables import Tree
from lissom.training.meta.networks import (
    STATISTICS,
    TaskNetwork,
    a_network_a_task,
    check_state,
    has_features,
    note,
    one_network,
    task_loss,
)
from lissom.training.objectives.base import Objective

GIVEN = ("support_inputs", "support_labels", "inputs", "labels")


class Episodic(Objective):
    """Subclasses define `adapt` and `answer`, for one task:

        adapt(network, params, stats, inputs, targets, key, train) -> what the support made of the network, any pytree
        answer(network, adapted, inputs, key, train) -> (outputs, new stats)

    The meta-loss is the mean over the tasks of a batch of the queries' loss, the classes' cross-entropy or the targets'
    squared error. Evaluated by accuracy, or mse, and loss over all queries of the test episodes; with the half width of
    the 95 % interval over episodes (`accuracy_interval`, `mse_interval`), and of a network with `features` by what
    prototypes, k-means, Laplacian-regularised prototypes and transported ones make of these, as they are in front of
    the adaptation (`prototype_accuracy` ...; `models/transductive.py`): baselines without which no accuracy here should
    be read.

    statistics: by which mean and variance BatchNorm normalises, a task apart (`networks.py`): the task's support's; the
    batch's, which is transductive; or running averages over training tasks. Rows say it.
    """

    kinds = ("episode",)
    chosen_by = "accuracy"
    method = "outputs"
    mapping = staticmethod(a_network_a_task)  # `one_network` where the support changes no parameters

    def __init__(self, *, statistics: str = "support"):
        if statistics not in STATISTICS:
            raise ValueError(f"objective.statistics={statistics!r} must be one of {', '.join(STATISTICS)}")
        self.statistics_of = statistics

    def adapt(
        self,
        network: TaskNetwork,
        params: Tree,
        stats: Tree,
        inputs: jax.Array,
        targets: jax.Array,
        key: jax.Array,
        train: bool = False,
    ) -> Any:
        raise NotImplementedError

    def answer(
        self, network: TaskNetwork, adapted: Any, inputs: jax.Array, key: jax.Array, train: bool = False
    ) -> tuple[jax.Array, Tree]:
        raise NotImplementedError

    def loss(self, module, batch, key, step):
        del step
        check_state(module, self.statistics_of)
        network, params, stats = TaskNetwork.of(module, self.statistics_of, self.method)

        def task(support, targets, inputs, labels, key):
            outputs, new = self._answered(network, params, stats, support, targets, inputs, key, train=True)
            return task_loss(outputs, labels), hits(outputs, labels), new

        keys = jax.random.split(key, len(batch["inputs"]))
        with self.mapping():
            losses, right, new = jax.vmap(task)(*(batch[name] for name in GIVEN), keys)
        if self.statistics_of == "running":
            nnx.update(module, jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf.mean(0)), new))
        return losses.mean(), {} if right is None else {"accuracy": right.mean()}

    def answers(self, network, inputs, *, support_inputs, support_labels):
        found, params, stats = TaskNetwork.of(network, self.statistics_of, self.method)
        key = jax.random.key(0)
        task = lambda s, t, x: self._answered(found, params, stats, s, t, x, key)[0]
        with self.mapping():
            return jax.vmap(task)(support_inputs, support_labels, inputs)

    def adaptation(self, network: nnx.Module, *, support_inputs: jax.Array, support_labels: jax.Array) -> Any:
        """What the supports of a batch of episodes make of the network: what adaptation takes is the time of this."""
        found, params, stats = TaskNetwork.of(network, self.statistics_of, self.method)
        key = jax.random.key(0)
        with self.mapping():
            return jax.vmap(lambda s, t: self.adapt(found, params, stats, s, t, key))(support_inputs, support_labels)

    def notes(self, network):
        return note(network, self.statistics_of)

    def features(self, network: nnx.Module, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """(features [B, S, D] of the supports, [B, Q, D] of the queries) of a batch of episodes, in front of any
        adaptation. Of networks with `features` (`networks.has_features`)."""
        found, params, stats = TaskNetwork.of(network, self.statistics_of, "features")
        with one_network():
            return jax.vmap(lambda s, x: shown_features(found, params, stats, s, x, jax.random.key(0)))(
                batch["support_inputs"], batch["inputs"]
            )

    def judge(self, network, batch, key):
        found, params, stats = TaskNetwork.of(network, self.statistics_of, self.method)
        transductive_too = has_features(network) and jnp.issubdtype(batch["labels"].dtype, jnp.integer)

        def task(support, targets, inputs, labels, key):
            outputs, _ = self._answered(found, params, stats, support, targets, inputs, key)
            values = {"loss": task_loss(outputs, labels)}
            if not jnp.issubdtype(labels.dtype, jnp.integer):
                return {**values, "mse": values["loss"]}
            values["accuracy"] = hits(outputs, labels)
            if transductive_too:
                with one_network():
                    given, asked = shown_features(found.by("features"), params, stats, support, inputs, key)
                values |= clustered(given, targets, asked, labels, outputs.shape[-1])
            return values

        keys = jax.random.split(key, len(batch["inputs"]))
        with self.mapping():
            values = jax.vmap(task)(*(batch[name] for name in GIVEN), keys)
        return judged(values, batch["mask"])

    def _answered(self, network, params, stats, support, targets, inputs, key, train=False):
        first, second = jax.random.split(key)
        adapted = self.adapt(network, params, stats, support, targets, first, train)
        return self.answer(network, adapted, inputs, second, train)


def hits(outputs: jax.Array, labels: jax.Array) -> jax.Array | None:
    """The share of queries whose class is right; None of targets that are no classes."""
    return (outputs.argmax(-1) == labels).mean() if jnp.issubdtype(labels.dtype, jnp.integer) else None


def shown_features(
    shown: TaskNetwork, params: Tree, stats: Tree, support: jax.Array, inputs: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The features of one episode's support and queries."""
    given, after = shown.support(params, stats, support, key)
    return given, shown.queries(params, after, inputs, key)[0]


METHODS = {
    "prototype_accuracy": transductive.nearest_prototype,
    "kmeans_accuracy": transductive.k_means,
    "laplacian_accuracy": lambda *given: transductive.laplacian(*given)[0],
    "transported_accuracy": transductive.transported,
}


def clustered(given: jax.Array, targets: jax.Array, asked: jax.Array, labels: jax.Array, ways: int) -> dict:
    """{name: accuracy} of one episode by its features alone, in the space of `transductive.centred`."""
    support, queries = transductive.centred(given, asked)
    return {name: hits(method(support, targets, queries, ways), labels) for name, method in METHODS.items()}


def judged(values: dict[str, jax.Array], mask: jax.Array) -> dict[str, tuple]:
    """The one episode evaluator: {name: value [B] of each episode} -> {name: (sum, count)}, and of accuracy and mse the
    sums from which `models/tallies.py` reads the interval over episodes."""
    count = mask.sum()
    sums = {name: (jnp.sum(value * mask), count) for name, value in values.items()}
    for name in ("accuracy", "mse"):
        if name in values:
            moments = jnp.stack([values[name] * mask, jnp.square(values[name]) * mask, mask], -1)
            sums[f"episode_{name}"] = moments.sum(0), count
    return sums
