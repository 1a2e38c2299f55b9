"""Gates by which tokens choose experts: top-k of a softmax (with noise), of a sigmoid with a bias, of a hash."""

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import UnsupportedForm
from lissom.models.context import Context
from lissom.models.linear import Linear, needed
from lissom.models.moe.routing import Choices, Routing, counts_of, load_metrics
from lissom.models.variables import Stat, StepSum

ROUTER_INIT = nnx.initializers.truncated_normal(0.02)


class Gate(nnx.Module):
    """`routing, aux = gate(x [B, T, M], context, key)`; x, scores and weights are float32."""

    def __init__(self, width: int, *, experts: int, k: int, rngs: nnx.Rngs):
        del width, rngs
        if k > experts:
            raise ValueError(f"ffn.k={k} experts a token are more than ffn.experts={experts}")
        self.experts, self.k = experts, k

    def __call__(self, x: jax.Array, context: Context, key: jax.Array | None) -> tuple[Routing, dict]:
        raise NotImplementedError


def router(width: int, outputs: int, rngs: nnx.Rngs) -> Linear:
    """Scores of experts: float32, no bias, small at the start, so that all experts begin alike."""
    return Linear(width, outputs, axes=("embed", None), bias=False, init=ROUTER_INIT, rngs=rngs)


