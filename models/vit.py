"""Vision transformer: patches, learned positions, residual stack, mean over tokens."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import at_least_one, shape_of
from lissom.models.context import Context
from lissom.models.linear import Linear
from lissom.models.transformer import Transformer
from lissom.models.variables import Param
from lissom.ops.attention import masks


class VisionTransformer(Transformer):
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
        patch: int,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
        **settings,
    ):
        at_least_one("model", width=width, patch=patch)
        rows, columns, channels = shape_of("vit", input_shape, "rows, columns, channels")
        if rows % patch or columns % patch:
            raise ValueError(f"model.patch={patch} must divide the image of {rows} x {columns} pixels")
        self.grid = (rows // patch, columns // patch)
        self.patch = patch
        self.embed = Linear(patch * patch * channels, width, axes=("channels", "embed"), dtype=dtype, rngs=rngs)
        table = 0.02 * jax.random.normal(rngs.params(), (self.grid[0] * self.grid[1], width))
        self.positions = Param(table, out_sharding=("positions", "embed"))
        super().__init__(width=width, dtype=dtype, rngs=rngs, **settings)
        self.head = Linear(width, classes, axes=("embed", "classes"), init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, inputs: jax.Array, *, train: bool = False, key: jax.Array | None = None):
        batch, (rows, columns), p = inputs.shape[0], self.grid, self.patch
        x = inputs.reshape(batch, rows, p, columns, p, -1).transpose(0, 1, 3, 2, 4, 5)
        x = self.embed(x.reshape(batch, rows * columns, -1)) + self.positions[...].astype(self.dtype)
        x, aux = self.features(x, Context(mask=masks.Full(), train=train, grid=self.grid), key)
        return self.head(x.mean(1).astype(jnp.float32)), aux
