"""Sinkhorn's plan: its marginals, its form, and the two limits whose answers are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from lissom.models.transport import sinkhorn

COST = jax.random.uniform(jax.random.key(0), (5, 7))


def marginals(seed=1):
    a, b = jax.random.uniform(jax.random.key(seed), (5,)), jax.random.uniform(jax.random.key(seed + 1), (7,))
    return a / a.sum(), b / b.sum()


@pytest.mark.parametrize("epsilon", [0.05, 1.0])
def test_marginals(epsilon):
    rows, columns = marginals()
    plan = sinkhorn(COST, epsilon=epsilon, rows=rows, columns=columns, rounds=500)
    np.testing.assert_allclose(plan.sum(1), rows, rtol=1e-5)
    np.testing.assert_allclose(plan.sum(0), columns, rtol=1e-3)
    even = sinkhorn(COST, epsilon=epsilon, rounds=500)
    np.testing.assert_allclose(even.sum(1), 1 / 5, rtol=1e-5)
    np.testing.assert_allclose(even.sum(0), 1 / 7, rtol=1e-3)


def test_plan_is_the_kernel_with_scaled_rows_and_columns():
    """P_ij P_kl / (P_il P_kj) is that of exp(-cost / epsilon), whatever the marginals."""
    plan = sinkhorn(COST, epsilon=0.3, rows=marginals()[0], rounds=7)
    kernel = np.exp(-np.asarray(COST) / 0.3)
    for i, k in itertools.combinations(range(5), 2):
        ratio = lambda p, i=i, k=k: p[i, 0] * p[k, 3] / (p[i, 3] * p[k, 0])
        np.testing.assert_allclose(ratio(np.asarray(plan)), ratio(kernel), rtol=1e-4)


def test_two_by_two_by_hand():
    """cost [[0, 1], [1, 0]], epsilon 1, even: P = [[x, y], [y, x]] with x + y = 1/2 and x / y = e."""
    plan = sinkhorn(jnp.array([[0.0, 1.0], [1.0, 0.0]]), epsilon=1.0)
    y = 0.5 / (1 + np.e)
    np.testing.assert_allclose(plan, [[np.e * y, y], [y, np.e * y]], rtol=1e-5)


def test_a_small_epsilon_finds_the_least_cost():
    """That of the linear program, by scipy."""
    rows, columns = (np.asarray(m, np.float64) for m in marginals())
    columns = columns / columns.sum() * rows.sum()
    sums = [np.kron(np.eye(5), np.ones(7)), np.kron(np.ones(5), np.eye(7))]
    best = linprog(np.ravel(COST), A_eq=np.concatenate(sums), b_eq=np.concatenate([rows, columns])).fun
    cost = lambda epsilon, rounds: float(
        (sinkhorn(COST, epsilon=epsilon, rows=rows, columns=columns, rounds=rounds) * COST).sum()
    )
    assert best <= cost(0.003, 5000) < best + 0.01
    assert cost(0.3, 500) > best + 0.02


def test_a_cost_of_thousands_is_no_problem():
    plan = sinkhorn(1e4 * COST, epsilon=0.05, rounds=50)
    assert np.isfinite(np.asarray(plan)).all()
    # The scalings are near 2e5, of which float32 keeps 1e-2.
    np.testing.assert_allclose(plan.sum(1), 1 / 5, rtol=1e-2)


@pytest.mark.parametrize("slack", [None, 0.005, 0.1])
def test_what_weighs_nothing_stays_empty(slack):
    rows, columns = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.0, 0.4, 0.3, 0.3])
    plan = sinkhorn(COST[:3, :4], epsilon=0.05, rows=rows, columns=columns, slack=slack)
    assert plan[2].max() == 0 and plan[:, 0].max() == 0 and plan[:2, 1:].min() > 0
    for epsilon in (0.05, 1.0):  # and changes nothing
        given = {"epsilon": epsilon, "slack": slack}
        plan = sinkhorn(COST[:3, :4], rows=rows, columns=columns, **given)
        without = sinkhorn(COST[:2, 1:4], rows=rows[:2], columns=columns[1:], **given)
        np.testing.assert_allclose(plan[:2, 1:], without, rtol=1e-5)


def test_unbalanced():
    """Without end it is balanced; with little slack a column that costs much gets less than its share; and at the
    solution u = -slack / epsilon log(row sum / row): the condition of the penalty."""
    rows, columns = marginals()
    far = jnp.concatenate([COST[:, :6], COST[:, 6:] + 3], 1)
    solve = lambda **more: sinkhorn(far, epsilon=0.2, rows=rows, columns=columns, rounds=2000, **more)
    np.testing.assert_allclose(solve(slack=1e6), solve(), atol=1e-5)
    loose = np.asarray(solve(slack=0.3))
    assert loose.sum(0)[6] < 0.01 * columns[6]
    log_scales = np.log(loose) + np.asarray(far) / 0.2  # u_i + v_j
    u = -0.3 / 0.2 * np.log(loose.sum(1) / np.asarray(rows))
    v = -0.3 / 0.2 * np.log(loose.sum(0) / np.asarray(columns))
    np.testing.assert_allclose(log_scales, u[:, None] + v[None], atol=2e-3)


def test_an_empty_class_stays_empty_and_gradients_are_finite():
    rows = jnp.array([0.5, 0.5, 0.0, 0.0, 0.0])
    plan = sinkhorn(COST, epsilon=0.1, rows=rows)
    assert np.asarray(plan[2:]).max() < 1e-20
    gradient = jax.grad(lambda c: (sinkhorn(c, epsilon=0.1, rows=rows) * COST).sum())(COST)
    assert np.isfinite(np.asarray(gradient)).all() and np.abs(gradient).max() > 0


def test_bad_settings():
    with pytest.raises(ValueError, match="epsilon=0, rounds=50 and slack=None must be above 0"):
        sinkhorn(COST, epsilon=0)
    with pytest.raises(ValueError, match="epsilon=nan"):
        sinkhorn(COST, epsilon=float("nan"))
    with pytest.raises(ValueError, match="slack=-1"):
        sinkhorn(COST, epsilon=1, slack=-1)
