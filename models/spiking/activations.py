"""What stands in the place of neurons in the dense twins of a spiking network, with the same call."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.variables import Param


class ReLU(nnx.Module):
    """max(0, x), of each step alone, in floats."""

    states, multiplications, floats = 0, 0, True

    def __init__(self, channels: int, space: Sequence[int], *, rngs: nnx.Rngs):
        del channels, space, rngs

    def __call__(self, current: jax.Array, state=None, *, train: bool):
        del train
        return jax.nn.relu(current), state


class ClipFloor(nnx.Module):
    """Quantized clip-floor-shift activation (QCFS, Bu et al. 2022, arXiv:2303.04347):

        y = limit / levels x clip(floor(x levels / limit + 1 / 2), 0, levels)

    with a learned limit, one a layer. Gradients pass the floor as they are: dy/dx is 1 inside of the clip, and the
    limit is pulled by what is clipped and by the rounding. An IF neuron with threshold `limit`, a soft reset and half a
    threshold in its membrane at the start has this mean over `levels` steps of a constant current, for which it is
    meant. With 255 levels it is an 8-bit activation.
    """

    states, multiplications = 0, 0

    def __init__(self, channels: int, space: Sequence[int], *, levels: int = 4, limit: float = 4.0, rngs: nnx.Rngs):
        del channels, space, rngs
        if not 1 <= levels <= 255:
            raise ValueError(f"neuron.levels={levels} must be at least 1 and, in 8 bits, at most 255")
        if limit <= 0:
            raise ValueError(f"neuron.limit={limit} must be above 0")
        self.limit, self.levels = Param(jnp.array([float(limit)]), out_sharding=("norm",)), levels

    def __call__(self, current: jax.Array, state=None, *, train: bool):
        del train
        limit = self.limit[...].astype(current.dtype)
        # Clipped before it is rounded: rounded numbers would meet the bounds, where a clip has half a gradient.
        x = jnp.clip(current / limit * self.levels + 0.5, 0, self.levels)
        steps = x + jax.lax.stop_gradient(jnp.floor(x) - x)
        return limit / self.levels * steps, state
