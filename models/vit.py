"""Vision transformer: patches, learned positions, residual stack, mean over tokens."""

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


class VisionTransformer(nnx.Module):
    """inputs [B, rows, columns, C] -> logits [B, classes] (Dosovitskiy et al. 2020, arXiv:2010.11929; the head is a
    mean over tokens, as Beyer et al. 2022, arXiv:2205.01580, found as good as a class token).

    `patch` x `patch` pixels are one token; position and order come from a learned table alone (the attention
    mixer's rotary angles count tokens in raster order and are switched off unless `rope_theta` is asked for).
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        classes: int,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        mixer: str | Sequence[str] = "attention",
        mixer_kwargs: Mapping | None = None,
        ffn: str = "mlp",
        ffn_kwargs: Mapping | None = None,
        norm: str = "layernorm",
        norm_kwargs: Mapping | None = None,
        dropout: float = 0.0,
        stack: str | None = None,
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        rows, columns, channels = input_shape
        if rows % patch or columns % patch:
            raise ValueError(f"model.patch={patch} must divide the image of {rows} x {columns} pixels")
        self.grid = (rows // patch, columns // patch)
        self.patch, self.dropout, self.dtype = patch, dropout, dtype
        self.embed = Linear(patch * patch * channels, width, axes=("channels", "embed"), dtype=dtype, rngs=rngs)
        table = 0.02 * jax.random.normal(rngs.params(), (self.grid[0] * self.grid[1], width))
        self.positions = nnx.Param(table, out_sharding=("positions", "embed"))
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
        batch, (rows, columns), p = inputs.shape[0], self.grid, self.patch
        x = inputs.reshape(batch, rows, p, columns, p, -1).transpose(0, 1, 3, 2, 4, 5)
        x = self.embed(x.reshape(batch, rows * columns, -1))
        x = dropout(x + self.positions[...].astype(self.dtype), self.dropout, embed_key, train)
        context = Context(mask=masks.Full(), train=train, grid=self.grid)
        x, _, aux = self.blocks(x, context, key=key)
        return self.head(self.norm(x).mean(1).astype(jnp.float32)), aux
