"""What every transformer is between its ends: the residual stack and the last norm."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models import NORMS
from lissom.models.block import Block
from lissom.models.bounds import at_least_one, rate
from lissom.models.context import Context
from lissom.models.linear import dropout
from lissom.models.registry import construct
from lissom.models.stack import Stack
from lissom.ops.attention import masks


class Transformer(nnx.Module):
    """x[B, T, M] -> norm(blocks(dropout(x))) [B, T, M]: `depth` blocks over `width` = M features.

    A tuple of names of mixers or of feed-forwards repeats over the layers (the depth must be a multiple of its length,
    and of both lengths' least common multiple). A subclass adds its ends: it
    builds what comes in front before it calls this constructor, and what comes behind afterwards, since that is the
    order in which random keys are drawn, and a seed must go on giving the same network.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        mixer: str | Sequence[str] = "attention",
        mixer_kwargs: Mapping | None = None,
        ffn: str | Sequence[str] = "mlp",
        ffn_kwargs: Mapping | None = None,
        norm: str = "layernorm",
        norm_kwargs: Mapping | None = None,
        dropout: float = 0.0,
        stack: str | None = None,
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        at_least_one("model", heads=heads)
        rate("model", dropout=dropout)
        mixers, ffns = ((names,) if isinstance(names, str) else tuple(names) for names in (mixer, ffn))
        for name, names in (("mixer", mixers), ("ffn", ffns)):
            if not names:
                raise ValueError(f"model.{name}=() must name at least one {name}")
        length = math.lcm(len(mixers), len(ffns))
        pattern = [(mixers[i % len(mixers)], ffns[i % len(ffns)]) for i in range(length)]
        shared = {
            "heads": heads,
            "mixer_kwargs": mixer_kwargs,
            "ffn_kwargs": ffn_kwargs,
            "norm": norm,
            "norm_kwargs": norm_kwargs,
            "dtype": dtype,
        }
        block = lambda rngs, mixer, ffn: Block(width, mixer=mixer, ffn=ffn, rngs=rngs, **shared)
        make = [partial(block, mixer=mixer, ffn=ffn) for mixer, ffn in pattern]
        self.blocks = Stack(make, depth=depth, mode=stack, remat=remat, rngs=rngs)
        self.norm = construct(NORMS, norm, norm_kwargs, "norm", width=width, rngs=rngs)
        self.dropout, self.dtype = dropout, dtype

    def features(self, x: jax.Array, context: Context, key: jax.Array | None = None) -> tuple[jax.Array, dict]:
        """Embedded tokens [B, T, M] -> (normed features [B, T, M], aux)."""
        embed_key, key = (None, None) if key is None else jax.random.split(key)
        x = dropout(x, self.dropout, embed_key, context.train)
        x, _, aux = self.blocks(x, context, key=key)
        return self.norm(x), aux

    def continued(
        self,
        x: jax.Array,
        caches: list,
        at: jax.Array,
        meta: jax.Array | None = None,
        tokens: jax.Array | None = None,
        expert: jax.Array | None = None,
    ) -> tuple[jax.Array, list]:
        """The t next tokens [B, t, M] of sequences of which the caches hold `at` [B] -> (normed features [B, t, M],
        caches). Causal, and never in training. `meta`, `tokens`, `expert`: as in `Context`."""
        positions = at[:, None] + jnp.arange(x.shape[1])
        context = Context(positions=positions, mask=masks.Causal(offset=at), meta=meta, tokens=tokens, expert=expert)
        x, caches, _ = self.blocks(x, context, caches=caches)
        return self.norm(x), caches
