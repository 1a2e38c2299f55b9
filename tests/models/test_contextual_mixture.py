"""Contextual EM: its objective never falls, without contexts it is plain EM, with sure ones it is a regression each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from lissom.data.errors import DataError
from lissom.data.regimes import regimes, trapezoid
from lissom.models import contextual_mixture as cm
from lissom.models.mixtures import adjusted_rand

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def softmax(a):
    a = np.exp(a - a.max(1, keepdims=True))
    return a / a.sum(1, keepdims=True)


def plain_em(x, y, r, *, ridge, gate_ridge, iterations, gate_steps):
    """Jordan and Jacobs' EM by loops, the gates by the same bound: (gates, experts, variances, log-likelihoods)."""
    x = np.concatenate([np.ones((len(x), 1)), x], 1)
    (n, d), e = x.shape, r.shape[1]
    free = np.array([0.0] + [1.0] * (d - 1))
    w, theta, v, told = np.zeros((d, e)), np.zeros((d, e)), np.full(e, y.var()), []
    for _ in range(iterations + 1):
        for k in range(e):
            system = np.diag(ridge * v[k] * free + 1e-6)
            for i in range(n):
                system += r[i, k] * np.outer(x[i], x[i])
            theta[:, k] = np.linalg.solve(system, (r[:, k, None] * x).T @ y)
            v[k] = max((r[:, k] * (y - x @ theta[:, k]) ** 2).sum() / r[:, k].sum(), 1e-4)
        inverse = np.linalg.inv(x.T @ x / 2 + np.diag(gate_ridge * free + 1e-6))
        for _ in range(gate_steps):
            w = w + inverse @ (x.T @ (r - softmax(x @ w)) - gate_ridge * free[:, None] * w)
        joint = softmax(x @ w) * norm.pdf(y[:, None], x @ theta, np.sqrt(v))
        told.append(np.log(joint.sum(1)).sum())
        r = joint / joint.sum(1, keepdims=True)
    return w, theta, v, np.array(told)


