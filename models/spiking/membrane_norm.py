"""Normalised membrane potentials, folded into thresholds (Guo et al. 2023, arXiv:2308.08359, section 4.3)."""

import jax
import jax.numpy as jnp

from lissom.models.norms import BatchNorm


def sign(norm: BatchNorm) -> jax.Array:
    """-1 where the scale is below 0, else 1."""
    return jnp.where(norm.scale[...] < 0, -1.0, 1.0)


def folded_threshold(norm: BatchNorm, threshold: float | jax.Array) -> jax.Array:
    """The q for which BN(h) >= threshold where sign h >= q, for BatchNorm as it is in evaluation:

        q = sign (mean + sqrt(var + epsilon) (threshold - bias) / scale)

    and where the scale is 0, so that BN(h) is the bias whatever h is, -inf or inf.
    """
    scale, bias = norm.scale[...], norm.bias[...]
    never = scale == 0
    at = norm.mean[...] + jnp.sqrt(norm.var[...] + norm.epsilon) * (threshold - bias) / jnp.where(never, 1.0, scale)
    return jnp.where(never, jnp.where(bias >= threshold, -jnp.inf, jnp.inf), sign(norm) * at)
