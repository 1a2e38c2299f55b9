"""The control of every mixer comparison: tokens never see each other."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.context import Context
from lissom.models.ffn import NO_AUX


class NoMixer(nnx.Module):
    """y = 0, so that the residual block hands its input on. It has no parameters and its cache counts tokens only."""

    cache_axes: ClassVar = {"length": ("batch",)}

    def __init__(self, width: int, *, heads: int, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        del width, heads, dtype, rngs

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the cache for `batch` sequences of at most `length` tokens."""
        del length, dtype
        return {"length": jax.ShapeDtypeStruct((batch,), jnp.int32)}

    def __call__(self, x: jax.Array, context: Context, cache: dict | None = None, key: jax.Array | None = None):
        del context, key
        if cache is not None:
            cache = {"length": cache["length"] + x.shape[1]}
        return jnp.zeros_like(x), cache, NO_AUX
