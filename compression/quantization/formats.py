"""Number formats of few bits: the numbers that each one has, how others are rounded to them, and their codes.

    format = FORMATS["fp4_e2m1"]
    format.round(x)              # the nearest number of the format, of two as near the one with an even code
    format.round(x, u)           # u uniform in [0, 1): one of the two neighbours, in expectation x
    format.round(x, way="up")    # the next one that is not below x; "down": not above
    format.encode(format.round(x)), format.decode(codes)

Numbers beyond the largest become the largest (saturation), infinite ones too; NaN stays NaN. Everything is computed in
float32, so that a network can be trained on a machine that has no such format: XLA's own casts to 4 bits do not compile
in every product (jax 0.11.2).

    int8, int4, int2    integers, symmetric: -(2^(b-1) - 1) ... 2^(b-1) - 1, so that int2 has -1, 0 and 1. The lowest
                        code, which has no partner above 0, is never used
    uint8, uint4, uint2 0 ... 2^b - 1, for what is never below 0
    fp8_e4m3, fp8_e5m2  as in Micikevicius et al. 2022, arXiv:2209.05433; the largest are 448 and 57344
    fp4_e2m1            0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives (OCP Microscaling Formats 1.0)
    nf4                 16 quantiles of a normal distribution in [-1, 1], one of which is 0 (Dettmers et al. 2023,
                        arXiv:2305.14314, appendix E); not spaced by powers of two, so that no product can use the codes
    e8m0, ue4m3, ue5m3  of scales, without a sign: powers of two up to 2^127; fp8_e4m3 without its sign; 5 bits of
                        exponent (bias 15) and 3 of mantissa. e8m0 has 2^-127 too, which here becomes 2^-126, since XLA
                        takes what is below for 0. Of ue5m3 no standard is known: as in e4m3 the highest code is left
                        for NaN, so that the largest number is 1.75 x 2^16 = 114688
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class Format:
    """signed: whether it has numbers below 0."""

    name: str
    bits: int
    signed: bool = True

    @property
    def largest(self) -> float:
        raise NotImplementedError

    @property
    def smallest(self) -> float:
        """Of those above 0."""
        raise NotImplementedError

    def round(self, x: jax.Array, uniform: jax.Array | None = None, *, way: str = "nearest") -> jax.Array:
        """float32 numbers of the format. `way` ("nearest", "up", "down") is that without `uniform`."""
        raise NotImplementedError

    def encode(self, numbers: jax.Array) -> jax.Array:
        """Numbers of the format -> uint8 codes below 2^bits; NaN has none."""
        raise NotImplementedError

    def decode(self, codes: jax.Array) -> jax.Array:
        """float32 numbers of the codes; NaN of those that are left for what is infinite or no number."""
        raise NotImplementedError

    def _within(self, x: jax.Array) -> jax.Array:
        x = jnp.asarray(x, jnp.float32)
        return jnp.clip(x, -self.largest if self.signed else 0.0, self.largest)


WAYS = {"nearest": jnp.round, "up": jnp.ceil, "down": jnp.floor}


def _whole(x: jax.Array, uniform: jax.Array | None, way: str) -> jax.Array:
    """Whole numbers; nearest: of two the even one."""
    return WAYS[way](x) if uniform is None else jnp.floor(x + uniform)


def _goes_up(above: jax.Array, uniform: jax.Array | None, way: str) -> jax.Array:
    """Of what lies `above` (0 to 1) between two neighbours, the lower of which is 0: whether it becomes the upper one;
    nearest: half-way it does."""
    if uniform is not None:
        return above + uniform >= 1
    return {"nearest": above >= 0.5, "up": above > 0, "down": above >= 1}[way]


@dataclass(frozen=True)
class Integer(Format):
    largest = property(lambda self: float(2 ** (self.bits - self.signed) - 1))
    smallest = property(lambda self: 1.0)

    def round(self, x, uniform=None, *, way="nearest"):
        return self._within(_whole(self._within(x), uniform, way))

    def encode(self, numbers):
        # Two's complement.
        return numbers.astype(jnp.int32).astype(jnp.uint8) & (2**self.bits - 1)

    def decode(self, codes):
        codes = codes.astype(jnp.int32)
        negative = (codes >> (self.bits - 1)) * self.signed
        return (codes - 2**self.bits * negative).astype(jnp.float32)


@dataclass(frozen=True)
class Float(Format):
    """(-1)^s 2^(e - bias) (1 + m / 2^mantissa), and below the smallest exponent m 2^(1 - bias - mantissa)
    (subnormals). reserved: how many of the highest codes are infinite or NaN."""

    exponent: int = 0
    mantissa: int = 0
    reserved: int = 0

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    @property
    def largest(self) -> float:
        e, m = divmod(self._magnitudes - 1, 2**self.mantissa)
        return math.ldexp(1 + m / 2**self.mantissa, e - self.bias)

    @property
    def smallest(self) -> float:
        return 2.0 ** (1 - self.bias - self.mantissa)

    @property
    def _magnitudes(self) -> int:
        """How many codes are numbers, without the sign."""
        return 2 ** (self.exponent + self.mantissa) - self.reserved

    def round(self, x, uniform=None, *, way="nearest"):
        x = self._within(x)
        step = jnp.ldexp(jnp.float32(1), self._exponents(x) - self.mantissa)
        # Both are exact: steps are powers of two. A draw near 1 may lift even the largest by a step.
        return self._within(_whole(x / step, uniform, way) * step)

    def _exponents(self, x: jax.Array) -> jax.Array:
        """floor(log2 |x|), but not below that of subnormals."""
        _, e = jnp.frexp(x)
        return jnp.where(x == 0, 1 - self.bias, jnp.maximum(e - 1, 1 - self.bias))

    def encode(self, numbers):
        e = self._exponents(numbers)
        magnitude = jnp.abs(numbers)
        # Subnormals have the exponent of the smallest normal numbers, and no 1 in front of their mantissa.
        m = (magnitude * jnp.ldexp(jnp.float32(1), self.mantissa - e)).astype(jnp.int32)
        code = (e - 1 + self.bias) * 2**self.mantissa + m
        if self.signed:
            code = code + jnp.where(jnp.signbit(numbers), 2 ** (self.bits - 1), 0)
        return code.astype(jnp.uint8)

    def decode(self, codes):
        code = codes.astype(jnp.int32) & (2 ** (self.exponent + self.mantissa) - 1)
        e, m = code >> self.mantissa, code & (2**self.mantissa - 1)
        fraction = jnp.where(e > 0, 2**self.mantissa, 0) + m
        number = jnp.ldexp(fraction.astype(jnp.float32), jnp.maximum(e, 1) - self.bias - self.mantissa)
        number = jnp.where(code >= self._magnitudes, jnp.nan, number)
        return jnp.where(codes.astype(jnp.int32) >> (self.bits - 1) == 1, -number, number) if self.signed else number


@dataclass(frozen=True)
class PowersOfTwo(Format):
    """2^-126 ... 2^127 (E8M0), and no 0: what is below becomes the smallest. The nearest is that of the numbers, not of
    their logarithms: 1.5 is as near to 1 as to 2, and goes to 2, as a cast of `ml_dtypes` does."""

    largest = property(lambda self: 2.0**127)
    smallest = property(lambda self: 2.0**-126)

    def round(self, x, uniform=None, *, way="nearest"):
        x = jnp.clip(jnp.asarray(x, jnp.float32), self.smallest, self.largest)
        half, e = jnp.frexp(x)  # x = half 2^e, half in [1/2, 1)
        up = _goes_up(2 * half - 1, uniform, way)
        return jnp.where(jnp.isnan(x), x, jnp.ldexp(jnp.float32(1), e - 1 + up))

    def encode(self, numbers):
        return (jnp.frexp(numbers)[1] + 126).astype(jnp.uint8)

    def decode(self, codes):
        number = jnp.ldexp(jnp.float32(1), jnp.clip(codes.astype(jnp.int32), 1, 254) - 127)
        return jnp.where(codes == 255, jnp.nan, number)


@dataclass(frozen=True)
class Table(Format):
    """Any numbers, in order; of two as near the upper one."""

    numbers: tuple[float, ...] = ()

    largest = property(lambda self: max(map(abs, self.numbers)))
    smallest = property(lambda self: min(x for x in self.numbers if x > 0))

    def round(self, x, uniform=None, *, way="nearest"):
        x, numbers = self._within(x), jnp.asarray(self.numbers, jnp.float32)
        below = jnp.clip(jnp.searchsorted(numbers, x, side="right") - 1, 0, len(self.numbers) - 2)
        low, high = numbers[below], numbers[below + 1]
        up = _goes_up((x - low) / (high - low), uniform, way)
        return jnp.where(jnp.isnan(x), x, jnp.where(up, high, low))

    def encode(self, numbers):
        return jnp.searchsorted(jnp.asarray(self.numbers, jnp.float32), numbers).astype(jnp.uint8)

    def decode(self, codes):
        return jnp.asarray(self.numbers, jnp.float32)[codes.astype(jnp.int32)]


FORMATS: Mapping[str, Format] = {
    format.name: format
    for format in (
        Integer("int8", 8),
        Integer("int4", 4),
        Integer("int2", 2),
        Integer("uint8", 8, signed=False),
        Integer("uint4", 4, signed=False),
        Integer("uint2", 2, signed=False),
        Float("fp8_e4m3", 8, exponent=4, mantissa=3, reserved=1),
        Float("fp8_e5m2", 8, exponent=5, mantissa=2, reserved=4),
        Float("fp4_e2m1", 4, exponent=2, mantissa=1),
        Table("nf4", 4, numbers=NF4),
    )
}

SCALE_FORMATS: Mapping[str, Format] = {
    format.name: format
    for format in (
        PowersOfTwo("e8m0", 8, signed=False),
        Float("ue4m3", 8, signed=False, exponent=4, mantissa=3, reserved=1),
        Float("ue5m3", 8, signed=False, exponent=5, mantissa=3, reserved=1),
    )
}


def numbers(format: Format) -> np.ndarray:
    """All that it has, in order, float64; 0 once."""
    codes = np.arange(2**format.bits, dtype=np.uint8)
    found = np.asarray(format.decode(jnp.asarray(codes)), np.float64)
    return np.unique(found[np.abs(found) <= format.largest] + 0.0)  # -0 is 0
