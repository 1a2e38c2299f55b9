"""Traces of the Hessian of a loss, block by block (Hutchinson): how much a loss bends along the weights of a layer.

    trace(H_ii) = E[v_i^T (H v)_i],    v of independent signs

Of one product with the Hessian the traces of all diagonal blocks are read at once: what other blocks add has the mean
0. HAWQ-V2 (Dong et al. 2019, arXiv:1911.03852) multiplies the mean of a block's eigenvalues, trace / size, by the
squared error of rounding it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def traces(loss: Callable[[Any], jax.Array], params: Any, key: jax.Array, samples: int) -> tuple[Any, Any]:
    """(mean, standard error) of the estimates of each leaf's trace. loss: of the parameters alone."""
    if samples < 2:
        raise ValueError(f"samples={samples} must be at least 2, for an error besides the mean")
    leaves, tree = jax.tree.flatten(params)

    def estimate(key: jax.Array) -> Any:
        keys = jax.tree.unflatten(tree, list(jax.random.split(key, len(leaves))))
        signs = jax.tree.map(lambda leaf, key: jax.random.rademacher(key, leaf.shape, leaf.dtype), params, keys)
        _, bent = jax.jvp(jax.grad(loss), (params,), (signs,))
        return jax.tree.map(lambda v, w: jnp.vdot(v, w), signs, bent)

    # One after the other: side by side each would keep what differentiating twice needs.
    found = jax.lax.map(estimate, jax.random.split(key, samples))
    mean = jax.tree.map(lambda x: x.mean(0), found)
    return mean, jax.tree.map(lambda x: x.std(0, ddof=1) / samples**0.5, found)
