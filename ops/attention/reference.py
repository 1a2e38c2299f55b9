"""Attention as its equation, in plain jnp: written to be read, and the definition of right for every other
form.

Differentiable to any order. Memory is quadratic in length. Softmax is taken in float32, or float64 when the
inputs are.
"""

import jax
import jax.numpy as jnp

from lissom.ops.attention.masks import Mask, without_padding

LOCAL = False


def check(q, k, v, mask: Mask, bias, sinks, *, scale: float, logit_softcap: float | None, return_lse: bool) -> None:
    """Does everything."""


def run(q, k, v, mask: Mask, bias, sinks, *, scale: float, logit_softcap: float | None, return_lse: bool):
    """out [batch, q_len, heads, v_dim], and lse [batch, heads, q_len] if asked for."""
    valid = mask.valid_queries(q.shape[1])
    q, k, v = without_padding(mask, q, k, v)
    batch, q_len, heads, _ = q.shape
    kv_len, kv_heads = k.shape[1:3]
    exact = jnp.promote_types(q.dtype, jnp.float32)
    # Heads first: XLA's CPU has no bfloat16 product for some other orders ("Unsupported element type for DotThunk").
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    q = q.reshape(batch, kv_heads, heads // kv_heads, q_len, -1)

    scores = scale * jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=exact)
    scores = scores.reshape(batch, heads, q_len, kv_len)
    if logit_softcap is not None:
        scores = logit_softcap * jnp.tanh(scores / logit_softcap)
    if bias is not None:
        scores += bias.astype(exact)
    seen = mask.dense(q_len, kv_len)
    if seen.shape[1] == kv_heads:
        seen = jnp.repeat(seen, heads // kv_heads, 1)  # lists that the query heads of a group share
    scores = jnp.where(seen, scores, -jnp.inf)

    # A row that sees nothing has maximum -inf and sum 0; both are replaced before they are divided or
    # subtracted, so that neither the row nor its gradient meets inf - inf or 0 / 0.
    largest = scores.max(-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.astype(exact)[:, None, None]
        largest = jnp.maximum(largest, sinks)
    largest = jax.lax.stop_gradient(largest)
    largest = jnp.where(jnp.isneginf(largest), 0, largest)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - largest)
    sees = total > 0
    total = jnp.where(sees, total, 1)
    lse = jnp.where(sees, jnp.log(total) + largest, -jnp.inf)[..., 0]

    weights = (weights / total).astype(v.dtype).reshape(batch, kv_heads, -1, q_len, kv_len)
    out = jnp.einsum("bkgts,bksd->bkgtd", weights, v, preferred_element_type=exact)
    out = jnp.swapaxes(out.reshape(batch, heads, q_len, -1), 1, 2).astype(v.dtype)
    if valid is not None:
        # Their output is 0 already; this keeps whatever cotangent padding rows receive out of the gradients.
        out = jnp.where(valid[:, :, None, None], out, 0)
    return (out, lse) if return_lse else out