def test_possibility_one_everywhere_is_plain_em():
    data = regimes(size=60, dims=2, seed=1)
    pi = np.ones((60, 3))
    settings = {"ridge": 0.1, "gate_ridge": 0.2, "iterations": 15, "gate_steps": 3}
    found = cm.fit(data.inputs, data.targets, pi, **settings, key=KEY)
    start = np.asarray(jax.random.uniform(KEY, (60, 3), jnp.float64, 0.5, 1.5))
    w, theta, v, told = plain_em(data.inputs, data.targets, start / start.sum(1, keepdims=True), **settings)
    np.testing.assert_allclose(found.experts, theta, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.variances, v, rtol=1e-6)
    np.testing.assert_allclose(found.gates, w, rtol=1e-6, atol=1e-8)
    penalty = 0.1 / 2 * np.square(theta[1:]).sum() + 0.2 / 2 * np.square(w[1:]).sum()
    assert float(found.history[-1]) == pytest.approx(told[-1] - penalty, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("contexts", ["none", "trapezoids", "random"])
def test_the_objective_never_falls(contexts, seed):
    data = regimes(size=90, dims=3, seed=seed)
    pi = {
        "none": np.ones((90, 3)),
        "trapezoids": data.possibilities,
        "random": np.random.default_rng(seed).random((90, 3)),
    }[contexts]
    ridges = {"ridge": 0.0, "gate_ridge": 0.0} if seed % 2 else {"ridge": 3.0, "gate_ridge": 1.0}
    fit = cm.fit(data.inputs, data.targets, pi, **ridges, gate_steps=2, iterations=60, key=jax.random.key(seed))
    steps = np.diff(fit.history)
    assert steps.min() > -1e-5 and fit.history[-1] > fit.history[0] + 1  # 1e-6 on the diagonals is in no objective
    assert np.isfinite(fit.history).all()


def test_sure_contexts_are_regressions_apart():
    data = regimes(size=120, dims=2, seed=2)
    ridge = 0.5
    fit = cm.fit(data.inputs, data.targets, np.eye(3)[data.regime], ridge=ridge, iterations=300, key=KEY)
    for e in range(3):
        own = data.regime == e
        x, y = np.concatenate([np.ones((own.sum(), 1)), data.inputs[own]], 1), data.targets[own]
        system = x.T @ x + np.diag([0, ridge, ridge]) * float(fit.variances[e])
        np.testing.assert_allclose(fit.experts[:, e], np.linalg.solve(system, x.T @ y), rtol=1e-4, atol=1e-6)
        assert float(fit.variances[e]) == pytest.approx(np.square(y - x @ fit.experts[:, e]).mean(), rel=1e-6)
    # The gates are the softmax regression of the regime on the inputs: its slope is 0 there.
    x = np.concatenate([np.ones((120, 1)), data.inputs], 1)
    slope = x.T @ (np.eye(3)[data.regime] - np.asarray(cm.gates(fit, data.inputs)))
    slope[1:] -= 1e-2 * np.asarray(fit.gates)[1:]
    np.testing.assert_allclose(slope, 0, atol=1e-2)


def test_one_expert_is_a_ridge_regression():
    data = regimes(size=40, dims=2, seed=3)
    fit = cm.fit(data.inputs, data.targets, np.ones((40, 1)), ridge=0.0, key=KEY)
    x = np.concatenate([np.ones((40, 1)), data.inputs], 1)
    expected = np.linalg.lstsq(x, data.targets, rcond=None)[0]
    np.testing.assert_allclose(fit.experts[:, 0], expected, atol=1e-5)
    np.testing.assert_allclose(cm.predict(fit, data.inputs), x @ expected, atol=1e-5)


def test_responsibilities_by_hand():
    """Two experts that say 0 and 2 with variance 1, gates that are alike; y = 0, 1."""
    mixture = cm.ContextualMixture(jnp.zeros((2, 2)), jnp.array([[0.0, 2.0], [0.0, 0.0]]), jnp.ones(2), jnp.zeros(1))
    x, y = jnp.zeros((2, 1)), jnp.array([0.0, 1.0])
    # Densities in proportion to 1 and exp(-2); at y = 1 alike.
    first = 1 / (1 + np.exp(-2))
    np.testing.assert_allclose(cm.responsibilities(mixture, x, y), [[first, 1 - first], [0.5, 0.5]], rtol=1e-6)
    pi = jnp.array([[0.0, 1.0], [0.25, 0.75]])
    np.testing.assert_allclose(cm.responsibilities(mixture, x, y, pi), [[0, 1], [0.25, 0.75]], rtol=1e-6)
    np.testing.assert_allclose(cm.predict(mixture, x), [1, 1], rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_known_regimes_are_recovered(seed):
    made = {"noise": 0.1, "overlap": 0.3, "seed": seed}
    data, test = regimes(size=150, **made), regimes(size=900, draw=1, **made)
    fit = cm.fit(data.inputs, data.targets, data.possibilities, key=KEY)
    shares = cm.responsibilities(fit, test.inputs, test.targets)
    # Expert e is context e: nothing has to be matched, and the partition is that of the regimes.
    assert (shares.argmax(-1) == test.regime).mean() > 0.95
    assert float(adjusted_rand(shares.argmax(-1)[None], jnp.asarray(test.regime)[None], 3)[0]) > 0.9
    alone = cm.fit(data.inputs, data.targets, np.ones((150, 1)), key=KEY)
    error = lambda fit: float(jnp.sqrt(jnp.square(cm.predict(fit, test.inputs) - test.targets).mean()))
    assert error(fit) < 0.7 * error(alone)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"targets": np.zeros(4)}, "is fitted to inputs"),
        ({"possibilities": np.full((5, 2), 1.5)}, "possibilities must be numbers from 0 to 1"),
        ({"possibilities": np.array([[1.0, 1]] * 3 + [[0, 0]] * 2)}, "sample 3 has possibility 0 in every context"),
        ({"ridge": -1.0}, "ridge=-1.0 must be at least 0"),
        ({"iterations": 0}, "iterations=0 must be over 0"),
        ({"least_variance": 0.0}, "least_variance=0.0 must be over 0"),
    ],
)
def test_bad_requests(changes, sentence):
    given = {"inputs": np.zeros((5, 1)), "targets": np.zeros(5), "possibilities": np.ones((5, 2)), **changes}
    with pytest.raises(ValueError, match=sentence):
        cm.fit(given.pop("inputs"), given.pop("targets"), given.pop("possibilities"), **given, key=KEY)


def test_trapezoid_by_hand():
    at = np.array([-1.0, 0, 1, 2, 5, 6, 8, 9])
    np.testing.assert_allclose(trapezoid(at, (0, 8), (2, 6)), [0, 0, 0.5, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(trapezoid(np.array([0.0, 1, 2]), (1, 1), (1, 1)), [0, 1, 0])
    with pytest.raises(DataError, match="needs support"):
        trapezoid(at, (3, 8), (2, 6))


def test_regimes_are_linear_apart_and_contexts_allow_the_true_one():
    data = regimes(size=900, count=3, dims=2, noise=0.0, margin=0.2, seed=4)
    assert np.bincount(data.regime).tolist() == [300, 300, 300]
    for e in range(3):
        own = data.regime == e
        x = np.concatenate([np.ones((own.sum(), 1)), data.inputs[own]], 1)
        _, residual, *_ = np.linalg.lstsq(x, data.targets[own], rcond=None)
        assert residual.max() < 1e-18
    # 0.2 of 300 samples: the context of regime 1 rises over 240..360 and falls over 540..660.
    np.testing.assert_allclose(data.possibilities[[240, 300, 360, 540, 600, 660], 1], [0, 0.5, 1, 1, 0.5, 0])
    assert (data.possibilities[np.arange(900), data.regime] >= 0.5 - 1 / 120).all()
    test = regimes(size=900, count=3, dims=2, noise=0.0, margin=0.2, seed=4, draw=1)
    assert not np.allclose(test.inputs, data.inputs)
    for wrong in ({"count": 1}, {"margin": 0.5}, {"overlap": 0.0}, {"noise": -1.0}, {"size": 4}):
        with pytest.raises(DataError, match="regimes needs"):
            regimes(**wrong)
