"""Compressed convolutional attention: the whole attention happens in a latent, which convolutions enrich."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import UnsupportedForm, at_least_one, rate
from lissom.models.context import Context
from lissom.models.linear import Linear
from lissom.models.mixers import caches
from lissom.models.mixers.attention import Attention, head_size
from lissom.models.variables import Param
from lissom.ops.attention import masks


class CompressedAttention(Attention):
    """CCA (Figliolia et al. 2025, arXiv:2510.04476): heads of the usual size, but fewer: `heads` / compression of them.

        q0 = x Wq [heads / query_compression, D]        k0 = x Wk [heads / cache_compression, D]
        q1, k1 = conv_head(conv_depthwise(q0, k0))      causal, over the sequence
        q2 = q1 + (q0 + k0) / 2                         k2 = k1 + the same, averaged over the queries of a key head
        q = sqrt(D) q2 / |q2|                           k = temperature sqrt(D) k2 / |k2|
        v = [x_t Wv | x_{t-1} Wv']                      then rotary angles, softmax attention with scale 1 / sqrt(D), Wo

    query_compression (C1) divides the compute of attention, cache_compression (C2, a multiple of it) the keys and
    values; with C2 > C1 key heads are shared as in grouped attention (`ccgqa`). `kernels`: lengths of the first
    convolution (each channel alone) and the second (all channels of a head). `conv`, `mean`, `value_shift` and `norm`
    switch the four parts off; without any of them this is (grouped) attention with fewer heads. `temperature` is
    learned, one a key head, and starts at 1.

    Left open by the paper and chosen here: the scale of the logits (1 / sqrt(D), so they are sqrt(D) temperature cos);
    which half of v looks back (the second half of the latent, which is half of the heads where their number is even);
    the first weights of the convolutions (normal, variance 1 / fan-in).

    Cache: k, v [B, K, length, D], rotated, and of fixed size the last tokens' q0, k0 (`tail`) and x Wv' (`previous`).
    """

    cache_axes: ClassVar = {
        **Attention.cache_axes,
        "tail": ("batch", None, "latent"),
        "previous": ("batch", None, "latent"),
    }

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        query_compression: int = 2,
        cache_compression: int = 2,
        kernels: tuple[int, int] = (2, 2),
        conv: bool = True,
        mean: bool = True,
        value_shift: bool = True,
        norm: bool = True,
        head_dim: int | None = None,
        rope_theta: float = 10_000.0,
        dropout: float = 0.0,
        implementation: str | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        at_least_one("mixer", query_compression=query_compression, cache_compression=cache_compression, kernels=kernels)
        rate("mixer", dropout=dropout)
        if len(kernels) != 2:
            raise ValueError(f"mixer.kernels={tuple(kernels)} must be two lengths")
        if cache_compression % query_compression or heads % cache_compression:
            raise ValueError(
                f"heads={heads} must be a multiple of cache_compression={cache_compression}, and that a multiple of "
                f"query_compression={query_compression}"
            )
        head_dim = head_size(width, heads, head_dim)
        super().__init__(
            width, heads=heads // query_compression, kv_heads=heads // cache_compression, head_dim=head_dim,
            rope_theta=rope_theta, dropout=dropout, implementation=implementation, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        self.heads = heads // query_compression
        self.mean, self.norm, self.kernels, self.dtype = mean, norm, tuple(kernels), dtype
        all_heads, values = self.heads + self.kv_heads, self.kv_heads * head_dim
        self.channel_conv, self.head_conv, self.temperature = nnx.data(None), nnx.data(None), nnx.data(None)
        self.v_previous = nnx.data(None)
        if conv:
            first, second = kernels
            normal = lambda fan_in, *shape: jax.random.normal(rngs.params(), shape) * fan_in**-0.5
            channel = normal(first, first, all_heads, head_dim)
            mixed = normal(second * head_dim, second, all_heads, head_dim, head_dim)
            self.channel_conv = Param(channel, out_sharding=(None, None, "head_dim"))
            self.head_conv = Param(mixed, out_sharding=(None, None, None, "head_dim"))
        if value_shift:
            kinds = {"axes": ("embed", "latent"), "bias": False, "dtype": dtype, "rngs": rngs}
            self.v = Linear(width, values - values // 2, **kinds)
            self.v_previous = Linear(width, values // 2, **kinds)
        if norm:
            self.temperature = Param(jnp.ones(self.kv_heads), out_sharding=(None,))

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the cache for `batch` sequences of at most `length` tokens."""
        found = super().init_cache(batch, length, dtype)
        if self.channel_conv is not None:
            channels = (self.heads + self.kv_heads) * self.head_dim
            found["tail"] = jax.ShapeDtypeStruct((batch, sum(self.kernels) - 2, channels), dtype)
        if self.v_previous is not None:
            found["previous"] = jax.ShapeDtypeStruct((batch, 1, self.kv_heads * self.head_dim // 2), dtype)
        return found

    def project(self, x: jax.Array, context: Context, cache: dict | None):
        """x [B, T, M] -> (q [B, T, H, D], k, v [B, T, K, D], and the cache with the new tails)."""
        if context.segments is not None or not isinstance(context.mask, masks.Full | masks.Causal):
            raise UnsupportedForm(
                f"{type(self).__name__} convolves over the sequence and cannot keep segments apart: it takes a causal "
                f"mask or none, not {context.mask!r:.80}."
            )
        q0, k0, new = self.q(x), self.k(x), {}
        q, k = q0, k0
        if self.channel_conv is not None:
            both = jnp.concatenate([q0, k0], 2)
            seen, new["tail"] = caches.shifted(self._past("tail", cache, x), both.reshape(*x.shape[:2], -1), 1)
            both = self._convolved(seen.astype(x.dtype).reshape(x.shape[0], -1, *both.shape[2:]))
            q, k = both[:, :, : self.heads], both[:, :, self.heads :]
        if self.mean:
            grouped = q0.reshape(*x.shape[:2], self.kv_heads, -1, self.head_dim)
            mean = (grouped + k0[:, :, :, None]) / 2
            q, k = q + mean.reshape(q0.shape), k + mean.mean(3)
        if self.temperature is not None:
            q, k = unit(q), unit(k) * self.temperature[...].astype(k.dtype)[:, None]
        if self.rope_theta:
            q, k = (self.rotated(part, context) for part in (q, k))
        v = self.v(x)
        if self.v_previous is not None:
            seen, new["previous"] = caches.shifted(self._past("previous", cache, x), self.v_previous(x), 1)
            v = jnp.concatenate([v, seen[:, :-1].astype(v.dtype)], -1)
        v = v.reshape(*k.shape)
        return q, k, v, None if cache is None else {**cache, **new}

    def _past(self, name: str, cache: dict | None, x: jax.Array) -> jax.Array:
        """What a sequence has had of `name`; zeros before its first token."""
        if cache is not None:
            return cache[name]
        return jnp.zeros(self.init_cache(x.shape[0], 1, x.dtype)[name].shape, x.dtype)

    def _convolved(self, rows: jax.Array) -> jax.Array:
        """[B, K1 - 1 + K2 - 1 + T, heads, D] -> [B, T, heads, D]: y_t = sum_i W_i x_{t - (K - 1) + i}, twice."""
        taps = self.channel_conv[...].astype(self.dtype)
        length = rows.shape[1] - len(taps) + 1
        rows = sum(rows[:, i : i + length] * tap for i, tap in enumerate(taps))
        taps = self.head_conv[...].astype(self.dtype)
        length = rows.shape[1] - len(taps) + 1
        return sum(jnp.einsum("bthd,hde->bthe", rows[:, i : i + length], tap) for i, tap in enumerate(taps))


class CompressedGroupedAttention(CompressedAttention):
    """CCGQA: `CompressedAttention` whose keys and values are, if nothing else is said, compressed by 4 and the queries
    by 2, so that two query heads share a key head."""

    def __init__(self, width: int, *, heads: int, query_compression: int = 2, cache_compression: int = 4, **kwargs):
        super().__init__(
            width, heads=heads, query_compression=query_compression, cache_compression=cache_compression, **kwargs
        )


def unit(x: jax.Array) -> jax.Array:
    """sqrt(D) x / |x| over the last axis, in float32; zeros stay zeros."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-12)).astype(x.dtype)
