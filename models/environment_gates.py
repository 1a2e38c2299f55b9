"""Gates by which environments, each known by a context vector, choose one expert: MixER's, and a trained softmax."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import at_least_one
from lissom.models.linear import Linear
from lissom.models.variables import Stat

# () -> (losses [N, E] of every expert on every environment, which environments they are known of, bool [N])
Losses = Callable[[], tuple[jax.Array, jax.Array]]


class Clusters(NamedTuple):
    """labels int32 [N], centroids [K, C]; `whole`: no cluster is empty, and the last step moved no point."""

    labels: jax.Array
    centroids: jax.Array
    whole: jax.Array


def farthest_points(points: jax.Array, count: int) -> jax.Array:
    """`count` of the points [N, C]: the first, and then each that is farthest from those taken (Gonzalez 1985)."""

    def take(nearest, _):
        point = points[nearest.argmax()]
        return jnp.minimum(nearest, jnp.square(points - point).sum(-1)), point

    return jax.lax.scan(take, jnp.full(len(points), jnp.inf), length=count)[1]


def k_means(points: jax.Array, centroids: jax.Array, iterations: int) -> Clusters:
    """So many of Lloyd's iterations on points [N, C] from centroids [K, C]: every point to the nearest centroid (of
    equals the first), every centroid to the mean of its points. One without points stays where it is."""
    count = len(centroids)

    def step(carry, _):
        before, centroids = carry
        labels = jnp.square(points[:, None] - centroids).sum(-1).argmin(1).astype(jnp.int32)
        members = (labels[:, None] == jnp.arange(count)).astype(points.dtype)
        sizes = members.sum(0)
        means = (members.T @ points) / jnp.maximum(sizes, 1)[:, None]
        centroids = jnp.where(sizes[:, None] > 0, means, centroids)
        return (labels, centroids), (sizes.min() > 0) & (labels == before).all()

    start = jnp.full(len(points), -1, jnp.int32), centroids
    (labels, centroids), whole = jax.lax.scan(step, start, length=iterations)
    return Clusters(labels, centroids, whole[-1])


def medians(losses: jax.Array, known: jax.Array, labels: jax.Array, clusters: int) -> jax.Array:
    """[K, E]: of each expert's losses [N, E] the median over the environments of a cluster that are `known` [N]; NaN
    for a cluster that has none."""
    mine = (labels == jnp.arange(clusters)[:, None]) & known
    return jnp.nanmedian(jnp.where(mine[..., None], losses, jnp.nan), axis=1)


def matching(losses: jax.Array) -> jax.Array:
    """int32 [K]: one cluster after the other takes the expert of its least loss [K, E] among those not taken."""

    def take(taken, row):
        # An expert that overflows can be the last choice, and an expert that is taken none.
        row = jnp.nan_to_num(row, nan=jnp.finfo(row.dtype).max)
        expert = jnp.where(taken, jnp.inf, row).argmin().astype(jnp.int32)
        return taken.at[expert].set(True), expert

    return jax.lax.scan(take, jnp.zeros(losses.shape[1], bool), losses)[1]


def least_squares(contexts: jax.Array, targets: jax.Array) -> jax.Array:
    """W [C + 1, E], its last row a bias: the smallest of those with the least sum of |c_n W - t_n|^2 over contexts
    [N, C] and targets [N, E]."""
    return jnp.linalg.lstsq(_with_one(contexts), targets)[0]


def _with_one(contexts: jax.Array) -> jax.Array:
    return jnp.concatenate([contexts, jnp.ones((len(contexts), 1), contexts.dtype)], -1)


class MixerGate(nnx.Module):
    """An environment of context c is of expert argmax_e (c, 1) W, and W has no gradient. Every `every` training calls:

        1. K-means of all contexts, as many clusters as experts, of `iterations` iterations
        2. the loss of every expert on every environment, and for each cluster the median over its environments
        3. one cluster after the other takes the expert of its least median that is not taken (`matching`)
        4. W = argmin sum_n |(c_n, 1) W - one_hot(expert of the cluster of n)|^2

    A clustering with an empty cluster, or that did not converge, is skipped, and W stays. MixER: Nzoyem et al. 2025,
    arXiv:2502.05335; that clusters choose in their order is read off the authors' code (github.com/ddrous/MixER).

    Chosen here: losses are those of the trajectories in the batch, not of all data, and an update is skipped too where
    a cluster has no environment in the batch; distances are Euclidean, for which a mean is the best centroid (the code
    has absolute ones); converged is a last iteration that moves no point (the code: no centroid by 1e-3); K-means
    begins where the last whole one ended, else at contexts far from each other (the code: near 0, where contexts begin
    but do not stay); of several W the smallest is taken (the code adds noise of 1e-4 to the contexts instead).

    `skipped_updates` is the share of updates that were skipped. FLOPs are counted as if each call updated.
    """

    def __init__(self, context_size: int, *, experts: int, every: int = 10, iterations: int = 20, rngs: nnx.Rngs):
        at_least_one("gate", every=every, iterations=iterations)
        bound = (context_size + 1) ** -0.5
        shape = (context_size + 1, experts)
        self.kernel = Stat(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        self.centroids = Stat(jnp.zeros((experts, context_size)))
        self.settled = Stat(jnp.zeros((), jnp.int32))  # 1 once a K-means was whole
        self.calls = Stat(jnp.zeros((), jnp.int32))
        self.skipped = Stat(jnp.zeros((), jnp.int32))
        self.experts, self.every, self.iterations = experts, every, iterations

    def __call__(self, contexts: jax.Array, losses: Losses, train: bool) -> tuple[jax.Array, jax.Array, dict]:
        """contexts [N, C] -> (int32 [N] expert of each, float32 [N] weight of its output: 1, aux)."""
        contexts = jax.lax.stop_gradient(contexts)
        if train:
            self._train(contexts, losses)
        chosen = (_with_one(contexts) @ self.kernel[...]).argmax(-1).astype(jnp.int32)
        updates = jnp.maximum(self.calls[...] // self.every, 1)
        metrics = {"skipped_updates": self.skipped[...].astype(jnp.float32) / updates}
        return chosen, jnp.ones(len(contexts)), {"losses": {}, "metrics": metrics}

    def _train(self, contexts: jax.Array, losses: Losses) -> None:
        before = (self.kernel[...], self.centroids[...], self.settled[...], self.skipped[...])
        calls = self.calls[...] + 1

        def update(before):
            kernel, centroids, settled, skipped = before
            start = jnp.where(settled > 0, centroids, farthest_points(contexts, self.experts))
            found = k_means(contexts, start, self.iterations)
            of_clusters = medians(*losses(), found.labels, self.experts)
            good = found.whole & ~jnp.isnan(of_clusters).all(1).any()
            targets = jax.nn.one_hot(matching(of_clusters)[found.labels], self.experts)
            after = least_squares(contexts, targets), found.centroids
            kernel, centroids = (jnp.where(good, new, old) for new, old in zip(after, (kernel, centroids), strict=True))
            return kernel, centroids, settled | good.astype(jnp.int32), skipped + (~good).astype(jnp.int32)

        after = jax.lax.cond(calls % self.every == 0, update, lambda before: before, before)
        self.kernel[...], self.centroids[...], self.settled[...], self.skipped[...] = after
        self.calls[...] = calls


class SoftmaxGate(nnx.Module):
    """p = softmax((c, 1) W), trained by gradient; an environment is of expert argmax_e p_e, whose output is multiplied
    by p_e: without that W would have no gradient (Fedus et al. 2021, arXiv:2101.03961).

    The naive mixture that MixER (arXiv:2502.05335) is compared to. `balance` weighs the squared coefficient of
    variation over experts of the mean of p over environments (Shazeer et al. 2017, arXiv:1701.06538), which keeps the
    gate from giving all environments to one expert. Both are chosen here: the code that MixER's authors published
    multiplies no output by p, and says nothing of the weight of the balance.
    """

    def __init__(self, context_size: int, *, experts: int, balance: float = 0.01, rngs: nnx.Rngs):
        if balance < 0:
            raise ValueError(f"gate.balance={balance} must be at least 0")
        self.scores = Linear(context_size, experts, axes=(None, None), rngs=rngs)
        self.balance = balance

    def __call__(self, contexts: jax.Array, losses: Losses, train: bool) -> tuple[jax.Array, jax.Array, dict]:
        """As `MixerGate`; the weights are the p of the experts chosen."""
        del losses, train
        p = jax.nn.softmax(self.scores(contexts))
        share = p.mean(0)
        of_balance = {"balance": self.balance * share.var() / jnp.square(share.mean())} if self.balance else {}
        return p.argmax(-1).astype(jnp.int32), p.max(-1), {"losses": of_balance, "metrics": {}}
