"""One time step of a spiking neuron, which every implementation is made of."""

import functools
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def spike(surrogate: str, slope: float, x: jax.Array) -> jax.Array:
    """1 where x >= 0, else 0, with the derivative of a surrogate."""
    return (x >= 0).astype(x.dtype)


@spike.defjvp
def _spike_jvp(surrogate, slope, primals, tangents):
    (x,), (dx,) = primals, tangents
    return spike(surrogate, slope, x), SURROGATES[surrogate].derivative(x, slope) * dx


def step(rule: Rule, rates: Rates, state: State, current: jax.Array) -> tuple[State, jax.Array]:
    """(state behind the step, spikes), as `spike_scan` says."""
    i, a = state.i, state.a
    if i is not None:
        i = current = rates.current_decay * i + current
    threshold = rates.threshold
    if a is not None:
        threshold = threshold + rates.adaptation_step * a
    h = rates.decay * state.v + current
    s = spike(rule.surrogate, rule.slope, h - threshold)
    cleared = s if rule.attached else jax.lax.stop_gradient(s)
    if rule.reset == "hard":
        v = (1 - cleared) * h + cleared * rule.reset_to  # which is exact
    elif rule.reset == "soft":
        v = h - cleared * threshold
    else:
        v = h
    if a is not None:
        a = rates.adaptation_decay * a + s
    return State(v, i, a), s
