"""Gates by which experts get tokens: expert choice, and the mixtures of tokens of Soft MoE."""

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import at_least_one
from lissom.models.moe.gates import Gate, router, top_k
from lissom.models.moe.routing import Choices, Picks, Slots, counts_of, load_metrics
from lissom.models.variables import Param, Stat
from lissom.ops.attention import masks


class ExpertChoice(Gate):
    """p = softmax(x W) over experts; every expert takes the N k / E tokens of the batch that have most of it, with
    weights p (Zhou et al. 2022, arXiv:2202.09368). All experts have the same load, and tokens from 0 to E experts.

    Whether a token is taken depends on all others, later ones too, so training of a decoder sees a little of the
    future. The paper leaves open how to decode. Here an expert remembers the least p that it took in training (a mean
    over steps, `decay` a step); outside of training it takes every token above that, which is causal and the same for a
    token alone, and of which the load is what it is (`max_load`).
    """

    def __init__(self, width: int, *, experts: int, k: int = 2, decay: float = 0.99, rngs: nnx.Rngs):
        super().__init__(width, experts=experts, k=k, rngs=rngs)
        if not 0 <= decay < 1:
            raise ValueError(f"ffn.decay={decay} must be at least 0 and below 1")
        self.router, self.decay = router(width, experts, rngs), decay
        self.least = Stat(jnp.full(experts, 1 / experts))
        self.steps = Stat(jnp.zeros(()))

    def __call__(self, x, context, key):
        del key
        probabilities = jax.nn.softmax(self.router(x))
        flat = probabilities.reshape(-1, self.experts)
        if not context.train:
            chosen = probabilities >= self.least[...]
            experts = jnp.where(chosen, jnp.arange(self.experts), self.experts).astype(jnp.int32)
            metrics = load_metrics(counts_of(experts, self.experts))
            taken = chosen.sum(-1)
            routing = Choices(experts, jnp.where(chosen, probabilities, 0))
        else:
            room = max(1, round(len(flat) * self.k / self.experts))
            weights, tokens = top_k(flat.T, min(room, len(flat)))
            # The first step has nothing to remember.
            kept = jnp.where(self.steps[...] > 0, self.decay, 0.0)
            self.least[...] = kept * self.least[...] + (1 - kept) * jax.lax.stop_gradient(weights[:, -1])
            self.steps[...] = self.steps[...] + 1
            metrics = load_metrics(jnp.full(self.experts, float(tokens.shape[1])))
            taken = counts_of(tokens, len(flat))
            routing = Picks(tokens, weights)
        return routing, {"losses": {}, "metrics": {**metrics, "untaken": (taken == 0).mean(dtype=jnp.float32)}}


class Soft(nnx.Module):
    """No token is left out and none chosen: slot s of expert e sees sum_t D x_t, a token gets sum_es C y_es, with D the
    softmax of the scores over the tokens of a group and C that over all slots (Puigcerver et al. 2023,
    arXiv:2308.00951). Scores are scale x (x / |x|) (Phi / |Phi|), as the paper has them for large widths.

    A group is a sequence. Under a mask, where a token must not see all others, a group is the tokens at one place of
    all sequences of the batch, as in Mixture of Tokens (Antoniak et al. 2023, arXiv:2310.15961): what a token gets then
    depends on the other sequences. A group of g tokens makes `slots` x E evaluations of an expert, as `slots` x E / g
    experts a token do.
    """

    def __init__(self, width: int, *, experts: int, slots: int = 1, rngs: nnx.Rngs):
        at_least_one("ffn", slots=slots)
        self.experts, self.slots = experts, slots
        self.phi = router(width, experts * slots, rngs)
        self.phi.kernel_alone = True
        self.scale = Param(jnp.ones(()), out_sharding=())

    def __call__(self, x, context, key):
        del key
        batch, length, _ = x.shape
        tokens = jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, length)
        if not isinstance(context.mask, masks.Full):
            x, tokens = x.swapaxes(0, 1), tokens.T
        kernel = self.phi.kernel[...]
        scores = self.scale[...] * (_unit(x, -1) @ _unit(kernel, 0))
        shape = (*tokens.shape, self.experts, self.slots)
        dispatch = jax.nn.softmax(scores, 1).reshape(shape)
        combine = jax.nn.softmax(scores, 2).reshape(shape)
        metrics = load_metrics(combine.sum((0, 1, 3)))
        return Slots(tokens, dispatch, combine), {"losses": {}, "metrics": metrics}


def _unit(x: jax.Array, axis: int) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis, keepdims=True) + 1e-12)
