"""x ~ scale * numbers: which scale the numbers of a format have, and how many of them share one.

    scheme = Scheme("fp4_e2m1", per=16, scale_format="ue4m3", tensor_scale=True)
    scaled = quantize(x, scheme, contracted=(0,))
    dequantize(scaled)                                  scale * numbers; `rounding.py` has it with gradients

`contracted` are the axes that a product sums over. One scale is shared by everything ("tensor"), by what is summed over
together ("channel": of a kernel each output, of activations each row), or by `per` numbers that follow one another
along the last contracted axis (microscaling). So scales can be taken out of a product's sum; those of groups out of the
sums of groups.

    scale = max |x| / largest, where all are 0: 1

A scale that is itself a number of `scale_format` is rounded by `scale_rounding`; rounded down, the largest numbers
saturate. tensor_scale: scales are first divided by a float32 number of the whole tensor, so that the largest of them is
the largest that `scale_format` has (two levels, as in NVFP4); with by_row each row, what is summed over together, has
a number of its own: activations, of which no example may change another's. A NaN or an infinite number makes NaN of all
that share its scale.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lissom.compression.quantization.formats import FORMATS, SCALE_FORMATS, WAYS, Format


@dataclass(frozen=True)
class Scheme:
    """per: "tensor", "channel" or a number, the size of a group. clip: ranges are this share of max |x|."""

    format: str
    per: str | int = "channel"
    scale_format: str = "float32"
    scale_rounding: str = "nearest"
    tensor_scale: bool = False
    by_row: bool = False
    clip: float = 1.0

    def __post_init__(self):
        scales = ("float32", *SCALE_FORMATS)
        for name, known in (("format", FORMATS), ("scale_format", scales), ("scale_rounding", WAYS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")
        if isinstance(self.per, str) and self.per not in ("tensor", "channel"):
            raise ValueError(f"per={self.per!r} must be 'tensor', 'channel' or the size of a group")
        if not isinstance(self.per, str) and (type(self.per) is not int or self.per < 1):
            raise ValueError(f"per={self.per} must be a whole number, at least 1")
        if self.tensor_scale and self.scale_format == "float32":
            raise ValueError("tensor_scale=True goes with a scale_format of few bits: float32 needs no second scale")
        if self.tensor_scale and self.scale_format == "e8m0":
            raise ValueError("tensor_scale=True goes with ue4m3 or ue5m3: e8m0 has the range of float32")
        if self.by_row and not self.tensor_scale:
            raise ValueError("by_row=True says whose the tensor_scale is, and there is none")
        if not 0 < self.clip <= 1:
            raise ValueError(f"clip={self.clip} must be above 0 and at most 1")

    @property
    def numbers(self) -> Format:
        return FORMATS[self.format]

    def bits(self, shape: Sequence[int], contracted: Sequence[int]) -> int:
        """Of an array of that shape, with its scales."""
        of_scale = 32 if self.scale_format == "float32" else SCALE_FORMATS[self.scale_format].bits
        scales = math.prod(scale_shape(shape, self.per, contracted))
        rows = math.prod(scale_shape(shape, "channel" if self.by_row else "tensor", contracted))
        return math.prod(shape) * self.numbers.bits + scales * of_scale + 32 * rows * self.tensor_scale


class Scaled(NamedTuple):
    """numbers of the format, float32 [shape]; scale float32, of as many axes, each of which divides that of the shape.
    tensor: the part of the scale that all share (by_row: that each row does)."""

    numbers: jax.Array
    scale: jax.Array
    tensor: jax.Array | None = None


def scale_shape(shape: Sequence[int], per: str | int, contracted: Sequence[int]) -> tuple[int, ...]:
    """ValueError where groups do not divide the last contracted axis."""
    axes = sorted(axis % len(shape) for axis in contracted)
    if not axes:
        raise ValueError("a product sums over an axis or more, and contracted names none")
    if per == "tensor":
        return (1,) * len(shape)
    if per == "channel":
        return tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    if shape[axes[-1]] % per:
        raise ValueError(f"groups of {per} do not divide axis {axes[-1]} of {list(shape)}")
    return tuple(size // per if axis == axes[-1] else size for axis, size in enumerate(shape))


def spread(scale: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Each scale for the numbers that share it."""
    for axis, size in enumerate(shape):
        if scale.shape[axis] not in (1, size):
            scale = jnp.repeat(scale, size // scale.shape[axis], axis)
    return jnp.broadcast_to(scale, shape)


def over_groups(reduction: Callable, x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """reduction (of an array and an axis) of those that share a number of `shape`."""
    for axis, (size, groups) in enumerate(zip(x.shape, shape, strict=True)):
        if groups != size:
            x = reduction(x.reshape(*x.shape[:axis], groups, size // groups, *x.shape[axis + 1 :]), axis + 1)
    return x


def peaks(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """max |x| of those that share a scale, float32 [shape]."""
    return over_groups(jnp.max, jnp.abs(x.astype(jnp.float32)), shape)


def scales(peak: jax.Array, scheme: Scheme, contracted: Sequence[int]) -> tuple[jax.Array, jax.Array | None]:
    """(scale, the part of it that all share or None) for ranges of +- peak, of as many axes as the numbers have."""
    scale = jnp.where(jnp.isfinite(peak), scheme.clip * peak / scheme.numbers.largest, jnp.nan)
    if scheme.scale_format == "float32":
        return jnp.where(scale == 0, 1.0, scale), None
    format, tensor = SCALE_FORMATS[scheme.scale_format], None
    if scheme.tensor_scale:
        over = tuple(contracted) if scheme.by_row else None
        tensor = scale.max(over, keepdims=scheme.by_row) / format.largest
        tensor = jnp.where(tensor == 0, 1.0, tensor)
        scale = scale / tensor
    if scheme.scale_rounding == "down":
        # The quotient may lie a rounding below the number of the format that it is, and would lose a whole step.
        scale = scale * (1 + 2.0**-20)
    # Where all are 0 any scale does; where a few are tiny, 0 would be none.
    few = jnp.maximum(format.round(scale, way=scheme.scale_rounding), format.smallest)
    return few if tensor is None else few * tensor, tensor


def quantize(x: jax.Array, scheme: Scheme, contracted: Sequence[int], uniform: jax.Array | None = None) -> Scaled:
    """uniform: numbers in [0, 1) of x's shape, for stochastic rounding."""
    scale, tensor = scales(peaks(x, scale_shape(x.shape, scheme.per, contracted)), scheme, contracted)
    numbers = scheme.numbers.round(x.astype(jnp.float32) / spread(scale, x.shape), uniform)
    return Scaled(numbers, scale, tensor)


def dequantize(scaled: Scaled) -> jax.Array:
    return scaled.numbers * spread(scaled.scale, scaled.numbers.shape)
