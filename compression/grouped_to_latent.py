"""TransMLA: grouped-query attention as multi-head latent attention, the same function at the same cache."""

import jax.numpy as jnp
from flax import nnx

from lissom.compression.transforms import Transform, layer_paths, replace_layers
from lissom.models.mixers.attention import Attention, GroupedQueryAttention
from lissom.models.mixers.latent import LatentAttention
from lissom.models.mixers.meta import MetaTokens
from lissom.training.errors import UserError

KINDS = (Attention, GroupedQueryAttention)


class GroupedToLatent(Transform):
    """Replaces every grouped-query (or multi-head) `Attention` by a `LatentAttention` whose latents are the keys and
    values that were cached, and whose up-projections repeat each group's for its heads (Meng et al. 2025,
    arXiv:2502.07864, section 3): k_h = c U_h, U_h zeros and ones. Trained further, U is any matrix, so the heads of a
    group may see different keys at the same cache.

    The paper's U does not commute with rotary positions once it is trained; there are two forms, each exact where it
    says so:

    form="after": c is cached unrotated, and k_h = rotate(c U_h). Equal to the source whatever its rotary positions; the
        cache has the same size; decoding makes all keys anew, there is no absorption.
    form="decoupled": the rotated entries of each group stay as they are, cached rotated and outside of U; U acts on the
        rest. Decoding is absorbed. Equal to the source too, but the rest must exist: rope_dim < head_dim (all of the
        head, if rotary positions are off).

    Biases, normed queries and keys and `rope_factors` have no place in the latent form: an error.
    """

    def __init__(self, *, form: str = "after"):
        if form not in ("after", "decoupled"):
            raise UserError(f"grouped_to_latent: form={form!r} must be 'after' or 'decoupled'")
        self.form = form

    def structure(self, module: nnx.Module) -> nnx.Module:
        if layer_paths(module, (MetaTokens,)):
            raise UserError("grouped_to_latent: meta_tokens has no latent form")
        if not _sources(module):
            raise UserError("grouped_to_latent: the network has no mixer 'attention' or 'gqa' to convert")

        def change(path: str, layer: nnx.Module) -> nnx.Module:
            return self._latent(path, layer) if type(layer) in KINDS else layer

        return replace_layers(module, KINDS, change)

    def _latent(self, path: str, source: Attention) -> LatentAttention:
        if not isinstance(source.q.kernel, nnx.Param):
            raise UserError(f"grouped_to_latent: {path} is quantized already: put it in front of that transform")
        biased = source.q.bias is not None or source.o.bias is not None
        if biased or source.q_norm is not None or source.rope_factors is not None:
            raise UserError(
                f"grouped_to_latent: {path} has a bias, qk_norm or rope_factors, which the latent form does not have"
            )
        width, heads, head_dim = source.q.kernel.shape
        kv_heads, rope_dim = source.kv_heads, source.rope_dim if source.rope_theta else 0
        if self.form == "decoupled" and rope_dim == head_dim:
            raise UserError(
                f"grouped_to_latent: all {head_dim} entries of the heads of {path} are rotated, and form='decoupled' "
                "converts the unrotated ones: set rope_dim, or take form='after'"
            )
        decoupled = self.form == "decoupled" and rope_dim > 0
        return LatentAttention(
            width, heads=heads, value_dim=head_dim, latent_norm=False, value_latent_dim=kv_heads * head_dim,
            latent_dim=kv_heads * (head_dim - rope_dim if decoupled else head_dim),
            head_dim=head_dim - rope_dim if decoupled else head_dim,
            rotary="none" if not rope_dim else self.form, rope_dim=rope_dim or None,
            rope_heads=kv_heads if decoupled else 1, rope_theta=source.rope_theta or 10_000.0,
            dropout=source.dropout, implementation=source.implementation, dtype=source.q.dtype, rngs=nnx.Rngs(0),
        )  # fmt: skip

    def values(self, module: nnx.Module, source: nnx.Module, data) -> nnx.Module:
        del data
        targets = layer_paths(module, (LatentAttention,))
        for path, old in _sources(source).items():
            _fill(targets[path], old)
        return module


def _sources(module: nnx.Module) -> dict[str, Attention]:
    return {path: layer for path, layer in layer_paths(module, KINDS).items() if type(layer) in KINDS}


def _fill(new: LatentAttention, old: Attention) -> None:
    """Writes the weights of `old` [M, heads, D] into `new`."""
    q, k, v = (layer.kernel[...] for layer in (old.q, old.k, old.v))
    width, heads, head_dim = q.shape
    if new.k_rope is not None:
        # `Attention` rotates the first entries of a head, `LatentAttention` the last: the order within a head is free.
        turned = new.extra
        q = jnp.concatenate([q[..., turned:], q[..., :turned]], -1)
        new.k_rope.kernel[...] = k[..., :turned]
        k = k[..., turned:]
    new.q.kernel[...] = q
    new.down.kernel[...] = k.reshape(width, -1)
    new.value_down.kernel[...] = v.reshape(width, -1)
    new.k_up.kernel[...] = _repeats(old.kv_heads, heads, k.shape[2])
    new.v_up.kernel[...] = _repeats(old.kv_heads, heads, head_dim)
    new.o.kernel[...] = old.o.kernel[...]


def _repeats(kv_heads: int, heads: int, size: int) -> jnp.ndarray:
    """[kv_heads size, heads, size]: 1 where entry i of group g is entry i of a head of that group."""
    group = jnp.arange(heads) // (heads // kv_heads)
    chosen = jnp.eye(kv_heads)[group]  # [heads, kv_heads]
    return jnp.einsum("hg,ij->gihj", chosen, jnp.eye(size)).reshape(kv_heads * size, heads, size)
