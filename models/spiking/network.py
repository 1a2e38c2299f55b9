"""A plain spiking network, and its dense twins."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import at_least_one
from lissom.models.linear import Linear
from lissom.models.spiking.layers import SpikingLayer, Work
from lissom.models.spiking.stepwise import Entered, StepwiseNetwork, entered_or_not


class SpikingNet(StepwiseNetwork):
    """inputs [B, *space, C], or with an encoding of timed examples [B, T, *space, C] -> logits [B, classes].

    `widths[i]` channels with stride `strides[i]` in the convolutions, one behind the other without shortcuts; `hidden`
    features in the dense layers behind them, which see all places of the last convolution. Examples without space have
    dense layers alone. Each layer has neurons (`neuron`, of `ACTIVATIONS`) behind BatchNorm (`SpikingLayer`); with
    "relu" or "clip_floor" it is the dense twin.

    At one step neurons have no use of their decay and their reset: the network is one of activations in {0, 1}. The
    last layer has weights alone, on the mean over places where no dense layer stands in front, or, if the decoding
    reads spikes, neurons.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        classes: int,
        widths: Sequence[int],
        strides: Sequence[int],
        kernel: int = 3,
        hidden: Sequence[int] = (),
        recurrent: bool = False,
        neuron: str = "lif",
        neuron_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        batch_norm: bool = True,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
        **settings,
    ):
        super().__init__(input_shape=input_shape, classes=classes, dtype=dtype, rngs=rngs, **settings)
        *space, inputs = self.encoded
        _check_sizes(space, input_shape, widths, strides, kernel, hidden, recurrent)
        kinds = {
            "neuron": neuron,
            "neuron_kwargs": neuron_kwargs,
            "batch_norm": batch_norm,
            "dtype": dtype,
            "rngs": rngs,
        }
        layers = []
        for width, stride in zip(widths, strides, strict=True):
            layers.append(SpikingLayer(inputs, width, space, kernel=kernel, stride=stride, **kinds))
            inputs, space = width, layers[-1].after
        self.first_dense, self.places = len(layers), math.prod(space)
        dense = [*hidden, *((classes,) if self.decoder.spiking else ())]
        if dense:
            inputs *= self.places
        for number, width in enumerate(dense):
            layers.append(SpikingLayer(inputs, width, (), recurrent=recurrent and number < len(hidden), **kinds))
            inputs = width
        if not layers[-1].is_spiking and self.encoder.repeats and self.steps > 1:
            raise ValueError(
                f"model.neuron={neuron!r} has no memory, and model.time_steps={self.steps} would compute the same so "
                "many times: set it to 1"
            )
        if self.decoder.spiking and not layers[-1].is_spiking:
            decoding = settings["decoding"]
            raise ValueError(f"model.decoding={decoding!r} reads spikes, and model.neuron={neuron!r} has none")
        self.layers = nnx.List(layers)
        self.features = inputs
        self.head = None if self.decoder.spiking else Linear(inputs, classes, axes=("mlp", "classes"), rngs=rngs)

    @property
    def is_spiking(self) -> bool:
        return self.layers[0].is_spiking

    def start(self, batch: int) -> tuple:
        return (None,) * len(self.layers), self.decoder.start(batch, self.classes)

    def entered(self, x: jax.Array) -> Entered:
        return Entered(x, self.layers[0].currents(x.astype(self.dtype), train=False))

    def advance(self, x: jax.Array | Entered, steps: int, carry: tuple, *, train: bool = False):
        states, activity = [], []
        for layer, before, y, state in self.through(x, steps, carry[0], train=train):
            states.append(state)
            spikes = [(y != 0).sum(), y.size] if layer.is_spiking else [0, 0]
            activity.append([*spikes, layer.synapses(before, y), y.shape[1]])
        x = y
        outputs = x.astype(jnp.float32)
        if self.head is not None:
            activity.append([0, 0, (x != 0).sum() * self.classes, x.shape[1]])
            # The head is linear: that of the mean over places is the mean of those of the spikes.
            outputs = self.head(outputs if outputs.ndim == 3 else outputs.mean(tuple(range(2, outputs.ndim - 1))))
        scores, decoded = self.decoder(outputs, carry[1])
        return scores, (tuple(states), decoded), jnp.array(activity, jnp.float32)

    def through(self, x: jax.Array | Entered, steps: int, states: Sequence, *, train: bool = False):
        """Of each layer, one after the other: (itself, what it sees, what it gives, its state to go on with)."""
        x, current = entered_or_not(x)
        x = x.astype(self.dtype)
        for number, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            before = x.reshape(*x.shape[:2], -1) if number == self.first_dense else x
            known = current if number == 0 else None
            x, state = layer(before, steps, state, train=train, current=known)
            yield layer, before, x, state

    def work(self) -> list[Work]:
        """What each layer does for one example; the last weights are a layer too."""
        found, binary = [], self.encoder.binary
        for number, layer in enumerate(self.layers):
            once = number == 0 and self.encoder.repeats
            found.append(layer.work(self.steps, once=once, binary=binary))
            binary = layer.is_spiking
        if self.head is not None:
            features = self.features
            # Spikes are multiplied where they are, since there is nothing to multiply; numbers behind the mean.
            inputs = features * (self.places if binary and self.first_dense == len(self.layers) else 1)
            found.append(
                Work(
                    products=inputs * self.classes * self.steps,
                    passes=self.steps,
                    steps=self.steps,
                    weights=features * self.classes,
                    inputs=inputs,
                    outputs=self.classes,
                    binary=binary,
                    events=binary,
                    states=0,
                    multiplications=0,
                    floats=found[-1].floats,
                )
            )
        return found


def _check_sizes(space, input_shape, widths, strides, kernel: int, hidden, recurrent: bool) -> None:
    at_least_one("model", kernel=kernel)
    for name, sizes in (("widths", widths), ("strides", strides), ("hidden", hidden)):
        if sizes:
            at_least_one("model", **{name: sizes})
    if len(widths) != len(strides):
        raise ValueError(f"model.widths {tuple(widths)} and model.strides {tuple(strides)} must be as long")
    if space and not widths:
        raise ValueError(f"model.widths is empty, and examples {list(input_shape)} have space to convolve over")
    if widths and not space:
        raise ValueError(
            f"model.widths {tuple(widths)} are convolutions over space, and examples {list(input_shape)} have none: "
            "set model.widths and model.strides to (), and model.hidden"
        )
    if not widths and not hidden:
        raise ValueError("model.hidden is empty, and a network without space has dense layers alone")
    if recurrent and not hidden:
        raise ValueError("model.recurrent is of dense layers, and model.hidden is empty")
