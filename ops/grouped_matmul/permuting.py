"""Rows sorted by group and back: what stands around a grouped matmul in a mixture of experts.

All of it gathers, backward too: the gradient of a gather by a permutation is a gather by its inverse, where jax would
scatter.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Permutation(NamedTuple):
    """How the choices of t tokens, k each, are sorted by group.

    choice [t k]: at each sorted row the number of its choice, token * k + (which of the token's).
    row [t k]: at each choice its sorted row, the inverse.
    group_sizes [g]: the rows of each group. Choices of no group stand behind the last.
    """

    choice: Int[Array, "tk"]
    row: Int[Array, "tk"]
    group_sizes: Int[Array, "g"]


def permutation(groups_of: Int[Array, "t k"], groups: int) -> Permutation:
    """Sorts choices by group; within a group by token, then as the token has them (stable).

    groups_of: the group of each choice, 0 <= group < groups; any other integer is no group (a dropped choice).
    """
    if getattr(groups_of, "ndim", 0) != 2 or not jnp.issubdtype(groups_of.dtype, jnp.integer):
        raise ValueError("groups_of is [tokens, choices] of integers.")
    flat = groups_of.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < groups), flat, groups)
    choice = jnp.argsort(flat, stable=True).astype(jnp.int32)
    row = jnp.zeros_like(choice).at[choice].set(jnp.arange(len(flat), dtype=jnp.int32), unique_indices=True)
    sizes = (flat[:, None] == jnp.arange(groups)).sum(0, dtype=jnp.int32)
    return Permutation(choice, row, sizes)


def permute(x: Float[Array, "t d"], by: Permutation) -> Float[Array, "tk d"]:
    """The token of every choice, sorted: y_i = x[choice_i // k]."""
    if by.choice.shape[0] % x.shape[0]:
        raise ValueError(f"a permutation of {by.choice.shape[0]} choices is not of {x.shape[0]} tokens.")
    return _permute(x, by)


def unpermute(rows: Float[Array, "tk d"], by: Permutation, weights: Float[Array, "t k"]) -> Float[Array, "t d"]:
    """Back to tokens, their choices weighted and summed: y_t = sum_j weights[t, j] rows[row of (t, j)].

    Weights may be of another float dtype than rows; products and sums are of the wider one, y is of that of rows. A
    dropped choice should have weight 0: its row is what a grouped matmul leaves behind the last group, zeros.
    """
    if rows.shape[0] != by.row.shape[0] or weights.size != rows.shape[0]:
        raise ValueError(f"rows {rows.shape} and weights {weights.shape} are not of {by.row.shape[0]} choices.")
    return _unpermute(rows, by, weights)


@jax.custom_vjp
def _permute(x, by: Permutation):
    return x[by.choice // (by.choice.shape[0] // x.shape[0])]


def _permute_forward(x, by):
    return _permute(x, by), (by, jnp.ones((x.shape[0], by.choice.shape[0] // x.shape[0]), jnp.float32))


def _permute_backward(saved, dy):
    by, ones = saved
    return _unpermute(dy, by, ones), None


_permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def _unpermute(rows, by: Permutation, weights):
    wide = jnp.promote_types(rows.dtype, weights.dtype)
    taken = rows[by.row].reshape(*weights.shape, rows.shape[1]).astype(wide)
    return (taken * weights[..., None]).sum(1).astype(rows.dtype)


def _unpermute_forward(rows, by, weights):
    return _unpermute(rows, by, weights), (rows, by, weights)


def _unpermute_backward(saved, dy):
    rows, by, weights = saved
    wide = jnp.promote_types(rows.dtype, weights.dtype)
    of_token = _permute(dy, by).astype(wide)  # at each sorted row
    drows = (of_token * weights.reshape(-1)[by.choice][:, None]).astype(rows.dtype)
    products = (rows.astype(wide) * of_token).sum(1)
    return drows, None, products[by.row].reshape(weights.shape).astype(weights.dtype)


_unpermute.defvjp(_unpermute_forward, _unpermute_backward)
