"""Copies of one network side by side: the branches of Branch-Train-MiX."""

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.stack import stacks
from lissom.models.variables import Parts, merge, repeat, split


class Branches(nnx.Module):
    """`count` networks of one shape: every parameter has a leading axis of them, and begins as in the one given.

    inputs [B, ...], branch int32 [B] -> the outputs [B, ...] of each sequence's own branch. Without `branch` the
    branches are an ensemble: log mean_b softmax(logits_b), which costs `count` forward passes (Branch-Train-Merge, Li
    et al. 2022, arXiv:2208.03306, with even weights; the paper weighs by a posterior over domains).

    A forward pass with `branch` holds the parameters once a sequence of the batch.
    """

    def __init__(self, network: nnx.Module, count: int):
        if count < 1:
            raise ValueError(f"branches: count must be at least 1, got {count}")
        if stacks(network):
            raise ValueError("branches: the layers of a network must stand apart: set config.model.stack to 'loop'")
        if split(network).stats:
            raise ValueError("branches are of a network without statistics: each would have its own")
        self.network, self.count = repeat(network, count), count

    def __call__(
        self,
        inputs: jax.Array,
        *,
        branch: jax.Array | None = None,
        train: bool = False,
        key: jax.Array | None = None,
    ):
        parts = split(self.network)

        def of_one(params, frozen, inputs, key):
            return merge(Parts(parts.graph, params, {}, frozen))(inputs, train=train, key=key)

        trees = parts.params, parts.frozen
        if branch is None:
            keys = None if key is None else jax.random.split(key, self.count)
            logits, aux = jax.vmap(of_one, (0, 0, None, None if key is None else 0))(*trees, inputs, keys)
            mixed = jax.nn.logsumexp(jax.nn.log_softmax(logits), 0) - jnp.log(self.count)
            return mixed, _mean(aux)
        keys = None if key is None else jax.random.split(key, len(inputs))
        trees = jax.tree.map(lambda leaf: leaf[branch], trees)
        y, aux = jax.vmap(of_one, (0, 0, 0, None if key is None else 0))(*trees, inputs[:, None], keys)
        return y[:, 0], _mean(aux)


def _mean(aux: dict) -> dict:
    """Losses and metrics of the mapped networks, one of each."""
    return jax.tree.map(lambda leaf: leaf.mean(0), aux)
