"""A mixture of linear experts whose experts mean something: each is tied to a context that an operator has marked.

Contextual mixture of experts, cMoE (Souza et al. 2022, arXiv:2211.00558). Of N samples, E contexts:

    p(y | x) = sum_e g_e(x) N(y; theta_e^T [1, x], v_e)          g = softmax(W [1, x])
    pi_ie in 0..1: the possibility that sample i is of context e

    objective   L = sum_i log sum_e pi_ie g_e(x_i) N(y_i; .)  -  ridge / 2 sum |theta_e|^2  -  gate_ridge / 2 |W|^2
    E step      r_ie = pi_ie g_e(x_i) N(y_i; .) / sum over experts of the same
    M step      theta_e by ridge regression weighted by r_e; v_e their weighted mean square error; W by softmax
                regression on r

Where pi is 1 throughout this is the plain EM mixture of experts (Jordan & Jacobs 1994, "Hierarchical mixtures of
experts and the EM algorithm"); where pi is 0 or 1 and names one context a sample, experts are fitted apart. No penalty
is on the intercepts. EM has no gradient, no step and no batch: the mixture is fitted by a function, not by train.py.

Of the paper we had the abstract and a summary. Open there, and chosen here: pi weighs the densities, as the
plausibility of a soft label does (Côme et al. 2009, "Learning from partially supervised data using mixture models and
belief functions"), so that L is what EM raises; experts are ridge regressions; the gates take `gate_steps` steps by the
bound of Böhning 1992 ("Multinomial logistic regression algorithm"), no step of which lowers L; inputs are taken as they
are, so standardise them; a sample that no context allows is an error.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

HALF_LOG_2PI = 0.9189385332046727


class ContextualMixture(NamedTuple):
    """A fitted mixture. `gates` [D + 1, E] and `experts` [D + 1, E], the intercept in row 0; `variances` [E]; `history`
    [iterations + 1]: L in front of the first iteration and behind each."""

    gates: jax.Array
    experts: jax.Array
    variances: jax.Array
    history: jax.Array


def fit(
    inputs: jax.Array,
    targets: jax.Array,
    possibilities: jax.Array,
    *,
    ridge: float = 1e-2,
    gate_ridge: float = 1e-2,
    least_variance: float = 1e-4,
    iterations: int = 100,
    gate_steps: int = 10,
    key: jax.Array,
) -> ContextualMixture:
    """inputs [N, D], targets [N], possibilities [N, E] -> the mixture after `iterations` of EM.

    It begins with responsibilities in proportion to pi x u, u uniform in 0.5..1.5 by `key`: without contexts, experts
    that begin alike would stay alike. `least_variance` bounds v from below, in the unit of the targets squared. In
    float32, or in float64 where jax computes in it. Raises ValueError, one sentence, for what can't be meant.
    """
    _check(inputs, targets, possibilities, ridge, gate_ridge, least_variance, iterations, gate_steps)
    return _fit(inputs, targets, possibilities, key, ridge, gate_ridge, least_variance, iterations, gate_steps)


@jax.jit(static_argnames=("iterations", "gate_steps"))
def _fit(inputs, targets, possibilities, key, ridge, gate_ridge, least_variance, iterations, gate_steps):
    x = _with_intercept(inputs)
    pi = jnp.asarray(possibilities, x.dtype)
    y = jnp.asarray(targets, x.dtype)
    shared = {"ridge": ridge, "least_variance": least_variance, "gate_ridge": gate_ridge, "gate_steps": gate_steps}

    def objective(state):
        gates, experts, _ = state
        total = jax.nn.logsumexp(_joint(x, y, state) + jnp.log(pi), axis=-1).sum()
        return total - ridge / 2 * jnp.square(experts[1:]).sum() - gate_ridge / 2 * jnp.square(gates[1:]).sum()

    def step(state, _):
        r = jax.nn.softmax(_joint(x, y, state) + jnp.log(pi), axis=-1)
        state = _maximised(x, y, r, state, **shared)
        return state, objective(state)

    start = pi * jax.random.uniform(key, pi.shape, x.dtype, 0.5, 1.5)
    start = start / start.sum(-1, keepdims=True)
    blank = (jnp.zeros((x.shape[1], pi.shape[1]), x.dtype),) * 2 + (jnp.full(pi.shape[1], y.var(), x.dtype),)
    state = _maximised(x, y, start, blank, **shared)
    first = objective(state)
    state, history = jax.lax.scan(step, state, length=iterations)
    return ContextualMixture(*state, jnp.concatenate([first[None], history]))


def predict(mixture: ContextualMixture, inputs: jax.Array) -> jax.Array:
    """inputs [N, D] -> the mean of p(y | x) [N]: sum_e g_e(x) theta_e^T [1, x]. Contexts are for fitting only."""
    return jnp.sum(gates(mixture, inputs) * (_with_intercept(inputs) @ mixture.experts), -1)


def gates(mixture: ContextualMixture, inputs: jax.Array) -> jax.Array:
    """inputs [N, D] -> g [N, E]: which context the inputs speak for."""
    return jax.nn.softmax(_with_intercept(inputs) @ mixture.gates, axis=-1)


def responsibilities(
    mixture: ContextualMixture, inputs: jax.Array, targets: jax.Array, possibilities: jax.Array | None = None
) -> jax.Array:
    """r [N, E] of samples whose targets are known, with their contexts or (None) without."""
    x = _with_intercept(inputs)
    log_pi = 0.0 if possibilities is None else jnp.log(jnp.asarray(possibilities, x.dtype))
    return jax.nn.softmax(_joint(x, jnp.asarray(targets, x.dtype), mixture[:3]) + log_pi, axis=-1)


def _with_intercept(inputs: jax.Array) -> jax.Array:
    inputs = jnp.asarray(inputs)
    return jnp.concatenate([jnp.ones((len(inputs), 1), inputs.dtype), inputs], axis=1)


def _joint(x: jax.Array, y: jax.Array, state: tuple) -> jax.Array:
    """log g_e(x_i) + log N(y_i; theta_e^T x_i, v_e)  [N, E]."""
    gates, experts, variances = state
    errors = y[:, None] - x @ experts
    normal = -0.5 * jnp.square(errors) / variances - 0.5 * jnp.log(variances) - HALF_LOG_2PI
    return jax.nn.log_softmax(x @ gates, axis=-1) + normal


def _maximised(x, y, r, state, *, ridge, least_variance, gate_ridge, gate_steps) -> tuple:
    """The M step: each of experts, variances and gates is moved to where the expected objective is higher."""
    gates, _, variances = state
    free = jnp.ones(x.shape[1], x.dtype).at[0].set(0)  # the intercept

    def expert(weights, variance):
        weighted = x * weights[:, None]
        # L has squared errors over twice the variance: times it, the ridge is. 1e-6 is for an expert without samples.
        system = x.T @ weighted + jnp.diag(ridge * variance * free + 1e-6)
        return jnp.linalg.solve(system, weighted.T @ y)

    experts = jax.vmap(expert, in_axes=(1, 0), out_axes=1)(r, variances)
    errors = jnp.square(y[:, None] - x @ experts)
    found = (r * errors).sum(0) / jnp.maximum(r.sum(0), 1e-6)
    variances = jnp.maximum(found, least_variance)
    # The curvature of the softmax is nowhere over 1/2 x^T x for each expert: a step by it can't go too far.
    bound = jnp.linalg.inv(0.5 * x.T @ x + jnp.diag(gate_ridge * free + 1e-6))

    def gate_step(_, gates):
        slope = x.T @ (r - jax.nn.softmax(x @ gates, axis=-1)) - gate_ridge * free[:, None] * gates
        return gates + bound @ slope

    return jax.lax.fori_loop(0, gate_steps, gate_step, gates), experts, variances


def _check(inputs, targets, possibilities, ridge, gate_ridge, least_variance, iterations, gate_steps) -> None:
    shapes = [tuple(jnp.shape(a)) for a in (inputs, targets, possibilities)]
    (n, *width), own, pi = shapes
    if len(width) != 1 or own != (n,) or len(pi) != 2 or pi[0] != n or n < 1 or pi[1] < 1:
        raise ValueError(f"a mixture is fitted to inputs [N, D], targets [N], possibilities [N, E], and not {shapes}")
    pi = jnp.asarray(possibilities)
    if not ((pi >= 0) & (pi <= 1)).all():
        raise ValueError("possibilities must be numbers from 0 to 1")
    if not (pi > 0).any(-1).all():
        index = int(jnp.argmin((pi > 0).any(-1)))
        raise ValueError(f"sample {index} has possibility 0 in every context, so that no expert may explain it")
    for name, value in (("ridge", ridge), ("gate_ridge", gate_ridge)):
        if value < 0:
            raise ValueError(f"{name}={value} must be at least 0")
    for name, value in (("least_variance", least_variance), ("iterations", iterations), ("gate_steps", gate_steps)):
        if not value > 0:
            raise ValueError(f"{name}={value} must be over 0")
