"""A decoder of labelled examples: it says the label of each by the ones before."""

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import at_least_one
from lissom.models.context import Context
from lissom.models.linear import Linear
from lissom.models.products import placed
from lissom.models.transformer import Decoder
from lissom.ops.attention import masks


class InContextLearner(Decoder):
    """inputs float32 [B, T, D], D = `features` -> logits float32 [B, T, classes] (Kirsch et al. 2022, arXiv:2212.04458,
    whose inputs are (x_t, y_{t-1})): a product into the stream, causal residual stack, norm, a product that begins
    as 0.

    The cache is all that a prediction knows of the examples before: by its size, `cache_bytes` in the rows of a run,
    the paper orders mixers. `learned_positions`: as in `LanguageModel` (0: positions are the mixer's affair).
    """

    def __init__(
        self,
        *,
        features: int,
        classes: int,
        width: int,
        norm: str = "layernorm",
        learned_positions: int = 0,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
        **settings,
    ):
        at_least_one("model", width=width)
        self.embed = Linear(features, width, axes=("channels", "embed"), dtype=dtype, rngs=rngs)
        self.make_table(learned_positions, width, dtype=dtype, rngs=rngs)
        super().__init__(width=width, norm=norm, dtype=dtype, rngs=rngs, **settings)
        self.head = Linear(width, classes, axes=("embed", "classes"), init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, inputs: jax.Array, *, train: bool = False, key: jax.Array | None = None):
        x = self._embedded(inputs, jnp.arange(inputs.shape[1])[None])
        x, aux = self.features(x, Context(mask=masks.Causal(), train=train), key)
        return self.head(x.astype(jnp.float32)), aux

    def _embedded(self, inputs: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.embed(inputs)
        return x if self.table is None else x + self.learned(positions)

    def extend(self, inputs: jax.Array, cache: dict) -> tuple[jax.Array, dict]:
        """The t next examples [B, t, D] of each sequence -> (logits [B, t, classes], cache). Writing past the cache's
        length is the caller's mistake and cannot be seen under jit."""
        length = cache["length"]
        positions = length[:, None] + jnp.arange(inputs.shape[1])
        with placed(positions):
            x, layers = self.continued(self._embedded(inputs, positions), cache["layers"], length)
            logits = self.head(x.astype(jnp.float32))
        return logits, {"layers": layers, "length": length + inputs.shape[1]}
