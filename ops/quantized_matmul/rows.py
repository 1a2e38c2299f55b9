"""Rows of x in one axis, however many axes they have, and under `vmap` too: a batch of x is more rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def as_rows(product: Callable, x: jax.Array, codes: jax.Array, scale: jax.Array, x_scale: jax.Array | None):
    """product(x [m, k], codes, scale, x_scale [m, 1] or None) -> [m, n], for x [..., k] and x_scale as dispatched."""
    lead = x.shape[:-1]
    if x_scale is not None:
        x_scale = jnp.broadcast_to(x_scale, (*lead, 1)).reshape(-1, 1)
    y = product(x.reshape(-1, x.shape[-1]), codes, scale, x_scale)
    return y.reshape(*lead, y.shape[-1])


def batched_as_rows(product: Callable) -> Callable:
    """`product` of arrays, or None, of which the codes are the second and the scales the third. Batches of others are
    rows; those of codes are a loop, since jax's own rule would have every matrix read at once."""

    @jax.custom_batching.custom_vmap
    def call(*arrays):
        return product(*arrays)

    @call.def_vmap
    def of_a_batch(size: int, batched, *arrays):
        if batched[1] or batched[2]:
            moving = [a if b else None for a, b in zip(arrays, batched)]

            def one(moving):
                return call(*(m if b else a for a, m, b in zip(arrays, moving, batched)))

            return jax.lax.map(one, moving), True
        spread = lambda a, b: a if b or a is None else jnp.broadcast_to(a, (size, *a.shape))
        rows = [
            a if i in (1, 2) or a is None else spread(a, b).reshape(-1, a.shape[-1])
            for i, (a, b) in enumerate(zip(arrays, batched))
        ]
        y = call(*rows)
        return y.reshape(size, -1, y.shape[-1]), True

    return call


def forward_only(name: str, product: Callable) -> Callable:
    """The product of a kernel that has no gradient: who asks for one is told."""

    def refuse(*_):
        raise NotImplementedError(
            f"implementation: {name} of quantized_matmul is forward only; reference and xla can be differentiated."
        )

    call = jax.custom_vjp(product)
    call.defvjp(refuse, refuse)
    return call
