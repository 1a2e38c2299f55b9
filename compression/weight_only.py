"""Int8 weights by rounding to nearest: what is stored and read is a quarter; products run in the layer's dtype."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.compression.quantization.scaling import Scheme, quantize
from lissom.compression.transforms import Transform, layer_paths, match_rules, replace_layers
from lissom.models.linear import Conv, Embedding, Linear
from lissom.models.variables import Frozen
from lissom.training.errors import UserError

KINDS = (Linear, Conv, Embedding)


class Int8(nnx.Module):
    """W[..., c] ~ scale[c] x int8[..., c], scale[c] = max |W[..., c]| / 127: symmetric, one scale a channel (the
    rows of an embedding, the last axis otherwise). A channel of zeros has scale 1."""

    def __init__(self, weight: jax.Array, channel: int):
        over = tuple(axis for axis in range(weight.ndim) if axis != channel % weight.ndim)
        scaled, axes = quantize(weight, Scheme("int8"), over), (None,) * weight.ndim
        self.integers = Frozen(scaled.numbers.astype(jnp.int8), out_sharding=axes)
        self.scale = Frozen(scaled.scale, out_sharding=axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.integers.shape

    def __getitem__(self, _: type(Ellipsis)) -> jax.Array:
        """The dequantized weight: reads like the variable that it stands for."""
        return self.integers[...].astype(jnp.float32) * self.scale[...]


class Int8Weights(Transform):
    """Replaces the weight of every layer that a rule matches (default: all products) by an `Int8`. Biases, norms and
    tables of positions stay float32. Works on looped stacks; scanned ones are unstacked first by the caller.

    The settings of a rule are `skip=True` to leave its layers alone.
    """

    def __init__(self, *, rules: Sequence[tuple[str, Mapping]] = ((".*", {}),)):
        self.rules = rules

    def structure(self, module: nnx.Module) -> nnx.Module:
        for pattern, settings in self.rules:
            if set(settings) - {"skip"}:
                raise UserError(f"int8_weights: the rule {pattern!r} has {sorted(settings)}; a rule takes skip only")
        matched = match_rules(self.rules, layer_paths(module, KINDS), "int8_weights")

        def change(path: str, layer: nnx.Module) -> nnx.Module:
            if path in matched and not matched[path].get("skip", False):
                name, channel = ("table", 0) if isinstance(layer, Embedding) else ("kernel", -1)
                setattr(layer, name, Int8(getattr(layer, name)[...], channel))
            return layer

        return replace_layers(module, KINDS, change)
