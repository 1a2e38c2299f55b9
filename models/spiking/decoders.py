"""Decoders: what the output layer gives at each step -> the scores of the classes after each step.

    scores[T, B, classes], carry = decoder(outputs[T, B, classes], carry)

scores[t] is what is known of the first t + 1 steps; the network's answer is the last. `carry` is what a later call goes
on with, `start(batch, classes)` the first. `spiking`: whether the outputs are the spikes of neurons, one a class.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class Decoder(nnx.Module):
    spiking = False

    def __init__(self, *, rngs: nnx.Rngs):
        del rngs


class Mean(Decoder):
    """The mean of the outputs so far: of a last layer that does not spike, the potential of neurons that gather and do
    not leak, by the time that has passed."""

    def start(self, batch: int, classes: int):
        return jnp.zeros((batch, classes)), jnp.zeros(())

    def __call__(self, outputs: jax.Array, carry):
        total, count = carry
        sums = total + jnp.cumsum(outputs, 0)
        counts = count + jnp.arange(1, len(outputs) + 1, dtype=jnp.float32)
        return sums / counts[:, None, None], (sums[-1], counts[-1])


class Count(Decoder):
    """The spikes so far."""

    spiking = True

    def start(self, batch: int, classes: int):
        return jnp.zeros((batch, classes))

    def __call__(self, outputs: jax.Array, carry):
        sums = carry + jnp.cumsum(outputs, 0)
        return sums, sums[-1]


class MaxMembrane(Decoder):
    """The largest potential so far of neurons that leak and never fire: v_t = decay v_{t-1} + output_t."""

    def __init__(self, *, decay: float = 0.9, rngs: nnx.Rngs):
        if not 0 <= decay <= 1:
            raise ValueError(f"decoding.decay={decay} must be at least 0 and at most 1")
        self.decay = decay

    def start(self, batch: int, classes: int):
        return jnp.zeros((batch, classes)), jnp.full((batch, classes), -jnp.inf)

    def __call__(self, outputs: jax.Array, carry):
        def step(carry, now):
            v, largest = carry
            v = self.decay * v + now
            largest = jnp.maximum(largest, v)
            return (v, largest), largest

        carry, scores = jax.lax.scan(step, carry, outputs)
        return scores, carry


class FirstSpike(Decoder):
    """scale x exp(-t / tau) where the first spike so far came at step t, 0 without one: who fires first wins.

    With s_t the spikes, e_t = s_t (1 - s_0) ... (1 - s_{t-1}) marks the first, and passes gradients to all spikes up to
    it by their surrogates.
    """

    spiking = True

    def __init__(self, *, tau: float = 4.0, scale: float = 8.0, rngs: nnx.Rngs):
        if tau <= 0 or scale <= 0:
            raise ValueError(f"decoding.tau={tau} and decoding.scale={scale} must be above 0")
        self.tau, self.scale = tau, scale

    def start(self, batch: int, classes: int):
        return jnp.ones((batch, classes)), jnp.zeros((batch, classes)), jnp.zeros(())

    def __call__(self, outputs: jax.Array, carry):
        def step(carry, now):
            silent, score, t = carry
            score = score + silent * now * self.scale * jnp.exp(-t / self.tau)
            silent = silent * (1 - now)
            return (silent, score, t + 1), score

        carry, scores = jax.lax.scan(step, carry, outputs)
        return scores, carry
