"""Decoder language model, with its cache."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import at_least_one
from lissom.models.context import Context
from lissom.models.linear import Embedding, Linear
from lissom.models.products import placed
from lissom.models.transformer import Decoder
from lissom.ops.attention import masks


class LanguageModel(Decoder):
    """inputs int32 [B, T] -> logits float32 [B, T, vocab]: embedding, causal residual stack, norm, logits.

    `tied` shares the embedding with the last product (Press & Wolf 2016, arXiv:1608.05859). Positions are the
    mixer's affair (rotary angles in `attention`), unless `learned_positions` > 0 asks for a learned table of so many,
    which is added to the embedding (sequences can be no longer then). Rows of both tables are multiplied by
    `embedding_multiplier` (None: sqrt(width), see `Embedding`; 1 in networks of the Llama family). `extend` continues
    sequences through a cache, `branch` lets several continuations share one. `meta` bool [B, T] says which tokens are
    meta-tokens: mixers read it in their context. `zero_meta_positions` leaves the learned position of those tokens out
    at inference. `domains` [B, D], `expert` [B, T], `compare`: as in `Context`.
    """

    places_tokens = True  # whether layers can tell which tokens of a sequence they see

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        ffn: str | Sequence[str] = "swiglu",
        norm: str = "rmsnorm",
        tied: bool = True,
        learned_positions: int = 0,
        embedding_multiplier: float | None = None,
        zero_meta_positions: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
        **settings,
    ):
        at_least_one("model", width=width)
        if embedding_multiplier is not None and not 0 < embedding_multiplier < math.inf:
            raise ValueError(f"model.embedding_multiplier={embedding_multiplier} must be above 0, or None: sqrt(width)")
        rows = {"multiplier": embedding_multiplier, "dtype": dtype, "rngs": rngs}
        self.embed = Embedding(vocab_size, width, **rows)
        if zero_meta_positions and not learned_positions:
            raise ValueError(
                "model.zero_meta_positions is for learned_positions; rotary ones are zeroed by "
                "mixer_kwargs.meta_tokens.zero_positions"
            )
        self.zero_meta_positions = zero_meta_positions
        self.make_table(learned_positions, width, **rows)
        super().__init__(width=width, ffn=ffn, norm=norm, dtype=dtype, rngs=rngs, **settings)
        self.head = (
            None if tied else Linear(width, vocab_size, axes=("embed", "vocab"), bias=False, dtype=dtype, rngs=rngs)
        )

    def logits(self, x: jax.Array) -> jax.Array:
        return (self.embed.logits(x) if self.head is None else self.head(x)).astype(jnp.float32)

    def __call__(
        self,
        inputs: jax.Array,
        *,
        meta: jax.Array | None = None,
        domains: jax.Array | None = None,
        expert: jax.Array | None = None,
        compare: bool = False,
        train: bool = False,
        key: jax.Array | None = None,
    ):
        x = self._embedded(inputs, jnp.arange(inputs.shape[1])[None], None if train else meta)
        told = {"meta": meta, "tokens": inputs, "domains": domains, "expert": expert, "compare": compare}
        context = Context(mask=masks.Causal(), train=train, **told)
        x, aux = self.features(x, context, key)
        return self.logits(x), aux

    def _embedded(self, inputs: jax.Array, positions: jax.Array, meta: jax.Array | None) -> jax.Array:
        x = self.embed(inputs)
        if self.table is None:
            return x
        learned = self.learned(positions)
        if self.zero_meta_positions and meta is not None:
            learned = jnp.where(meta[..., None], 0, learned)
        return x + learned

    def extend(
        self, inputs: jax.Array, cache: dict, meta: jax.Array | None = None, expert: jax.Array | None = None
    ) -> tuple[jax.Array, dict]:
        """The t next tokens [B, t] of each sequence, of which `meta` bool [B, t] are meta-tokens, for which a router
        named `expert` [B, t] -> (logits [B, t, vocab], cache). Writing past the cache's length is the caller's mistake
        and cannot be seen under jit: `inference/` checks it before it compiles."""
        length = cache["length"]
        positions = length[:, None] + jnp.arange(inputs.shape[1])
        with placed(positions):
            x = self._embedded(inputs, positions, meta)
            x, layers = self.continued(x, cache["layers"], length, meta, inputs, expert)
            logits = self.logits(x)
        return logits, {"layers": layers, "length": length + inputs.shape[1]}
