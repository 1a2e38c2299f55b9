"""Feed-forward layers: `y, aux = ffn(x[B, T, M], context, key=None)`."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import rate
from lissom.models.context import Context
from lissom.models.linear import Linear, dropout

NO_AUX = {"losses": {}, "metrics": {}}


class FeedForward(nnx.Module):
    """y = inner(x) Wd with a hidden width F of `expansion` x M; a subclass has `inner(x)` [B, T, F].

    A `gated` one has a second product up and no biases; its F is `expansion` x M x 2/3, so that the parameters equal
    those of a plain one of the same expansion.
    """

    gated: ClassVar[bool]

    def __init__(
        self,
        width: int,
        *,
        expansion: float = 4.0,
        dropout: float = 0.0,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        rate("ffn", dropout=dropout)
        hidden = round(expansion * width * 2 / 3 if self.gated else expansion * width)
        if hidden < 1:
            raise ValueError(f"ffn.expansion={expansion} of a width of {width} leaves no hidden feature")
        kinds = {"bias": not self.gated, "dtype": dtype, "rngs": rngs}
        self.gate = Linear(width, hidden, axes=("embed", "mlp"), **kinds) if self.gated else None
        self.up = Linear(width, hidden, axes=("embed", "mlp"), **kinds)
        self.down = Linear(hidden, width, axes=("mlp", "embed"), **kinds)
        self.dropout = dropout

    def __call__(self, x: jax.Array, context: Context, key: jax.Array | None = None):
        return dropout(self.down(self.inner(x)), self.dropout, key, context.train), NO_AUX


class MLP(FeedForward):
    """y = gelu(x Wu + bu) Wd + bd (tanh form of gelu)."""

    gated = False

    def inner(self, x: jax.Array) -> jax.Array:
        return jax.nn.gelu(self.up(x))


class SwiGLU(FeedForward):
    """y = (silu(x Wg) * (x Wu)) Wd, without biases (Shazeer 2020, arXiv:2002.05202)."""

    gated = True

    def inner(self, x: jax.Array) -> jax.Array:
        return jax.nn.silu(self.gate(x)) * self.up(x)


class NoFFN(nnx.Module):
    """y = 0: the block keeps its mixer only."""

    def __init__(self, width: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        del width, dtype, rngs

    def __call__(self, x: jax.Array, context: Context, key: jax.Array | None = None):
        del context, key
        return jnp.zeros_like(x), NO_AUX
