"""Decoding in plain XLA operations: a product of the queries of a group with all keys, in `splits` parts.

Dense caches are read where they lie; one part is best on a CPU, where a product reads as fast as the memory gives. A
paged cache is gathered a few pages at a time, which then lie in the CPU's cache, by a loop that ends with the longest
sequence of the batch; it cannot be differentiated.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from lissom.ops.attention.masks import Span, square
from lissom.ops.attention.merging import merge, with_sinks
from lissom.ops.attention.xla_block import Numbers, forward
from lissom.ops.decode_attention.reference import in_order, mask

LOCAL = False

GATHERED_KEYS = 512
"""So many keys a sequence and head are gathered at a time."""


def check(q, k, v, lengths, block_table, sinks, **options) -> None:
    """Does everything, forward."""


def run(q, k, v, lengths, block_table, sinks, *, window, scale, logit_softcap, splits, return_lse):
    """out, or (out, lse), as `decode_attention` says."""
    batch, q_len, heads, _ = q.shape
    kv_heads = k.shape[1]
    tests = mask(lengths, q_len, window)
    rows = q.transpose(0, 2, 1, 3).reshape(batch, kv_heads, heads // kv_heads, q_len, -1)

    def part(k, v, start):
        """Keys [batch, kv_heads, n, d] that stand at start, start + 1, ... (start may be traced)."""
        keys = Span(start, k.shape[2])
        seen = square(tests.intervals(q_len, k.shape[2]), Span(0, q_len), keys)
        valid = keys.positions() < lengths[:, None]
        out, lse = forward(Numbers(scale, logit_softcap), rows, k, v, seen[:, None, None], None, valid)
        return out.reshape(batch, heads, q_len, -1).transpose(0, 2, 1, 3), lse.reshape(batch, heads, q_len)

    if block_table is None:
        out, lse = _dense(part, k, v, splits or 1)
    else:
        out, lse = _paged(part, q, k, v, lengths, block_table, splits)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def _dense(part, k, v, splits: int):
    length = k.shape[2]
    edges = np.linspace(0, length, min(splits, length) + 1).astype(int)
    parts = [part(k[:, :, a:b], v[:, :, a:b], int(a)) for a, b in itertools.pairwise(edges)]
    return merge(parts)


def _paged(part, q, k, v, lengths, block_table, splits: int | None):
    page, most = k.shape[2], block_table.shape[1]
    together = max(GATHERED_KEYS // page, 1) if splits is None else -(-most // splits)
    together = min(together, most)
    steps = -(-most // together)
    block_table = jnp.pad(block_table, ((0, 0), (0, steps * together - most)))
    exact = jnp.promote_types(q.dtype, jnp.float32)

    def step(number, carry):
        pages = jax.lax.dynamic_slice_in_dim(block_table, number * together, together, 1)
        out, lse = part(in_order(k, pages), in_order(v, pages), number * together * page)
        return merge([carry, (out.astype(exact), lse)])

    batch, q_len, heads, _ = q.shape
    nothing = (jnp.zeros((batch, q_len, heads, v.shape[3]), exact), jnp.full((batch, heads, q_len), -jnp.inf, exact))
    used = jnp.minimum(-(-lengths.max() // (together * page)), steps)
    out, lse = jax.lax.fori_loop(0, used, step, nothing)
    return out.astype(v.dtype), lse
