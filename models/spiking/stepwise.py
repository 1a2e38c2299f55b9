"""What all networks that go through examples step by step share: encoder in front, decoder behind, a state between."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.linear import needed
from lissom.models.registry import construct
from lissom.models.spiking import DECODERS, ENCODERS
from lissom.models.spiking.layers import Work


class Entered(NamedTuple):
    """Encoded x, and the currents that the first layer makes of it."""

    x: jax.Array
    current: jax.Array | None


def entered_or_not(x: jax.Array | Entered) -> Entered:
    """With None for currents that are to be computed."""
    return x if isinstance(x, Entered) else Entered(x, None)


class StepwiseNetwork(nnx.Module):
    """inputs [B, *space, C], or with an encoding of timed examples [B, T, *space, C] -> logits [B, classes].

    time_steps: how often the network sees an example; 0 where the examples have a time axis (encoding "frames",
    "delta" or "stacked"). `encoded`: the shape of an example at a step, behind the encoder. A subclass says what a step
    is: `start`, `advance`, `work`, `is_spiking`, and where it can `entered`.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        classes: int,
        encoding: str = "direct",
        encoding_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        decoding: str = "mean",
        decoding_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        time_steps: int = 4,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.encoder = construct(ENCODERS, encoding, encoding_kwargs, "encoding", rngs=rngs)
        self.decoder = construct(DECODERS, decoding, decoding_kwargs, "decoding", rngs=rngs)
        if self.encoder.timed and time_steps:
            raise ValueError(f"model.encoding={encoding!r} reads the time of the examples: set model.time_steps to 0")
        if not self.encoder.timed and time_steps < 1:
            raise ValueError(f"model.time_steps={time_steps} must be at least 1 with model.encoding={encoding!r}")
        if self.encoder.timed and len(input_shape) < 2:
            raise ValueError(f"model.encoding={encoding!r} reads examples [time, ...], not {list(input_shape)}")
        self.steps, self.classes = time_steps or self.encoder.steps(input_shape[0]), classes
        *space, channels = input_shape[1:] if self.encoder.timed else input_shape
        self.encoded, self.dtype = (*space, self.encoder.channels(channels, input_shape[0])), dtype

    @property
    def is_spiking(self) -> bool:
        """Whether it has neurons that spike."""
        raise NotImplementedError

    def start(self, batch: int) -> tuple:
        """What `advance` begins with."""
        raise NotImplementedError

    def advance(self, x: jax.Array | Entered, steps: int, carry: tuple, *, train: bool = False):
        """Encoded x [steps, B, ...], or one step that stands for `steps` equal ones -> (scores [steps, B, classes]
        after each step, carry, activity float32 [layers, 4]). Several calls that hand on the carry give the scores of
        one of all their steps.

        activity, of this call, summed over steps and examples: spikes, outputs that may be spikes, synaptic operations,
        examples.
        """
        raise NotImplementedError

    def entered(self, x: jax.Array) -> Entered:
        """Encoded x -> what may be given to `advance` in its place, in evaluation: x with what needs no state already
        computed of it. Who gives the same x at step after step computes it once. Here nothing is."""
        return Entered(x, None)

    def work(self) -> list[Work]:
        """What each layer does for one example."""
        raise NotImplementedError

    def __call__(self, inputs: jax.Array, *, train: bool = False, key: jax.Array | None = None):
        scores, activity = self._run(inputs, train, key)
        if not train:
            return scores[-1], {"losses": {}, "metrics": {"layer_activity": activity}}
        spikes, places = activity[:, 0].sum(), activity[:, 1].sum()
        return scores[-1], {"losses": {}, "metrics": {"firing_rate": spikes / places} if self.is_spiking else {}}

    def running(self, inputs: jax.Array) -> jax.Array:
        """scores [T, B, classes]: the answer after each step."""
        return self._run(inputs, False, None)[0]

    def _run(self, inputs: jax.Array, train: bool, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        if train and self.encoder.draws:
            key = needed(key, "an encoding that draws")
        x = self.encoder(inputs, self.steps, key)
        steps = self.encoder.steps(inputs.shape[1]) if self.encoder.timed else self.steps
        scores, _, activity = self.advance(x, steps, self.start(len(inputs)), train=train)
        return scores, activity
