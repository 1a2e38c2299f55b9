"""What transforms that take the channels of gated feed-forward layers apart have in common."""

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.context import Context
from lissom.models.ffn import SwiGLU
from lissom.models.moe.experts import Experts


def copy_channels(experts: Experts, layer: SwiGLU, channels: jax.Array) -> None:
    """Fills E experts of F channels each with those of `layer` that int [E, F] names."""
    gate, up, down = (part.kernel[...] for part in (layer.gate, layer.up, layer.down))
    inner = jnp.stack([gate[:, channels], up[:, channels]], 2)  # [M, E, 2, F]
    experts.inner[...], experts.down[...] = jnp.moveaxis(inner, 1, 0), down[channels]


class Recorder(nnx.Module):
    """A gated layer that says what its channels do: metrics `inputs` [B, T, M], what it was given, and `activity`
    [B, T, H], the |activations|; with `mean` their means over tokens, [B, H], alone."""

    def __init__(self, layer: SwiGLU, mean: bool = False):
        self.layer, self.mean = layer, mean

    def __call__(self, x: jax.Array, context: Context, key: jax.Array | None = None):
        y, _ = self.layer(x, context, key)
        activity = jnp.abs(self.layer.inner(x))
        told = {"activity": activity.mean(1)} if self.mean else {"inputs": x, "activity": activity}
        return y, {"losses": {}, "metrics": told}
