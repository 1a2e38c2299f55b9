"""The neuron on Hopper GPUs with Mosaic GPU: a warpgroup has some neurons in registers for all of time.

NEVER RUN ON A GPU: interpreted and lowered for CUDA in tests, and in no default order.

Forward it reads currents and writes spikes, once each; potentials stay in registers. Backward it reads currents twice
(the second time soon after the first), cotangents once and writes gradients once: the states of all steps
are taken once more, into shared memory, each thread its own, and then the gradients from the last step to the first, by
`neuron.pulled`. Nothing but the arguments is kept between the passes.

Every thread has as many neurons that follow one another as it loads at once, 16 bytes of them where their number allows
it, and fewer in the backward pass where shared memory would hold few warpgroups otherwise. Numbers of a neuron, scalars
too, come as an array of all neurons, and so do their gradients.

Addresses are computed in 32 bits, so there is a most of all elements together.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lissom.ops.hopper import SHARED_BYTES
from lissom.ops.interpreting import is_interpreting
from lissom.ops.spiking.neuron import Rates, Rule, State, fired, pulled, step

LOCAL = True

THREADS = 128
MOST_ELEMENTS = 2**31
# Of a warpgroup's states in the backward pass, so that six are on a multiprocessor.
STATE_BYTES = 36 * 1024


@dataclass(frozen=True)
class Plan:
    """What is static in a call."""

    rule: Rule
    interpret: bool


def check(current, state: State, rates: Rates, *, rule: Rule) -> None:
    if current.dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
        raise NotImplementedError(f"current is {current.dtype}; this kernel takes float32, float16 and bfloat16.")
    neurons = math.prod(current.shape[1:])
    if neurons % THREADS:
        raise NotImplementedError(f"{neurons} neurons are not a multiple of {THREADS}, and padding would copy them.")
    if current.size >= MOST_ELEMENTS:
        raise NotImplementedError(f"{current.size} elements need offsets of more than 32 bits.")
    each = 4 * THREADS * sum(part is not None for part in state)
    if len(current) * each > SHARED_BYTES:
        raise NotImplementedError(
            f"the states of {len(current)} steps do not fit into shared memory; {SHARED_BYTES // each} is the most."
        )


def run(current, state: State, rates: Rates, *, rule: Rule) -> tuple[jax.Array, State]:
    neurons = current.shape[1:]
    every = lambda rate: jnp.broadcast_to(rate, neurons).reshape(-1)
    spikes, after = _scan(
        Plan(rule, is_interpreting()),
        current.reshape(len(current), -1),
        jax.tree.map(lambda part: part.reshape(-1), state),
        jax.tree.map(every, rates),
    )
    return spikes.reshape(current.shape), jax.tree.map(lambda part: part.reshape(neurons), after)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: Plan, current: jax.Array, state: State, rates: Rates) -> tuple[jax.Array, State]:
    """current [t, n], all else [n]."""
    together = _together(current)
    return _call(plan, _forward_kernel, "forward", together, (current, state, rates), (current, state), ())


def _forward(plan: Plan, current: jax.Array, state: State, rates: Rates):
    return _scan(plan, current, state, rates), (current, state, rates)


def _backward(plan: Plan, kept, cotangents):
    current, state, rates = kept
    parts = len(jax.tree.leaves(state))
    together = _together(current)
    while together > 1 and 4 * THREADS * together * len(current) * parts > STATE_BYTES:
        together //= 2
    held = [plgpu.SMEM((len(current), THREADS * together), jnp.float32)] * parts
    operands = (current, state, rates, *cotangents)
    return _call(plan, _backward_kernel, "backward", together, operands, (current, state, rates), held)


_scan.defvjp(_forward, _backward)


def _together(current: jax.Array) -> int:
    """Neurons of a thread."""
    return math.gcd(current.shape[1] // THREADS, 16 // current.dtype.itemsize)


def _call(plan: Plan, kernel, name: str, together: int, operands: tuple, like: tuple, held):
    """`kernel` for each 128 x `together` neurons; results have the shapes and dtypes of `like`."""
    given, structure = jax.tree.flatten(operands)
    made, results = jax.tree.flatten(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like))
    size = THREADS * together

    def body(*refs):
        block = pl.ds(jax.lax.axis_index("block") * size, size)
        taken, left = refs[: len(given)], refs[len(given) :]
        kernel(
            plan.rule,
            Block(block, plgpu.Layout.WG_STRIDED((size,), vec_size=together)),
            structure.unflatten(taken),
            results.unflatten(left[: len(made)]),
            left[len(made) :],
        )

    outputs = plgpu.kernel(
        body,
        out_type=made,
        grid=(operands[0].shape[1] // size,),
        grid_names=("block",),
        scratch_types=list(held),
        kernel_name=f"lissom_spiking_{name}",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if plan.interpret else False,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*given)
    return results.unflatten(outputs)


@dataclass(frozen=True)
class Block:
    """The neurons of a warpgroup, and how its threads have them."""

    neurons: pl.Slice
    layout: plgpu.Layout

    def load(self, ref, *time) -> jax.Array:
        return plgpu.load(ref.at[(*time, self.neurons)], layout=self.layout).astype(jnp.float32)

    def store(self, ref, value: jax.Array, *time) -> None:
        ref[(*time, self.neurons)] = value.astype(ref.dtype)


def _forward_kernel(rule: Rule, block: Block, operands, results, _):
    current_ref, state_refs, rate_refs = operands
    spikes_ref, after_refs = results
    rates = jax.tree.map(block.load, rate_refs)

    def body(t, state):
        state, spikes = step(rule, rates, state, block.load(current_ref, t), fired)
        block.store(spikes_ref, spikes, t)
        return state

    state = jax.lax.fori_loop(0, current_ref.shape[0], body, jax.tree.map(block.load, state_refs))
    jax.tree.map(block.store, after_refs, state)


def _backward_kernel(rule: Rule, block: Block, operands, results, held):
    """`held`: shared memory [t, neurons] for each part of a state."""
    current_ref, state_refs, rate_refs, d_spikes_ref, d_after_refs = operands
    d_current_ref, d_state_refs, d_rate_refs = results
    rates, time = jax.tree.map(block.load, rate_refs), current_ref.shape[0]
    held_refs = jax.tree.structure(state_refs).unflatten(held)

    def forward(t, state):
        jax.tree.map(lambda ref, part: ref.__setitem__(t, part), held_refs, state)
        return step(rule, rates, state, block.load(current_ref, t), fired)[0]

    jax.lax.fori_loop(0, time, forward, jax.tree.map(block.load, state_refs))

    def backward(n, carry):
        d_state, d_rates = carry
        t = time - 1 - n
        state = jax.tree.map(lambda ref: plgpu.load(ref.at[t], layout=block.layout), held_refs)
        now, d_spikes = block.load(current_ref, t), block.load(d_spikes_ref, t)
        d_now_rates, d_state, d_now = pulled(rule, rates, state, now, d_state, d_spikes)
        block.store(d_current_ref, d_now, t)
        return d_state, jax.tree.map(jnp.add, d_rates, d_now_rates)

    start = (jax.tree.map(block.load, d_after_refs), jax.tree.map(jnp.zeros_like, rates))
    d_state, d_rates = jax.lax.fori_loop(0, time, backward, start)
    jax.tree.map(block.store, d_state_refs, d_state)
    jax.tree.map(block.store, d_rate_refs, d_rates)
