"""A learned gate on pooled queries and keys, distilled from the attention map."""

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import at_least_one
from lissom.models.linear import KERNEL_INIT
from lissom.models.positions import rotate
from lissom.models.selectors import scores
from lissom.models.selectors.base import Choice, Selector, fraction, geometry, reach, top_share
from lissom.models.variables import Param


class LearnedGate(Selector):
    """The gate of SeerAttention (Gao et al. 2024, arXiv:2410.13276).

        gq[h, i] = rope(Wq[h] mean q_block i)        gk[m, j] = rope(Wk[m] [max k, min k, mean k]_block j)
        gate[h, i] = softmax over j <= i of gq[h, i] . gk[m, j] / sqrt(G)        m the key-value head of h

    q and k are those in front of the rotary angles; blocks are turned by the position of their first token (that it is
    the first token's is a choice made here). Listed are the blocks with a gate above `threshold` (5e-4 to 5e-3 in the
    authors' code), or the share `density` of the visible ones with the largest gates; one of the two is None. The own
    block always is. `gate_dim` G, by default the head's size.

    The gate learns from the attention map itself: `loss` is `weight` x the divergence of `gate_kl`. The selection has
    no gradient, q and k get none from the loss; to leave the base as it is, as the paper does in post-training, train
    the gate's parameters alone. As with `pooled`, which blocks a row sees depends on its own block's later tokens too.
    In prefill only: a step of one token with a cache is dense.
    """

    unrotated = True

    def __init__(
        self,
        *,
        density: float | None = 0.5,
        threshold: float | None = None,
        gate_dim: int | None = None,
        rope_theta: float = 10_000.0,
        weight: float = 1.0,
        rngs: nnx.Rngs,
        **kwargs,
    ):
        super().__init__(**kwargs)
        at_least_one("selector", gate_dim=gate_dim)
        if (density is None) == (threshold is None):
            raise ValueError(
                f"selector.density={density} and selector.threshold={threshold}: give one, and None for the other"
            )
        if density is not None:
            fraction(density=density)
        elif not 0 <= threshold < 1:
            raise ValueError(f"selector.threshold={threshold!r} must be at least 0 and below 1")
        if weight < 0:
            raise ValueError(f"selector.weight={weight!r} must be at least 0")
        if self.head_dim is None:
            raise ValueError("selector.head_dim is the size of the heads that the gate reads: give it")
        size = gate_dim or self.head_dim
        if rope_theta and size % 2:
            raise ValueError(f"selector.gate_dim={size} must be even for rotary positions")
        # One map a head; each reads head_dim (q) or three times that (k) numbers.
        init = lambda heads, inputs: jnp.stack(
            [KERNEL_INIT(rngs.params(), (inputs, size), jnp.float32) for _ in range(heads)]
        )
        self.q = Param(init(self.heads, self.head_dim), out_sharding=("heads", "head_dim", None))
        self.k = Param(init(self.kv_heads, 3 * self.head_dim), out_sharding=("kv_heads", "head_dim", None))
        self.density, self.threshold, self.rope_theta, self.weight = density, threshold, rope_theta, weight

    def gate(self, q: jax.Array, k: jax.Array, offset=0) -> jax.Array:
        """The gate of unrotated q and k: [B, H, query blocks, key blocks], rows that sum to 1 over visible blocks."""
        gate_q = jnp.einsum("bihd,hdg->bihg", scores.pooled(q, self.block), self.q[...])
        pools = [scores.pooled(k, self.block, kind) for kind in ("max", "min", "mean")]
        gate_k = jnp.einsum("bjmd,mdg->bjmg", jnp.concatenate(pools, -1), self.k[...])
        if self.rope_theta:
            first, _ = reach(offset, q.shape[1], self.block)
            gate_q = rotate(gate_q, jnp.asarray(first), self.rope_theta)
            gate_k = rotate(gate_k, jnp.arange(gate_k.shape[1])[None] * self.block, self.rope_theta)
        visible, _ = geometry(offset, q.shape[1], k.shape[1], self.block, self.block)
        return jax.nn.softmax(jnp.where(visible, scores.products(gate_q, gate_k), -jnp.inf), axis=-1)

    def choose(self, q, k, offset, key, raw):
        gate = jax.lax.stop_gradient(self.gate(*raw, offset))
        visible, own = geometry(offset, q.shape[1], k.shape[1], self.block, self.block)
        if self.threshold is None:
            return top_share(gate, self.density, (visible, own))
        return Choice(((gate > self.threshold) & visible) | own, gate.shape[-1])

    def loss(self, q, k, raw):
        q, k, raw = jax.lax.stop_gradient((q, k, raw))
        return {"gate_kl": self.weight * gate_kl(self.gate(*raw), distillation_target(q, k, self.block))}


def distillation_target(q: jax.Array, k: jax.Array, block: int) -> jax.Array:
    """The causal attention map of q and k, max-pooled over blocks in both dimensions, rows renormalised to sum 1:
    [B, H, ceil(T / block), ceil(S / block)]. No array [T, S] is made."""
    largest = scores.block_attention(q, k, 0, block, "max")
    return largest / largest.sum(-1, keepdims=True)


def gate_kl(gate: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over batch, heads and rows of sum_j target log(target / gate); the first quarter of the rows is skipped,
    which have few blocks to choose from."""
    gate, target = (x[:, :, x.shape[2] // 4 :] for x in (gate, target))
    # What is invisible is 0 in both: 0 log 0 is 0, and its gradient too.
    some = target > 0
    log_ratio = jnp.log(jnp.where(some, target, 1)) - jnp.log(jnp.where(some, jnp.maximum(gate, 1e-30), 1))
    return (target * log_ratio).sum(-1).mean()
