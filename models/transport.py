"""Entropic optimal transport: the one Sinkhorn solver of the house."""

import jax
import jax.numpy as jnp

NEVER = -1e30  # the logarithm of a scaling of 0: -inf has differences that are no numbers


def sinkhorn(
    cost: jax.Array,
    *,
    epsilon: float,
    rows: jax.Array | None = None,
    columns: jax.Array | None = None,
    rounds: int = 50,
    slack: float | None = None,
) -> jax.Array:
    """The plan P [N, M], float32, that is least in

        sum P cost + epsilon sum P (log P - 1)      with row sums `rows` [N] and column sums `columns` [M]

    by Sinkhorn's iterations on the logarithms of its scalings (Cuturi 2013, arXiv:1306.0895): P_ij = exp(u_i + v_j -
    cost_ij / epsilon), v and u solved for in turn, `rounds` times each; u comes last, so that the rows sum exactly to
    `rows` and the columns nearly. None is an even share of 1. A row or a column of weight 0 stays empty.

    With `slack` r both conditions are penalties r KL(sums | given) instead, and the steps are damped by r / (r +
    epsilon) (Chizat et al. 2016, arXiv:1607.05816); r without end is the balanced plan.

    Rounds are a fixed number, so that the plan can be differentiated and vmapped.
    """
    if not epsilon > 0 or rounds < 1 or not (slack is None or slack > 0):
        raise ValueError(f"epsilon={epsilon}, rounds={rounds} and slack={slack} must be above 0")
    cost = jnp.asarray(cost, jnp.float32)
    size = cost.shape
    weights = [
        jnp.full(n, 1 / n) if given is None else jnp.asarray(given, jnp.float32)
        for n, given in zip(size, (rows, columns), strict=True)
    ]
    log_rows, log_columns = map(_log, weights)
    empty_rows, empty_columns = (given <= 0 for given in weights)
    kernel, damping = -cost / epsilon, 1.0 if slack is None else slack / (slack + epsilon)

    def one(u, _):
        v = damping * (log_columns - jax.nn.logsumexp(kernel + u[:, None], 0))
        v = jnp.where(empty_columns, NEVER, v)
        u = damping * (log_rows - jax.nn.logsumexp(kernel + v[None], 1))
        return jnp.where(empty_rows, NEVER, u), v

    u, v = jax.lax.scan(one, jnp.where(empty_rows, NEVER, 0.0), None, length=rounds)
    plan = jnp.exp(kernel + u[:, None] + v[-1][None])
    return jnp.where(empty_rows[:, None] | empty_columns[None], 0.0, plan)


def _log(weights: jax.Array) -> jax.Array:
    """log; of 0, where it is not read, any number."""
    return jnp.log(jnp.where(weights > 0, weights, 1.0))
