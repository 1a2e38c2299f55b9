"""Feed-forward layers: `y, aux = ffn(x[B, T, M], context, key=None)`."""

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.context import Context
from lissom.models.linear import Linear, dropout

NO_AUX = {"losses": {}, "metrics": {}}


class MLP(nnx.Module):
    """y = gelu(x W1 + b1) W2 + b2 with a hidden width of `expansion` x M (tanh form of gelu)."""

    def __init__(
        self,
        width: int,
        *,
        expansion: float = 4.0,
        dropout: float = 0.0,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        hidden = round(expansion * width)
        self.up = Linear(width, hidden, axes=("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)
        self.dropout = dropout

    def __call__(self, x: jax.Array, context: Context, key: jax.Array | None = None):
        y = self.down(jax.nn.gelu(self.up(x)))
        return dropout(y, self.dropout, key, context.train), NO_AUX


class SwiGLU(nnx.Module):
    """y = (silu(x Wg) * (x Wu)) Wd, without biases (Shazeer 2020, arXiv:2002.05202).

    The hidden width is `expansion` x M x 2/3, so that the parameters equal those of an MLP of the same expansion.
    """

    def __init__(
        self,
        width: int,
        *,
        expansion: float = 4.0,
        dropout: float = 0.0,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        hidden = round(expansion * width * 2 / 3)
        self.gate = Linear(width, hidden, axes=("embed", "mlp"), bias=False, dtype=dtype, rngs=rngs)
        self.up = Linear(width, hidden, axes=("embed", "mlp"), bias=False, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, axes=("mlp", "embed"), bias=False, dtype=dtype, rngs=rngs)
        self.dropout = dropout

    def __call__(self, x: jax.Array, context: Context, key: jax.Array | None = None):
        y = self.down(jax.nn.silu(self.gate(x)) * self.up(x))
        return dropout(y, self.dropout, key, context.train), NO_AUX


class NoFFN(nnx.Module):
    """y = 0: the block keeps its mixer only."""

    def __init__(self, width: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        del width, dtype, rngs

    def __call__(self, x: jax.Array, context: Context, key: jax.Array | None = None):
        del context, key
        return jnp.zeros_like(x), NO_AUX
