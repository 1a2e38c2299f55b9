"""A network as functions of its parameters: what an inner loop needs, a network a task under one `vmap`."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models import products
from lissom.models.norms import BatchNorm
from lissom.models.variables import Parts, Tree, is_stat, map_paths, merge, split, stats_of
from lissom.ops import dispatch
from lissom.training.errors import UserError
from lissom.training.objectives.base import cross_entropy

STATISTICS = {
    "support": "by the statistics of the task's support, queries too",
    "queries": "queries by their own statistics, so that an answer depends on the other queries (transductive)",
    "running": "by running averages over all training tasks",
}


class TaskNetwork:
    """The network without its values. `statistics` says by which mean and variance BatchNorm normalises (`STATISTICS`);
    `method`: whether its outputs or its features are asked for; `ways`: the classes that a headless network is for
    (`headless`). Losses that layers ask for (the balance of experts) are no part of a task's loss.

    support(params, stats, inputs, key, train)   (outputs, stats for the queries)
    queries(params, stats, inputs, key, train)   (outputs, new stats), with the stats that `support` gave

    train: whether this is a training step, in which running averages are moved, and the batch's own normalise. Whatever
    normalises, what is random in training (dropout) is so in training alone.
    """

    def __init__(self, graph: nnx.GraphDef, frozen: Tree, statistics: str, method: str, ways: int | None):
        self.graph, self.frozen, self.statistics, self.method, self.ways = graph, frozen, statistics, method, ways

    @classmethod
    def of(cls, network: nnx.Module, statistics: str, method: str = "outputs") -> tuple["TaskNetwork", Tree, Tree]:
        """(the network, its params, its stats)."""
        graph, params, stats, frozen = split(network)
        return cls(graph, frozen, statistics, method, getattr(network, "ways", None)), params, stats

    def by(self, method: str) -> "TaskNetwork":
        """The same network, of which another method is run: "outputs" or "features"."""
        return TaskNetwork(self.graph, self.frozen, self.statistics, method, self.ways)

    def support(self, params: Tree, stats: Tree, inputs: jax.Array, key: jax.Array, train: bool = False):
        network = self._merged(params, stats, self.statistics != "running" or train)
        outputs = self._run(network, inputs, train, key)
        return outputs, stats if self.statistics == "queries" else stats_of(network)

    def queries(self, params: Tree, stats: Tree, inputs: jax.Array, key: jax.Array, train: bool = False):
        network = self._merged(params, stats, self.statistics == "queries" or (self.statistics == "running" and train))
        outputs = self._run(network, inputs, train, key)
        return outputs, stats_of(network) if self.statistics == "running" else stats

    def _run(self, network: nnx.Module, inputs: jax.Array, train: bool, key: jax.Array) -> jax.Array:
        if self.method == "features":
            return network.features(inputs, train=train, key=key)
        return network(inputs, train=train, key=key)[0]

    def _merged(self, params: Tree, stats: Tree, by_batch: bool) -> nnx.Module:
        network = merge(Parts(self.graph, params, stats, self.frozen))
        for node in batch_norms(network):
            node.by_batch = by_batch
            if self.statistics == "support":
                node.momentum = 0.0  # running averages that keep nothing are the statistics of the last batch
        return network


def has_features(network: nnx.Module) -> bool:
    """Whether it has what a head reads, `features(inputs, train=, key=)` [B, feature_size]: a transformer's features
    are of tokens."""
    return hasattr(network, "feature_size")


def headless(model: nnx.Module) -> nnx.Module:
    """The network without the product that its features end in; `ways` says how many outputs it had."""
    if not has_features(model):
        raise ValueError(f"model: {type(model).__name__} has no features without a head, which this objective is about")
    model.ways = model.head.kernel.shape[-1]
    model.head = None
    return model


def batch_norms(network: nnx.Module) -> list[BatchNorm]:
    """Every BatchNorm of the network."""
    return [node for _, node in nnx.iter_graph(network) if isinstance(node, BatchNorm)]


def check_state(network: nnx.Module, statistics: str) -> None:
    """UserError where a network in training has state besides BatchNorm's and the statistics are a task's own: what its
    tasks make of that is thrown away, and a range of activations or a router's bias would never move. (State that no
    training moves anyway is that of a module which says so, `state_moves`.)"""
    if statistics == "running":
        return
    nodes = [(path, node) for path, node in nnx.iter_graph(network) if isinstance(node, nnx.Module)]
    own = [path for path, node in nodes if isinstance(node, BatchNorm) or not getattr(node, "state_moves", True)]
    for path, value in nnx.iter_graph(network):
        if isinstance(value, nnx.Variable) and is_stat(path, value) and path[:-1] not in own:
            raise UserError(
                f"statistics={statistics!r} keeps none of the network's state, and {'/'.join(map(str, path))} is some "
                "that training moves: set config.objective_kwargs.<objective>.statistics='running'"
            )


def note(network: nnx.Module, statistics: str) -> tuple[str, ...]:
    """What a row says of BatchNorm, where the network has one."""
    return (f"BatchNorm normalises {STATISTICS[statistics]}",) if batch_norms(network) else ()


def note_of_frozen(network: nnx.Module) -> tuple[str, ...]:
    """What a row says of an inner loop that part of a network is kept from."""
    _, params, _, frozen = split(network)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    held = count(frozen)
    return (f"{held:,} frozen numbers are not adapted, {count(params):,} parameters are",) if held else ()


def task_loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy of classes [n] (whole numbers), or mean squared error of targets [n, D]."""
    if jnp.issubdtype(targets.dtype, jnp.integer):
        return cross_entropy(outputs, targets).mean()
    return jnp.square(outputs.astype(jnp.float32) - targets).mean()


@contextlib.contextmanager
def a_network_a_task() -> Iterator[None]:
    """For parameters that differ from task to task, and gradients of gradients: convolutions as batched products of
    matrices, and ops in plain jax.numpy, since a kernel's backward pass has no derivative."""
    with products.as_matrices(), dispatch.use("reference"):
        yield


@contextlib.contextmanager
def one_network() -> Iterator[None]:
    """For parameters that are the same for all tasks of a vmap."""
    with products.as_matrices(False):
        yield


def parts(tree: Any, is_mine: Callable[[str], bool]) -> tuple[Any, Any]:
    """(the leaves of whose path `is_mine` holds, the others): each with None in the places of the other's."""
    mine = map_paths(lambda name, leaf: leaf if is_mine(name) else None, tree)
    others = map_paths(lambda name, leaf: None if is_mine(name) else leaf, tree)
    return mine, others


def together(mine: Any, others: Any) -> Any:
    """The inverse of `parts`."""
    return jax.tree.map(lambda a, b: b if a is None else a, mine, others, is_leaf=lambda leaf: leaf is None)
