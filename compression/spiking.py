"""A trained dense twin as a spiking network: rates of IF neurons in the place of activations."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lissom.compression.transforms import Transform
from lissom.models.spiking.activations import ClipFloor, ReLU
from lissom.models.spiking.decoders import Mean
from lissom.models.spiking.network import SpikingNet
from lissom.models.spiking.neurons import IF


class ToSpiking(Transform):
    """A `spiking` network of "relu" or "clip_floor", trained at one step, seen `steps` times by IF neurons with a soft
    reset, whose rate over the steps is an activation in units of its layer's limit q_l:

        W_l <- W_l q_{l-1} / q_l;    b_l <- b_l / q_l;    threshold 1;    q_0 = 1 of the input

    after norms were folded. The last weights take q_{l-1} alone, and their outputs are averaged.

    q_l of "clip_floor" is its learned limit (Bu et al. 2022, arXiv:2303.04347; exact behind the first layer where
    `steps` is its number of levels; behind others the spikes do not come evenly). Of "relu" it is the `percentile` of
    the layer's activations on `examples` of the training set, above which they are clipped: threshold balancing (Diehl
    et al. 2015, with 100; Rueckauer et al. 2017, with 99.9).
    initial: the potential at the start, in thresholds; 1/2 rounds where 0 truncates.
    """

    def __init__(self, *, steps: int, percentile: float = 99.9, examples: int = 512, initial: float = 0.5):
        for name, value in (("steps", steps), ("examples", examples)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile={percentile} must be above 0 and at most 100")
        self.steps, self.percentile, self.examples, self.initial = steps, percentile, examples, initial

    def structure(self, module: nnx.Module) -> nnx.Module:
        if not isinstance(module, SpikingNet):
            raise ValueError(f"it is for the network 'spiking', not for a {type(module).__name__}")
        if not isinstance(module.decoder, Mean):
            raise ValueError("it is for model.decoding='mean', which is what a rate over the steps comes to")
        if not module.encoder.repeats:
            raise ValueError("it is for model.encoding='direct', by which a network sees the same at all steps")
        for layer in module.layers:
            if not isinstance(layer.neuron, ReLU | ClipFloor):
                raise ValueError(f"it is for model.neuron='relu' or 'clip_floor', not a {type(layer.neuron).__name__}")
            layer.fold()
            layer.neuron = IF(layer.outputs, layer.after, reset="soft", initial=self.initial, rngs=nnx.Rngs(0))
        module.steps = self.steps
        return module

    def values(self, module: nnx.Module, source: nnx.Module, data: Iterable[dict]) -> nnx.Module:
        limits = self.limits(source, data)
        for layer, fed, own in zip(module.layers, [1.0, *limits[:-1]], limits, strict=True):
            layer.weights.kernel[...] *= fed / own
            if layer.weights.bias is not None:
                layer.weights.bias[...] /= own
        module.head.kernel[...] *= limits[-1]
        return module

    def limits(self, source: SpikingNet, data: Iterable[dict]) -> list[jax.Array | float]:
        """q_l of each layer."""
        if isinstance(source.layers[0].neuron, ClipFloor):
            return [layer.neuron.limit[0] for layer in source.layers]
        seen, count = [[] for _ in source.layers], 0
        for batch in data:
            x = source.encoder(jnp.asarray(batch["inputs"]), 1, None)[:, : self.examples - count]
            for number, (_, _, y, _) in enumerate(source.through(x, 1, (None,) * len(source.layers))):
                seen[number].append(np.asarray(y, np.float32).ravel())
            count += x.shape[1]
            if count >= self.examples:
                break
        return [_limit(np.concatenate(values), self.percentile) for values in seen]


def _limit(values: np.ndarray, percentile: float) -> float:
    """The percentile; where few are above 0, so that it is 0, the largest; of a silent layer, which stays so, 1."""
    found = (float(limit) for limit in (np.percentile(values, percentile), values.max()))
    return next((limit for limit in found if limit > 0), 1.0)
