"""What transforms that take the channels of gated feed-forward layers apart have in common."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.compression.transforms import layer_paths, replace_layers
from lissom.models.context import Context
from lissom.models.ffn import SwiGLU
from lissom.models.moe.experts import Experts
from lissom.models.variables import merge, split


def copy_channels(experts: Experts, layer: SwiGLU, channels: jax.Array) -> None:
    """Fills E experts of F channels each with those of `layer` that int [E, F] names."""
    gate, up, down = (part.kernel[...] for part in (layer.gate, layer.up, layer.down))
    inner = jnp.stack([gate[:, channels], up[:, channels]], 2)  # [M, E, 2, F]
    experts.inner.kernel[...], experts.down.kernel[...] = jnp.moveaxis(inner, 1, 0), down[channels]


class Recorder(nnx.Module):
    """A gated layer that says what its channels do, in metrics that its `name` stands in front of: `inputs` [B, T, M],
    what it was given, and `activity` [B, T, H], the |activations|; with `mean` their means over tokens, [B, H], alone.
    """

    def __init__(self, layer: SwiGLU, name: str, mean: bool = False):
        self.layer, self.name, self.mean = layer, name, mean

    def __call__(self, x: jax.Array, context: Context, key: jax.Array | None = None):
        y, _ = self.layer(x, context, key)
        activity = jnp.abs(self.layer.inner(x))
        told = {"activity": activity.mean(1)} if self.mean else {"inputs": x, "activity": activity}
        return y, {"losses": {}, "metrics": {f"{self.name} {kind}": value for kind, value in told.items()}}


def recorded(network: nnx.Module, mean: bool = False) -> Callable:
    """inputs -> {path of a gated layer: {what: as `Recorder`}}, compiled. The network stays as it is."""
    parts = split(replace_layers(merge(split(network)), (SwiGLU,), lambda path, layer: Recorder(layer, path, mean)))
    paths = list(layer_paths(network, (SwiGLU,)))

    @jax.jit
    def run(inputs: jax.Array) -> dict:
        told = merge(parts)(inputs)[1]["metrics"]
        kinds = ("activity",) if mean else ("inputs", "activity")
        # Metrics of layers are stacked; a name of its own has one.
        return {path: {kind: told[f"{path} {kind}"][0] for kind in kinds} for path in paths}

    return run
