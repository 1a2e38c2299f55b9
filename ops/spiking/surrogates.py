"""Surrogate derivatives: what stands for the derivative of a spike, by the distance x of potential and threshold.

A spike is 1 where x >= 0 and 0 elsewhere: its derivative is 0, and infinite at 0. Each function here takes x and a
slope k > 0 and gives what is used in its place. Default slopes are those of the source, or 1 in units of the threshold
where it has none.

| name | derivative | area | source |
|---|---|---|---|
| fast_sigmoid | 1 / (1 + k |x|)^2 | 2 / k | Zenke and Ganguli 2018, arXiv:1705.11146; slope 25 |
| superspike | the same | 2 / k | the same, slope 100 |
| sigmoid | k s(kx) (1 - s(kx)) | 1 | the derivative of a sigmoid s; slope 4 |
| arctan | (k / 2) / (1 + (pi k x / 2)^2) | 1 | Fang et al. 2021, arXiv:2007.05785, slope 2 |
| triangle | max(0, 1 - k |x|) | 1 / k | Esser et al. 2016, arXiv:1603.08270; Bellec et al. 2018, arXiv:1803.09574 |
| boxcar | k where |x| < 1 / (2 k) | 1 | Wu et al. 2018, arXiv:1706.02609 |
| gaussian | k exp(-(k x)^2 / 2) / sqrt(2 pi) | 1 | the same |
| straight_through | 1 | - | Bengio et al. 2013, arXiv:1308.3432 |
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Surrogate(NamedTuple):
    """derivative(x, k) and the default k."""

    derivative: Callable[[jax.Array, float], jax.Array]
    slope: float


def fast_sigmoid(x: jax.Array, k: float) -> jax.Array:
    return 1 / jnp.square(1 + k * jnp.abs(x))


def sigmoid(x: jax.Array, k: float) -> jax.Array:
    s = jax.nn.sigmoid(k * x)
    return k * s * (1 - s)


def arctan(x: jax.Array, k: float) -> jax.Array:
    return (k / 2) / (1 + jnp.square((jnp.pi / 2 * k) * x))


def triangle(x: jax.Array, k: float) -> jax.Array:
    return jnp.maximum(0, 1 - k * jnp.abs(x))


def boxcar(x: jax.Array, k: float) -> jax.Array:
    return jnp.where(jnp.abs(x) < 1 / (2 * k), jnp.asarray(k, x.dtype), 0)


def gaussian(x: jax.Array, k: float) -> jax.Array:
    return (k / (2 * jnp.pi) ** 0.5) * jnp.exp(-jnp.square(k * x) / 2)


def straight_through(x: jax.Array, k: float) -> jax.Array:
    del k
    return jnp.ones_like(x)


SURROGATES = {
    "arctan": Surrogate(arctan, 2.0),
    "fast_sigmoid": Surrogate(fast_sigmoid, 25.0),
    "superspike": Surrogate(fast_sigmoid, 100.0),
    "sigmoid": Surrogate(sigmoid, 4.0),
    "triangle": Surrogate(triangle, 1.0),
    "boxcar": Surrogate(boxcar, 1.0),
    "gaussian": Surrogate(gaussian, 2.5),
    "straight_through": Surrogate(straight_through, 1.0),
}
