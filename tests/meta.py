"""Tasks and networks so small that meta-gradients are known, or told by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lissom.models.cnn import ConvNet
from lissom.models.perceptron import Perceptron
from lissom.models.variables import Param, split

KEY = jax.random.key(0)


class Line(nnx.Module):
    """w x: of one number, its loss has the Hessian 2 mean x^2."""

    def __init__(self, w=0.5):
        self.w = Param(jnp.full(1, w), out_sharding=(None,))

    def __call__(self, inputs, *, train=False, key=None):
        return inputs * self.w[...], {"losses": {}, "metrics": {}}


def batch_of(support, targets, inputs, labels):
    given = {"support_inputs": support, "support_labels": targets, "inputs": inputs, "labels": labels}
    return {name: jnp.asarray(value) for name, value in given.items()} | {"mask": jnp.ones(len(support))}


def regression(tasks=3, seed=0, shots=4, queries=5):
    """x, and y = a x + noise with a task's own a."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (tasks, shots + queries, 1))
    y = jax.random.normal(keys[1], (tasks, 1, 1)) * x + 0.1 * jax.random.normal(keys[2], x.shape)
    return batch_of(x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])


def classes(tasks=2, ways=3, shots=2, queries=4, seed=0):
    """Pictures [6, 6, 1] around a task's own means."""
    keys = jax.random.split(jax.random.key(seed), 2)
    labels = lambda each: jnp.tile(jnp.repeat(jnp.arange(ways), each), (tasks, 1))
    means = jax.random.normal(keys[0], (tasks, ways, 6, 6, 1))
    total = shots + queries
    x = jnp.repeat(means, total, 1).reshape(tasks, ways, total, 6, 6, 1)
    x = x + 0.5 * jax.random.normal(keys[1], x.shape)
    flat = lambda part: part.reshape(tasks, -1, 6, 6, 1)
    found = batch_of(flat(x[:, :, :shots]), labels(shots), flat(x[:, :, shots:]), labels(queries))
    return found | {"classes": jnp.tile(jnp.arange(ways) + 1, (tasks, 1))}


def perceptron(**settings):
    return Perceptron(**{"input_shape": (1,), "outputs": 1, "hidden": (8,), "rngs": nnx.Rngs(0)} | settings)


def smooth():
    module = perceptron()
    module.activation = jnp.tanh
    return module


def cnn(**settings):
    given = {"input_shape": (6, 6, 1), "classes": 3, "channels": (4, 4), "kernel": 3, "batch_norm": True}
    return ConvNet(**given | settings, rngs=nnx.Rngs(1))


def gradient(objective, module, batch, key=KEY):
    parts = split(objective.build(objective.structure(module), nnx.Rngs(2)))
    return parts, objective.gradients(*parts, batch, key, jnp.zeros((), jnp.int32))


def close(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **{"rtol": 1e-4, "atol": 1e-6} | tolerance), one, other)


def flat(tree):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
