"""The neuron as its equations, step by step: the definition of right for every other form. jax differentiates the scan,
for which it keeps every potential."""

import jax
import jax.numpy as jnp

from lissom.ops.spiking.neuron import Rates, Rule, State, step

LOCAL = False


def check(current, state: State, rates: Rates, *, rule: Rule) -> None:
    """Does everything."""


def run(current, state: State, rates: Rates, *, rule: Rule) -> tuple[jax.Array, State]:
    wide = jnp.promote_types(current.dtype, jnp.float32)
    state, rates = jax.tree.map(lambda x: x.astype(wide), (state, rates))
    one = lambda state, now: step(rule, rates, state, now.astype(wide))
    state, spikes = jax.lax.scan(one, state, current)
    return spikes.astype(current.dtype), state
