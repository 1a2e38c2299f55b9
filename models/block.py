"""The residual block: x + mixer(norm(x)), then x + ffn(norm(x)) (pre-norm; Xiong et al. 2020, arXiv:2002.04745)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models import FFNS, NORMS
from lissom.models.context import Context
from lissom.models.mixers import MIXERS
from lissom.models.registry import construct


class Block(nnx.Module):
    """One layer: `y, cache, aux = block(x[B, T, M], context, cache, key)`. The norm in front of a mixer or a
    feed-forward named "none" is not built: it would be a parameter that nothing reads."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        mixer: str = "attention",
        mixer_kwargs: Mapping | None = None,
        ffn: str = "mlp",
        ffn_kwargs: Mapping | None = None,
        norm: str = "layernorm",
        norm_kwargs: Mapping | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        normed = lambda name: construct(
            NORMS, "none" if name == "none" else norm, norm_kwargs, "norm", width=width, rngs=rngs
        )
        self.mixer_norm = normed(mixer)
        self.mixer = construct(MIXERS, mixer, mixer_kwargs, "mixer", width=width, heads=heads, dtype=dtype, rngs=rngs)
        self.ffn_norm = normed(ffn)
        self.ffn = construct(FFNS, ffn, ffn_kwargs, "ffn", width=width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, context: Context, cache: dict | None = None, key: jax.Array | None = None):
        mixer_key, ffn_key = (None, None) if key is None else jax.random.split(key)
        y, cache, mixer_aux = self.mixer(self.mixer_norm(x), context, cache, mixer_key)
        x = x + y
        y, ffn_aux = self.ffn(self.ffn_norm(x), context, ffn_key)
        aux = {kind: {**mixer_aux[kind], **ffn_aux[kind]} for kind in ("losses", "metrics")}
        return x + y, cache, aux
