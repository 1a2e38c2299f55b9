"""What tests of spiking neurons share."""

import jax
import jax.numpy as jnp

from lissom.ops.spiking import State, spike_scan


def whole(implementation, neuron, settings, current):
    """(spikes and state, gradients by current, state and rates) with fixed cotangents."""
    rates = {name: jnp.asarray(rate, jnp.float32) for name, rate in neuron.items()}
    parts = (True, "current_decay" in neuron, "adaptation_decay" in neuron)
    state = State(*(jnp.full(current.shape[1:], 0.2) if part else None for part in parts))

    @jax.jit
    def run(current, state, rates):
        f = lambda current, state, rates: spike_scan(current, state, **rates, **settings, implementation=implementation)
        out, pull = jax.vjp(f, current, state, rates)
        return out, pull(jax.tree.map(lambda x: jnp.sin(jnp.arange(float(x.size))).reshape(x.shape), out))

    return run(current, state, rates)
