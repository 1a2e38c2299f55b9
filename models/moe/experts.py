"""The experts: feed-forward layers whose kernels lie in one stack."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.linear import StackedLinear
from lissom.models.moe.devices import over_devices
from lissom.models.moe.forms import Kernels, mixed, picked
from lissom.models.moe.routing import Choices, Everyone, Picks, Routing, rows_of
from lissom.models.products import Stacked, note


class Experts(nnx.Module):
    """E feed-forward layers without biases: (silu(x Wg) * (x Wu)) Wd if `gated`, else gelu(x Wu) Wd. `buffer`: of what
    devices send each other (`models/moe/devices.py`)."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        experts: int,
        gated: bool,
        buffer: float = 1.5,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds = {"experts": experts, "bias": False, "rngs": rngs}
        self.inner = StackedLinear(width, (2 if gated else 1, hidden), axes=("embed", None, "mlp"), **kinds)
        self.down = StackedLinear(hidden, width, axes=("mlp", "embed"), **kinds)
        self.buffer, self.dtype = buffer, dtype

    @property
    def kernels(self) -> Kernels:
        inner, down = self.inner, self.down
        return Kernels(inner.weights.astype(self.dtype), down.weights.astype(self.dtype), inner.rounding, down.rounding)

    def __call__(
        self, x: jax.Array, routing: Routing, capacity: float | None, priority: bool = False
    ) -> tuple[jax.Array, dict]:
        """x [B, T, M] -> (y [B, T, M], metrics). `capacity`: of `Choices`, an expert takes so many times its even share
        and drops the rest, by `priority` as `with_capacity` says; None drops nothing."""
        x, kernels, dropped = x.astype(self.dtype), self.kernels, jnp.zeros(())
        if isinstance(routing, Choices) and capacity is not None:
            routing, dropped = with_capacity(routing, len(kernels.down), capacity, priority)
        for layer in (self.inner, self.down):
            results = rows_of(routing) * math.prod(layer.kernel.shape[2:])
            note(Stacked(), len(x), results, layer.kernel, layer.quantizer)
        if isinstance(routing, Choices | Everyone):
            y = over_devices(kernels, x, routing, self.buffer)
        else:
            y = (picked if isinstance(routing, Picks) else mixed)(kernels, x, routing)
        return y, {"dropped": dropped}


def with_capacity(choices: Choices, experts: int, capacity: float, priority: bool = False) -> tuple[Choices, jax.Array]:
    """(choices of which each expert has at most ceil(capacity x N k / E), the rest named no expert; their share).

    First choices of all tokens come before second ones, and of these earlier tokens before later ones (GShard, Lepikhin
    et al. 2020, arXiv:2006.16668); with `priority` those of tokens of a larger weight, the largest of their k, before
    those of others (batch prioritised routing: Riquelme et al. 2021, arXiv:2106.05974), for encoders: what is
    dropped depends on later tokens then. Weights stay as they are: a
    token whose choice is dropped gets less.
    """
    batch, length, k = choices.experts.shape
    room = math.ceil(capacity * batch * length * k / experts)
    flat = choices.experts.reshape(-1, k)
    order = jnp.argsort(-choices.weights.max(-1).reshape(-1)) if priority else jnp.arange(len(flat))
    ranked = flat[order].T.reshape(-1)
    one_hot = ranked[:, None] == jnp.arange(experts)
    place = jnp.where(one_hot, jnp.cumsum(one_hot, 0) - 1, 0).sum(1)
    named = one_hot.any(1)
    fits = (named & (place < room)).reshape(k, -1).T
    kept = jnp.zeros_like(fits).at[order].set(fits).reshape(batch, length, k)
    dropped = 1 - kept.sum() / jnp.maximum(named.sum(), 1)
    return choices._replace(experts=jnp.where(kept, choices.experts, experts)), dropped.astype(jnp.float32)
