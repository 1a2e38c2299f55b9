"""Decoder language model, with its cache."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models import NORMS
from lissom.models.block import residual_stack
from lissom.models.context import Context
from lissom.models.linear import Embedding, Linear, dropout
from lissom.models.registry import construct
from lissom.ops.attention import masks


class LanguageModel(nnx.Module):
    """inputs int32 [B, T] -> logits float32 [B, T, vocab]: embedding, causal residual stack, norm, logits.

    `tied` shares the embedding with the last product (Press & Wolf 2016, arXiv:1608.05859). Positions are the
    mixer's affair (rotary angles in `attention`). `extend` continues sequences through a cache.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        depth: int,
        heads: int,
        mixer: str | Sequence[str] = "attention",
        mixer_kwargs: Mapping | None = None,
        ffn: str = "swiglu",
        ffn_kwargs: Mapping | None = None,
        norm: str = "rmsnorm",
        norm_kwargs: Mapping | None = None,
        tied: bool = True,
        dropout: float = 0.0,
        stack: str | None = None,
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.embed = Embedding(vocab_size, width, dtype=dtype, rngs=rngs)
        self.blocks = residual_stack(
            depth=depth,
            width=width,
            heads=heads,
            mixer=mixer,
            mixer_kwargs=mixer_kwargs,
            ffn=ffn,
            ffn_kwargs=ffn_kwargs,
            norm=norm,
            norm_kwargs=norm_kwargs,
            stack=stack,
            remat=remat,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = construct(NORMS, norm, norm_kwargs, "norm", width=width, rngs=rngs)
        self.head = (
            None if tied else Linear(width, vocab_size, axes=("embed", "vocab"), bias=False, dtype=dtype, rngs=rngs)
        )
        self.dropout, self.dtype = dropout, dtype

    def _logits(self, x: jax.Array) -> jax.Array:
        x = self.norm(x)
        return (self.embed.logits(x) if self.head is None else self.head(x)).astype(jnp.float32)

    def __call__(self, inputs: jax.Array, *, train: bool = False, key: jax.Array | None = None):
        embed_key, key = (None, None) if key is None else jax.random.split(key)
        x = dropout(self.embed(inputs), self.dropout, embed_key, train)
        x, _, aux = self.blocks(x, Context(mask=masks.Causal(), train=train), key=key)
        return self._logits(x), aux

    def init_cache(self, batch: int, length: int) -> dict:
        """An empty cache for `batch` sequences of at most `length` tokens."""
        return {
            "layers": self.blocks.init_cache(batch, length, self.dtype),
            "length": jnp.zeros(batch, jnp.int32),
        }

    def extend(self, inputs: jax.Array, cache: dict) -> tuple[jax.Array, dict]:
        """The t next tokens [B, t] of each sequence -> (logits [B, t, vocab], cache). Writing past the cache's
        length is the caller's mistake and cannot be seen under jit: `inference/` checks it before it compiles."""
        length = cache["length"]
        positions = length[:, None] + jnp.arange(inputs.shape[1])
        context = Context(positions=positions, mask=masks.Causal(offset=length))
        x, layers, _ = self.blocks(self.embed(inputs), context, caches=cache["layers"])
        return self._logits(x), {"layers": layers, "length": length + inputs.shape[1]}
