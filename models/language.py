"""Decoder language model, with its cache."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import UnsupportedForm, at_least_one
from lissom.models.context import Context
from lissom.models.linear import Embedding, Linear
from lissom.models.products import placed
from lissom.models.transformer import Transformer
from lissom.ops.attention import masks


class LanguageModel(Transformer):
    """inputs int32 [B, T] -> logits float32 [B, T, vocab]: embedding, causal residual stack, norm, logits.

    `tied` shares the embedding with the last product (Press & Wolf 2016, arXiv:1608.05859). Positions are the
    mixer's affair (rotary angles in `attention`), unless `learned_positions` > 0 asks for a learned table of so many,
    which is added to the embedding (sequences can be no longer then). Rows of both tables are multiplied by
    `embedding_multiplier` (None: sqrt(width), see `Embedding`; 1 in networks of the Llama family). `extend` continues
    sequences through a cache, `branch` lets several continuations share one. `meta` bool [B, T] says which tokens are
    meta-tokens: mixers read it in their context. `zero_meta_positions` leaves the learned position of those tokens out
    at inference. `domains` [B, D], `expert` [B, T], `compare`: as in `Context`.
    """

    period = 1  # decoding costs the same again after so many tokens

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
        if learned_positions < 0:
            raise ValueError(f"model.learned_positions={learned_positions} must be 0 or the greatest length")
        if zero_meta_positions and not learned_positions:
            raise ValueError(
                "model.zero_meta_positions is for learned_positions; rotary ones are zeroed by "
                "mixer_kwargs.meta_tokens.zero_positions"
            )
        self.zero_meta_positions = zero_meta_positions
        self.learned_positions = learned_positions
        self.table = (
            Embedding(learned_positions, width, axes=("positions", "embed"), **rows) if learned_positions else None
        )
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
        if inputs.shape[1] > self.learned_positions:
            raise UnsupportedForm(
                f"{inputs.shape[1]} tokens are more than model.learned_positions={self.learned_positions}"
            )
        learned = self.table(positions)
        if self.zero_meta_positions and meta is not None:
            learned = jnp.where(meta[..., None], 0, learned)
        return x + learned

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
