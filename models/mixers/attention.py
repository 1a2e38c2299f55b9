"""Softmax attention as a mixer: multi-head, grouped-query, windowed; rotary positions, normed q and k, a cache.

Variants override one of three steps: `project` (x to q, k, v), `see` (which mask) and `attend` (against what).
"""

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lissom.models.bounds import at_least_one, rate
from lissom.models.context import Context
from lissom.models.ffn import NO_AUX
from lissom.models.linear import Linear, dropout
from lissom.models.mixers import caches
from lissom.models.norms import RMSNorm
from lissom.models.positions import positions_of, rotate
from lissom.ops.attention import attention, masks
from lissom.ops.attention.shared_prefix import Shared, shared_prefix_attention


class Attention(nnx.Module):
    """y = softmax(q k^T / sqrt(D)) v Wo over the keys that `context.mask` allows (Vaswani et al. 2017,
    arXiv:1706.03762).

    `kv_heads` < `heads` shares each key and value head between heads / kv_heads query heads (Ainslie et al. 2023,
    arXiv:2305.13245); 1 is multi-query attention (Shazeer 2019, arXiv:1911.02150). `rope_theta` turns q and k by rotary
    angles of that base (Su et al. 2021, arXiv:2104.09864; 0 switches it off), each pair's angle divided by its entry of
    `rope_factors`, and `rope_dim` only the first so many entries of each head (None: all). `qk_norm` normalises q and k
    a head before the product (Henry et al. 2020, arXiv:2010.04245, here with RMSNorm). `out_bias` is whether Wo has a
    bias, None: where q, k and v have one (`bias`). The cache is heads-major, k and v [B, K, length, D], so that
    decoding reads contiguous rows; k is stored rotated.
    """

    cache_axes: ClassVar = {
        "k": ("batch", "kv_heads", "length", "head_dim"),
        "v": ("batch", "kv_heads", "length", "head_dim"),
        "length": ("batch",),
    }

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float = 10_000.0,
        rope_dim: int | None = None,
        rope_factors: Sequence[float] | None = None,
        qk_norm: bool = False,
        bias: bool = False,
        out_bias: bool | None = None,
        dropout: float = 0.0,
        implementation: str | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        at_least_one("mixer", kv_heads=kv_heads, head_dim=head_dim, rope_dim=rope_dim)
        rate("mixer", dropout=dropout)
        kv_heads = heads if kv_heads is None else kv_heads
        if heads % kv_heads:
            raise ValueError(f"heads={heads} must be a multiple of kv_heads={kv_heads}")
        head_dim = head_size(width, heads, head_dim)
        rope_dim = rotary_size(head_dim, rope_theta, rope_dim)
        pairs = rope_dim // 2 if rope_theta else 0
        if rope_factors is not None and (len(rope_factors) != pairs or any(by <= 0 for by in rope_factors)):
            raise ValueError(
                f"mixer.rope_factors={rope_factors!r:.60} must be {pairs} positive numbers, one a rotary pair"
            )
        self.rope_factors = None if rope_factors is None else tuple(rope_factors)
        kinds = {"dtype": dtype, "bias": bias, "rngs": rngs}
        out = {**kinds, "bias": bias if out_bias is None else out_bias}
        self.q = Linear(width, (heads, head_dim), axes=("embed", "heads", "head_dim"), **kinds)
        self.k = Linear(width, (kv_heads, head_dim), axes=("embed", "kv_heads", "head_dim"), **kinds)
        self.v = Linear(width, (kv_heads, head_dim), axes=("embed", "kv_heads", "head_dim"), **kinds)
        self.o = Linear(heads * head_dim, width, axes=("heads", "embed"), **out)
        self.q_norm = RMSNorm(head_dim, rngs=rngs) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, rngs=rngs) if qk_norm else None
        self.kv_heads, self.head_dim, self.rope_theta, self.rope_dim = kv_heads, head_dim, rope_theta, rope_dim
        self.dropout, self.implementation = dropout, implementation

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the cache for `batch` sequences of at most `length` tokens."""
        entry = jax.ShapeDtypeStruct((batch, self.kv_heads, length, self.head_dim), dtype)
        return {"k": entry, "v": entry, "length": jax.ShapeDtypeStruct((batch,), jnp.int32)}

    def project(self, x: jax.Array, context: Context, cache: dict | None):
        """x [B, T, M] -> (q [B, T, H, D], k, v [B, T, K, D], rotated; the cache as far as projecting changes it)."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_theta:
            q, k = (self.rotated(part, context) for part in (q, k))
        return q, k, v, cache

    def rotated(self, x: jax.Array, context: Context) -> jax.Array:
        """x [B, T, heads, D] turned by the rotary angles of its positions."""
        positions = positions_of(context, x.shape[1])
        return rotate(x, positions, self.rope_theta, factors=self.rope_factors, size=self.rope_dim)

    def see(self, context: Context) -> masks.Mask:
        """The mask of this mixer; a variant narrows it."""
        return context.mask

    def attend(self, q, k, v, context: Context, cache: dict | None, key: jax.Array | None):
        """(weighted values [B, T, H, D], cache, aux)."""
        if cache is None:
            return attention(q, k, v, mask=self.see(context), implementation=self.implementation), None, NO_AUX
        own, levels = cache["length"], cache.get("prefix", ())
        caches.need_causal(self, context.mask, alone=bool(levels))
        cache = caches.append(cache, k=k, v=v)
        if not levels:
            seen = {"mask": self.see(context), "implementation": self.implementation}
            return caches.attend(q, cache["k"], cache["v"], cache["length"], **seen), cache, NO_AUX
        shared = [_level(level, len(q), q.dtype) for level in levels]
        k, v = (jnp.swapaxes(cache[name], 1, 2).astype(q.dtype) for name in ("k", "v"))
        options = {"mask": masks.Causal(offset=own), "implementation": self.implementation}
        return shared_prefix_attention(q, shared, k, v, **options), cache, NO_AUX

    def branch(self, cache: dict, ways: int, more: int) -> dict:
        """A cache for `ways` continuations of each sequence, of at most `more` tokens each. What the sequence holds is
        kept once, as one more level of `prefix`, and read once a step for all its continuations (Hydragen: Juravsky et
        al. 2024, arXiv:2402.05099)."""
        level = {name: cache[name] for name in ("k", "v", "length")}
        batch, heads, _, size = cache["k"].shape
        empty = jnp.zeros((batch * ways, heads, more, size), cache["k"].dtype)
        # The tails of convolutions go on in each continuation.
        rest = {name: jnp.repeat(cache[name], ways, 0) for name in cache if name not in (*level, "prefix")}
        own = {"k": empty, "v": empty, "length": jnp.zeros(batch * ways, jnp.int32)}
        return {**rest, **own, "prefix": (*cache.get("prefix", ()), level)}

    def __call__(self, x: jax.Array, context: Context, cache: dict | None = None, key: jax.Array | None = None):
        q, k, v, cache = self.project(x, context, cache)
        y, cache, aux = self.attend(q, k, v, context, cache, key)
        y = self.o(y.reshape(*x.shape[:2], -1))
        return dropout(y, self.dropout, key, context.train), cache, aux


