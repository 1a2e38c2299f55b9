"""The arithmetic of one block of the `xla` form: some queries against all of their keys, forward and backward.

q [..., group, t, d], k [..., s, d], v [..., s, d_v]; scores [..., group, t, s].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Numbers(NamedTuple):
    """The static numbers of a request."""

    scale: float
    softcap: float | None


def scores_of(numbers: Numbers, q, k, keep, bias):
    """(scores, d cap / d product, None without a cap), in float32 at least; -inf where `keep` is False."""
    exact = jnp.promote_types(q.dtype, jnp.float32)
    scores = numbers.scale * jnp.einsum("...gtd,...sd->...gts", q, k, preferred_element_type=exact)
    slope = None
    if numbers.softcap is not None:
        bent = jnp.tanh(scores / numbers.softcap)
        scores, slope = numbers.softcap * bent, 1 - bent * bent
    if bias is not None:
        scores += bias.astype(exact)
    return scores if keep is None else jnp.where(keep, scores, -jnp.inf), slope


def forward(numbers: Numbers, q, k, v, keep, bias, valid=None):
    """out in v's dtype and lse of queries against all of their keys; `keep` broadcasts to [..., group, t, s],
    `valid` [batch, s] is False at padding of k and v. What padding does to scores is hidden by `keep`."""
    scores, _ = scores_of(numbers, q, k, keep, bias)
    largest = scores.max(-1, keepdims=True)
    largest = jnp.where(jnp.isneginf(largest), 0, largest)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    sees = total > 0
    out = _weighted(weights, v, valid) / jnp.where(sees, total, 1)
    lse = jnp.where(sees, jnp.log(total) + largest, -jnp.inf)[..., 0]
    return out.astype(v.dtype), lse


def backward(numbers: Numbers, q, k, v, keep, bias, d_out, lse, d_lse, wide=False):
    """(dq, dk, dv, d scores), all in float32 at least; dk and dv lie as [..., d, s] if `wide`, else as
    [..., s, d]."""
    scores, slope = scores_of(numbers, q, k, keep, bias)
    exact = scores.dtype
    weights = jnp.exp(scores - lse[..., None])
    d_weights = jnp.einsum("...gtd,...sd->...gts", d_out, v, preferred_element_type=exact)
    # A block holds whole rows, so the softmax's own term is summed from what is at hand. sum(d_out * out),
    # the usual form, has the rounding of out in it: in bfloat16 that quadrupled the error of dk.
    own = (weights * d_weights).sum(-1) - d_lse
    ds = weights * (d_weights - own[..., None])
    low = (ds if slope is None else ds * slope).astype(q.dtype)
    dq = numbers.scale * jnp.einsum("...gts,...sd->...gtd", low, k, preferred_element_type=exact)
    dk, dv = (
        jnp.einsum("...gtd,...gts->...ds", rows, square, preferred_element_type=exact)
        if wide
        else jnp.einsum("...gts,...gtd->...sd", square, rows, preferred_element_type=exact)
        for rows, square in ((q, low), (d_out, weights.astype(v.dtype)))
    )
    return dq, numbers.scale * dk, dv, ds


def _weighted(weights, v, valid):
    """sum_s weights[..., g, t, s] v[..., s, d], where padding of v counts as zeros."""

    def product(weights, v):
        return jnp.einsum("...gts,...sd->...gtd", weights.astype(v.dtype), v, preferred_element_type=weights.dtype)

    if valid is None:
        return product(weights, v)

    def unless_poisoned(weights, v, valid):
        # Padding has weight 0, which takes everything out but NaN and infinities, and these show in the result.
        # On a CPU a copy of the values without padding takes five times as long as the product itself.
        out = product(weights, v)
        rows = (weights, v, jnp.broadcast_to(valid, (v.shape[0], valid.shape[1])))

        # The name tells evaluation/costs.py that this is no part of the usual work.
        def fallback(rows):
            return jax.lax.map(lambda x: product(x[0], zero_padding(x[1], x[2])), rows)

        by_row = jax.jit(fallback)
        return jax.lax.cond(jnp.isfinite(out).all(), lambda out, _: out, lambda _, rows: by_row(rows), out, rows)

    # Elsewhere the choice would have the host wait for the device.
    clean = lambda weights, v, valid: product(weights, zero_padding(v, valid))
    return jax.lax.platform_dependent(weights, v, valid, cpu=unless_poisoned, default=clean)


def zero_padding(x, valid):
    """x [..., s, d] with zeros where `valid` [..., s] is False."""
    if valid is None:
        return x
    valid = valid.reshape(*valid.shape[:-1], *(1,) * (x.ndim - valid.ndim - 1), valid.shape[-1], 1)
    return jnp.where(valid, x, 0)


def sum_to(array, shape):
    """The sum over the dimensions in which `shape` has 1."""
    axes = tuple(i for i, size in enumerate(shape) if size == 1 and array.shape[i] > 1)
    return array.sum(axes, keepdims=True)
