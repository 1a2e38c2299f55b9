"""One-dimensional sequence classifier: a transformer over a real-valued signal."""

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


class SequenceTransformer(Transformer):
    """inputs [B, length, C] -> logits [B, classes]: `patch` samples a token, learned positions, mean over tokens.

    `causal` masks the future; `positions=False` leaves order to the mixer alone.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        classes: int,
        width: int,
        patch: int = 1,
        causal: bool = False,
        positions: bool = True,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
        **settings,
    ):
        at_least_one("model", width=width, patch=patch)
        length, channels = shape_of("sequence_transformer", input_shape, "length, channels")
        if length % patch:
            raise ValueError(f"model.patch={patch} must divide the signal's length {length}")
        self.patch, self.causal = patch, causal
        self.embed = Linear(patch * channels, width, axes=("channels", "embed"), dtype=dtype, rngs=rngs)
        table = 0.02 * jax.random.normal(rngs.params(), (length // patch, width))
        self.positions = Param(table, out_sharding=("positions", "embed")) if positions else None
        super().__init__(width=width, dtype=dtype, rngs=rngs, **settings)
        self.head = Linear(width, classes, axes=("embed", "classes"), init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, inputs: jax.Array, *, train: bool = False, key: jax.Array | None = None):
        batch, length, _ = inputs.shape
        x = self.embed(inputs.reshape(batch, length // self.patch, -1))
        if self.positions is not None:
            x = x + self.positions[...].astype(self.dtype)
        x, aux = self.features(x, Context(mask=masks.Causal() if self.causal else masks.Full(), train=train), key)
        return self.head(x.mean(1).astype(jnp.float32)), aux
