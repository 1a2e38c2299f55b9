"""Attention over the blocks of keys that a selector lists, and attention among the blocks of tokens that are kept."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import UnsupportedForm, at_least_one
from lissom.models.context import Context
from lissom.models.mixers import caches
from lissom.models.mixers.attention import Attention
from lissom.models.positions import positions_of
from lissom.models.registry import construct
from lissom.models.selectors import SELECTORS, scores
from lissom.models.selectors import token_sparsity as tokens
from lissom.models.selectors.base import fraction
from lissom.ops.attention import And, Causal, Mask, Segments, attention


class BlockSparseAttention(Attention):
    """Causal attention in which each query sees what `selector` lists for it: y = softmax(q k^T / sqrt(D)) v Wo over
    those keys (`lissom.ops.attention` computes the lists; each selector credits its paper).

    `selector` is a name of `SELECTORS`, `selector_kwargs` holds settings by name, `block` is the number of keys of a
    block. aux has the metric "density", the measured share of the causal scores that are computed, and in training the
    losses of a selector with parameters. Gradients go through attention; a selection has none. In packed rows a
    selector lists, density counts and a gate learns as if the row were one document; attention itself stays within
    documents.

    With a cache, a chunk selects among the keys so far, and a single token as the selector's `decode` says: "select",
    or "dense" where the source selects in prefill only (density 1).
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        selector: str = "strided",
        selector_kwargs: Mapping | None = None,
        block: int = 64,
        rngs: nnx.Rngs,
        **kwargs,
    ):
        super().__init__(width, heads=heads, rngs=rngs, **kwargs)
        facts = {"heads": heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim, "block": block}
        self.selector = construct(SELECTORS, selector, selector_kwargs, "selector", **facts, rngs=rngs)

    def branch(self, cache: dict, ways: int, more: int) -> dict:
        """A cache for `ways` continuations of each sequence: selectors list blocks of one cache; each has its own."""
        return caches.repeated(cache, self.cache_axes, ways, more)

    def attend(self, q, k, v, context: Context, cache: dict | None, key: jax.Array | None):
        """(weighted values, cache, aux)."""
        cached = cache is not None
        if cached:
            cache = caches.append(cache, k=k, v=v)
            k, v = (jnp.swapaxes(cache[name], 1, 2).astype(q.dtype) for name in ("k", "v"))
        causal, rest = causal_part(context.mask)
        if cached and q.shape[1] == 1 and self.selector.decode == "dense":
            y = attention(q, k, v, mask=context.mask, implementation=self.implementation)
            return y, cache, {"losses": {}, "metrics": {"density": jnp.ones(())}}
        raw = self.unrotated(q, k, context, cached) if self.selector.unrotated else None
        mask, info = self.selector(q, k, causal.offset, key, raw)
        if rest is not None:
            mask, info = mask & rest, {name: value for name, value in info.items() if name != "tokens"}
        y = self.selector.attend(q, k, v, mask, info, self.implementation)
        losses = self.selector.loss(q, k, (q, k) if raw is None else raw) if context.train else {}
        return y, cache, {"losses": losses, "metrics": {"density": info["density"]}}

    def unrotated(self, q, k, context: Context, cached: bool) -> tuple[jax.Array, jax.Array]:
        """q and k turned back to what they were in front of the rotary angles (a cache holds turned keys only)."""
        if not self.rope_theta:
            return q, k
        positions = positions_of(context, q.shape[1])
        of_keys = jnp.arange(k.shape[1])[None] if cached else positions
        return tuple(self.rotated(x, Context(positions=-at)) for x, at in ((q, positions), (k, of_keys)))


class TokenElimination(Attention):
    """Attention that in training is one among the most informative blocks of tokens, whose activations alone are kept
    (after LeMo; Wang et al. 2025, arXiv:2501.09767, for fine-tuning on long contexts). Outside of training it is
    `Attention`.

    In training the ceil(keep x blocks) blocks of `block` tokens with the largest accumulated attention, the last block
    always, are gathered in front of the projections: q, k, v, the softmax and the output product, and what the backward
    pass saves of them, have `keep` of the length. The others pass through the residual (their output is 0). `keep` is
    static.

    Importance is the attention among the blocks' means, projected by this layer's own q and k, a choice made here: the
    paper predicts the pattern by small trained networks, for each input and layer. These, its kernels without
    permutation, a share that follows the input, and elimination in the feed-forward layer too are not here. Which
    blocks are kept depends on later tokens: the loss of training is not that of judging, which is dense.
    """

    def __init__(self, width: int, *, heads: int, keep: float = 0.5, block: int = 16, **kwargs):
        super().__init__(width, heads=heads, **kwargs)
        fraction(keep=keep)
        at_least_one("mixer", block=block)
        self.keep, self.block = keep, block

    def __call__(self, x: jax.Array, context: Context, cache: dict | None = None, key: jax.Array | None = None):
        if not isinstance(context.mask, Causal):
            raise UnsupportedForm(f"token_elimination takes a causal mask alone, got {context.mask}")
        if not context.train:
            return super().__call__(x, context, cache, key)
        batch, length, _ = x.shape
        index = tokens.kept_blocks(self.importance(x), self.keep)
        at = (index[:, :, None] * self.block + jnp.arange(self.block)).reshape(batch, -1)
        few = Context(
            positions=at if context.positions is None else jnp.take_along_axis(context.positions, at, 1, mode="clip"),
            mask=context.mask if length % self.block == 0 else context.mask & Segments(jnp.where(at < length, 0, -1)),
            train=context.train,
        )
        y, _, aux = super().__call__(tokens.gather_blocks(x, index, self.block), few, None, key)
        y = tokens.scatter_blocks(y, index, self.block, length)
        return y, None, {**aux, "metrics": {"kept": (at < length).sum() / (batch * length)}}

    def importance(self, x: jax.Array) -> jax.Array:
        """[B, blocks], from the blocks' means."""
        means = jax.lax.stop_gradient(scores.pooled(x[:, :, None], self.block)[:, :, 0])
        q, k = self.q(means), self.k(means)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_theta:
            at = Context(positions=jnp.arange(q.shape[1])[None] * self.block)
            q, k = (self.rotated(part, at) for part in (q, k))
        return tokens.block_importance(q, k)


def causal_part(mask: Mask) -> tuple[Causal, Mask | None]:
    """The causal part of a mask and what is left of it. ValueError where there is none."""
    parts = mask.parts if isinstance(mask, And) else (mask,)
    causal = [part for part in parts if isinstance(part, Causal)]
    if len(causal) != 1:
        raise UnsupportedForm(f"block_sparse selects among past keys: it needs a causal mask, got {mask}")
    rest = tuple(part for part in parts if part is not causal[0])
    return causal[0], None if not rest else rest[0] if len(rest) == 1 else And(rest)
