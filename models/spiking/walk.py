"""A walk through a network of maps and neurons in the order in which they compute: what each of them does is noted.

The same walk gives the states to go on with, the activity of a batch, and, of shapes alone, the work of one example; so
they have the same rows in the same order. A row is a map (or the products of an attention) and the neurons that follow.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lissom.models.spiking.layers import Work, reached
from lissom.models.spiking.spike_maps import SpikeMap


class Walk:
    """steps: of this call. states: of an earlier call, in order; None: every neuron is at rest.

    Synaptic operations of a map are the outputs that its spikes go to if it is the one convolution that it folds into,
    borders included, folded or not. Where a branch ends, its currents are added to those of the stream, and the next
    neurons that read the stream are those of the branch's last map; adding a stream to a branch is not counted.
    """

    def __init__(self, steps: int, states: Sequence | None = None, *, train: bool):
        self.steps, self.train = steps, train
        self._before = None if states is None else iter(states)
        self.states, self.activity, self.work = [], [], []

    def map(
        self,
        layer: SpikeMap,
        x: jax.Array,
        *,
        binary: bool = True,
        events: bool = True,
        known: jax.Array | None = None,
    ) -> jax.Array:
        """Currents [steps, B, rows', columns', C'] of x [T, B, rows, columns, C], one step of which stands for all.
        binary: x is 0 or 1. events: what is 0 in x costs nothing. known: the currents, where they are computed."""
        y = known
        if y is None:
            y = layer(x.reshape(-1, *x.shape[2:]), train=self.train)
            y = y.reshape(*x.shape[:2], *y.shape[1:])
        space = x.shape[2:-1]
        reaches = [reached(size, layer.size, layer.stride) for size in space]
        fan_out = np.multiply.outer(*reaches) * layer.outputs
        active = (x != 0).astype(jnp.float32).sum((0, 1, -1))
        self.row(
            (active * jnp.asarray(fan_out, jnp.float32)).sum(),
            y.shape[1],
            products=int(fan_out.sum()) * layer.inputs,
            passes=len(x),
            weights=layer.size**2 * layer.inputs * layer.outputs,
            inputs=math.prod(space) * layer.inputs,
            outputs=math.prod(y.shape[2:]),
            binary=binary,
            events=events,
        )
        return jnp.broadcast_to(y, (self.steps, *y.shape[1:])) if len(y) < self.steps else y

    def row(
        self, synapses: jax.Array, examples: int, *, products: int, passes: int, events: bool = True, **work
    ) -> None:
        """Notes products (of one step) that no neuron follows yet, and their synaptic operations."""
        self.activity.append([0, 0, synapses, examples])
        self.work.append(
            Work(products=products * passes, passes=passes, steps=self.steps, events=events, states=0,
                 multiplications=0, floats=False, **work)
        )  # fmt: skip

    def fire(self, neuron: nnx.Module, current: jax.Array) -> jax.Array:
        """Spikes of the neurons that follow the last row."""
        state = None if self._before is None else next(self._before)
        spikes, state = neuron(current, state, train=self.train)
        self.states.append(state)
        self.activity[-1][:2] = [(spikes != 0).sum(), spikes.size]
        self.work[-1] = self.work[-1]._replace(states=neuron.states, multiplications=neuron.multiplications)
        return spikes
