"""A token mixer of one's own, picked by name without touching Lissom:

uv run train.py --config=configs/vision/digits_vit.py --config.model.mixer=examples.mean_mixer:MeanMixer
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import UnsupportedForm
from lissom.models.linear import Linear
from lissom.ops.attention.masks import Full


class MeanMixer(nnx.Module):
    """y = W mean(x over tokens) for every token: the least a mixer can do. It has no causal form and no cache."""

    cache_axes: ClassVar = {}

    def __init__(self, width: int, *, heads: int, scale: float = 1.0, dtype=jnp.float32, rngs: nnx.Rngs):
        del heads  # every mixer is told the number of heads; this one has none
        self.out = Linear(width, width, axes=("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.scale = scale

    def __call__(self, x: jax.Array, context, cache=None, key=None):
        if cache is not None or not isinstance(context.mask, Full):
            raise UnsupportedForm("MeanMixer reads all tokens: it has no causal form, no mask and no cache")
        mean = self.scale * x.mean(1, keepdims=True)
        return jnp.broadcast_to(self.out(mean), x.shape), None, {"losses": {}, "metrics": {}}
