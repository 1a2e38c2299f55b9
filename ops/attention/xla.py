"""Attention in plain XLA operations that is fast on CPUs and linear in memory, forward and backward.

Queries go in blocks, and each block meets only the keys that its mask can show it: a triangle for causal
masks, a band for windows, a rectangle of the plane for neighbourhoods, the listed blocks or keys for lists
(`xla_plan.py`). All blocks of a head are one `scan`, in which a `switch` picks the body for a block's number of keys,
so the program stays small at any length. One head is computed at a time, which keeps a block's scores in the cache of
the CPU. A row's softmax is taken whole, over one block of queries by all its keys, so memory is O(block * kv_len)
beside inputs and outputs.

The backward pass keeps q, k, v and lse, and computes the scores again (FlashAttention-2, Dao 2023, arXiv
2307.08691, section 3.1.2). It is a `custom_vjp` over loops: forward mode and second derivatives are the reference's.

Small problems and few queries (decode) take one direct product over all heads: nothing is unrolled.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from lissom.ops.attention.masks import Interval, Mask, Neighbourhood, Span, square
from lissom.ops.attention.merging import with_sinks
from lissom.ops.attention.sparse import KeyColumns, listed
from lissom.ops.attention.xla_block import Numbers, backward, forward, sum_to, zero_padding
from lissom.ops.attention.xla_plan import Block, Plan, Stage, candidates, key_of, plan, sizes_of

# The head loop indexes the batch and head axes, which the compiler would gather onto every device.
LOCAL = True

DECODE_QUERIES = 16
"""Up to so many queries are one block: the keys are read once either way."""

DIRECT_SCORES = 2**21
"""Up to so many scores over all heads (8 MB in float32, about a cache) are one block: loops would only add
overhead."""

WIDE = 512
"""From so many keys on, dk and dv are computed transposed. On a CPU a product with the scores transposed runs at a
quarter of the speed of one with the few rows of q transposed; with fewer keys, turning dk and dv back costs more."""


__all__ = ["candidates", "check", "key_of", "run"]


def check(q, k, v, mask: Mask, bias, sinks, *, scale: float, logit_softcap: float | None, return_lse: bool) -> None:
    """Does everything (once differentiable)."""


def run(q, k, v, mask: Mask, bias, sinks, *, scale: float, logit_softcap: float | None, return_lse: bool):
    """out, or (out, lse), as `attention` says."""
    numbers = Numbers(scale, logit_softcap)
    valid = mask.valid_queries(q.shape[1])
    if valid is not None:
        q = jnp.where(valid[:, :, None, None], q, 0)
    # Heads before positions: one head's keys lie together. A heads-major cache given as a transposed view
    # costs no copy.
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    if isinstance(mask, Neighbourhood) and max(mask.dilation) > 1:
        out, lse = _by_classes(numbers, q, k, v, mask, bias)
    else:
        out, lse = _attend(numbers, q, k, v, mask, bias)
    out = out.transpose(0, 2, 1, 3)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    if valid is not None:
        # Their output is 0 already; this keeps whatever cotangent padding rows receive out of the gradients.
        out = jnp.where(valid[:, :, None, None], out, 0)
    return (out, lse) if return_lse else out


def _by_classes(numbers, q, k, v, mask: Neighbourhood, bias):
    """A dilated neighbourhood is a plain one in each residue class of the grid: classes one by one."""
    places = np.arange(q.shape[2]).reshape(mask.shape)
    parts, order = [], []
    for start in itertools.product(*(range(d) for d in mask.dilation)):
        at = places[tuple(slice(s, None, d) for s, d in zip(start, mask.dilation))]
        part_mask = Neighbourhood(at.shape, mask.window, (1,), mask.stride, mask.causal)
        at = at.ravel()
        q_part, k_part, v_part = (x[:, :, at] for x in (q, k, v))
        b = bias
        for axis in (2, 3):
            b = b if b is None or b.shape[axis] == 1 else jnp.take(b, at, axis)
        parts.append(_attend(numbers, q_part, k_part, v_part, part_mask, b))
        order.append(at)
    back = np.argsort(np.concatenate(order))
    return tuple(jnp.concatenate(x, 2)[:, :, back] for x in zip(*parts))


# Arrays below: q, d_out [batch, heads, q_len, d], k and v [batch, kv_heads, kv_len, d], lse [batch, heads, q_len],
# bias [b|1, heads|1, q_len|1, kv_len|1].


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(numbers: Numbers, q, k, v, mask: Mask, bias):
    if _is_direct(q, k, mask):
        q, bias = _grouped(q, k.shape[1]), _grouped(bias, k.shape[1])
        out, lse = forward(numbers, q, k, v, _keep(q, k, mask), bias, mask.valid_keys(k.shape[2]))
        return _flat(out), _flat(lse)
    return _by_heads(numbers, q, k, v, mask, bias)


def _attend_forward(numbers, q, k, v, mask, bias):
    out, lse = _attend(numbers, q, k, v, mask, bias)
    return (out, lse), (q, k, v, mask, bias, lse)


def _attend_backward(numbers, saved, cotangents):
    q, k, v, mask, bias, lse = saved
    d_out, d_lse = cotangents
    sees = ~jnp.isneginf(lse)
    d_lse = jnp.where(sees, d_lse, 0)
    lse = jnp.where(sees, lse, 0)  # exp(-inf - 0) is 0 where exp(-inf - -inf) is NaN
    if _is_direct(q, k, mask):
        k, v = (zero_padding(x, mask.valid_keys(k.shape[2])) for x in (k, v))
        q, d_out, lse, d_lse, rows_bias = (_grouped(x, k.shape[1]) for x in (q, d_out, lse, d_lse, bias))
        dq, dk, dv, ds = backward(numbers, q, k, v, _keep(q, k, mask), rows_bias, d_out, lse, d_lse)
        dq, d_bias = _flat(dq), None if bias is None else sum_to(_flat(ds), bias.shape)
    else:
        dq, dk, dv, d_bias = _by_heads_backward(numbers, q, k, v, mask, bias, d_out, lse, d_lse)
    d_bias = None if bias is None else d_bias.astype(bias.dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, d_bias


_attend.defvjp(_attend_forward, _attend_backward)


def _is_direct(q, k, mask: Mask) -> bool:
    if listed(mask) is not None:
        return False
    q_len, kv_len = q.shape[2], k.shape[2]
    return q_len <= DECODE_QUERIES or q.shape[0] * q.shape[1] * q_len * kv_len <= DIRECT_SCORES


def _grouped(x, ways: int):
    """[b, heads, ...] -> [b, ways, heads / ways, ...]; a bias that serves all heads gets two dimensions of 1."""
    if x is None:
        return None
    return x.reshape(x.shape[0], *((ways, x.shape[1] // ways) if x.shape[1] > 1 else (1, 1)), *x.shape[2:])


def _flat(x):
    """The inverse of `_grouped`."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _keep(q, k, mask: Mask):
    tests = mask.intervals(q.shape[3], k.shape[2])
    seen = square(tests, Span(0, q.shape[3]), Span(0, k.shape[2]))
    return None if seen is None else seen[:, None, None]


