"""The inner loop: some steps of an optax chain on the loss of one task, to be differentiated through or not.

What the backward pass keeps of T steps over P parameters whose step needs A numbers of activations, by `remat`:

    none    T (P + A)
    step    T P + A: each step is computed again from its parameters
    tree    about 2 sqrt(T) P + A: segments of sqrt(T) steps are, and each step in them
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax

REMAT = ("none", "step", "tree")


def adapted(
    loss: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    optimizer: optax.GradientTransformation,
    steps: int,
    key: jax.Array,
    *,
    second_order: bool = True,
    remat: str = "none",
) -> Any:
    """params after `steps` updates of `optimizer` by the gradients of loss(params, key), a new key a step.

    second_order: whether gradients depend on the parameters they are taken at, when the result is differentiated;
    without, d adapted / d params is that of the optimizer's own part alone (the identity, of plain descent).
    """
    keys = jax.random.split(key, steps)

    def step(carry, key):
        params, state = carry
        gradients = jax.grad(loss)(params, key)
        if not second_order:
            gradients = jax.lax.stop_gradient(gradients)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, optimizer.init(params))
    if remat == "none":
        return jax.lax.scan(step, carry, keys)[0][0]
    single = jax.checkpoint(step)
    if remat == "step":
        return jax.lax.scan(single, carry, keys)[0][0]
    length = math.isqrt(steps)
    whole = steps // length * length
    segment = jax.checkpoint(lambda carry, keys: jax.lax.scan(single, carry, keys))
    carry, _ = jax.lax.scan(segment, carry, keys[:whole].reshape(-1, length, *keys.shape[1:]))
    return jax.lax.scan(single, carry, keys[whole:])[0][0]