def top_k(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """(values, int32 indices) [..., k] of the largest along the last axis; of equals the first."""
    values, indices = jax.lax.top_k(scores, k)
    return values, indices.astype(jnp.int32)


class Balanced(Gate):
    """What gates with a balancing loss share.

        balance x E sum_i f_i P_i

    with f_i the share of expert i among all choices (a constant to the gradient) and P_i the mean over tokens of the
    gate's probabilities: 1 where all are alike (Fedus et al. 2021, arXiv:2101.03961, with choices in place of tokens).

    balance_sequences: None takes f over the whole batch of the step, on all devices and in all micro-batches (Qiu et
    al. 2025, arXiv:2501.11873), which costs one more forward pass where there are micro-batches; a number takes f and P
    over so many sequences that follow one another, and the mean over these. The paper's own form sums f over the
    micro-batches so far; here it is exact.
    """

    def __init__(
        self, width: int, *, experts: int, k: int, balance: float, balance_sequences: int | None, rngs: nnx.Rngs
    ):
        super().__init__(width, experts=experts, k=k, rngs=rngs)
        if balance < 0:
            raise ValueError(f"ffn.balance={balance} must be at least 0")
        if balance_sequences is not None and balance_sequences < 1:
            raise ValueError(f"ffn.balance_sequences={balance_sequences} must be at least 1, or None: the whole batch")
        self.balance, self.sequences = balance, balance_sequences
        self.seen = StepSum(jnp.zeros(experts)) if balance and balance_sequences is None else None

    def balancing(self, experts: jax.Array, probabilities: jax.Array, train: bool) -> dict[str, jax.Array]:
        """The loss for choices [B, T, k] and probabilities [B, T, E] that sum to 1."""
        if not self.balance:
            return {}
        n = self.sequences
        if self.seen is not None or not train:
            counts = counts_of(experts, self.experts)
            if self.seen is not None and train:
                counts = self.seen.total(counts)
            loss = self._product(counts, probabilities)
        elif len(experts) % n:
            raise UnsupportedForm(f"ffn.balance_sequences={n} must divide the micro-batch of {len(experts)} sequences")
        else:
            group = lambda a: a.reshape(-1, n, *a.shape[1:])
            one = lambda e, p: self._product(counts_of(e, self.experts), p)
            loss = jax.vmap(one)(group(experts), group(probabilities)).mean()
        return {"balance": self.balance * loss}

    def _product(self, counts: jax.Array, probabilities: jax.Array) -> jax.Array:
        shares = jax.lax.stop_gradient(counts / jnp.maximum(counts.sum(), 1e-9))
        return self.experts * jnp.sum(shares * probabilities.reshape(-1, self.experts).mean(0))


class TopK(Balanced):
    """p = softmax(x W); the k most probable experts, with weights p, over their sum if `normalize` (None: if k > 1;
    with one expert the weight would be the constant 1, and the router without a gradient).

    z_loss x mean (log sum exp(x W))^2 keeps the scores small (Zoph et al. 2022, arXiv:2202.08906). `jitter` multiplies
    x by uniform numbers in 1 - jitter .. 1 + jitter in training (arXiv:2101.03961). Shazeer et al. 2017,
    arXiv:1701.06538; for k = 1 arXiv:2101.03961.
    """

    def __init__(
        self,
        width: int,
        *,
        experts: int,
        k: int = 2,
        normalize: bool | None = None,
        balance: float = 0.01,
        balance_sequences: int | None = None,
        z_loss: float = 0.0,
        jitter: float = 0.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(width, experts=experts, k=k, balance=balance, balance_sequences=balance_sequences, rngs=rngs)
        if not 0 <= jitter < 1:
            raise ValueError(f"ffn.jitter={jitter} must be at least 0 and below 1")
        if z_loss < 0:
            raise ValueError(f"ffn.z_loss={z_loss} must be at least 0")
        self.router = router(width, experts, rngs)
        self.normalize = k > 1 if normalize is None else normalize
        self.z_loss, self.jitter = z_loss, jitter

    def __call__(self, x, context, key):
        if self.jitter and context.train:
            x = x * jax.random.uniform(needed(key, "jitter"), x.shape, minval=1 - self.jitter, maxval=1 + self.jitter)
        scores = self.router(x)
        probabilities = jax.nn.softmax(scores)
        weights, experts = top_k(probabilities, self.k)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdims=True)
        losses = self.balancing(experts, probabilities, context.train)
        if self.z_loss:
            losses["router_z"] = self.z_loss * jnp.square(jax.nn.logsumexp(scores, -1)).mean()
        return Choices(experts, weights), {"losses": losses, "metrics": load_metrics(counts_of(experts, self.experts))}


class NoisyTopK(Gate):
    """H = x W + e softplus(x V), e normal, in training; the k largest of H, with the softmax of these as weights
    (Shazeer et al. 2017, arXiv:1701.06538).

    `balance` weighs the squared coefficients of variation (variance / mean^2 over experts) of two sums over the batch:
    the weights, and the probability that an expert is among the k largest under new noise of its own. Both matrices
    begin at 0, as in the paper.
    """

    def __init__(self, width: int, *, experts: int, k: int = 2, balance: float = 0.01, rngs: nnx.Rngs):
        super().__init__(width, experts=experts, k=k, rngs=rngs)
        if balance < 0:
            raise ValueError(f"ffn.balance={balance} must be at least 0")
        zeros = lambda: Linear(width, experts, axes=("embed", None), bias=False, init=nnx.initializers.zeros, rngs=rngs)
        self.router, self.noise, self.balance = zeros(), zeros(), balance

    def __call__(self, x, context, key):
        clean = self.router(x)
        scores, spread = clean, jax.nn.softplus(self.noise(x)) + 1e-2  # a spread of 0 has no probability
        if context.train:
            scores = clean + spread * jax.random.normal(needed(key, "noisy_top_k"), clean.shape)
        kept, experts = top_k(scores, self.k)
        weights = jax.nn.softmax(kept)
        losses = {}
        if self.balance:
            one_hot = jax.nn.one_hot(experts, self.experts)
            importance = (one_hot * weights[..., None]).sum((0, 1, 2))
            losses["balance"] = self.balance * _variation(importance)
            if context.train and self.k < self.experts:
                # An expert is chosen if it is above the k-th of the others.
                edges = top_k(scores, self.k + 1)[0]
                chosen = one_hot.sum(2) > 0
                edge = jnp.where(chosen, edges[..., -1:], edges[..., -2:-1])
                load = jax.scipy.stats.norm.cdf((clean - edge) / spread).sum((0, 1))
                losses["balance"] = losses["balance"] + self.balance * _variation(load)
        return Choices(experts, weights), {"losses": losses, "metrics": load_metrics(counts_of(experts, self.experts))}


class SigmoidBias(Gate):
    """s = sigmoid(x W); the k largest of s + b, with weights s over their sum: balanced by b, without a loss (Wang et
    al. 2024, arXiv:2408.15664; used by DeepSeek-V3).

    b is a statistic: after each training batch (micro-batch, where there are several) b_i rises by `rate` where
    expert i had less than the mean number of choices, and falls where it had more. It has no part in the weights.
    """

    def __init__(self, width: int, *, experts: int, k: int = 2, rate: float = 1e-3, rngs: nnx.Rngs):
        super().__init__(width, experts=experts, k=k, rngs=rngs)
        if rate < 0:
            raise ValueError(f"ffn.rate={rate} must be at least 0")
        self.router, self.rate = router(width, experts, rngs), rate
        self.bias = Stat(jnp.zeros(experts))

    def __call__(self, x, context, key):
        del key
        scores = jax.nn.sigmoid(self.router(x))
        _, experts = top_k(jax.lax.stop_gradient(scores) + self.bias[...], self.k)
        weights = jnp.take_along_axis(scores, experts, -1)
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        counts = counts_of(experts, self.experts)
        if context.train:
            self.bias[...] = self.bias[...] + self.rate * jnp.sign(counts.mean() - counts)
        return Choices(experts, weights), {"losses": {}, "metrics": load_metrics(counts)}


class Hash(Gate):
    """Experts by the token itself: a fixed random function of its number names the first, and those that follow it the
    other k - 1, each with weight 1 / k (Roller et al. 2021, arXiv:2106.04426, random hashes; several experts a token
    are ours). Not trained, and not balanced: frequent tokens make loaded experts.

    seed: of the function.
    """

    def __init__(self, width: int, *, experts: int, k: int = 2, seed: int = 0, rngs: nnx.Rngs):
        super().__init__(width, experts=experts, k=k, rngs=rngs)
        self.seed = seed

    def __call__(self, x, context, key):
        del key
        if context.tokens is None:
            raise UnsupportedForm("the gate 'hash' routes by the numbers of tokens, and this network reads none")
        first = _hashed(context.tokens, self.seed) % jnp.uint32(self.experts)
        experts = (first[..., None].astype(jnp.int32) + jnp.arange(self.k)) % self.experts
        weights = jnp.full(experts.shape, 1 / self.k, jnp.float32)
        return Choices(experts, weights), {"losses": {}, "metrics": load_metrics(counts_of(experts, self.experts))}


def _hashed(numbers: jax.Array, seed: int) -> jax.Array:
    """uint32 of each number, mixed by two rounds of multiplying and shifting."""
    x = numbers.astype(jnp.uint32) + jnp.uint32(0x9E3779B9) * jnp.uint32(seed + 1)
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        x = (x ^ (x >> 15)) * jnp.uint32(multiplier)
    return x ^ (x >> 16)


def _variation(values: jax.Array) -> jax.Array:
    """variance / mean^2."""
    return values.var() / (jnp.square(values.mean()) + 1e-10)