# ---- one head after the other -----------------------------------------------------------------------------------


class _Heads:
    """The loop over the heads of all batch entries: what a step of it works on.

    A step has all query heads of one key head, [group, q_len, d]; where each query head has a list of its own, one.
    """

    def __init__(self, q, k, v, mask: Mask):
        self.mask, (self.batch, self.heads, self.q_len, _) = mask, q.shape
        self.kv_heads, self.kv_len = k.shape[1:3]
        lists = listed(mask)
        own = lists is not None and lists.index.shape[1] == self.heads
        self.ways = self.heads if own else self.kv_heads
        self.tests = mask.intervals(self.q_len, self.kv_len)
        self.valid = mask.valid_keys(self.kv_len)
        self.columns = isinstance(lists, KeyColumns)
        tokens_first = lambda x: jax.ShapeDtypeStruct((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype)
        self.sizes = sizes_of(key_of(*(tokens_first(x) for x in (q, k, v)), mask))

    def steps(self, *arrays):
        """For `scan`: the number of each step and its part of arrays that have a row a query."""
        flat = [_grouped(x, self.ways).reshape(-1, self.heads // self.ways, *x.shape[2:]) for x in arrays]
        return np.arange(self.batch * self.ways, dtype=np.int32), *flat

    def keys(self, index, *arrays):
        """The keys or values of a step, [kv_len, d], padding cleared."""
        at = (index // self.ways, index % self.ways // (self.ways // self.kv_heads))
        valid = self.valid
        if valid is not None:
            valid = jnp.broadcast_to(valid, (self.batch, self.kv_len))[at[0]]
        return tuple(zero_padding(x[at], valid) for x in arrays)

    def plan(self, index) -> tuple[Plan, tuple[Interval, ...]]:
        entry = (index // self.ways, index % self.ways)
        tests = tuple(test.at(entry[0]) for test in self.tests)
        found = plan(self.mask, tests, self.q_len, self.kv_len, self.heads // self.ways, entry, self.sizes)
        if found.kv_len > self.kv_len:
            # The last block overhangs: nobody sees keys that do not exist.
            tests = (*tests, Interval(None, np.full((1, self.q_len), self.kv_len, np.int32)))
        pad = lambda table, size: _pad(table, 1, size)
        tests = tuple(
            Interval(pad(t.low, found.q_len), pad(t.high, found.q_len), pad(t.code, found.kv_len)) for t in tests
        )
        return found, tests

    def bias(self, bias, index):
        """[group|1, q_len|1, kv_len|1] and where it is in the whole."""
        if bias is None:
            return None, None
        bias = _grouped(bias, self.ways)
        at = tuple(jnp.where(n > 1, i, 0) for i, n in zip((index // self.ways, index % self.ways), bias.shape))
        return bias[at], at


def _pad_bias(bias, q_len: int, kv_len: int):
    """[group|1, q_len|1, kv_len|1] with zeros behind; a dimension of 1 stands for all."""
    for axis, size in ((1, q_len), (2, kv_len)):
        bias = bias if bias is None or bias.shape[axis] == 1 else _pad(bias, axis, size)
    return bias


def _pad(x, axis: int, size: int):
    """x with zeros behind, up to `size` along the axis."""
    if x is None or x.shape[axis] == size:
        return x
    return (np if isinstance(x, np.ndarray) else jnp).pad(x, [(0, size - n) if a == axis else (0, 0)
                                                               for a, n in enumerate(x.shape)])  # fmt: skip


def _over_blocks(found: Plan, compute, put, carry):
    """compute(block, size) -> (results, parts) for all blocks; put(carry, block, parts) -> carry. Results are joined
    along the query axis, 1 of [g, t, ...]."""
    joined = []
    for stage in found.stages:
        bodies = [functools.partial(_step, stage, make, compute, put) for make in stage.bodies]

        # A switch, and no loop for each kind: loops without a dependence may run at the same time, each with
        # scores of its own, which do not fit into the cache together.
        def step(carry, at, bodies=bodies):
            return jax.lax.switch(at[0], bodies, carry, at[1]) if len(bodies) > 1 else bodies[0](carry, at[1])

        carry, results = jax.lax.scan(step, carry, (stage.kinds, stage.at))
        joined.append(jax.tree.map(_joined, results))
    joined = jax.tree.map(lambda *xs: jnp.concatenate(xs, 1) if len(xs) > 1 else xs[0], *joined)
    if found.restore is None:
        return carry, joined

    def restored(x):
        units = x.reshape(x.shape[0], -1, found.unit, *x.shape[2:])[:, found.restore]
        return units.reshape(x.shape[0], -1, *x.shape[2:])

    return carry, jax.tree.map(restored, joined)


def _step(stage: Stage, make, compute, put, carry, at):
    one = lambda at: compute(make(at), stage.size)
    entries = [jax.tree.map(lambda x, i=i: x[i], at) for i in range(stage.together)]
    if stage.together == 1:
        results, parts = one(entries[0])
        return put(carry, make(entries[0]), parts), jax.tree.map(lambda x: x[None], results)
    results, parts = jax.vmap(one)(at)
    for i, entry in enumerate(entries):
        carry = put(carry, make(entry), jax.tree.map(lambda x, i=i: x[i], parts))
    return carry, results


def _joined(blocks):
    """[steps, together, g, t, ...] -> [g, steps * together * t, ...]."""
    blocks = jnp.moveaxis(blocks.reshape(-1, *blocks.shape[2:]), 0, 1)
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])


def _keep_of(block: Block, tests):
    seen = square(tests, block.q, block.k)
    if block.counts is None:
        return seen
    return block.counts if seen is None else seen & block.counts


def _by_heads(numbers, q, k, v, mask, bias):
    heads = _Heads(q, k, v, mask)
    exact = jnp.promote_types(q.dtype, jnp.float32)

    def one(_, item):
        index, q = item
        found, tests = heads.plan(index)
        k_head, v_head = (_pad(x, 0, found.kv_len) for x in heads.keys(index, k, v))
        q = _pad(q, 1, found.q_len)
        b = _pad_bias(heads.bias(bias, index)[0], found.q_len, found.kv_len)

        def compute(block, size):
            if block is None:
                rows = (q.shape[0], size)
                return (jnp.zeros((*rows, v.shape[3]), v.dtype), jnp.full(rows, -jnp.inf, exact)), None
            b_part = None if b is None else block.k.rows(block.q.rows(b, 1), 2)
            k_part, v_part = (block.k.rows(x, 0) for x in (k_head, v_head))
            return forward(numbers, block.q.rows(q, 1), k_part, v_part, _keep_of(block, tests), b_part), None

        out, lse = _over_blocks(found, compute, lambda carry, *_: carry, None)[1]
        return None, (out[:, : heads.q_len], lse[:, : heads.q_len])

    out, lse = jax.lax.scan(one, None, heads.steps(q))[1]
    return out.reshape(*q.shape[:3], v.shape[3]), lse.reshape(q.shape[:3])


def _by_heads_backward(numbers, q, k, v, mask, bias, d_out, lse, d_lse):
    heads = _Heads(q, k, v, mask)

    def one(d_bias, item):
        index, *rows = item
        found, tests = heads.plan(index)
        # Padding behind the last query has cotangents of zero, and gives none.
        q, d_out, lse, d_lse = (_pad(x, 1, found.q_len) for x in rows)
        k_head, v_head = (_pad(x, 0, found.kv_len) for x in heads.keys(index, k, v))
        b, at_bias = heads.bias(bias, index)
        b = _pad_bias(b, found.q_len, found.kv_len)
        wide = not heads.columns and max(max(stage.widths) for stage in found.stages) >= WIDE
        zeros = tuple(jnp.zeros(x.shape[::-1] if wide else x.shape, lse.dtype) for x in (k_head, v_head))
        zeros = (*zeros, None if b is None else jnp.zeros(b.shape, lse.dtype))

        def compute(block, size):
            if block is None:
                return jnp.zeros((q.shape[0], size, q.shape[2]), q.dtype), None
            parts = [block.q.rows(x, 1) for x in (q, d_out, lse, d_lse)]
            k_part, v_part = (block.k.rows(x, 0) for x in (k_head, v_head))
            b_part = None if b is None else block.k.rows(block.q.rows(b, 1), 2)
            dq, dk_part, dv_part, ds = backward(
                numbers, parts[0], k_part, v_part, _keep_of(block, tests), b_part, *parts[1:], wide
            )
            return dq.astype(q.dtype), (dk_part, dv_part, None if b is None else sum_to(ds, b_part.shape))

        def put(carry, block, parts):
            if block is None:
                return carry
            dk, dv = (block.k.add(x, part, int(wide)) for x, part in zip(carry[:2], parts[:2]))
            db = carry[2]
            if b is not None:
                rows = block.k.add(jnp.zeros_like(block.q.rows(db, 1)), parts[2], 2)
                db = block.q.add(db, rows, 1)
            return dk, dv, db

        (dk, dv, db), dq = _over_blocks(found, compute, put, zeros)
        dk, dv = (x.T if wide else x for x in (dk, dv))
        if bias is not None:
            db = db[:, : bias.shape[2], : bias.shape[3]]
            d_bias = d_bias.at[at_bias].add(db)
        return d_bias, (dq[:, : heads.q_len], dk[: heads.kv_len], dv[: heads.kv_len])

    d_bias = None if bias is None else jnp.zeros_like(_grouped(bias, heads.ways), lse.dtype)
    d_bias, (dq, dk, dv) = jax.lax.scan(one, d_bias, heads.steps(q, d_out, lse, d_lse))
    # Where each query head was a step of its own, the gradients of a shared key head are summed.
    dk, dv = (
        x.reshape(heads.batch, heads.kv_heads, -1, *x.shape[1:]).sum(2) if heads.ways > heads.kv_heads
        else x.reshape(heads.batch, heads.kv_heads, *x.shape[1:])
        for x in (dk, dv)
    )  # fmt: skip
    return dq.reshape(q.shape), dk, dv, None if bias is None else _flat(d_bias)
