"""Traces of the Hessian of a loss, block by block (Hutchinson): how much a loss bends along the weights of a layer.

    trace(H_ii) = E[v_i^T (H v)_i],    v of independent signs

Of one product with the Hessian the traces of all diagonal blocks are read at once: what other blocks add has the mean
0. HAWQ-V2 (Dong et al. 2019, arXiv:1911.03852) multiplies the mean of a block's eigenvalues, trace / size, by the
squared error of rounding it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp


def estimator(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(key, params, *given) -> an estimate of each leaf's trace, of loss(params, *given). A program for one of them:
    within a loop XLA's convolutions are slow on CPUs."""

    @jax.jit
    def estimate(key: jax.Array, params: Any, *given: Any) -> Any:
        leaves, tree = jax.tree.flatten(params)
        keys = jax.tree.unflatten(tree, list(jax.random.split(key, len(leaves))))
        signs = jax.tree.map(lambda leaf, key: jax.random.rademacher(key, leaf.shape, leaf.dtype), params, keys)
        _, bent = jax.jvp(jax.grad(lambda params: loss(params, *given)), (params,), (signs,))
        return jax.tree.map(lambda v, w: jnp.vdot(v, w), signs, bent)

    return estimate


def traces(estimates: Iterable[Any]) -> tuple[Any, Any]:
    """(mean, standard error) of estimates of an `estimator`, a leaf each."""
    estimates = list(estimates)
    if len(estimates) < 2:
        raise ValueError(f"{len(estimates)} estimates of a trace have no error: there must be at least 2")
    found = jax.tree.map(lambda *values: jnp.stack(values), *estimates)
    mean = jax.tree.map(lambda x: x.mean(0), found)
    return mean, jax.tree.map(lambda x: x.std(0, ddof=1) / len(estimates) ** 0.5, found)
