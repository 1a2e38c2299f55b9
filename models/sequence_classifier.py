"""One-dimensional sequence classifier: a transformer over a real-valued signal."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models import NORMS
from lissom.models.block import residual_stack
from lissom.models.context import Context
from lissom.models.linear import Linear, dropout
from lissom.models.registry import construct
from lissom.ops.attention import masks


class SequenceTransformer(nnx.Module):
    """inputs [B, length, C] -> logits [B, classes]: `patch` samples a token, learned positions, mean over tokens.

    `causal` masks the future; `positions=False` leaves order to the mixer alone.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        classes: int,
        width: int,
        depth: int,
        heads: int,
        patch: int = 1,
        mixer: str | Sequence[str] = "attention",
        mixer_kwargs: Mapping | None = None,
        ffn: str = "mlp",
        ffn_kwargs: Mapping | None = None,
        norm: str = "layernorm",
        norm_kwargs: Mapping | None = None,
        causal: bool = False,
        positions: bool = True,
        dropout: float = 0.0,
        stack: str | None = None,
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        length, channels = input_shape
        if length % patch:
            raise ValueError(f"model.patch={patch} must divide the signal's length {length}")
        self.patch, self.dropout, self.causal, self.dtype = patch, dropout, causal, dtype
        self.embed = Linear(patch * channels, width, axes=("channels", "embed"), dtype=dtype, rngs=rngs)
        table = 0.02 * jax.random.normal(rngs.params(), (length // patch, width))
        self.positions = nnx.Param(table, out_sharding=("positions", "embed")) if positions else None
        self.blocks = residual_stack(
            depth=depth,
            width=width,
            heads=heads,
            mixer=mixer,
            mixer_kwargs=mixer_kwargs,
            ffn=ffn,
            ffn_kwargs=ffn_kwargs,
            norm=norm,
            norm_kwargs=norm_kwargs,
            stack=stack,
            remat=remat,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = construct(NORMS, norm, norm_kwargs, "norm", width=width, rngs=rngs)
        self.head = Linear(width, classes, axes=("embed", "classes"), init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, inputs: jax.Array, *, train: bool = False, key: jax.Array | None = None):
        embed_key, key = (None, None) if key is None else jax.random.split(key)
        batch, length, _ = inputs.shape
        x = self.embed(inputs.reshape(batch, length // self.patch, -1))
        if self.positions is not None:
            x = x + self.positions[...].astype(self.dtype)
        x = dropout(x, self.dropout, embed_key, train)
        context = Context(mask=masks.Causal() if self.causal else masks.Full(), train=train)
        x, _, aux = self.blocks(x, context, key=key)
        return self.head(self.norm(x).mean(1).astype(jnp.float32)), aux
