"""Examples for what needs some where there are no data: distilled by a network with BatchNorm from its own statistics
(ZeroQ, Cai et al. 2020, arXiv:2001.00281), or noise.

    minimize over x [N, ...]    sum_l mean_nc (mean_l[n, c] - mu_l[c])^2 + (std_l[n, c] - sigma_l[c])^2
                                + the same of x itself, with 0 and 1 or what it is told

by Adam from Gaussian numbers; mean_l and std_l are over the places of each example in front of the l-th BatchNorm, mu_l
and sigma_l what that one keeps. The paper's 500 steps at a rate of 0.5 are the defaults.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lissom.compression.transforms import layer_paths, replace_layers
from lissom.models.norms import BatchNorm
from lissom.models.variables import Parts, merge, split

# Where the examples come from that ranges of activations are measured on.
EXAMPLES = ("training", "distilled", "noise")

STEPS, LEARNING_RATE = 500, 0.5


class _Watched(nnx.Module):
    """A norm that keeps what it was last given."""

    def __init__(self, norm: BatchNorm, seen: list):
        self.norm, self.seen = norm, seen

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        self.seen.append((x, self.norm.mean[...], jnp.sqrt(self.norm.var[...])))
        return self.norm(x, train=train)


def distilled(
    network: nnx.Module,
    shape: Sequence[int],
    key: jax.Array,
    *,
    count: int = 32,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    input_statistics: tuple[float, float] = (0.0, 1.0),
) -> tuple[jax.Array, jax.Array]:
    """(inputs [count, *shape], the loss at the beginning and behind the last step [2]). ValueError of a network without
    BatchNorm."""
    return _distiller(network, steps, learning_rate, input_statistics)(jax.random.normal(key, (count, *shape)))


def _distiller(
    network: nnx.Module, steps: int, learning_rate: float, input_statistics: tuple[float, float]
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """noise -> what `distilled` gives."""
    check_distillable(network)
    parts = split(network)

    def loss(x: jax.Array, state: tuple) -> jax.Array:
        seen: list = []
        copy = merge(Parts(parts.graph, *state))
        replace_layers(copy, (BatchNorm,), lambda _, norm: _Watched(norm, seen))(x)
        return sum(_distance(*entry) for entry in [(x, *map(jnp.asarray, input_statistics)), *seen])

    optimizer = optax.adam(learning_rate)

    @jax.jit
    def run(x: jax.Array, state: tuple) -> tuple[jax.Array, jax.Array]:
        def step(carried, _):
            x, moments = carried
            value, gradient = jax.value_and_grad(loss)(x, state)
            updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(x, updates), moments), value

        (x, _), values = jax.lax.scan(step, (x, optimizer.init(x)), length=steps)
        return x, jnp.stack([values[0], loss(x, state)])

    return lambda x: run(x, parts[1:])


def check_distillable(network: nnx.Module) -> None:
    """ValueError of a network without BatchNorm."""
    if not layer_paths(network, (BatchNorm,)):
        raise ValueError("examples are distilled from the statistics of BatchNorm, and this network has none")


def examples(
    kind: str,
    network: nnx.Module,
    data: Iterable[Mapping[str, Any]],
    batches: int,
    *,
    seed: int = 0,
    input_statistics: tuple[float, float] = (0.0, 1.0),
) -> Iterable[Mapping[str, Any]]:
    """So many batches of one of `EXAMPLES`, for a network to be called with: those of `data`, or others of their shape,
    of which nothing else is read. Noise is Gaussian, of the mean and standard deviation `input_statistics`, which
    distillation aims at too. ValueError where inputs are no numbers, or there is nothing to distil from."""
    if kind == "training":
        return itertools.islice(data, batches)
    like = next(iter(data), None)
    if like is None:
        raise ValueError(f"examples={kind!r} are made in the shape of the training data, and there are none")
    like = np.asarray(like["inputs"])
    if not np.issubdtype(like.dtype, np.floating):
        raise ValueError(f"examples={kind!r} are real numbers, and this network takes {like.dtype}")
    noise = jax.random.normal(jax.random.key(seed), (batches, *like.shape))
    if kind == "distilled":
        distil = _distiller(network, STEPS, LEARNING_RATE, input_statistics)
        return [{"inputs": distil(part)[0]} for part in noise]
    mean, std = input_statistics
    return [{"inputs": mean + std * part} for part in noise]


def _distance(x: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    places = tuple(range(1, x.ndim - 1))
    x = x.astype(jnp.float32)
    # The root has no slope where an example has the same number everywhere.
    own = jnp.sqrt(x.var(places) + 1e-12)
    return jnp.square(x.mean(places) - mean).mean() + jnp.square(own - std).mean()
