"""What the caches of mixers have in common.

A cache is a dict of arrays and `length` int32 [B], the number of tokens that each sequence has had. Arrays that grow
have an axis "length" in `mixer.cache_axes`; the others hold what is needed of the past and no more (a window's last
keys, the tail of a convolution).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lissom.ops.attention import attention, masks
from lissom.ops.decode_attention import OP as DECODE
from lissom.ops.decode_attention import decode_attention

FEW = 16
"""Up to so many new tokens `decode_attention` reads a cache, beyond it the blocks of `attention`."""


def append(cache: Mapping, **new: jax.Array) -> dict:
    """The cache with rows [B, t, K, D] of each name written behind the `length[B]` tokens that are there, heads before
    positions, and `length` counted on."""
    length = cache["length"]
    write = jax.vmap(lambda rows, part, at: jax.lax.dynamic_update_slice(rows, part, (0, at, 0)))
    written = {
        name: write(cache[name], jnp.swapaxes(rows, 1, 2).astype(cache[name].dtype), length)
        for name, rows in new.items()
    }
    tokens = next(iter(new.values())).shape[1]
    return {**cache, **written, "length": length + tokens}


def shifted(tail: jax.Array, new: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """(what a step sees: tail and new joined along the axis, the tail that it leaves: the last entries of that)."""
    seen = jnp.concatenate([tail, new.astype(tail.dtype)], axis)
    size = tail.shape[axis]
    return seen, jax.lax.slice_in_dim(seen, seen.shape[axis] - size, seen.shape[axis], axis=axis)


def attend(q, k, v, length, mask, *, scale: float | None = None, implementation: str | None = None) -> jax.Array:
    """Causal attention of the t newest tokens q [B, t, H, D] over caches k, v [B, K, room, D] that hold `length[B]`
    tokens, these included. Returns [B, t, H, Dv].

    `mask` is the context's: `Causal(offset=length - t)`, as `LanguageModel.extend` makes it, or one with more parts.
    """
    k, v = (x.astype(q.dtype) for x in (k, v))
    named = implementation is None or implementation in DECODE.implementations
    if q.shape[1] <= FEW and named and isinstance(mask, masks.Causal):
        return decode_attention(q, k, v, lengths=length, scale=scale, implementation=implementation)
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    return attention(q, k, v, mask=mask, scale=scale, implementation=implementation)


def repeated(cache: Mapping, axes: Mapping, ways: int, more: int) -> dict:
    """Each sequence `ways` times, one behind the other, with room for `more` tokens where `axes` say "length"."""

    def grown(name, rows):
        rows = jnp.repeat(rows, ways, 0)
        if "length" not in axes[name]:
            return rows
        return jnp.pad(rows, [(0, more if axis == "length" else 0) for axis in axes[name]])

    return {name: grown(name, rows) for name, rows in cache.items()}


def advanced(where: jax.Array, new: Mapping, old: Mapping, axes: Mapping) -> dict:
    """`new` of the sequences where `where` [B], `old` of the others. Arrays that grow are the new ones for all, since
    what stands behind a sequence's length is never read: no cache is copied. (There must be room for it.)"""
    return {
        name: rows if "length" in axes.get(name, ("length",)) else chosen(where, rows, old[name])
        for name, rows in new.items()
    }


def chosen(where: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Rows [B, ...] of `new` where `where` [B], of `old` elsewhere."""
    return jnp.where(where.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def need_causal(mixer: object, mask: masks.Mask, *, alone: bool = False) -> None:
    """A cache holds the past only: ValueError where the mask would show more; `alone`, where it has more parts too."""
    parts = mask.parts if isinstance(mask, masks.And) and not alone else (mask,)
    if not any(isinstance(part, masks.Causal) for part in parts):
        raise ValueError(f"{type(mixer).__name__} continues a cache under a causal mask only, not under {mask!r}.")
