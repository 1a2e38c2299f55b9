"""What implementations of matrices alone share: leading axes, and `vmap`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Product = Callable[[jax.Array, jax.Array], jax.Array]
"""x [m, w], w [n, w] -> [m, n]."""


def on_rows(product: Product, x: jax.Array, w: jax.Array) -> jax.Array:
    """`product` on x [..., w]. Under `vmap` examples with one w are more rows, others come one after the other."""
    return _batched(product)(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[0])


def _batched(product: Product) -> Product:
    call = jax.custom_batching.custom_vmap(product)

    @call.def_vmap
    def of_more(size: int, batched: list[bool], x: jax.Array, w: jax.Array):
        if batched[1]:
            x = x if batched[0] else jnp.broadcast_to(x, (size, *x.shape))
            return jax.lax.map(lambda pair: _batched(product)(*pair), (x, w)), True
        return on_rows(product, x, w), True

    return call
