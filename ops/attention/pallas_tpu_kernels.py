"""The kernels of `pallas_tpu`, which explains them, and their `custom_vjp`: arrays heads-major and in whole tiles."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lissom.ops.attention.kernel_layout import Rule, Tests

LANES = 128
# Hidden scores, the maximum of no scores and the lse of a row that sees nothing are finite and far apart: exponentials
# of their differences are 0, and no infinity enters the kernels.
HIDDEN, LEAST, UNSEEN = -1e38, -5e37, 1e38
# A step in one int32: four flags, 12 bits for the outer tile, 15 for the inner one with its head of the group.
FIRST, LAST, RUN, WHOLE = 1, 2, 4, 8
OUTER_AT, INNER_AT = 4, 16
MOST_OUTER, MOST_INNER = 2 ** (INNER_AT - OUTER_AT), 2 ** (31 - INNER_AT)


@dataclass(frozen=True)
class Plan:
    """What is static in a call. kv_len: None where no tile of keys overhangs. always_whole: no tile needs a test.
    visits: tiles of scores over all batch entries and heads, for the estimates of cost. exact_out: out is float32."""

    rules: tuple[Rule, ...]
    scale: float
    softcap: float | None
    kv_len: int | None
    block_q: int
    block_k: int
    always_whole: bool
    visits: int
    exact_out: bool
    interpret: bool


class Steps(NamedTuple):
    """words int32 [1 or batch, 1 or heads or kv_heads, room]: the steps of each list; behind its end the last one is
    repeated without flags. longest: the number of steps of the longest list, a Python int where it is static."""

    words: jax.Array
    longest: jax.Array | int


class Step(NamedTuple):
    """One step, unpacked: scalars."""

    first: jax.Array
    last: jax.Array
    run: jax.Array
    whole: jax.Array
    outer: jax.Array
    inner: jax.Array


def packed(first, last, run, whole, outer, inner):
    """The words of `Steps`, numpy where the parts are."""
    flags = first * FIRST + last * LAST + run * RUN + whole * WHOLE
    return (flags + outer * (1 << OUTER_AT) + inner * (1 << INNER_AT)).astype(np.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, q, k, v, tests: Tests, by_queries: Steps, by_keys: Steps):
    """q [batch, heads, q_len, head_dim], k [batch, kv_heads, kv_len, head_dim], v [batch, kv_heads, kv_len, v_dim], in
    whole tiles of tokens -> out [batch, heads, q_len, v_dim], lse float32 [batch, heads, 1, q_len]."""
    out, lse, _ = _forward(plan, q, k, v, tests, by_queries, differentiated=False)
    return out, lse


def _attend_forward(plan: Plan, q, k, v, tests: Tests, by_queries: Steps, by_keys: Steps):
    out, lse, rest = _forward(plan, q, k, v, tests, by_queries, differentiated=True)
    return (out, lse), (q, k, v, out, rest, lse, tests, by_queries, by_keys)


def _attend_backward(plan: Plan, kept, cotangents):
    q, k, v, out, rest, lse, tests, by_queries, by_keys = kept
    d_out, d_lse = cotangents
    unseen = jnp.isneginf(lse)
    exact = out.astype(jnp.float32) + (0 if rest is None else rest.astype(jnp.float32))
    delta = jnp.sum(exact * d_out.astype(jnp.float32), 3)[:, :, None] - d_lse
    d_out = d_out.astype(v.dtype)
    rows = jnp.concatenate([jnp.where(unseen, UNSEEN, lse), jnp.where(unseen, 0, delta)], 2)
    dq = _queries_gradient(plan, q, k, v, d_out, rows, tests, by_queries)
    dk, dv = _keys_gradient(plan, q, k, v, d_out, rows, tests, by_keys)
    return dq, dk, dv, None, None, None


attend.defvjp(_attend_forward, _attend_backward)


class _Grid:
    """Where a step's blocks lie: grid (batch, heads, steps), `heads` those of the outer tiles.

    inner_heads: 1 where an inner head serves `group` outer ones (queries outside), `group` where it is one of a group
    that is summed over (keys outside); then the inner number is head of the group * inner_tiles + tile.
    """

    def __init__(self, steps: Steps, outer: jax.Array, inner: jax.Array, inner_tiles: int):
        self.steps, self.batch, self.heads, self.inner_tiles = steps, outer.shape[0], outer.shape[1], inner_tiles
        self.outer_group = max(outer.shape[1] // inner.shape[1], 1)
        self.inner_group = max(inner.shape[1] // outer.shape[1], 1)

    def step(self, words, batch=None, head=None, number=None) -> Step:
        if batch is None:
            batch, head, number = (pl.program_id(axis) for axis in range(3))
        batches, heads, room = self.steps.words.shape
        if heads not in (1, self.heads):
            head = jax.lax.div(head, self.heads // heads)
        place = (batch * heads if batches > 1 else 0) + (head if heads > 1 else 0)
        word = words[place * room + number]
        flags = ((word & flag) != 0 for flag in (FIRST, LAST, RUN, WHOLE))
        return Step(*flags, (word >> OUTER_AT) & (MOST_OUTER - 1), word >> INNER_AT)

    def outer_spec(self, block: int, width: int) -> pl.BlockSpec:
        """Blocks [block, width] of [batch, heads, tokens, width] at the outer tile."""
        index = lambda b, h, s, words: (b, h, self.step(words, b, h, s).outer, 0)
        return pl.BlockSpec((None, None, block, width), index)

    def inner_spec(self, block: int, width: int) -> pl.BlockSpec:
        def index(b, h, s, words):
            head, tile = self._inner(h, self.step(words, b, h, s).inner)
            return b, head, tile, 0

        return pl.BlockSpec((None, None, block, width), index)

    def outer_rows(self, block: int, rows: int) -> pl.BlockSpec:
        """Blocks [rows, block] of [batch, heads, rows, tokens] at the outer tile."""
        index = lambda b, h, s, words: (b, h, 0, self.step(words, b, h, s).outer)
        return pl.BlockSpec((None, None, rows, block), index)

    def inner_rows(self, block: int, rows: int) -> pl.BlockSpec:
        def index(b, h, s, words):
            head, tile = self._inner(h, self.step(words, b, h, s).inner)
            return b, head, 0, tile

        return pl.BlockSpec((None, None, rows, block), index)

    def table(self, table: jax.Array | None, block: int, outer: bool) -> pl.BlockSpec | None:
        """Blocks [rows, block] of the tables [1 or batch, rows, tokens] of `Tests`."""
        if table is None:
            return None

        def index(b, h, s, words):
            step = self.step(words, b, h, s)
            return b if table.shape[0] > 1 else 0, 0, step.outer if outer else self._inner(h, step.inner)[1]

        return pl.BlockSpec((None, table.shape[1], block), index)

    def _inner(self, head, number):
        # lax.div rounds to zero, which is one operation; the floor of // is several.
        if self.inner_group == 1:
            return (jax.lax.div(head, self.outer_group) if self.outer_group > 1 else head), number
        own = jax.lax.div(number, self.inner_tiles)
        return head * self.inner_group + own, number - own * self.inner_tiles

    def call(self, kernel: Callable, plan: Plan, name: str, operands, in_specs, out_specs, out_shape, scratch, widths):
        """widths: sum of those of the products that are taken for a tile of scores."""
        scores = plan.visits * plan.block_q * plan.block_k
        moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((operands, out_shape)))
        return pl.pallas_call(
            functools.partial(kernel, plan=plan, grid=self),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(self.batch, self.heads, self.steps.longest),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            out_shape=out_shape,
            # One core of the two of a v5p may take other batch entries and heads, not other steps.
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(flops=2 * scores * widths, transcendentals=scores, bytes_accessed=moved),
            interpret=pltpu.InterpretParams() if plan.interpret else False,
            name=name,
        )(self.steps.words.reshape(-1), *operands)


def _forward(plan: Plan, q, k, v, tests: Tests, steps: Steps, differentiated: bool):
    """out, lse, and, for gradients in bfloat16, what rounding took from out. From a rounded out comes a delta that
    lets the error of dk or dq exceed twice that of the plain bfloat16 form, which is what the tests allow."""
    (batch, heads, q_len, head_dim), v_dim = q.shape, v.shape[3]
    dtype = jnp.float32 if plan.exact_out else v.dtype
    has_rest = differentiated and dtype == jnp.bfloat16
    grid = _Grid(steps, q, k, k.shape[2] // plan.block_k)
    block = plan.block_q
    return grid.call(
        _forward_kernel,
        plan,
        "attention_forward",
        operands=(q, k, v, tests.queries, tests.keys),
        in_specs=(
            grid.outer_spec(block, head_dim),
            grid.inner_spec(plan.block_k, head_dim),
            grid.inner_spec(plan.block_k, v_dim),
            grid.table(tests.queries, block, outer=True),
            grid.table(tests.keys, plan.block_k, outer=False),
        ),
        out_specs=(
            grid.outer_spec(block, v_dim),
            grid.outer_rows(block, 1),
            grid.outer_spec(block, v_dim) if has_rest else None,
        ),
        out_shape=(
            jax.ShapeDtypeStruct((batch, heads, q_len, v_dim), dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, q_len), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, q_len, v_dim), dtype) if has_rest else None,
        ),
        scratch=(
            pltpu.VMEM((block, LANES), jnp.float32),
            pltpu.VMEM((block, LANES), jnp.float32),
            pltpu.VMEM((block, v_dim), jnp.float32),
            _columns_scratch(tests.queries, block),
        ),
        widths=head_dim + v_dim,
    )


def _queries_gradient(plan: Plan, q, k, v, d_out, rows, tests: Tests, steps: Steps):
    """rows float32 [batch, heads, 2, q_len]: lse (finite) and delta."""
    head_dim, v_dim, block = q.shape[3], v.shape[3], plan.block_q
    grid = _Grid(steps, q, k, k.shape[2] // plan.block_k)
    return grid.call(
        _queries_gradient_kernel,
        plan,
        "attention_dq",
        operands=(q, k, v, d_out, rows, tests.queries, tests.keys),
        in_specs=(
            grid.outer_spec(block, head_dim),
            grid.inner_spec(plan.block_k, head_dim),
            grid.inner_spec(plan.block_k, v_dim),
            grid.outer_spec(block, v_dim),
            grid.outer_rows(block, 2),
            grid.table(tests.queries, block, outer=True),
            grid.table(tests.keys, plan.block_k, outer=False),
        ),
        out_specs=grid.outer_spec(block, head_dim),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch=(
            pltpu.VMEM((block, head_dim), jnp.float32),
            pltpu.VMEM((2, block, LANES), jnp.float32),
            _columns_scratch(tests.queries, block),
        ),
        widths=2 * head_dim + v_dim,
    )


def _keys_gradient(plan: Plan, q, k, v, d_out, rows, tests: Tests, steps: Steps):
    head_dim, v_dim, block = q.shape[3], v.shape[3], plan.block_k
    grid = _Grid(steps, k, q, q.shape[2] // plan.block_q)
    return grid.call(
        _keys_gradient_kernel,
        plan,
        "attention_dkv",
        operands=(q, k, v, d_out, rows, tests.queries, tests.keys),
        in_specs=(
            grid.inner_spec(plan.block_q, head_dim),
            grid.outer_spec(block, head_dim),
            grid.outer_spec(block, v_dim),
            grid.inner_spec(plan.block_q, v_dim),
            grid.inner_rows(plan.block_q, 2),
            grid.table(tests.queries, plan.block_q, outer=False),
            grid.table(tests.keys, block, outer=True),
        ),
        out_specs=(grid.outer_spec(block, head_dim), grid.outer_spec(block, v_dim)),
        out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch=(
            pltpu.VMEM((block, head_dim), jnp.float32),
            pltpu.VMEM((block, v_dim), jnp.float32),
            _columns_scratch(tests.keys, block),
        ),
        widths=2 * (head_dim + v_dim),
    )


def _columns_scratch(table: jax.Array | None, block: int):
    return None if table is None else pltpu.VMEM((table.shape[1], block, LANES), jnp.int32)


def _forward_kernel(
    words,  # SMEM, the steps
    q_ref,  # [block_q, head_dim]
    k_ref,  # [block_k, head_dim]
    v_ref,  # [block_k, v_dim]
    queries_ref,  # [rows, block_q] or None
    keys_ref,  # [rows, block_k] or None
    out_ref,  # [block_q, v_dim]
    lse_ref,  # [1, block_q]
    rest_ref,  # [block_q, v_dim] or None
    most_ref,  # [block_q, LANES], the running maximum, the same in all lanes
    sum_ref,  # [block_q, LANES]
    out_sum_ref,  # [block_q, v_dim]
    columns_ref,  # [rows, block_q, LANES] or None
    *,
    plan: Plan,
    grid: _Grid,
):
    step = grid.step(words)

    @pl.when(step.first)
    def _():
        most_ref[...] = jnp.full_like(most_ref, LEAST)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        out_sum_ref[...] = jnp.zeros_like(out_sum_ref)
        _to_columns(queries_ref, columns_ref)

    def visit(tested: bool):
        scores, _ = _scores(q_ref[...], k_ref[...], plan)
        if tested:
            at = step.inner * plan.block_k
            seen = _seen(plan, scores.shape, lambda n: columns_ref[n], lambda n: keys_ref[n : n + 1], at, axis=1)
            scores = jnp.where(seen, scores, HIDDEN)
        before = most_ref[...]
        most = jnp.maximum(before, scores.max(1, keepdims=True))
        weights = jnp.exp(scores - _wide(most, plan.block_k))
        shrink = jnp.exp(before - most)
        most_ref[...] = most
        sum_ref[...] = shrink * sum_ref[...] + weights.sum(1, keepdims=True)
        v = v_ref[...]
        out_sum_ref[...] = _wide(shrink, v.shape[1]) * out_sum_ref[...] + _dot(weights.astype(v.dtype), v, 1, 0)

    _visit(step, plan, visit)

    @pl.when(step.last)
    def _():
        total = sum_ref[...]
        sees = total > 0
        total = jnp.where(sees, total, 1)
        out = out_sum_ref[...] / _wide(total, out_ref.shape[1])
        out_ref[...] = out.astype(out_ref.dtype)
        if rest_ref is not None:
            rest_ref[...] = (out - out_ref[...].astype(jnp.float32)).astype(rest_ref.dtype)
        lse = jnp.where(sees, most_ref[...] + jnp.log(total), -jnp.inf)
        lse_ref[...] = lse.T[:1]


def _queries_gradient_kernel(
    words,  # SMEM
    q_ref,  # [block_q, head_dim]
    k_ref,  # [block_k, head_dim]
    v_ref,  # [block_k, v_dim]
    d_out_ref,  # [block_q, v_dim]
    rows_ref,  # [2, block_q]: lse, delta
    queries_ref,  # [rows, block_q] or None
    keys_ref,  # [rows, block_k] or None
    dq_ref,  # [block_q, head_dim]
    dq_sum_ref,  # [block_q, head_dim]
    own_ref,  # [2, block_q, LANES]: lse, delta as columns
    columns_ref,  # [rows, block_q, LANES] or None
    *,
    plan: Plan,
    grid: _Grid,
):
    step = grid.step(words)

    @pl.when(step.first)
    def _():
        dq_sum_ref[...] = jnp.zeros_like(dq_sum_ref)
        _to_columns(rows_ref, own_ref)
        _to_columns(queries_ref, columns_ref)

    def visit(tested: bool):
        k = k_ref[...]
        scores, slope = _scores(q_ref[...], k, plan)
        if tested:
            at = step.inner * plan.block_k
            seen = _seen(plan, scores.shape, lambda n: columns_ref[n], lambda n: keys_ref[n : n + 1], at, axis=1)
            scores = jnp.where(seen, scores, HIDDEN)
        lse, delta = (_wide(own_ref[n], plan.block_k) for n in range(2))
        d_scores = jnp.exp(scores - lse) * (_dot(d_out_ref[...], v_ref[...], 1, 1) - delta)
        d_scores = d_scores if slope is None else d_scores * slope
        dq_sum_ref[...] += _dot(d_scores.astype(k.dtype), k, 1, 0)

    _visit(step, plan, visit)

    @pl.when(step.last)
    def _():
        dq_ref[...] = (dq_sum_ref[...] * plan.scale).astype(dq_ref.dtype)


def _keys_gradient_kernel(
    words,  # SMEM
    q_ref,  # [block_q, head_dim], of one head of the group
    k_ref,  # [block_k, head_dim]
    v_ref,  # [block_k, v_dim]
    d_out_ref,  # [block_q, v_dim]
    rows_ref,  # [2, block_q]: lse, delta
    queries_ref,  # [rows, block_q] or None
    keys_ref,  # [rows, block_k] or None
    dk_ref,  # [block_k, head_dim]
    dv_ref,  # [block_k, v_dim]
    dk_sum_ref,  # [block_k, head_dim]
    dv_sum_ref,  # [block_k, v_dim]
    columns_ref,  # [rows, block_k, LANES] or None
    *,
    plan: Plan,
    grid: _Grid,
):
    step = grid.step(words)

    @pl.when(step.first)
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)
        _to_columns(keys_ref, columns_ref)

    def visit(tested: bool):
        q, d_out = q_ref[...], d_out_ref[...]
        scores, slope = _scores(k_ref[...], q, plan)  # [block_k, block_q]
        if tested:
            at = step.outer * plan.block_k
            seen = _seen(plan, scores.shape, lambda n: queries_ref[n : n + 1], lambda n: columns_ref[n], at, axis=0)
            scores = jnp.where(seen, scores, HIDDEN)
        weights = jnp.exp(scores - rows_ref[0:1])
        dv_sum_ref[...] += _dot(weights.astype(d_out.dtype), d_out, 1, 0)
        d_scores = weights * (_dot(v_ref[...], d_out, 1, 1) - rows_ref[1:2])
        d_scores = d_scores if slope is None else d_scores * slope
        dk_sum_ref[...] += _dot(d_scores.astype(q.dtype), q, 1, 0)

    _visit(step, plan, visit)

    @pl.when(step.last)
    def _():
        dk_ref[...] = (dk_sum_ref[...] * plan.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)


def _visit(step: Step, plan: Plan, visit: Callable[[bool], None]) -> None:
    """Traces `visit` once with and once without tests, and runs what the step asks for."""
    if plan.always_whole:
        pl.when(step.run)(lambda: visit(False))
    else:
        pl.when(step.run & step.whole)(lambda: visit(False))
        pl.when(step.run & ~step.whole)(lambda: visit(True))


def _dot(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((of_a,), (of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def _scores(outer: jax.Array, inner: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array | None]:
    """Scores [outer, inner], and the derivative of their cap."""
    scores = _dot(outer, inner, 1, 1) * plan.scale
    if plan.softcap is None:
        return scores, None
    bent = jnp.tanh(scores * (1 / plan.softcap))
    return plan.softcap * bent, 1 - bent * bent


def _seen(plan: Plan, shape: tuple[int, int], of_query: Callable, of_key: Callable, at, axis: int) -> jax.Array:
    """Bool of `shape`, which queries see which keys of a tile, whose keys lie along `axis` and begin at position `at`.

    of_query(n), of_key(n): row n of a table of `Tests`; of the outer tile a column [outer, LANES], of the inner one a
    row [1, inner].
    """
    spread = lambda table: table if table.shape[0] == 1 else _wide(table, shape[1])
    position = at + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    seen = None if plan.kv_len is None else position < plan.kv_len
    for rule in plan.rules:
        code = position if rule.code is None else spread(of_key(rule.code))
        parts = [] if rule.low is None else [spread(of_query(rule.low)) <= code]
        parts += [] if rule.high is None else [code < spread(of_query(rule.high))]
        for part in parts:
            seen = part if seen is None else seen & part
    return jnp.ones(shape, bool) if seen is None else seen


def _to_columns(rows_ref, columns_ref) -> None:
    """[rows, tokens] -> [rows, tokens, LANES]."""
    if rows_ref is not None:
        for n in range(rows_ref.shape[0]):
            row = rows_ref[n : n + 1]
            columns_ref[n] = jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _wide(column: jax.Array, width: int) -> jax.Array:
    """[n, LANES], the same in all lanes -> [n, width]."""
    return jnp.tile(column, (1, math.ceil(width / LANES)))[:, :width]
