"""Solvers against brute force, traces against a whole Hessian."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from lissom.compression.quantization.allocation import solvers
from lissom.compression.quantization.allocation.hessians import estimator, traces


def problem(seed, layers=5, options=3):
    rng = np.random.default_rng(seed)
    loss = rng.exponential(size=(layers, options)) * rng.exponential(size=(layers, 1)) * 100
    size = np.sort(rng.integers(1, 40, (layers, options)), 1)
    return loss, size


def brute(loss, size, budget):
    choices = itertools.product(range(loss.shape[1]), repeat=len(loss))
    total = lambda table, choice: sum(table[i, c] for i, c in enumerate(choice))
    fits = [choice for choice in choices if total(size, choice) <= budget]
    return min(total(loss, choice) for choice in fits)


@pytest.mark.parametrize("seed", range(6))
def test_pareto_and_integer_program_are_the_best_choice(seed):
    loss, size = problem(seed)
    front = solvers.pareto(loss, size)
    value = lambda choice: sum(loss[i, c] for i, c in enumerate(choice))
    for budget in np.linspace(size.min(1).sum(), size.max(1).sum(), 7):
        best = brute(loss, size, budget)
        for choice in (solvers.within(front, budget), solvers.integer(loss, size, budget)):
            assert sum(size[i, c] for i, c in enumerate(choice)) <= budget
            np.testing.assert_allclose(value(choice), best, rtol=1e-9)
    sizes, losses = zip(*((s, lost) for s, lost, _ in front), strict=True)
    assert list(sizes) == sorted(set(sizes)) and list(losses) == sorted(set(losses), reverse=True)


def test_uniform_and_random_fit():
    _, size = problem(7)
    rng = np.random.default_rng(0)
    budget = int(size.sum(0)[1])
    assert solvers.uniform(size, budget) == (1,) * 5
    drawn = {solvers.random(size, budget, rng) for _ in range(50)}
    assert len(drawn) > 10
    for choice in drawn:
        left = budget - sum(size[i, c] for i, c in enumerate(choice))
        steps = [size[i, option] - size[i, c] for i, c in enumerate(choice) for option in range(size.shape[1])]
        assert left >= 0 and not any(0 < step <= left for step in steps)  # nothing more fits


def test_decoupled_divides_the_budget_by_what_it_is_worth():
    """Two layers matter to one metric, two to the other; the second metric counts ten times as much."""
    size = np.tile([1, 4], (4, 1))
    tables = np.zeros((2, 4, 2))
    tables[0, :2, 0], tables[1, 2:, 0] = 1.0, 1.0
    value = lambda choice: sum((1, 1, 10, 10)[layer] for layer, option in enumerate(choice) if option == 0)
    assert solvers.decoupled(tables, size, 10, value) == (0, 0, 1, 1)
    assert solvers.decoupled(tables, size, 10, lambda choice: -value(choice)) == (1, 1, 0, 0)
    assert solvers.decoupled(tables, size, 16, value) == (1, 1, 1, 1)
    for budget in range(4, 17):
        choice = solvers.decoupled(tables, size, budget, value)
        assert size[range(4), choice].sum() <= budget
    # All layers matter more to the first metric: the second one has none.
    alone = solvers.decoupled(np.stack([tables.sum(0), np.zeros((4, 2))]), size, 10, value)
    assert size[range(4), alone].sum() == 10


def test_bisection_finds_the_last_layer_that_keeps_the_bound():
    order, minds = [2, 0, 3, 1], [0.02, 0.5, 0.01, 0.1]
    asked = []

    def accuracy(choice):
        asked.append(choice)
        return 1 - sum(m for m, few in zip(minds, choice, strict=True) if few)

    choice, evaluations = solvers.bisection(order, accuracy, 0.95)
    assert choice == (1, 0, 1, 0) and evaluations == len(asked) <= 4
    assert solvers.bisection(order, accuracy, 0.3)[0] == (1, 1, 1, 1)
    assert solvers.bisection(order, accuracy, 0.999)[0] == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: solvers.within(solvers.pareto([[1.0]], [[5]]), 4), "a budget of 4 is below the smallest choice, 5"),
        (lambda: solvers.integer(np.ones((2, 1)), np.full((2, 1), 3), 5), "a budget of 5 is below"),
        (lambda: solvers.uniform(np.full((2, 1), 3), 5), "the smallest uniform choice, 6"),
        (lambda: solvers.random(np.full((2, 1), 3), 5, np.random.default_rng(0)), "a budget of 5"),
        (lambda: solvers.decoupled(np.ones((3, 2, 2)), np.ones((2, 2)), 4, len), "two metrics, not of 3"),
        (lambda: solvers.decoupled(np.ones((2, 2, 1)), np.full((2, 1), 3), 5, len), "below the smallest choice, 6"),
        (lambda: solvers.pareto([[1.0]], [[1, 2]]), r"must both be \[layers, options\]"),
        (lambda: solvers.pareto([[np.nan]], [[1]]), "losses must be finite"),
        (lambda: solvers.pareto([[1.0]], [[1.5]]), "sizes must be whole numbers"),
        (lambda: solvers.bisection([0, 0], lambda _: 1.0, 0.5), "must name each of 2 layers once"),
        (lambda: solvers.bisection([0, 1], lambda _: 0.4, 0.5), "the accuracy is 0.4, below the bound 0.5"),
        (lambda: traces([jnp.ones(())]), "1 estimates of a trace have no error"),
    ],
)
def test_mistakes_are_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_traces_are_those_of_the_hessian():
    """Of a small network, block by block; and exact where the Hessian is diagonal."""
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(3, 4))), "b": jnp.asarray(rng.normal(size=(4, 2)))}
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    loss = lambda p: jnp.square(jnp.tanh(x @ p["a"]) @ p["b"] - y).mean()
    flat, back = ravel_pytree(params)
    diagonal = back(jnp.diagonal(jax.hessian(lambda flat: loss(back(flat)))(flat)))
    estimate = estimator(loss)
    mean, error = traces(estimate(key, params) for key in jax.random.split(jax.random.key(0), 2000))
    for name in params:
        assert abs(mean[name] - diagonal[name].sum()) < 5 * error[name], name
        assert error[name] < 0.2 * abs(mean[name])
    own = lambda p: sum((k + 1) * jnp.square(leaf).sum() for k, leaf in enumerate(p.values()))
    estimate = estimator(own)
    mean, error = traces(estimate(key, params) for key in jax.random.split(jax.random.key(1), 3))
    np.testing.assert_allclose(mean["a"], 2 * 12, rtol=1e-5)
    np.testing.assert_allclose(mean["b"], 4 * 8, rtol=1e-5)
