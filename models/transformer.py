"""What every transformer is between its ends: the residual stack and the last norm; what a decoder adds, its cache."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models import NORMS
from lissom.models.block import Block
from lissom.models.bounds import UnsupportedForm, at_least_one, rate
from lissom.models.context import Context
from lissom.models.linear import Embedding, dropout
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


class Decoder(Transformer):
    """A causal `Transformer` that continues sequences through a cache, of tokens of any kind.

    A subclass calls `make_table` between its embedding and this constructor, embeds with `learned`, and has
    `extend(inputs, cache) -> (output, cache)`.
    """

    period = 1  # decoding costs the same again after so many tokens

    def make_table(self, learned_positions: int, width: int, **rows) -> None:
        """The table of so many learned positions; 0: none."""
        if learned_positions < 0:
            raise ValueError(f"model.learned_positions={learned_positions} must be 0 or the greatest length")
        self.learned_positions = learned_positions
        self.table = (
            Embedding(learned_positions, width, axes=("positions", "embed"), **rows) if learned_positions else None
        )

    def learned(self, positions: jax.Array) -> jax.Array:
        """What the table has for positions [B or 1, T]: [B or 1, T, M]."""
        if positions.shape[1] > self.learned_positions:
            raise UnsupportedForm(
                f"{positions.shape[1]} tokens are more than model.learned_positions={self.learned_positions}"
            )
        return self.table(positions)

    def init_cache(self, batch: int, length: int) -> dict:
        """An empty cache for `batch` sequences of at most `length` tokens."""
        if self.table is not None and length > self.learned_positions:
            raise ValueError(
                f"a cache of {length} tokens is longer than model.learned_positions={self.learned_positions}"
            )
        return {
            "layers": self.blocks.init_cache(batch, length, self.dtype),
            "length": jnp.zeros(batch, jnp.int32),
        }

    def branch(self, cache: dict, ways: int, more: int) -> dict:
        """A cache for `ways` continuations of each sequence of `cache`, one behind the other, of at most `more` tokens
        each; `extend` goes on from it as if each had a copy. Attention keeps what they share once and reads it as one
        product for all of them (Hydragen, RelayAttention: `lissom.ops.attention.shared_prefix`); branched again, it is
        a tree. ValueError for numbers below 1."""
        at_least_one("branch", ways=ways, more=more)
        layers = self.blocks.branch(cache["layers"], ways, more)
        return {"layers": layers, "length": jnp.repeat(cache["length"], ways)}
