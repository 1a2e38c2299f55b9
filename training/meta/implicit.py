"""Implicit MAML: the meta-gradient at the end of the inner loop, however it got there."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lissom.training.meta.gradient_based import MAML
from lissom.training.meta.inner import adapted
from lissom.training.meta.networks import task_loss


class ImplicitMAML(MAML):
    """The inner loop is about phi = argmin_p L_support(p) + (proximity / 2) ||p - theta||^2, and the meta-gradient is
    that of the argmin (Rajeswaran et al. 2019, arXiv:1909.04630),

        (I + H / proximity)^-1 grad L_query(phi),    H = grad^2 L_support(phi)

    by `solver_steps` steps of conjugate gradients with products of H: its memory does not grow with inner_steps. It is
    exact as far as both loops have converged, and asks that I + H / proximity is positive definite: where the loss
    curves down by nearly `proximity` there may be no such minimum, and the solver ends (`LEAST_CURVATURE`).
    `damping` is added to the proximity in the solver alone: without end it leaves the first-order gradient. The paper
    has none; the authors' code has 10, and twice the I. All inner steps of a task have one key, so that dropout draws
    one mask.
    """

    def __init__(
        self,
        *,
        proximity: float = 2.0,
        damping: float = 0.0,
        solver_steps: int = 5,
        second_order: bool = True,
        **settings,
    ):
        if damping < 0:
            raise ValueError(f"objective.damping={damping} must be at least 0")
        if proximity <= 0:
            raise ValueError(f"objective.proximity={proximity} must be above 0")
        if solver_steps < 1:
            raise ValueError(f"objective.solver_steps={solver_steps} must be at least 1")
        if settings.get("parameters"):
            raise ValueError("objective.parameters: 'imaml' adapts all parameters")
        if settings.get("remat", "none") != "none":
            raise ValueError(f"objective.remat={settings['remat']!r}: 'imaml' has no backward pass through its steps")
        if not second_order:
            raise ValueError(
                "objective.second_order=False means nothing to 'imaml', which differentiates no inner step"
            )
        super().__init__(**settings)
        self.proximity, self.damping, self.solver_steps = proximity, damping, solver_steps

    def descend(self, network, params, stats, inputs, targets, key, train):
        def loss(phi, task, key):
            stats, inputs, targets = task
            return task_loss(network.support(phi, stats, inputs, key, train)[0], targets)

        def solve(theta, task, key):
            def regularised(phi, _):
                apart = jax.tree.map(lambda a, b: jnp.square(a - b).sum(), phi, theta)
                return loss(phi, task, key) + self.proximity / 2 * sum(jax.tree.leaves(apart))

            steps = self.inner_steps if train else self.test_steps
            return adapted(regularised, theta, self.optimizer(theta), steps, key, second_order=False)

        task = (stats, inputs, targets)
        return implicit(solve, jax.grad(loss), self.proximity + self.damping, self.solver_steps)(params, task, key)


# Of I + H / proximity along a direction of norm 1, where the solver ends: with no more than this a step would be ten
# times as long as what is solved for, and grow without bound as the curvature goes to 0.
LEAST_CURVATURE = 0.1


def implicit(
    solve: Callable[[Any, Any, Any], Any], gradient: Callable[[Any, Any, Any], Any], proximity: float, steps: int
) -> Callable[[Any, Any, Any], Any]:
    """solve(theta, task, key), whose result phi is differentiated by theta as the argmin that it stands for: a
    cotangent v becomes w with (I + H / proximity) w = v, H v the derivative of gradient(phi, task, key) along v."""

    @jax.custom_vjp
    def found(theta, task, key):
        return solve(theta, task, key)

    def forward(theta, task, key):
        phi = solve(theta, task, key)
        return phi, (phi, task, key)

    def backward(kept, v):
        phi, task, key = kept

        def product(w):
            curved = jax.jvp(lambda phi: gradient(phi, task, key), (phi,), (w,))[1]
            return jax.tree.map(lambda a, b: a + b / proximity, w, curved)

        return conjugate_gradients(product, v, steps, LEAST_CURVATURE), None, None

    found.defvjp(forward, backward)
    return found


def conjugate_gradients(product: Callable[[Any], Any], target: Any, steps: int, least: float = 0.0) -> Any:
    """x with product(x) = target after `steps` steps from 0, `product` symmetric and positive definite (Hestenes &
    Stiefel 1952). Once the residual is 0 it stays there. Where w . product(w) is not above `least` w . w along a
    direction w the steps end, with what there is (Steihaug 1983, whose least is 0), and at the first one with `target`:
    a step divides by it, and no step is longer than 1 / `least` times the residual that it goes along."""
    dot = lambda a, b: sum(jax.tree.leaves(jax.tree.map(lambda x, y: (x * y).sum(), a, b)))
    ratio = lambda a, b: jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))
    add = lambda a, scale, b: jax.tree.map(lambda x, y: x + scale * y, a, b)

    def step(state, number):
        x, residual, direction, norm, going = state
        curved = product(direction)
        curvature = dot(direction, curved)
        going &= curvature > least * dot(direction, direction)
        length = jnp.where(going, ratio(norm, curvature), jnp.where(number == 0, 1.0, 0.0))
        x, residual = add(x, length, direction), add(residual, -length, curved)
        after = dot(residual, residual)
        direction = add(residual, ratio(after, norm), direction)
        return (x, residual, direction, after, going), None

    zeros = jax.tree.map(jnp.zeros_like, target)
    begun = (zeros, target, target, dot(target, target), jnp.array(True))
    (x, *_), _ = jax.lax.scan(step, begun, jnp.arange(steps))
    return x
