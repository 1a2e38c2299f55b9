"""One time step of a spiking neuron, which every implementation is made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax

from lissom.ops.spiking.surrogates import SURROGATES


class State(NamedTuple):
    """What a neuron carries from step to step, each [...] of the neurons: potential v behind the reset; synaptic
    current i and threshold adaptation a, None where the neuron has none."""

    v: jax.Array
    i: jax.Array | None = None
    a: jax.Array | None = None


class Rates(NamedTuple):
    """Numbers of a neuron that can be learned, each a scalar or of a shape that broadcasts to the neurons; None where
    it has no such part."""

    decay: jax.Array
    threshold: jax.Array
    current_decay: jax.Array | None = None
    adaptation_decay: jax.Array | None = None
    adaptation_step: jax.Array | None = None


@dataclass(frozen=True)
class Rule:
    """What is static. attached: whether gradients pass the reset."""

    reset: str
    reset_to: float
    attached: bool
    surrogate: str
    slope: float


def fired(surrogate: str, slope: float, x: jax.Array) -> jax.Array:
    """1 where x >= 0, else 0."""
    del surrogate, slope
    return (x >= 0).astype(x.dtype)


spike = jax.custom_jvp(fired, nondiff_argnums=(0, 1))
"""`fired`, with the derivative of a surrogate."""


@spike.defjvp
def _spike_jvp(surrogate, slope, primals, tangents):
    (x,), (dx,) = primals, tangents
    return spike(surrogate, slope, x), SURROGATES[surrogate].derivative(x, slope) * dx


def step(rule: Rule, rates: Rates, state: State, current: jax.Array, fire: Callable = spike) -> tuple[State, jax.Array]:
    """(state behind the step, spikes), as `spike_scan` says. fire: `fired` where `pulled` has the gradient."""
    i, a = state.i, state.a
    if i is not None:
        i = current = rates.current_decay * i + current
    threshold = rates.threshold
    if a is not None:
        threshold = threshold + rates.adaptation_step * a
    h = rates.decay * state.v + current
    s = fire(rule.surrogate, rule.slope, h - threshold)
    # A comparison has no gradient; jax's stop_gradient is nothing that a GPU kernel takes.
    cleared = s if rule.attached else fired(rule.surrogate, rule.slope, h - threshold)
    if rule.reset == "hard":
        v = (1 - cleared) * h + cleared * rule.reset_to  # which is exact
    elif rule.reset == "soft":
        v = h - cleared * threshold
    else:
        v = h
    if a is not None:
        a = rates.adaptation_decay * a + s
    return State(v, i, a), s


def pulled(
    rule: Rule, rates: Rates, state: State, current: jax.Array, d_after: State, d_spikes: jax.Array
) -> tuple[Rates, State, jax.Array]:
    """The gradients of `step` by (rates, state, current) for cotangents of its results, each of a neuron apart: rates
    have the shape of the neurons. By hand, and in operations that the compilers of kernels take."""
    total = current if state.i is None else rates.current_decay * state.i + current
    threshold = rates.threshold if state.a is None else rates.threshold + rates.adaptation_step * state.a
    return pulled_at(rule, rates, state, rates.decay * state.v + total, threshold, d_after, d_spikes)


def pulled_at(
    rule: Rule, rates: Rates, state: State, h: jax.Array, threshold: jax.Array, d_after: State, d_spikes: jax.Array
) -> tuple[Rates, State, jax.Array]:
    """`pulled` where h and its threshold are known. The state is that in front of the step; the gradients by rates
    alone need its numbers."""
    v, i, a = state
    s = fired(rule.surrogate, rule.slope, h - threshold)
    d_s = d_spikes if a is None else d_spikes + d_after.a
    d_h = (1 - s) * d_after.v if rule.reset == "hard" else d_after.v
    if rule.attached and rule.reset == "hard":
        d_s = d_s + d_after.v * (rule.reset_to - h)
    elif rule.attached and rule.reset == "soft":
        d_s = d_s - d_after.v * threshold
    by_distance = d_s * SURROGATES[rule.surrogate].derivative(h - threshold, rule.slope)
    d_h = d_h + by_distance
    d_threshold = -by_distance - s * d_after.v if rule.reset == "soft" else -by_distance
    d_current = d_h if i is None else d_h + d_after.i
    d_rates = Rates(
        decay=v * d_h,
        threshold=d_threshold,
        current_decay=None if i is None else i * d_current,
        adaptation_decay=None if a is None else a * d_after.a,
        adaptation_step=None if a is None else a * d_threshold,
    )
    d_state = State(
        v=rates.decay * d_h,
        i=None if i is None else rates.current_decay * d_current,
        a=None if a is None else rates.adaptation_decay * d_after.a + rates.adaptation_step * d_threshold,
    )
    return d_rates, d_state, d_current
