"""A top-k whose result moves with the scores: how far each of n scores is among the k largest."""

import jax
import jax.numpy as jnp

STEPS = 48  # halvings of the interval that holds the threshold: below what float32 tells apart


def soft_top_k(scores: jax.Array, k: int, temperature: float) -> jax.Array:
    """scores [..., n] -> A [..., n] float32 in 0..1, of which each row sums to k

        A_i = sigmoid((s_i - t) / temperature)        t such that sum_i A_i = k

    At temperature 0 the k largest have 1 and the others 0; at a high one all have k / n. 1 throughout where k = n.

    This is the SOFT top-k operator of Xie et al. 2020 (arXiv:2002.06504): entropic optimal transport of n points to the
    anchors 0 and 1 with masses (n - k) / n and k / n and squared distance as cost. Of two anchors the costs of a point
    differ by 1 - 2 s_i, so that the plan, which they find by Sinkhorn's iterations, is the sigmoid above with
    temperature = epsilon / 2. Here t, the one unknown, is found by bisection, without a gradient; the gradient is that
    of the equation which defines it,

        dA_i = w_i (ds_i - sum_j w_j ds_j / sum_j w_j)        w = A (1 - A) / temperature

    first derivatives only. Xie et al. divide the costs by the largest one of the batch: temperature is then in units of
    that, and the result for one row depends on the others. Here it does not.

    Raises ValueError where k is not in 1..n, or the temperature not over 0.
    """
    n = scores.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"k={k} must be in 1..{n}, the number of scores")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be over 0")
    scores = scores.astype(jnp.float32)
    if k == n:
        return jnp.ones_like(scores)
    # Counted from the middle of the k-th and the next: where the temperature is low, all that matters lies near 0.
    edges = jax.lax.top_k(jax.lax.stop_gradient(scores), k + 1)[0]
    z = (scores - edges[..., -2:].mean(-1, keepdims=True)) / temperature
    t = _threshold(jax.lax.stop_gradient(z), k)
    a = jax.nn.sigmoid(z - t)
    slope = jax.lax.stop_gradient(jnp.sum(a * (1 - a), -1, keepdims=True))
    excess = jnp.sum(a, -1, keepdims=True)
    # Adds 0, and to the gradient that of the threshold; where all are 0 or 1 there is none.
    t = t + (excess - jax.lax.stop_gradient(excess)) / jnp.maximum(slope, 1e-30)
    return jax.nn.sigmoid(z - t)


def _threshold(z: jax.Array, k: int) -> jax.Array:
    """t [..., 1] with sum_i sigmoid(z_i - t) = k, for 0 < k < n."""
    # With every z at its least (most) the sum at the lower (upper) end would still be at least (at most) k.
    share = k / z.shape[-1]
    reach = jnp.log(share / (1 - share))
    ends = z.min(-1, keepdims=True) - reach, z.max(-1, keepdims=True) - reach

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        above = jax.nn.sigmoid(z - middle).sum(-1, keepdims=True) > k
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = jax.lax.fori_loop(0, STEPS, halve, ends)
    return (low + high) / 2
