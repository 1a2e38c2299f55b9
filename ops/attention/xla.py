"""Attention in plain XLA operations that is fast on CPUs and linear in memory, forward and backward.

Queries go in blocks, and each block meets only the keys that its mask can show it: a triangle for causal
masks, a band for windows, known while tracing. All blocks of a head are one `scan`, in which a `switch` picks
the body for a block's number of keys, so the program stays small at any length. One head is computed at a time,
which keeps a block's scores in the cache of the CPU. A row's softmax is taken whole, over one block of queries by
all its keys, so memory is O(block * kv_len) beside inputs and outputs.

The backward pass keeps q, k, v and lse, and computes the scores again (FlashAttention-2, Dao 2023, arXiv
2307.08691, section 3.1.2). It is a `custom_vjp` over loops: it cannot be differentiated twice; `reference`
can.

Small problems and few queries (decode) take one direct product over all heads: nothing is unrolled.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lissom.ops.attention.masks import Interval, Mask, Span, key_range, square
from lissom.ops.attention.merging import with_sinks

# The head loop indexes the batch and head axes, which the compiler would gather onto every device.
LOCAL = True

DECODE_QUERIES = 16
"""Up to so many queries are one block: the keys are read once either way."""

DIRECT_SCORES = 2**21
"""Up to so many scores over all heads (8 MB in float32, about a cache) are one block: loops would only add
overhead."""

BLOCK_SCORES = 2**20
"""Scores of one block of one head; with it the block's queries shrink as the keys grow, and memory stays
linear."""

LEAST_ROWS, MOST_ROWS = 64, 256
"""Bounds on the queries of a block: fewer make thin products, more compute too much beside a triangle."""

GROUPS = 8
"""Bodies to compile at most. A causal triangle in 8 steps computes 1/8 more than the triangle itself."""

WIDE = 512
"""From so many keys on, dk and dv are computed transposed. On a CPU a product with the scores transposed runs at a
quarter of the speed of one with the few rows of q transposed; with fewer keys, turning dk and dv back costs more."""


class Group(NamedTuple):
    """Query blocks that share one program: `starts` and `key_starts`, one each a block; `size` queries,
    `width` keys."""

    starts: tuple[int, ...]
    key_starts: tuple[int, ...]
    size: int
    width: int


class Numbers(NamedTuple):
    """The static numbers of a request."""

    scale: float
    softcap: float | None


def check(q, k, v, mask: Mask, bias, sinks, *, scale: float, logit_softcap: float | None, return_lse: bool) -> None:
    """Does everything (once differentiable)."""


def run(q, k, v, mask: Mask, bias, sinks, *, scale: float, logit_softcap: float | None, return_lse: bool):
    """out, or (out, lse), as `attention` says."""
    batch, q_len, heads, _ = q.shape
    kv_heads = k.shape[2]
    valid = mask.valid_queries(q_len)
    if valid is not None:
        q = jnp.where(valid[:, :, None, None], q, 0)
    # Heads before positions: one head's keys lie together. A heads-major cache given as a transposed view
    # costs no copy.
    q = q.transpose(0, 2, 1, 3).reshape(batch, kv_heads, heads // kv_heads, q_len, -1)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    if bias is not None:
        groups = (kv_heads, heads // kv_heads) if bias.shape[1] > 1 else (1, 1)
        bias = bias.reshape(bias.shape[0], *groups, *bias.shape[2:])
    out, lse = _attend(Numbers(scale, logit_softcap), q, k, v, mask, bias)
    out, lse = out.reshape(batch, heads, q_len, -1).transpose(0, 2, 1, 3), lse.reshape(batch, heads, q_len)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    if valid is not None:
        # Their output is 0 already; this keeps whatever cotangent padding rows receive out of the gradients.
        out = jnp.where(valid[:, :, None, None], out, 0)
    return (out, lse) if return_lse else out


# Arrays below: q [batch, kv_heads, group, q_len, d], k and v [batch, kv_heads, kv_len, d], bias
# [b|1, kv_heads|1, group|1, q_len|1, kv_len|1]; inside the head loop the same without the first two.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, q, k, v, mask: Mask, bias):
    if _is_direct(q, k):
        keep = mask.block(Span(0, q.shape[-2]), Span(0, k.shape[-2]))
        return _block(scale, q, k, v, None if keep is None else keep[:, :, None], bias, mask.valid_keys(k.shape[-2]))
    return _by_heads(scale, q, k, v, mask, bias)


def _attend_forward(scale, q, k, v, mask, bias):
    out, lse = _attend(scale, q, k, v, mask, bias)
    return (out, lse), (q, k, v, mask, bias, lse)


def _attend_backward(scale, saved, cotangents):
    q, k, v, mask, bias, lse = saved
    d_out, d_lse = cotangents
    sees = ~jnp.isneginf(lse)
    d_lse = jnp.where(sees, d_lse, 0)
    lse = jnp.where(sees, lse, 0)  # exp(-inf - 0) is 0 where exp(-inf - -inf) is NaN
    if _is_direct(q, k):
        keep = mask.block(Span(0, q.shape[-2]), Span(0, k.shape[-2]))
        keep = None if keep is None else keep[:, :, None]
        k, v = (_zero_padding(x, mask.valid_keys(k.shape[-2])) for x in (k, v))
        dq, dk, dv, ds = _block_backward(scale, q, k, v, keep, bias, d_out, lse, d_lse)
        d_bias = None if bias is None else _sum_to(ds, bias.shape)
    else:
        dq, dk, dv, d_bias = _by_heads_backward(scale, q, k, v, mask, bias, d_out, lse, d_lse)
    d_bias = None if bias is None else d_bias.astype(bias.dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, d_bias


_attend.defvjp(_attend_forward, _attend_backward)


def _is_direct(q, k) -> bool:
    q_len, kv_len = q.shape[-2], k.shape[-2]
    return q_len <= DECODE_QUERIES or np.prod(q.shape[:-1]) * kv_len <= DIRECT_SCORES


def _scores(scale, q, k, keep, bias):
    exact = jnp.promote_types(q.dtype, jnp.float32)
    scores = scale * jnp.einsum("...gtd,...sd->...gts", q, k, preferred_element_type=exact)
    if bias is not None:
        scores += bias.astype(exact)
    return scores if keep is None else jnp.where(keep, scores, -jnp.inf)


def _block(scale, q, k, v, keep, bias, valid=None):
    """out in v's dtype and lse of queries against all of their keys; `keep` broadcasts to [..., group, t, s],
    `valid` [batch, s] is False at padding of k and v. What padding does to scores is hidden by `keep`."""
    scores = _scores(scale, q, k, keep, bias)
    largest = scores.max(-1, keepdims=True)
    largest = jnp.where(jnp.isneginf(largest), 0, largest)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    sees = total > 0
    out = _weighted(weights, v, valid) / jnp.where(sees, total, 1)
    lse = jnp.where(sees, jnp.log(total) + largest, -jnp.inf)[..., 0]
    return out.astype(v.dtype), lse


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
            return jax.lax.map(lambda x: product(x[0], _zero_padding(x[1], x[2])), rows)

        by_row = jax.jit(fallback)
        return jax.lax.cond(jnp.isfinite(out).all(), lambda out, _: out, lambda _, rows: by_row(rows), out, rows)

    # Elsewhere the choice would have the host wait for the device.
    clean = lambda weights, v, valid: product(weights, _zero_padding(v, valid))
    return jax.lax.platform_dependent(weights, v, valid, cpu=unless_poisoned, default=clean)


def _zero_padding(x, valid):
    """x [..., s, d] with zeros where `valid` [..., s] is False."""
    if valid is None:
        return x
    valid = valid.reshape(*valid.shape[:-1], *(1,) * (x.ndim - valid.ndim - 1), valid.shape[-1], 1)
    return jnp.where(valid, x, 0)


def _block_backward(scale, q, k, v, keep, bias, d_out, lse, d_lse, wide=False):
    """(dq, dk, dv, d scores), all in float32 at least; dk and dv lie as [..., d, s] if `wide`, else as
    [..., s, d]."""
    scores = _scores(scale, q, k, keep, bias)
    exact = scores.dtype
    weights = jnp.exp(scores - lse[..., None])
    d_weights = jnp.einsum("...gtd,...sd->...gts", d_out, v, preferred_element_type=exact)
    # A block holds whole rows, so the softmax's own term is summed from what is at hand. sum(d_out * out),
    # the usual form, has the rounding of out in it: in bfloat16 that quadrupled the error of dk.
    own = (weights * d_weights).sum(-1) - d_lse
    ds = weights * (d_weights - own[..., None])
    low = ds.astype(q.dtype)
    dq = scale * jnp.einsum("...gts,...sd->...gtd", low, k, preferred_element_type=exact)
    dk, dv = (
        jnp.einsum("...gtd,...gts->...ds", rows, square, preferred_element_type=exact)
        if wide
        else jnp.einsum("...gts,...gtd->...sd", square, rows, preferred_element_type=exact)
        for rows, square in ((q, low), (d_out, weights.astype(v.dtype)))
    )
    return dq, scale * dk, dv, ds


def _sum_to(array, shape):
    axes = tuple(i for i, size in enumerate(shape) if size == 1 and array.shape[i] > 1)
    return array.sum(axes, keepdims=True)


def plan(mask: Mask, q_len: int, kv_len: int, rows: int) -> tuple[Group, ...]:
    """Cuts the queries into blocks of about `rows`, finds each block's keys, and joins neighbours into
    groups."""
    size = min(rows, q_len)
    starts = list(range(0, q_len, size))
    ranges = [mask.key_range(s, min(s + size, q_len), kv_len) for s in starts]
    groups = []
    if q_len % size:
        low, high = ranges.pop()
        groups = [Group((starts.pop(),), (min(low, kv_len - 1),), q_len % size, max(high - low, 1))]
    widths = [max(high - low, 1) for low, high in ranges]
    # One loop for all while it computes little more than the blocks need, else as many loops as are allowed.
    together = len(starts) if len(starts) * max(widths) <= 1.2 * sum(widths) else -(-len(starts) // GROUPS)
    for first in reversed(range(0, len(starts), together)):
        part = slice(first, first + together)
        width = max(widths[part])
        key_starts = tuple(min(low, kv_len - width) for low, _ in ranges[part])
        groups.insert(0, Group(tuple(starts[part]), key_starts, size, width))
    return tuple(groups)


def _plan(q, k, mask) -> tuple[Group, ...]:
    group, q_len = q.shape[2:4]
    kv_len = k.shape[2]
    ranges = (mask.key_range(i, i + 1, kv_len) for i in (0, q_len // 2, q_len - 1))
    seen = max(1, *(high - low for low, high in ranges))
    # A block of n queries of a band or a triangle meets n keys more than one query does.
    most = MOST_ROWS if mask.key_range(0, 1, kv_len) == (0, kv_len) else min(_round(seen) // 4, MOST_ROWS)
    rows = max(LEAST_ROWS, min(BLOCK_SCORES // (seen * group), most))
    return plan(mask, q_len, kv_len, rows)


def _round(n: int) -> int:
    return 1 << max(n - 1, 1).bit_length()


def _take(array, start, size, axis):
    """Slices an axis, or leaves it where it is 1 and stands for all (bias)."""
    if array is None or array.shape[axis] == 1:
        return array
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


def _over_blocks(groups, body, carry):
    """body(group, carry, start, key_start) over all blocks; results are joined along the query axis, 1 of
    [g, t, ...]."""
    parts = []
    for size in dict.fromkeys(group.size for group in groups):
        alike = [group for group in groups if group.size == size]
        bodies = [functools.partial(body, group) for group in alike]
        kinds = np.repeat(np.arange(len(alike), dtype=np.int32), [len(group.starts) for group in alike])
        starts, key_starts = (np.concatenate([group[i] for group in alike]).astype(np.int32) for i in (0, 1))

        # A switch, and no loop for each group: loops without a dependence may run at the same time, each with
        # scores of its own, which do not fit into the cache together.
        def step(carry, at, bodies=bodies):
            return jax.lax.switch(at[0], bodies, carry, *at[1:]) if len(bodies) > 1 else bodies[0](carry, *at[1:])

        carry, results = jax.lax.scan(step, carry, (kinds, starts, key_starts))
        parts.append(jax.tree.map(_joined, results))
    return carry, jax.tree.map(lambda *xs: jnp.concatenate(xs, 1) if len(xs) > 1 else xs[0], *parts)


def _joined(blocks):
    """[blocks, g, t, ...] -> [g, blocks * t, ...]."""
    blocks = jnp.moveaxis(blocks, 0, 1)
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])


def _keep(mask: Mask, start, size, key_start, width):
    square = mask.block(Span(start, size), Span(key_start, width))
    return None if square is None else square[0]


def _head_valid(mask, kv_len):
    valid = mask.valid_keys(kv_len)
    return None if valid is None else valid[0]


def _head_bias(bias, batch, head):
    if bias is None:
        return None
    bias = _take(_take(bias, batch, 1, 0), head, 1, 1)
    return bias[0, 0]


def _by_heads(scale, q, k, v, mask, bias):
    groups = _plan(q, k, mask)
    batch, kv_heads, kv_len = k.shape[:3]

    def one_head(item):
        index, q, k, v = item
        head_mask, head_bias = (
            mask.at(index // kv_heads),
            _head_bias(bias, index // kv_heads, index % kv_heads),
        )
        k, v = (_zero_padding(x, _head_valid(head_mask, kv_len)) for x in (k, v))

        def body(group, carry, start, key_start):
            k_part, v_part = (_take(x, key_start, group.width, 0) for x in (k, v))
            keep = _keep(head_mask, start, group.size, key_start, group.width)
            b = _take(_take(head_bias, start, group.size, 1), key_start, group.width, 2)
            return carry, _block(scale, _take(q, start, group.size, 1), k_part, v_part, keep, b)

        return _over_blocks(groups, body, None)[1]

    flat = [x.reshape(batch * kv_heads, *x.shape[2:]) for x in (q, k, v)]
    out, lse = jax.lax.map(one_head, (np.arange(batch * kv_heads, dtype=np.int32), *flat))
    return out.reshape(batch, kv_heads, *out.shape[1:]), lse.reshape(batch, kv_heads, *lse.shape[1:])


def _by_heads_backward(scale, q, k, v, mask, bias, d_out, lse, d_lse):
    groups = _plan(q, k, mask)
    batch, kv_heads, kv_len = k.shape[:3]
    wide = max(group.width for group in groups) >= WIDE

    def one_head(d_bias, item):
        index, q, k, v, d_out, lse, d_lse = item
        at_bias = (index // kv_heads, index % kv_heads)
        head_mask, head_bias = mask.at(at_bias[0]), _head_bias(bias, *at_bias)
        k, v = (_zero_padding(x, _head_valid(head_mask, kv_len)) for x in (k, v))
        carry = (*(jnp.zeros(x.shape[::-1] if wide else x.shape, lse.dtype) for x in (k, v)), d_bias)

        def body(group, carry, start, key_start):
            dk, dv, d_bias = carry
            q_part, d_part, lse_part, d_lse_part = (_take(x, start, group.size, 1) for x in (q, d_out, lse, d_lse))
            k_part, v_part = (_take(x, key_start, group.width, 0) for x in (k, v))
            keep = _keep(head_mask, start, group.size, key_start, group.width)
            b = _take(_take(head_bias, start, group.size, 1), key_start, group.width, 2)
            dq, dk_part, dv_part, ds = _block_backward(
                scale, q_part, k_part, v_part, keep, b, d_part, lse_part, d_lse_part, wide
            )
            at = (0, key_start) if wide else (key_start, 0)
            dk, dv = _add(dk, dk_part, at), _add(dv, dv_part, at)
            if bias is not None:
                d_bias = _add(d_bias, _sum_to(ds, b.shape)[None, None], (*at_bias, 0, start, key_start))
            return (dk, dv, d_bias), dq.astype(q.dtype)

        (dk, dv, d_bias), dq = _over_blocks(groups, body, carry)
        dk, dv = (dk.T, dv.T) if wide else (dk, dv)
        return d_bias, (dq, dk.astype(k.dtype), dv.astype(v.dtype))

    flat = [x.reshape(batch * kv_heads, *x.shape[2:]) for x in (q, k, v, d_out, lse, d_lse)]
    d_bias = None if bias is None else jnp.zeros(bias.shape, lse.dtype)
    items = (np.arange(batch * kv_heads, dtype=np.int32), *flat)
    d_bias, grads = jax.lax.scan(one_head, d_bias, items)
    dq, dk, dv = (g.reshape(batch, kv_heads, *g.shape[1:]) for g in grads)
    return dq, dk, dv, d_bias


def _add(array, part, starts):
    """Adds `part` at `starts`; a dimension of 1 stands for all, and is always at 0."""
    starts = tuple(jnp.int32(0 if size == 1 else start) for start, size in zip(starts, array.shape))
    old = jax.lax.dynamic_slice(array, starts, part.shape)
    return jax.lax.dynamic_update_slice(array, old + part, starts)
