"""Gradients of both forms of the op, for any implementation that computes them forward.

With y = x_g w_g for the rows of a group, dx = dy w_g^T is the op with w transposed, and dw = x_g^T dy is the transposed
op; the gradients of that are the op again. So two functions, each with a `custom_vjp` made of the other, are closed
under differentiation, and no loop is ever transposed by jax.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


class Forms(NamedTuple):
    """The two programs of an implementation. None is differentiated; sizes are int32 [g].

    rows(x [m, k], w, sizes, transposed, activation, dtype) -> [m, n] of dtype, where w is [g, k, n], or [g, n, k] if
    `transposed`; `activation` is a function or None.
    sums(x [m, k], y [m, n], sizes, dtype) -> [g, k, n] of dtype.
    """

    rows: Callable[..., jax.Array]
    sums: Callable[..., jax.Array]


def run(forms: Forms, x, other, group_sizes, *, form: str, activation: str | None, dtype) -> jax.Array:
    """What an implementation's `run` returns."""
    if form == "sums":
        return _sums(forms, dtype, x, other, group_sizes)
    if activation is None:
        return _rows(forms, False, dtype, x, other, group_sizes)
    return _activated(forms, activation, dtype, x, other, group_sizes)


def _one_by_one(f):
    """f, of which a batch is a loop: a batched loop of dynamic length would copy its whole result in each step, and
    `lax.ragged_dot` knows some batches only."""
    return jax.custom_batching.sequential_vmap(f)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _rows(forms: Forms, transposed: bool, dtype, x, w, sizes):
    return _one_by_one(lambda x, w, sizes: forms.rows(x, w, sizes, transposed, None, dtype))(x, w, sizes)


def _rows_forward(forms, transposed, dtype, x, w, sizes):
    return _rows(forms, transposed, dtype, x, w, sizes), (x, w, sizes)


def _rows_backward(forms, transposed, dtype, saved, dy):
    x, w, sizes = saved
    dy = dy.astype(x.dtype)
    pair = (dy, x) if transposed else (x, dy)
    return _rows(forms, not transposed, x.dtype, dy, w, sizes), _sums(forms, w.dtype, *pair, sizes), None


_rows.defvjp(_rows_forward, _rows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(forms: Forms, dtype, x, y, sizes):
    return _one_by_one(lambda x, y, sizes: forms.sums(x, y, sizes, dtype))(x, y, sizes)


def _sums_forward(forms, dtype, x, y, sizes):
    return _sums(forms, dtype, x, y, sizes), (x, y, sizes)


def _sums_backward(forms, dtype, saved, dz):
    x, y, sizes = saved
    dz = dz.astype(x.dtype)
    return _rows(forms, True, x.dtype, y, dz, sizes), _rows(forms, False, y.dtype, x, dz, sizes), None


_sums.defvjp(_sums_forward, _sums_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _activated(forms: Forms, activation: str, dtype, x, w, sizes):
    f = ACTIVATIONS[activation]
    return _one_by_one(lambda x, w, sizes: forms.rows(x, w, sizes, False, f, dtype))(x, w, sizes)


def _activated_forward(forms, activation, dtype, x, w, sizes):
    # The activation of the sum as it is, and not of a rounded one; what is kept may be rounded.
    z = _rows(forms, False, jnp.promote_types(x.dtype, jnp.float32), x, w, sizes)
    return ACTIVATIONS[activation](z).astype(dtype), (x, w, sizes, z.astype(x.dtype))


def _activated_backward(forms, activation, dtype, saved, dy):
    x, w, sizes, z = saved
    dz = jax.vjp(ACTIVATIONS[activation], z)[1](dy.astype(z.dtype))[0]
    return _rows_backward(forms, False, dtype, (x, w, sizes), dz)


_activated.defvjp(_activated_forward, _activated_backward)
