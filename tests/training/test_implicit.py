"""Implicit MAML: its gradient against closed forms and long inner loops, and the solver that it is made by."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lissom.models.variables import Parts, merge
from lissom.training.meta.implicit import ImplicitMAML, conjugate_gradients
from lissom.training.meta.inner import adapted
from lissom.training.meta.networks import task_loss
from tests.meta import KEY, Line, close, flat, gradient, perceptron, regression, smooth


@pytest.mark.parametrize("damping", [0.0, 3.0])
def test_implicit_gradient_is_that_of_the_closed_form(damping):
    """phi = argmin mean (p x - y)^2 + (l / 2) (p - w)^2 = (c + l w) / (h + l): d phi / d w = l / (h + l); damped by d
    it is (l + d) / (h + l + d), of the same phi."""
    batch, proximity = regression(), 1.5
    settings = {"inner_steps": 400, "inner_rate": 0.05, "solver_steps": 2}
    objective = ImplicitMAML(proximity=proximity, damping=damping, **settings)
    _, (found, _, _) = gradient(objective, Line(), batch)
    expected = []
    for x, y, z, t in zip(*(np.asarray(batch[n]) for n in ("support_inputs", "support_labels", "inputs", "labels"))):
        h, c = 2 * (x * x).mean(), 2 * (x * y).mean()
        phi = (c + proximity * 0.5) / (h + proximity)
        expected.append(2 * (z * (z * phi - t)).mean() * (proximity + damping) / (h + proximity + damping))
    np.testing.assert_allclose(found["w"], [np.mean(expected)], rtol=1e-4)


def test_implicit_gradient_is_that_of_a_long_inner_loop():
    """MAML through 300 steps of the same regularised descent, of a network with curvature."""
    batch = regression()
    objective = ImplicitMAML(proximity=4.0, inner_steps=300, inner_rate=0.05, solver_steps=25)
    module = smooth()
    parts, (found, _, _) = gradient(objective, module, batch)

    def loss(params):
        def task(support, targets, inputs, labels):
            run = lambda p, x: merge(Parts(parts.graph, p, {}, {}))(x)[0]
            near = lambda p: sum(jnp.square(a - b).sum() for a, b in zip(*map(jax.tree.leaves, (p, params))))
            inner = lambda p, _: task_loss(run(p, support), targets) + 2.0 * near(p)
            phi = adapted(inner, params, optax.sgd(0.05), 300, KEY)
            return task_loss(run(phi, inputs), labels)

        names = ("support_inputs", "support_labels", "inputs", "labels")
        return jax.vmap(task)(*(batch[name] for name in names)).mean()

    close(found, jax.grad(loss)(parts.params), rtol=2e-2, atol=1e-4)


def test_conjugate_gradients():
    """As many steps as dimensions solve a positive definite system, more change nothing, none is wrong for 0."""
    a = jax.random.normal(KEY, (6, 6))
    a, b = a @ a.T + jnp.eye(6), {"x": jnp.arange(4.0), "y": jnp.ones(2)}
    product = lambda v: dict(zip("xy", jnp.split(a @ flat(v), [4])))
    for steps in (6, 30):
        found = conjugate_gradients(product, b, steps)
        np.testing.assert_allclose(flat(found), np.linalg.solve(a, flat(b)), rtol=1e-3, atol=1e-4)
    zero = conjugate_gradients(product, jax.tree.map(jnp.zeros_like, b), 3)
    assert (flat(zero) == 0).all()


def test_conjugate_gradients_end_where_curvature_is_not_positive():
    """Of diag(1, -1): along (2, 1) it is 3, so that one step of 5 / 3 is taken, and along the next direction it is not;
    along (1, 2) it is -3 at once."""
    product = lambda v: v * jnp.array([1.0, -1.0])
    for steps in (1, 5):
        np.testing.assert_allclose(conjugate_gradients(product, jnp.array([2.0, 1.0]), steps), [10 / 3, 5 / 3])
        np.testing.assert_allclose(conjugate_gradients(product, jnp.array([1.0, 2.0]), steps), [1.0, 2.0])


def test_conjugate_gradients_end_before_a_step_is_too_long():
    """Of diag(1, -0.9) along (0.9488, 1), where it is 1e-4: a step would be 8,000 times as long as the target."""
    product, target = lambda v: v * jnp.array([1.0, -0.9]), jnp.array([0.9488, 1.0])
    np.testing.assert_array_equal(conjugate_gradients(product, target, 5, least=0.1), target)
    assert jnp.linalg.norm(conjugate_gradients(product, target, 1)) > 1e3
    product, target = lambda v: v * jnp.array([1.0, 0.2]), jnp.array([1.0, 1.0])
    np.testing.assert_allclose(conjugate_gradients(product, target, 2, least=0.1), [1.0, 5.0], rtol=1e-5)


def test_implicit_gradient_is_no_rounding():
    """Of a network whose loss curves down by more than the proximity: a change of its weights by 1e-6 of their size
    changes the gradient by no more than 1e-3 of its size (and by more than its size, if the solver went on)."""
    batch, module = regression(tasks=8), perceptron(hidden=(16, 16))
    objective = ImplicitMAML(proximity=0.1, inner_steps=4, solver_steps=10)
    parts, (found, _, _) = gradient(objective, module, batch)
    leaves, tree = jax.tree.flatten(parts.params)
    keys = jax.random.split(KEY, len(leaves))
    moved = [leaf * (1 + 1e-6 * jax.random.normal(key, leaf.shape)) for leaf, key in zip(leaves, keys, strict=True)]
    other, _, _ = objective.gradients(
        parts.graph, jax.tree.unflatten(tree, moved), parts.stats, parts.frozen, batch, KEY, jnp.zeros((), jnp.int32)
    )
    assert jnp.linalg.norm(flat(other) - flat(found)) < 1e-3 * jnp.linalg.norm(flat(found))
