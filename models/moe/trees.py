"""Gates that can be differentiated and become sparse: single-expert selectors (DSelect-k) and trees (COMET).

Both are made of the smooth step, a cubic that is exactly 0 and 1 outside of an interval,

    S(t) = 0 for t <= -g / 2,  -2 t^3 / g^3 + 3 t / (2 g) + 1 / 2,  1 for t >= g / 2

so that a weight can be 0 and not only small (Hazimeh et al. 2020, arXiv:2002.07772). Training evaluates every expert,
since any may still have weight; the entropy that is penalised makes the steps saturate. Outside of training a token
goes to its k heaviest experts, with weights over their sum: the same function once the steps are saturated (`left_out`
is the weight that this leaves out, on average), and the price of k experts in any case.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.linear import Linear
from lissom.models.moe.gates import Gate, top_k
from lissom.models.moe.routing import Choices, Everyone, counts_of, load_metrics


def smooth_step(t: jax.Array, gamma: float) -> jax.Array:
    """S(t), with its derivative 0 outside of the interval."""
    cubic = -2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5
    return jnp.where(t <= -gamma / 2, 0.0, jnp.where(t >= gamma / 2, 1.0, cubic))


class Sparse(Gate):
    """What both share: weights [B, T, E] to a routing, the entropy of `picks` [..., k, E] as a loss."""

    def __init__(self, width: int, *, experts: int, k: int, gamma: float, entropy: float, rngs: nnx.Rngs):
        super().__init__(width, experts=experts, k=k, rngs=rngs)
        self.bits = experts.bit_length() - 1
        if experts != 1 << self.bits:
            raise ValueError(f"ffn.experts={experts} must be a power of 2: they are the leaves of binary trees")
        if gamma <= 0:
            raise ValueError(f"ffn.gamma={gamma} must be above 0")
        if entropy < 0:
            raise ValueError(f"ffn.entropy={entropy} must be at least 0")
        self.gamma, self.entropy = gamma, entropy

    def routed(self, weights: jax.Array, picks: jax.Array, context):
        """picks [B, T, k, E]: distributions over experts, whose mean entropy is penalised."""
        entropy = -jax.scipy.special.xlogy(picks, jnp.maximum(picks, 1e-30)).sum(-1).mean()
        losses = {"entropy": self.entropy * entropy} if self.entropy else {}
        kept, experts = top_k(weights, self.k)
        total = kept.sum(-1, keepdims=True)
        metrics = {
            "left_out": 1 - total.mean(),
            "nonzero": (weights > 0).sum(-1).mean(dtype=jnp.float32),
            **load_metrics(weights.sum((0, 1)) if context.train else counts_of(experts, self.experts)),
        }
        routing = Everyone(weights) if context.train else Choices(experts, kept / jnp.maximum(total, 1e-20))
        return routing, {"losses": losses, "metrics": metrics}


class DSelectK(Sparse):
    """weights = sum_i softmax(a)_i r(z_i), where selector i names one expert by log2 E bits: r(z)_e is the product of
    S(z_b) where bit b of e is set and of 1 - S(z_b) where not (Hazimeh et al. 2021, arXiv:2106.03760; the form whose
    bits z = x Z and logits a = x A depend on the token). `entropy` weighs that of the selectors. For powers of two
    alone: the paper's penalty for codes that name no expert is not built.
    """

    def __init__(
        self, width: int, *, experts: int, k: int = 2, gamma: float = 1.0, entropy: float = 0.01, rngs: nnx.Rngs
    ):
        super().__init__(width, experts=experts, k=k, gamma=gamma, entropy=entropy, rngs=rngs)
        # Bits begin inside of the step: |z| about gamma / 10, for x of unit size.
        init = nnx.initializers.truncated_normal(gamma / 10 / width**0.5)
        axes = ("embed", None, None)
        self.codes = Linear(width, (k, max(self.bits, 1)), axes=axes, bias=False, init=init, rngs=rngs)
        self.mix = Linear(width, k, axes=("embed", None), bias=False, init=init, rngs=rngs)

    def __call__(self, x, context, key):
        del key
        steps = smooth_step(self.codes(x), self.gamma)
        bits = (jnp.arange(self.experts)[:, None] >> jnp.arange(max(self.bits, 1))) & 1
        picks = jnp.where(bits, steps[..., None, :], 1 - steps[..., None, :]).prod(-1)  # [B, T, k, E]
        if self.experts == 1:
            picks = jnp.ones_like(picks)
        weights = (jax.nn.softmax(self.mix(x))[..., None] * picks).sum(-2)
        return self.routed(weights, picks, context)


class Comet(Sparse):
    """k trees whose leaves are the experts. A node sends a token left with S(x w), so a leaf has the product p of its
    path, and

        weights_e = sum_j p_je exp(h_je) / sum_j,e p_je exp(h_je),    h_j = x V_j + v_j

    a softmax of h + log p over all leaves of all trees, in which a leaf with p = 0 has no part (Ibrahim et al. 2023,
    COMET, arXiv:2306.02824). `entropy` weighs that of p over the leaves of a tree. For powers of two alone.
    """

    def __init__(
        self, width: int, *, experts: int, k: int = 2, gamma: float = 1.0, entropy: float = 0.01, rngs: nnx.Rngs
    ):
        super().__init__(width, experts=experts, k=k, gamma=gamma, entropy=entropy, rngs=rngs)
        init = nnx.initializers.truncated_normal(gamma / 10 / width**0.5)
        axes = ("embed", None, None)
        self.nodes = Linear(width, (k, max(experts - 1, 1)), axes=axes, bias=False, init=init, rngs=rngs)
        self.leaves = Linear(width, (k, experts), axes=axes, bias=True, init=init, rngs=rngs)

    def __call__(self, x, context, key):
        del key
        paths = leaves_of(smooth_step(self.nodes(x), self.gamma), self.bits)  # [B, T, k, E]
        scores = self.leaves(x)
        largest = jax.lax.stop_gradient(jnp.where(paths > 0, scores, -jnp.inf).max((-2, -1), keepdims=True))
        mass = paths * jnp.exp(jnp.where(paths > 0, scores - largest, 0))
        weights = mass.sum(-2) / mass.sum((-2, -1))[..., None]
        return self.routed(weights, paths, context)


def leaves_of(steps: jax.Array, depth: int) -> jax.Array:
    """The probabilities [..., 2^depth] of the leaves of binary trees, from those of going left at the 2^depth - 1
    nodes, which stand level by level."""
    probability = jnp.ones((*steps.shape[:-1], 1))
    for level in range(depth):
        left = steps[..., (1 << level) - 1 : (2 << level) - 1]
        probability = jnp.stack([probability * left, probability * (1 - left)], -1)
        probability = probability.reshape(*steps.shape[:-1], -1)
    return probability
