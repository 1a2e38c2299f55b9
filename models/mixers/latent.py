"""Multi-head latent attention: keys and values are made from a small latent, and only the latent is cached."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import at_least_one, rate
from lissom.models.context import Context
from lissom.models.ffn import NO_AUX
from lissom.models.linear import Linear, dropout
from lissom.models.mixers import caches
from lissom.models.mixers.attention import head_size, rotary_size
from lissom.models.norms import RMSNorm
from lissom.models.positions import positions_of, rotate
from lissom.ops.attention import attention

ROTARY = ("decoupled", "after", "none")


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1), for head h and the latent
    c = norm(x Wc):

        k_h = [c U_h | rotate(x Wr)]    q_h = [x Wq_h | rotate(x Wq'_h)]    v_h = c V_h
        y = softmax(q_h k_h^T / sqrt(head_dim + rope_dim)) v_h, all heads, Wo

    latent_dim: of c (None: 2 head_dim); `value_latent_dim` gives the values a latent of their own, and None the keys'.
    head_dim: of the unrotated part of q and k (None: width / heads); `value_dim`: of v (None: head_dim).
    `query_latent_dim`: q is made from a normed latent of its own too. `latent_norm`: RMSNorm on the latents. The paper
    leaves open what a small model should take; the defaults cache 2.5 head_dim numbers a token.

    rotary is one of
      "decoupled"  as above: `rope_dim` more entries (None: the largest even number up to head_dim / 2), shared by the
                   heads of each of `rope_heads` groups. The cache holds c and the rotated part, and decoding is
                   *absorbed*: since q_h (c U_h)^T = (q_h U_h^T) c^T, queries go to the latent space and the keys of
                   the past are never made.
      "after"      no decoupled part: the first `rope_dim` entries (None: all) of k_h = c U_h are rotated, after the
                   up-projection. A trained U does not commute with the rotation, so the cache holds c unrotated and
                   decoding makes the keys of the whole past anew at each step. With U of zeros and ones this is grouped
                   attention at the same cache (TransMLA: Meng et al. 2025, arXiv:2502.07864; the transform
                   `grouped_to_latent`).
      "none"       no positions; absorbed.

    Cache: `latent` [B, 1, length, latent_dim + rope_heads rope_dim], and `value` [B, 1, length, value_latent_dim] where
    the values have their own. Positions of cached tokens are 0, 1, ... in a sequence.
    """

    cache_axes: ClassVar = {
        "latent": ("batch", None, "length", "latent"),
        "value": ("batch", None, "length", "latent"),
        "length": ("batch",),
    }

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        latent_dim: int | None = None,
        value_latent_dim: int | None = None,
        query_latent_dim: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        rotary: str = "decoupled",
        rope_dim: int | None = None,
        rope_heads: int = 1,
        rope_theta: float = 10_000.0,
        latent_norm: bool = True,
        dropout: float = 0.0,
        implementation: str | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        at_least_one("mixer", latent_dim=latent_dim, value_latent_dim=value_latent_dim, head_dim=head_dim)
        at_least_one("mixer", value_dim=value_dim)
        at_least_one("mixer", query_latent_dim=query_latent_dim, rope_dim=rope_dim, rope_heads=rope_heads)
        rate("mixer", dropout=dropout)
        if rotary not in ROTARY:
            raise ValueError(f"mixer.rotary={rotary!r} must be one of {', '.join(ROTARY)}")
        if rotary == "none" and rope_dim is not None:
            raise ValueError(f"mixer.rope_dim={rope_dim} has no meaning with rotary='none'")
        if rotary != "none" and rope_theta <= 0:
            raise ValueError(f"mixer.rope_theta={rope_theta} must be above 0; rotary='none' switches positions off")
        if heads % rope_heads or (rope_heads > 1 and rotary != "decoupled"):
            raise ValueError(f"rope_heads={rope_heads} must divide heads={heads}, and is for rotary='decoupled' only")
        head_dim = head_size(width, heads, head_dim)
        if rotary == "decoupled":
            rope_dim = max(head_dim // 4 * 2, 2) if rope_dim is None else rope_dim
            extra = rotary_size(max(rope_dim, head_dim), rope_theta, rope_dim)
        else:
            rope_dim, extra = (0 if rotary == "none" else rotary_size(head_dim, rope_theta, rope_dim)), 0
        latent_dim = 2 * head_dim if latent_dim is None else latent_dim
        value_dim = head_dim if value_dim is None else value_dim
        kinds = {"bias": False, "dtype": dtype, "rngs": rngs}
        norm = lambda size: RMSNorm(size, rngs=rngs) if latent_norm else None
        if query_latent_dim is None:
            self.q_down = self.q_latent_norm = None
        else:
            self.q_down = Linear(width, query_latent_dim, axes=("embed", "latent"), **kinds)
            self.q_latent_norm = norm(query_latent_dim)
        into = ("embed" if query_latent_dim is None else "latent", "heads", "head_dim")
        self.q = Linear(width if query_latent_dim is None else query_latent_dim, (heads, head_dim + extra),
                        axes=into, **kinds)  # fmt: skip
        self.down = Linear(width, latent_dim, axes=("embed", "latent"), **kinds)
        self.latent_norm = norm(latent_dim)
        own = value_latent_dim is not None
        self.value_down = Linear(width, value_latent_dim, axes=("embed", "latent"), **kinds) if own else None
        self.value_norm = norm(value_latent_dim) if own else None
        self.k_rope = Linear(width, (rope_heads, extra), axes=("embed", None, "head_dim"), **kinds) if extra else None
        self.k_up = Linear(latent_dim, (heads, head_dim), axes=("latent", "heads", "head_dim"), **kinds)
        self.v_up = Linear(value_latent_dim or latent_dim, (heads, value_dim), axes=("latent", "heads", "head_dim"),
                           **kinds)  # fmt: skip
        self.o = Linear(heads * value_dim, width, axes=("heads", "embed"), **kinds)
        self.heads, self.head_dim, self.latent_dim, self.value_latent_dim = (
            heads,
            head_dim,
            latent_dim,
            value_latent_dim,
        )
        self.rotary, self.rope_dim, self.extra, self.rope_heads = rotary, rope_dim, extra, rope_heads
        self.rope_theta, self.dropout, self.implementation = rope_theta, dropout, implementation

    @property
    def scale(self) -> float:
        """1 / sqrt of the entries of a query."""
        return (self.head_dim + self.extra) ** -0.5

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the cache for `batch` sequences of at most `length` tokens."""
        entry = lambda size: jax.ShapeDtypeStruct((batch, 1, length, size), dtype)
        found = {"latent": entry(self.latent_dim + self.rope_heads * self.extra)}
        if self.value_latent_dim is not None:
            found["value"] = entry(self.value_latent_dim)
        return {**found, "length": jax.ShapeDtypeStruct((batch,), jnp.int32)}

    def queries(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(q [B, T, H, head_dim], its decoupled part [B, T, H, extra]), rotated."""
        if self.q_down is not None:
            x = self.q_down(x)
            x = x if self.q_latent_norm is None else self.q_latent_norm(x)
        q = self.q(x)
        q, rotated = q[..., : self.head_dim], q[..., self.head_dim :]
        if self.rotary == "after":
            q = rotate(q, positions, self.rope_theta, size=self.rope_dim)
        return q, rotate(rotated, positions, self.rope_theta) if self.extra else rotated

    def latents(self, x: jax.Array, positions: jax.Array) -> dict[str, jax.Array]:
        """What is cached of x: `latent` [B, T, 1, latent_dim + rope_heads extra], and `value` of its own."""
        norm = lambda layer, c: c if layer is None else layer(c)
        latent = norm(self.latent_norm, self.down(x))
        if self.k_rope is not None:
            rotated = rotate(self.k_rope(x), positions, self.rope_theta)
            latent = jnp.concatenate([latent, rotated.reshape(*x.shape[:2], -1)], -1)
        found = {"latent": latent[:, :, None]}
        if self.value_down is not None:
            found["value"] = norm(self.value_norm, self.value_down(x))[:, :, None]
        return found

    def expanded(self, latents: dict[str, jax.Array], positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys [B, S, H, head_dim + extra] and values [B, S, H, value_dim] of latents [B, S, 1, ...]."""
        latent = latents["latent"][:, :, 0]
        c, rotated = latent[..., : self.latent_dim], latent[..., self.latent_dim :]
        k = self.k_up(c)
        if self.rotary == "after":
            k = rotate(k, positions, self.rope_theta, size=self.rope_dim)
        if self.extra:
            rotated = rotated.reshape(*c.shape[:2], self.rope_heads, self.extra)
            k = jnp.concatenate([k, jnp.repeat(rotated, self.heads // self.rope_heads, 2)], -1)
        return k, self.v_up(latents["value"][:, :, 0] if "value" in latents else c)

    def absorbed(self, q, rotated, cache: dict, context: Context) -> jax.Array:
        """[B, T, H, value_dim] of queries against the cached latents: all heads read one key row."""
        # U as the layer computes it, whatever a transform has made of its kernel.
        q = jnp.einsum("bthd,lhd->bthl", q, self.k_up(jnp.eye(self.latent_dim, dtype=q.dtype)))
        if self.extra:
            # A row has the rotated keys of all groups; a query has zeros at those that are not its own.
            group = jnp.arange(self.heads) // (self.heads // self.rope_heads)
            own = jax.nn.one_hot(group, self.rope_heads, dtype=q.dtype)
            placed = jnp.einsum("bthr,hg->bthgr", rotated, own)
            q = jnp.concatenate([q, placed.reshape(*q.shape[:3], -1)], -1)
        # Where the values are the keys' latent, whole rows are weighted and the rotated part is dropped afterwards: a
        # slice of the cache would be copied in every step.
        value = cache.get("value", cache["latent"])
        out = caches.attend(
            q,
            cache["latent"],
            value,
            cache["length"],
            context.mask,
            scale=self.scale,
            implementation=self.implementation,
        )
        size = self.value_latent_dim or self.latent_dim
        return jnp.einsum("bthl,lhd->bthd", out[..., :size], self.v_up(jnp.eye(size, dtype=q.dtype)))

    def __call__(self, x: jax.Array, context: Context, cache: dict | None = None, key: jax.Array | None = None):
        if cache is not None:
            caches.need_causal(self, context.mask)
        positions = positions_of(context, x.shape[1])
        q, rotated = self.queries(x, positions)
        new = self.latents(x, positions)
        if cache is None or self.rotary == "after":
            latents, at = new, positions
            if cache is not None:
                cache = caches.append(cache, **new)
                latents = {name: jnp.swapaxes(cache[name], 1, 2).astype(x.dtype) for name in new}
                at = jnp.arange(latents["latent"].shape[1])[None]
            k, v = self.expanded(latents, at)
            q = jnp.concatenate([q, rotated], -1)
            y = attention(q, k, v, mask=context.mask, scale=self.scale, implementation=self.implementation)
        else:
            cache = caches.append(cache, **new)
            y = self.absorbed(q, rotated, cache, context)
        y = self.o(y.reshape(*x.shape[:2], -1))
        return dropout(y, self.dropout, key, context.train), cache, NO_AUX
