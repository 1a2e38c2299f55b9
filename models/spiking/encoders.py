"""Encoders: examples -> what the first layer sees at each step.

    x[T, B, ...] = encoder(inputs[B, ...], steps, key)

Those of values that stay repeat or spread them over `steps` steps; `frames`, `delta` and `stacked` read a time axis
that the examples have, so that for them steps is 0.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class Encoder(nnx.Module):
    """timed: the examples have the time axis. binary: all that is given is 0 or 1. repeats: it is the same at all steps
    and given once. draws: by the key. `channels(c, time)`, `steps(time)`: how many channels c of them become, and how
    many steps the time of the examples, where they have one."""

    timed, binary, repeats, draws = False, True, False, False

    def __init__(self, *, rngs: nnx.Rngs):
        del rngs

    def channels(self, inputs: int, time: int) -> int:
        del time
        return inputs

    def steps(self, time: int) -> int:
        return time


class Direct(Encoder):
    """The values themselves, at every step: the first layer with its neurons is the encoder. Given once, [1, B, ...],
    since what a first layer makes of them is the same at all steps."""

    binary, repeats = False, True

    def __call__(self, inputs: jax.Array, steps: int, key: jax.Array | None) -> jax.Array:
        del steps, key
        return inputs[None]


class Rate(Encoder):
    """1 with probability clip(gain x value, 0, 1), drawn apart for each step. Without a key, where a network is judged,
    the draws are those of one fixed key; in training the network asks for one."""

    draws = True

    def __init__(self, *, gain: float = 1.0, rngs: nnx.Rngs):
        if gain <= 0:
            raise ValueError(f"encoding.gain={gain} must be above 0")
        self.gain = gain

    def __call__(self, inputs: jax.Array, steps: int, key: jax.Array | None) -> jax.Array:
        key = jax.random.key(0) if key is None else key
        drawn = jax.random.uniform(key, (steps, *inputs.shape))
        return (drawn < self.gain * inputs).astype(inputs.dtype)


class Latency(Encoder):
    """One spike, the earlier the larger the value in [0, 1]: at step round((1 - value) (steps - 1)); none where the
    value is not above `floor`. Values outside are clipped."""

    def __init__(self, *, floor: float = 0.0, rngs: nnx.Rngs):
        self.floor = floor

    def __call__(self, inputs: jax.Array, steps: int, key: jax.Array | None) -> jax.Array:
        del key
        at = jnp.round((1 - jnp.clip(inputs, 0, 1)) * (steps - 1))
        times = jnp.arange(steps).reshape(-1, *(1,) * inputs.ndim)
        return ((times == at) & (inputs > self.floor)).astype(inputs.dtype)


class Phase(Encoder):
    """The binary digits of the value in [0, 1], the largest first, in periods of `bits` steps: the spike of digit k
    counts 2^-k, k = 1 .. bits (Kim et al. 2018, "Deep neural networks with weighted spikes"). Values are rounded to
    bits digits, and clipped to the largest of them, 1 - 2^-bits."""

    binary = False

    def __init__(self, *, bits: int = 8, rngs: nnx.Rngs):
        if bits < 1:
            raise ValueError(f"encoding.bits={bits} must be at least 1")
        self.bits = bits

    def __call__(self, inputs: jax.Array, steps: int, key: jax.Array | None) -> jax.Array:
        del key
        whole = jnp.clip(jnp.round(inputs * 2**self.bits), 0, 2**self.bits - 1).astype(jnp.int32)
        k = (jnp.arange(steps) % self.bits).reshape(-1, *(1,) * inputs.ndim)
        digits = (whole >> (self.bits - 1 - k)) & 1
        return digits * (0.5 ** (k + 1)).astype(inputs.dtype)


class Frames(Encoder):
    """What the examples have at each time: inputs [B, T, ...] as they are (frames of events, a signal)."""

    timed, binary = True, False

    def __call__(self, inputs: jax.Array, steps: int, key: jax.Array | None) -> jax.Array:
        del steps, key
        return inputs.swapaxes(0, 1)


class Delta(Encoder):
    """Changes: of inputs [B, T, ..., C] an up and a down channel of each, 1 where the value lies `threshold` or more
    above (below) a reference, which then moves there by whole thresholds. The reference begins at 0."""

    timed = True

    def __init__(self, *, threshold: float = 0.25, rngs: nnx.Rngs):
        if threshold <= 0:
            raise ValueError(f"encoding.threshold={threshold} must be above 0")
        self.threshold = threshold

    def channels(self, inputs: int, time: int) -> int:
        del time
        return 2 * inputs

    def __call__(self, inputs: jax.Array, steps: int, key: jax.Array | None) -> jax.Array:
        del steps, key

        def step(reference, now):
            crossed = jnp.trunc((now - reference) / self.threshold)
            events = jnp.concatenate([crossed > 0, crossed < 0], -1).astype(inputs.dtype)
            return reference + crossed * self.threshold, events

        return jax.lax.scan(step, jnp.zeros_like(inputs[:, 0]), inputs.swapaxes(0, 1))[1]


class Stacked(Encoder):
    """All times at once: of inputs [B, T, ..., C] one step of T x C channels, [1, B, ..., T C], as a network without a
    memory sees the order of frames."""

    timed, binary = True, False

    def channels(self, inputs: int, time: int) -> int:
        return inputs * time

    def steps(self, time: int) -> int:
        del time
        return 1

    def __call__(self, inputs: jax.Array, steps: int, key: jax.Array | None) -> jax.Array:
        del steps, key
        return jnp.moveaxis(inputs, 1, -2).reshape(1, len(inputs), *inputs.shape[2:-1], -1)
