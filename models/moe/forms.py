"""The ways of bringing tokens to experts, on one device: y = sum_e w_e f_e(x) for each form of a routing."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lissom.models.moe.routing import Choices, Everyone, Picks, Slots
from lissom.models.products import Stacked
from lissom.ops.grouped_matmul import grouped_matmul, permutation, permute, unpermute


class Kernels(NamedTuple):
    """inner [E, M, h, F], h = 2 for gated experts (gate and up in one product), else 1; down [E, F, M]. rounding,
    hidden_rounding: of the rows that each is multiplied with, None where they stay as they are."""

    inner: jax.Array
    down: jax.Array
    rounding: Callable | None = None
    hidden_rounding: Callable | None = None

    def rows(self, x: jax.Array) -> jax.Array:
        """[..., M], as `inner` is multiplied with them."""
        return x if self.rounding is None else self.rounding(x)

    def hidden(self, inner: jax.Array) -> jax.Array:
        """[..., h, F] -> [..., F], as `down` is multiplied with them."""
        y = activated(inner)
        return y if self.hidden_rounding is None else self.hidden_rounding(y)


def activated(inner: jax.Array) -> jax.Array:
    """[..., h, F] -> [..., F], as `models/moe/experts.py` says."""
    return jax.nn.silu(inner[..., 0, :]) * inner[..., 1, :] if inner.shape[-2] == 2 else jax.nn.gelu(inner[..., 0, :])


def grouped(kernels: Kernels, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """rows [n, M], sorted by expert -> [n, M]: every row through its expert, zeros behind the last group."""
    experts, width, h, hidden = kernels.inner.shape
    inner = grouped_matmul(kernels.rows(rows), kernels.inner.reshape(experts, width, h * hidden), group_sizes)
    return grouped_matmul(kernels.hidden(inner.reshape(-1, h, hidden)), kernels.down, group_sizes)


def dropless(kernels: Kernels, x: jax.Array, choices: Choices) -> jax.Array:
    """Rows sorted by expert, through grouped matmuls: every choice is computed, and nothing else."""
    width, k = x.shape[-1], choices.experts.shape[-1]
    by = permutation(choices.experts.reshape(-1, k), len(kernels.down))
    y = grouped(kernels, permute(x.reshape(-1, width), by), by.group_sizes)
    return unpermute(y, by, choices.weights.reshape(-1, k)).reshape(x.shape)


def inner_of_all(kernels: Kernels, x: jax.Array) -> jax.Array:
    """x [B, T, M] -> [B, T, E, h, F]: every expert's inner product of every token."""
    return jnp.einsum("btm,emhf->btehf", kernels.rows(x), kernels.inner)


def everyone(kernels: Kernels, x: jax.Array, routing: Everyone) -> jax.Array:
    """Every expert on every token: sum_e w_e f_e(x)."""
    hidden = kernels.hidden(inner_of_all(kernels, x))
    return jnp.einsum("btef,efm->btm", hidden * routing.weights[..., None].astype(x.dtype), kernels.down)


def _slotted(kernels: Kernels, x: jax.Array) -> jax.Array:
    """x [E, c, M], each expert's own tokens."""
    product = Stacked()
    return product(kernels.hidden(product(kernels.rows(x), kernels.inner)), kernels.down)


def picked(kernels: Kernels, x: jax.Array, picks: Picks) -> jax.Array:
    """Every expert on the tokens that it named."""
    rows = x.reshape(-1, x.shape[-1])
    y = _slotted(kernels, rows[picks.tokens]) * picks.weights[..., None].astype(x.dtype)
    return jnp.zeros_like(rows).at[picks.tokens.reshape(-1)].add(y.reshape(-1, x.shape[-1])).reshape(x.shape)


def mixed(kernels: Kernels, x: jax.Array, slots: Slots) -> jax.Array:
    """Every expert on its slots, mixtures of tokens."""
    rows, (n, _, experts, s) = x.reshape(-1, x.shape[-1]), slots.dispatch.shape
    groups = rows[slots.tokens]
    taken = jnp.einsum("ngm,nges->ensm", groups, slots.dispatch.astype(x.dtype))
    y = _slotted(kernels, taken.reshape(experts, n * s, -1)).reshape(experts, n, s, -1)
    back = jnp.einsum("ensm,nges->ngm", y, slots.combine.astype(x.dtype))
    return jnp.zeros_like(rows).at[slots.tokens.reshape(-1)].set(back.reshape(rows.shape)).reshape(x.shape)
