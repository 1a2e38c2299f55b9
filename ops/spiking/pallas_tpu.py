"""The neuron on TPUs: a Pallas kernel that has a block of neurons in vector memory (VMEM) for all of time.

Never run on a TPU. The kernels are run in jax's interpreter of a TPU, and compiled by the real compiler for v5e and
v5p; no number here was measured.

Forward it reads currents and writes spikes, once each; potentials never leave the chip. Backward it reads currents and
cotangents and writes gradients, once each: the potentials of all steps are taken once more, into VMEM, and then the
gradients from the last step to the first, by `neuron.pulled`. Nothing but the arguments is
kept between the passes.

Arrays are [t, rows, columns], the columns a multiple of 128: the last axis of the neurons where it is one, so that
nothing is moved, else 128 of all neurons together, for which the compiler copies. Numbers of a neuron that differ along
the columns alone, and scalars, are [1, columns], and their gradients are summed over a block in the kernel.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lissom.ops.interpreting import is_interpreting
from lissom.ops.spiking.neuron import Rates, Rule, State, fired, pulled, step

LOCAL = True

LANES, SUBLANES = 128, 8
# What a kernel may take of VMEM. The compiler's default limit is 16 MB, of the 16 to 128 MB that a chip has.
VMEM_BYTES = 13 * 2**20
# Neurons of a block are as many as make so many elements over time: enough that a grid step's 0.35 us (jax's Pallas
# documentation) are little beside its copies. Modelled, not measured.
BLOCK = 2**18
COLUMNS = 512


@dataclass(frozen=True)
class Plan:
    """What is static in a call."""

    rule: Rule
    interpret: bool


def check(current, state: State, rates: Rates, *, rule: Rule) -> None:
    if current.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"current is {current.dtype}; this kernel takes float32 and bfloat16.")
    neurons = math.prod(current.shape[1:])
    if neurons % LANES:
        raise NotImplementedError(f"{neurons} neurons are not a multiple of {LANES}, and padding would copy them.")
    parts = sum(part is not None for part in state)
    tile = SUBLANES * LANES * 4 // current.dtype.itemsize
    if _bytes(len(current), current.dtype.itemsize, parts) * tile > VMEM_BYTES:
        each = _bytes(1, current.dtype.itemsize, parts) - _bytes(0, current.dtype.itemsize, parts)
        most = (VMEM_BYTES // tile - _bytes(0, current.dtype.itemsize, parts)) // each
        raise NotImplementedError(f"{len(current)} steps do not fit into VMEM; {most} is the most for such neurons.")


def run(current, state: State, rates: Rates, *, rule: Rule) -> tuple[jax.Array, State]:
    neurons = current.shape[1:]
    last = neurons[-1] if neurons and neurons[-1] % LANES == 0 else LANES
    flat = (math.prod(neurons) // last, last)

    def two(rate: jax.Array) -> jax.Array:
        """[1, columns] or [rows, columns]."""
        alike = rate.ndim == 0 or (last == neurons[-1] and math.prod(rate.shape[:-1]) == 1) or rate.size == 1
        if alike:
            return jnp.broadcast_to(rate.reshape(1, -1), (1, last))
        return jnp.broadcast_to(rate, neurons).reshape(flat)

    spikes, after = _scan(
        Plan(rule, is_interpreting()),
        current.reshape(len(current), *flat),
        jax.tree.map(lambda part: part.reshape(flat), state),
        jax.tree.map(two, rates),
    )
    return spikes.reshape(current.shape), jax.tree.map(lambda part: part.reshape(neurons), after)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: Plan, current: jax.Array, state: State, rates: Rates) -> tuple[jax.Array, State]:
    """current [t, rows, columns]; states [rows, columns]; rates [rows, columns] or [1, columns]."""
    shapes = (_like(current), jax.tree.map(_like, state))
    return _call(plan, _forward_kernel, "spiking_forward", (current, state, rates), shapes, ())


def _forward(plan: Plan, current: jax.Array, state: State, rates: Rates):
    return _scan(plan, current, state, rates), (current, state, rates)


def _backward(plan: Plan, kept, cotangents):
    current, state, rates = kept
    d_spikes, d_after = cotangents
    time, rows, columns = current.shape
    of_rows, of_columns = _block(current, state)
    # Of numbers that differ along the columns alone a sum for every block of rows.
    sums = jax.tree.map(
        lambda rate: (
            jax.ShapeDtypeStruct((pl.cdiv(rows, of_rows), 1, columns), jnp.float32)
            if _is_row(rate, rows)
            else _like(rate)
        ),
        rates,
    )
    scratch = [pltpu.VMEM((time, of_rows, of_columns), jnp.float32) for _ in jax.tree.leaves(state)]
    shapes = (_like(current), jax.tree.map(_like, state), sums)
    d_current, d_state, d_rates = _call(
        plan, _backward_kernel, "spiking_backward", (current, state, rates, d_spikes, d_after), shapes, scratch
    )
    d_rates = jax.tree.map(lambda found: found.sum(0) if found.ndim == 3 else found, d_rates)
    return d_current, d_state, d_rates


_scan.defvjp(_forward, _backward)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _is_row(rate: jax.Array, rows: int) -> bool:
    return rate.shape[0] == 1 and rows > 1


def _bytes(time: int, itemsize: int, parts: int) -> int:
    """Of VMEM a neuron, at most: three arrays over time and some states, each twice, and the states of all steps."""
    return time * (6 * itemsize + 4 * parts) + 48 * parts


def _block(current: jax.Array, state: State) -> tuple[int, int]:
    """(rows, columns) of a block."""
    time, rows, columns = current.shape
    size, parts = current.dtype.itemsize, len(jax.tree.leaves(state))
    tile = SUBLANES * 4 // size
    of_columns = next(width for width in range(min(COLUMNS, columns), 0, -LANES) if columns % width == 0)
    room = min(VMEM_BYTES // _bytes(time, size, parts), max(BLOCK // time, 1))
    while of_columns > LANES and of_columns * tile > room:
        of_columns = next(width for width in range(of_columns - LANES, 0, -LANES) if columns % width == 0)
    return min(rows, max(room // of_columns // tile, 1) * tile), of_columns


def _call(plan: Plan, kernel, name: str, operands: tuple, shapes: tuple, scratch):
    """operands: (current, state, rates, ...); `shapes`: of the results."""
    current, state, _ = operands[:3]
    time, rows, columns = current.shape
    of_rows, of_columns = _block(current, state)

    def spec(x) -> pl.BlockSpec:
        if x.ndim == 3 and x.shape[1] == 1 and x.shape[:2] != (time, rows):  # a sum for every block of rows
            return pl.BlockSpec((1, 1, of_columns), lambda i, j: (i, 0, j))
        if x.ndim == 3:
            return pl.BlockSpec((time, of_rows, of_columns), lambda i, j: (0, i, j))
        if _is_row(x, rows):
            return pl.BlockSpec((1, of_columns), lambda i, j: (0, j))
        return pl.BlockSpec((of_rows, of_columns), lambda i, j: (i, j))

    given, structure = jax.tree.flatten(operands)
    made, results = jax.tree.flatten(shapes)

    def body(*refs):
        taken, left = refs[: len(given)], refs[len(given) :]
        kernel(plan.rule, rows, *structure.unflatten(taken), results.unflatten(left[: len(made)]), left[len(made) :])

    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*given, *made))
    outputs = pl.pallas_call(
        body,
        grid=(pl.cdiv(rows, of_rows), columns // of_columns),
        in_specs=[spec(x) for x in given],
        out_specs=[spec(x) for x in made],
        out_shape=made,
        scratch_shapes=list(scratch),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(flops=10 * current.size, transcendentals=0, bytes_accessed=moved),
        interpret=pltpu.InterpretParams() if plan.interpret else False,
        name=name,
    )(*given)
    return results.unflatten(outputs)


def _forward_kernel(rule: Rule, rows: int, current_ref, state_refs: State, rate_refs: Rates, results, _):
    """current_ref [t, r, c]; states [r, c]; rates [r, c] or [1, c]; results (spikes [t, r, c], states [r, c])."""
    spikes_ref, after_refs = results
    rates = jax.tree.map(lambda ref: ref[...], rate_refs)

    def body(t, state):
        state, spikes = step(rule, rates, state, current_ref[t].astype(jnp.float32), fired)
        spikes_ref[t] = spikes.astype(spikes_ref.dtype)
        return state

    state = jax.tree.map(lambda ref: ref[...], state_refs)
    state = jax.lax.fori_loop(0, current_ref.shape[0], body, state)
    _write(after_refs, state)


def _backward_kernel(
    rule: Rule, rows: int, current_ref, state_refs, rate_refs, d_spikes_ref, d_after_refs, results, held
):
    """As the forward one, with cotangents of its results; `held`: of each part of a state [t, r, c]."""
    d_current_ref, d_state_refs, d_rate_refs = results
    time, *block = current_ref.shape
    # Of each neuron apart, and summed at the end.
    rates = jax.tree.map(lambda ref: jnp.broadcast_to(ref[...], block), rate_refs)
    held_refs = jax.tree.structure(state_refs).unflatten(held)
    now = lambda t: current_ref[t].astype(jnp.float32)

    def forward(t, state):
        jax.tree.map(lambda ref, part: ref.__setitem__(t, part), held_refs, state)
        return step(rule, rates, state, now(t), fired)[0]

    jax.lax.fori_loop(0, time, forward, jax.tree.map(lambda ref: ref[...], state_refs))

    def backward(n, carry):
        d_state, d_rates = carry
        t = time - 1 - n
        state = jax.tree.map(lambda ref: ref[t], held_refs)
        d_spikes = d_spikes_ref[t].astype(jnp.float32)
        d_now_rates, d_state, d_now = pulled(rule, rates, state, now(t), d_state, d_spikes)
        d_current_ref[t] = d_now.astype(d_current_ref.dtype)
        return d_state, jax.tree.map(jnp.add, d_rates, d_now_rates)

    start = (jax.tree.map(lambda ref: ref[...], d_after_refs), jax.tree.map(jnp.zeros_like, rates))
    d_state, d_rates = jax.lax.fori_loop(0, time, backward, start)
    _write(d_state_refs, d_state)
    # Behind the last row there is nothing to sum.
    within = pl.program_id(0) * block[0] + jax.lax.broadcasted_iota(jnp.int32, tuple(block), 0) < rows
    summed = lambda ref, d: jnp.where(within, d, 0).sum(0, keepdims=True)[None] if ref.ndim == 3 else d
    _write(d_rate_refs, jax.tree.map(summed, d_rate_refs, d_rates))


def _write(refs, values) -> None:
    for ref, value in zip(jax.tree.leaves(refs), jax.tree.leaves(values), strict=True):
        ref[...] = value
