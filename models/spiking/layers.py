"""A layer of a spiking network: weights, a norm, neurons."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lissom.models.linear import Conv, Linear
from lissom.models.norms import BatchNorm
from lissom.models.registry import construct
from lissom.models.spiking import ACTIVATIONS
from lissom.models.variables import Param


class Work(NamedTuple):
    """What a layer does for one example, whatever the example is.

    products: multiplications of a weight if nothing is skipped, of all `passes`; passes: how often its inputs come, 1
    where they stay the same; steps: how often its outputs are made. weights, inputs, outputs: how many there are, the
    last two of one step. binary: inputs are 0 or 1. events: an input that is 0 costs nothing; others may be numbers.
    states, multiplications: what the neuron of each output keeps from step to step (its potential, and more), and
    multiplies at each; 0 where there are no neurons. floats: numbers that are no spikes are floats, not of 8 bits.
    """

    products: int
    passes: int
    steps: int
    weights: int
    inputs: int
    outputs: int
    binary: bool
    events: bool
    states: int
    multiplications: int
    floats: bool


class SpikingLayer(nnx.Module):
    """y[T, B, *space', C'] = neurons(norm(W x[T, B, *space, C])): a convolution where there is space, else dense.

    The norm is BatchNorm over all steps and examples alike; without `batch_norm` the weights have a bias instead.
    One step of x stands for `steps` equal ones. A `recurrent` layer (dense) adds V y_{t-1} to the current of step t.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        space: Sequence[int],
        *,
        kernel: int = 3,
        stride: int = 1,
        batch_norm: bool = True,
        neuron: str = "lif",
        neuron_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        recurrent: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.before, self.after = tuple(space), tuple(-(-size // stride) for size in space)
        self.kernel, self.stride, self.inputs, self.outputs = kernel, stride, inputs, outputs
        kinds = {"bias": not batch_norm, "dtype": dtype, "rngs": rngs}
        if space:
            self.weights = Conv(inputs, outputs, (kernel,) * len(space), stride=stride, **kinds)
        else:
            self.weights = Linear(inputs, outputs, axes=("embed", "mlp"), **kinds)
        self.norm = BatchNorm(outputs, rngs=rngs) if batch_norm else None
        self.neuron = construct(
            ACTIVATIONS, neuron, neuron_kwargs, "neuron", channels=outputs, space=self.after, rngs=rngs
        )
        self.back = (
            Linear(outputs, outputs, axes=("embed", "mlp"), bias=False, dtype=dtype, rngs=rngs) if recurrent else None
        )
        if recurrent and not self.is_spiking:
            raise ValueError(f"model.recurrent goes with neurons that spike, not {neuron!r}")
        if recurrent and self.neuron.norm is not None:
            raise ValueError("model.recurrent does not go with a membrane_norm, whose statistics no scan can carry")

    @property
    def is_spiking(self) -> bool:
        """Whether its outputs are spikes of neurons with a state."""
        return self.neuron.states > 0

    def currents(self, x: jax.Array, *, train: bool) -> jax.Array:
        """norm(W x), what the neurons see of x."""
        merged = self.weights(x.reshape(-1, *x.shape[2:]))
        current = merged.reshape(*x.shape[:2], *merged.shape[1:])
        return current if self.norm is None else self.norm(current, train=train)

    def __call__(self, x: jax.Array, steps: int, state=None, *, train: bool, current: jax.Array | None = None):
        """(y [steps, B, ...], state to go on with). current: `currents(x)`, where they are known."""
        if current is None:
            current = self.currents(x, train=train)
        if len(current) < steps:
            current = jnp.broadcast_to(current, (steps, *current.shape[1:]))
        if self.back is None:
            return self.neuron(current, state, train=train)
        return self._recurrent(current, state, train)

    def _recurrent(self, current: jax.Array, state, train: bool):
        inner, spikes = state or (None, jnp.zeros_like(current[0]))

        def step(carry, now):
            inner, spikes = carry
            spikes, inner = self.neuron((now + self.back(spikes))[None], inner, train=train)
            return (inner, spikes[0]), spikes[0]

        # The first step alone makes the state, whose parts are the neuron's affair.
        carry, first = step((inner, spikes), current[0])
        carry, rest = jax.lax.scan(step, carry, current[1:])
        return jnp.concatenate([first[None], rest]), carry

    def fold(self) -> int:
        """Drops the norms, in place: BatchNorm as it is in evaluation is a scale and an addend of each channel, and a
        neuron that was compared the other way is mirrored, with its current. How many norms there were."""
        kernel, bias, found = self.weights.kernel[...], self.weights.bias, 0
        bias = None if bias is None else bias[...]
        if self.norm is not None:
            scale, bias = self.norm.affine()
            kernel, self.norm, found = kernel * scale, None, 1
            self.weights.bias = nnx.data(Param(bias, out_sharding=("channels",)))
        if self.is_spiking and self.neuron.norm is not None:
            signs, found = self.neuron.fold(), found + 1
            if signs is not None:
                kernel, bias = kernel * signs, None if bias is None else bias * signs
        self.weights.kernel[...] = kernel
        if bias is not None:
            self.weights.bias[...] = bias
        return found

    def fan_out(self) -> np.ndarray:
        """[*space]: the outputs that an input at each place goes to."""
        counts = [reached(size, self.kernel, self.stride) for size in self.before]
        places = np.ones(self.before)
        for axis, count in enumerate(counts):
            places *= count.reshape(-1, *(1,) * (len(counts) - 1 - axis))
        return places * self.outputs

    def work(self, steps: int, *, once: bool, binary: bool) -> Work:
        """For inputs that are `binary`, and that come `once` or at each step."""
        passes = 1 if once else steps
        weights = self.inputs * self.outputs * self.kernel ** len(self.before)
        neurons, fed = math.prod(self.after) * self.outputs, math.prod(self.before) * self.inputs
        products = int(self.fan_out().sum()) * self.inputs
        if self.back is not None:
            weights, fed, products = weights + self.outputs**2, fed + neurons, products + self.outputs**2
        return Work(
            products=products * passes,
            passes=passes,
            steps=steps,
            weights=weights,
            inputs=fed,
            outputs=neurons,
            binary=binary,
            events=binary or (self.is_spiking and not once),
            states=self.neuron.states,
            multiplications=self.neuron.multiplications,
            floats=getattr(self.neuron, "floats", False),
        )

    def synapses(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Synaptic operations of all examples: of each input that is not 0 the outputs that it goes to."""
        active = (x != 0).astype(jnp.float32).sum((0, 1, -1))
        sums = (active * jnp.asarray(self.fan_out(), jnp.float32)).sum()
        # The last spikes go nowhere: there is no step behind them.
        return sums if self.back is None else sums + (y[:-1] != 0).sum().astype(jnp.float32) * self.outputs


def reached(size: int, kernel: int, stride: int) -> np.ndarray:
    """[size]: of each place the windows of a 'SAME' convolution that it lies in."""
    windows = -(-size // stride)
    front = max((windows - 1) * stride + kernel - size, 0) // 2
    places = np.arange(windows)[:, None] * stride + np.arange(kernel) - front
    inside = places[(places >= 0) & (places < size)]
    return np.bincount(inside, minlength=size).astype(float)
