"""The neuron in XLA's operations, time by time, with a backward pass of its own.

What is kept between the passes is, beside the arguments, the state in front of every SEGMENT steps: 1 / SEGMENT of the
current for each part of a state. The backward pass goes over the segments from the last to the first, and of each takes
the states once more, then the gradients step by step (`neuron.pulled`).
"""

import functools

import jax
import jax.numpy as jnp

from lissom.ops.spiking.neuron import Rates, Rule, State, fired, pulled, step

LOCAL = False

SEGMENT = 16


def check(current, state: State, rates: Rates, *, rule: Rule) -> None:
    """Does everything."""


def run(current, state: State, rates: Rates, *, rule: Rule) -> tuple[jax.Array, State]:
    return _scan(rule, current, state, rates)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(rule: Rule, current: jax.Array, state: State, rates: Rates) -> tuple[jax.Array, State]:
    spikes, state, _ = _forward_pieces(rule, current, state, rates)
    return spikes, state


def _pieces(time: int) -> list[tuple[int, int, int]]:
    """(start, segments, their length): what does not make whole segments stands in front."""
    length = min(SEGMENT, time)
    rest = time % length
    return [(start, n, size) for start, n, size in ((0, 1, rest), (rest, time // length, length)) if size]


def _cut(x: jax.Array, piece: tuple[int, int, int]) -> jax.Array:
    start, segments, length = piece
    return x[start : start + segments * length].reshape(segments, length, *x.shape[1:])


def _joined(parts: list[jax.Array]) -> jax.Array:
    """[segments, length, ...] of every piece -> [t, ...]."""
    parts = [part.reshape(-1, *part.shape[2:]) for part in parts]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _forward_pieces(rule: Rule, current: jax.Array, state: State, rates: Rates):
    """(spikes, state behind the last step, of each piece the states in front of its segments)."""

    def one(state, now):
        state, spikes = step(rule, rates, state, now.astype(state.v.dtype), fired)
        return state, spikes.astype(current.dtype)

    def segment(state, now):
        after, spikes = jax.lax.scan(one, state, now)
        return after, (spikes, state)

    spikes, starts = [], []
    for piece in _pieces(len(current)):
        state, (of_piece, before) = jax.lax.scan(segment, state, _cut(current, piece))
        spikes.append(of_piece)
        starts.append(before)
    return _joined(spikes), state, starts


def _forward(rule: Rule, current: jax.Array, state: State, rates: Rates):
    spikes, after, starts = _forward_pieces(rule, current, state, rates)
    return (spikes, after), (current, rates, starts)


def _backward(rule: Rule, kept, cotangents):
    current, rates, starts = kept
    d_spikes, d_state = cotangents
    neurons, wide = current.shape[1:], starts[0].v.dtype
    # Of each neuron apart, and summed at the end: a sum in every step would stand in the way of one pass over memory.
    spread = jax.tree.map(lambda rate: jnp.broadcast_to(rate, neurons), rates)

    def before(state, now):
        return step(rule, rates, state, now.astype(wide), fired)[0], state

    def back(carry, over):
        d_state, d_rates = carry
        state, now, d_spike = over
        d_spike = d_spike.astype(wide)
        d_now_rates, d_state, d_now = pulled(rule, spread, state, now.astype(wide), d_state, d_spike)
        return (d_state, jax.tree.map(jnp.add, d_rates, d_now_rates)), d_now.astype(current.dtype)

    def segment(carry, over):
        start, now, d_spike = over
        _, states = jax.lax.scan(before, start, now)
        return jax.lax.scan(back, carry, (states, now, d_spike), reverse=True)

    carry, d_current = (d_state, jax.tree.map(jnp.zeros_like, spread)), []
    for piece, start in reversed(list(zip(_pieces(len(current)), starts, strict=True))):
        over = (start, _cut(current, piece), _cut(d_spikes, piece))
        carry, d_piece = jax.lax.scan(segment, carry, over, reverse=True)
        d_current.insert(0, d_piece)
    d_state, d_rates = carry
    return _joined(d_current), d_state, jax.tree.map(_summed, d_rates, rates)


def _summed(gradient: jax.Array, rate: jax.Array) -> jax.Array:
    """The gradient [...] of the neurons for a rate that was broadcast to them."""
    extra = gradient.ndim - rate.ndim
    ones = tuple(axis + extra for axis, size in enumerate(rate.shape) if size == 1 and gradient.shape[axis + extra] > 1)
    return gradient.sum((*range(extra), *ones)).reshape(rate.shape)


_scan.defvjp(_forward, _backward)
