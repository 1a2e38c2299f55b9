"""The equation, a group at a time: all rows, and those of other groups left out."""

import jax
import jax.numpy as jnp

from lissom.ops.grouped_matmul.differentiable import ACTIVATIONS

LOCAL = False


def check(x, other, group_sizes, *, form: str, activation: str | None, dtype) -> None:
    """Does everything."""


def run(x, other, group_sizes, *, form: str, activation: str | None, dtype) -> jax.Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x, other = x.astype(wide), other.astype(wide)
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])[:, None]
    of_group = [(row >= ends[j] - group_sizes[j]) & (row < ends[j]) for j in range(group_sizes.shape[0])]
    if form == "sums":
        z = [jnp.where(keep, x, 0).T @ jnp.where(keep, other, 0) for keep in of_group]
        return jnp.stack(z).astype(dtype)
    y = sum(jnp.where(keep, x @ other[j], 0) for j, keep in enumerate(of_group))
    return (y if activation is None else ACTIVATIONS[activation](y)).astype(dtype)
