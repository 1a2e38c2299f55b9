"""The neuron in XLA's operations, step by step, with a backward pass of its own.

What is kept between the passes is, beside the arguments, the state in front of every SEGMENT steps: no more than
1 / SEGMENT of the current for each part of a state, and the given one. The backward pass goes over the segments from
the last to the first, and of each takes the states once more, then the gradients step by step (`neuron.pulled_at`).

On a CPU the time is that of passes over memory, and so:

    potentials are carried as they are compared, and reset in front of the next step: spikes and potentials read one
    array then, where both would read the currents (`Charged`)
    results are written in place, one step at a time, into an array that all loops carry: results that a loop stacks
    within another are copied once for each
    segments are short: the system gives large arrays out page by page at each call, which takes as long as using them
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lissom.ops.spiking.neuron import Rates, Rule, State, pulled_at

LOCAL = False

SEGMENT = 8


def check(current, state: State, rates: Rates, *, rule: Rule) -> None:
    """Does everything."""


def run(current, state: State, rates: Rates, *, rule: Rule) -> tuple[jax.Array, State]:
    return _scan(rule, current, state, rates)


class Charged(NamedTuple):
    """Between comparison and reset. h, i: potential and current of the step; a: the adaptation in front of it; c, q:
    how fast it decays, and the threshold without it. At the start nothing is compared and nothing decays: q is inf, c
    is 1."""

    h: jax.Array
    i: jax.Array | None
    a: jax.Array | None
    c: jax.Array | None
    q: jax.Array


def _at_rest(state: State, rates: Rates) -> Charged:
    adaptation_decay = None if state.a is None else jnp.ones_like(rates.adaptation_decay)
    return Charged(*state, adaptation_decay, jnp.full_like(rates.threshold, jnp.inf))


def _limit(rates: Rates, charged: Charged) -> jax.Array:
    """What h is compared with. It is not carried, since that would cost an array to write and to read a step."""
    return charged.q if charged.a is None else charged.q + rates.adaptation_step * charged.a


def _settled(rule: Rule, rates: Rates, charged: Charged) -> State:
    """The state behind the step."""
    h, i, a, c, _ = charged
    q = _limit(rates, charged)
    s = (h >= q).astype(h.dtype)
    if rule.reset == "hard":
        v = (1 - s) * h + s * rule.reset_to
    elif rule.reset == "soft":
        v = h - jnp.where(h >= q, q, 0)
    else:
        v = h
    return State(v, i, None if a is None else c * a + s)


def _charge(rule: Rule, rates: Rates, charged: Charged, current: jax.Array) -> Charged:
    """The next step."""
    v, i, a = _settled(rule, rates, charged)
    if i is not None:
        i = current = rates.current_decay * i + current
    return Charged(rates.decay * v + current, i, a, rates.adaptation_decay, rates.threshold)


def _fired(rates: Rates, charged: Charged) -> jax.Array:
    return charged.h >= _limit(rates, charged)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(rule: Rule, current: jax.Array, state: State, rates: Rates) -> tuple[jax.Array, State]:
    def one(charged, now):
        charged = _charge(rule, rates, charged, now.astype(state.v.dtype))
        return charged, _fired(rates, charged).astype(current.dtype)

    charged, spikes = jax.lax.scan(one, _at_rest(state, rates), current)
    return spikes, _settled(rule, rates, charged)


def _pieces(time: int) -> list[tuple[int, int, int]]:
    """(start, segments, their length): what does not make whole segments makes the first one longer."""
    segments = max(time // SEGMENT, 1)
    first = time - (segments - 1) * SEGMENT
    return [(0, 1, first), *([(first, segments - 1, SEGMENT)] if segments > 1 else [])]


def _forward(rule: Rule, current, state, rates):
    """The arguments are `CustomVJPPrimal`s. For rates that nobody differentiates a None is kept: to sum up their
    gradients would cost a pass over memory a step."""
    wanted = jax.tree.map(lambda rate: jnp.zeros(()) if rate.perturbed else None, rates, is_leaf=_is_primal)
    current, state, rates = jax.tree.map(lambda x: x.value, (current, state, rates), is_leaf=_is_primal)
    spikes, charged, starts = jnp.zeros_like(current), _at_rest(state, rates), []

    def one(carry, t):
        charged, spikes = carry
        charged = _charge(rule, rates, charged, current[t].astype(state.v.dtype))
        now = _fired(rates, charged).astype(current.dtype)
        return (charged, jax.lax.dynamic_update_index_in_dim(spikes, now, t, 0)), None

    for start, segments, length in _pieces(len(current)):

        def segment(carry, at, length=length):
            return jax.lax.scan(one, carry, at + jnp.arange(length))[0], carry[0]

        (charged, spikes), before = jax.lax.scan(segment, (charged, spikes), start + length * jnp.arange(segments))
        starts.append(before)
    return (spikes, _settled(rule, rates, charged)), (current, rates, wanted, starts)


def _backward(rule: Rule, kept, cotangents):
    current, rates, wanted, starts = kept
    d_spikes, d_state = jax.tree.map(_instantiated, cotangents, is_leaf=_is_zero)
    neurons, wide = current.shape[1:], starts[0].h.dtype
    # The gradient by the potential is then the decay times that by the current, and is carried without it, so that one
    # array is written where both would be: as the potentials are, one factor late, and 1 at the end of time.
    is_plain = starts[0].i is None and starts[0].a is None

    def again(charged, t):
        before = _settled(rule, rates, charged)
        charged = _charge(rule, rates, charged, current[t].astype(wide))
        parts = (
            None if wanted.decay is None else before.v,
            None if wanted.current_decay is None else before.i,
            before.a,
        )
        return charged, (charged.h, parts)

    def back(carry, over):
        d_state, factor, d_rates, d_current = carry
        (h, parts), t = over
        d_state = d_state._replace(v=factor * d_state.v)
        # Where a part is not kept, the gradients that it would be a factor of are not wanted.
        state = State(*(None if of is None else 0.0 if x is None else x for of, x in zip(d_state, parts, strict=True)))
        q = rates.threshold if state.a is None else rates.threshold + rates.adaptation_step * state.a
        found, d_state, d_now = pulled_at(rule, rates, state, h, q, d_state, d_spikes[t].astype(wide))
        d_rates = Rates(*(None if sum_ is None else sum_ + now for sum_, now in zip(d_rates, found, strict=True)))
        d_current = jax.lax.dynamic_update_index_in_dim(d_current, d_now.astype(current.dtype), t, 0)
        if is_plain:
            d_state, factor = State(d_now), rates.decay
        return (d_state, factor, d_rates, d_current), None

    # Of each neuron apart, and summed at the end: a sum in every step would stand in the way of one pass over memory.
    sums = jax.tree.map(lambda zero: jnp.broadcast_to(zero.astype(wide), neurons), wanted)
    carry = d_state, jnp.ones_like(rates.decay), sums, jnp.zeros_like(current)
    for (start, segments, length), charged in reversed(list(zip(_pieces(len(current)), starts, strict=True))):

        def segment(carry, over, length=length):
            charged, at = over
            times = at + jnp.arange(length)
            _, states = jax.lax.scan(again, charged, times)
            return jax.lax.scan(back, carry, (states, times), reverse=True)

        carry, _ = jax.lax.scan(segment, carry, (charged, start + length * jnp.arange(segments)), reverse=True)
    d_state, factor, sums, d_current = carry
    d_state = d_state._replace(v=factor * d_state.v)
    d_rates = Rates(
        *(
            None if rate is None else jnp.zeros_like(rate) if found is None else _summed(found, rate)
            for rate, found in zip(rates, sums, strict=True)
        )
    )
    return d_current, d_state, d_rates


def _is_primal(x) -> bool:
    return hasattr(x, "perturbed")


def _is_zero(x) -> bool:
    return isinstance(x, SymbolicZero)


def _instantiated(x) -> jax.Array:
    return jnp.zeros(x.shape, x.dtype) if _is_zero(x) else x


def _summed(gradient: jax.Array, rate: jax.Array) -> jax.Array:
    """The gradient [...] of the neurons for a rate that was broadcast to them."""
    extra = gradient.ndim - rate.ndim
    ones = tuple(axis + extra for axis, size in enumerate(rate.shape) if size == 1 and gradient.shape[axis + extra] > 1)
    return gradient.sum((*range(extra), *ones)).reshape(rate.shape)


_scan.defvjp(_forward, _backward, symbolic_zeros=True)