def _level(level: dict, batch: int, dtype: jnp.dtype) -> Shared:
    """What is cached of one level of the tree. Every node has as many continuations, one behind the other."""
    nodes = level["k"].shape[0]
    k, v = (jnp.swapaxes(level[name], 1, 2).astype(dtype) for name in ("k", "v"))
    return Shared(k, v, np.repeat(np.arange(nodes), batch // nodes), level["length"])


class GroupedQueryAttention(Attention):
    """`Attention` in which, if nothing else is said, four query heads share a key and value head: a quarter of the
    cache (Ainslie et al. 2023, arXiv:2305.13245). Where heads are no multiple of four, the next larger groups that they
    divide into."""

    def __init__(self, width: int, *, heads: int, kv_heads: int | None = None, **kwargs):
        quarter = next((few for few in range(max(heads // 4, 1), 0, -1) if heads % few == 0), 1)
        super().__init__(width, heads=heads, kv_heads=quarter if kv_heads is None else kv_heads, **kwargs)


class WindowAttention(Attention):
    """Attention in which a query at t sees the keys of t - window + 1 .. t + window - 1 that `context.mask` allows;
    with a causal mask that is the last `window` tokens, itself included (Beltagy et al. 2020, arXiv:2004.05150).

    The cache holds the last window - 1 keys and values, however long the sequence."""

    cache_axes: ClassVar = {
        "k": ("batch", "kv_heads", None, "head_dim"),
        "v": ("batch", "kv_heads", None, "head_dim"),
        "length": ("batch",),
    }

    def __init__(self, width: int, *, heads: int, window: int = 8, **kwargs):
        at_least_one("mixer", window=window)
        super().__init__(width, heads=heads, **kwargs)
        self.window, self.dilation = window, 1

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the cache for `batch` sequences."""
        return super().init_cache(batch, self.reach, dtype)

    def branch(self, cache: dict, ways: int, more: int) -> dict:
        """A cache for `ways` continuations of each sequence: a window is small, each has its own."""
        return caches.repeated(cache, self.cache_axes, ways, more)

    @property
    def reach(self) -> int:
        """Distance of the farthest key. (`dilation` is that of `NeighborhoodAttention`.)"""
        return (self.window - 1) * self.dilation

    def see(self, context: Context) -> masks.Mask:
        """The context's mask, narrowed to the window."""
        near = masks.Window(left=self.reach, right=self.reach, offset=getattr(context.mask, "offset", 0))
        return context.mask & near

    def attend(self, q, k, v, context: Context, cache: dict | None, key: jax.Array | None):
        """(weighted values, cache, aux). Row r of what a step sees stands at position length - reach + r."""
        if cache is None:
            return super().attend(q, k, v, context, cache, key)
        caches.need_causal(self, context.mask, alone=True)
        (k, k_tail), (v, v_tail) = (
            caches.shifted(cache[name], jnp.swapaxes(new, 1, 2), 2) for name, new in (("k", k), ("v", v))
        )
        reach, length = self.reach, cache["length"]
        rows = np.arange(k.shape[2], dtype=np.int32)
        # Keys of a query's own residue class modulo the dilation; what lies before the first token is padding.
        classes = jnp.broadcast_to((rows + length[:, None]) % self.dilation, (len(length), len(rows)))
        exists = rows >= reach - length[:, None]
        apart = masks.Segments(classes[:, reach:], jnp.where(exists, classes, -1))
        seen = masks.Window(left=reach, right=0, offset=reach) & apart
        k, v = (jnp.swapaxes(x, 1, 2).astype(q.dtype) for x in (k, v))
        y = attention(q, k, v, mask=seen, implementation=self.implementation)
        return y, {"k": k_tail, "v": v_tail, "length": length + q.shape[1]}, NO_AUX


def head_size(width: int, heads: int, head_dim: int | None) -> int:
    """`head_dim`, or the width's part of a head."""
    if head_dim is None and width % heads:
        raise ValueError(f"model width {width} must be a multiple of heads={heads}, or head_dim given")
    return width // heads if head_dim is None else head_dim


def rotary_size(head_dim: int, rope_theta: float, rope_dim: int | None) -> int:
    """How many entries of a head turn: an even number up to all of them."""
    if rope_theta < 0:
        raise ValueError(f"mixer.rope_theta={rope_theta} must be above 0, or 0 for no rotary positions")
    size = head_dim if rope_dim is None else rope_dim
    if rope_theta and (size % 2 or size > head_dim):
        name = "head_dim" if rope_dim is None else "rope_dim"
        raise ValueError(f"rotary positions turn an even number of the {head_dim} entries of a head, not {name}={size}")
    return size
