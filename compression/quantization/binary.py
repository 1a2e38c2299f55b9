"""Binary layers: products of signs, of which one operator or another makes what is trained.

    y[..., n] = scale[n] sum_k sign(x[..., k] - threshold) sign(w[k, n])

An operator is how the sign is differentiated, what scales the weights and where the threshold of the activations lies;
those are BiBench's (Qin et al. 2023, arXiv:2301.11233) at the level of operators, with nothing around them: no
shortcuts, no other activations, no losses. sign(0) is 1. What lies outside of a picture counts as 1, since a bit has no
0.

    bnn         Courbariaux et al. 2016, arXiv:1602.02830. No scale; straight through between -1 and 1
    xnor        Rastegari et al. 2016, arXiv:1603.05279. Scale: mean |w| a channel (that of activations is left out)
    dorefa      Zhou et al. 2016, arXiv:1606.06160. Scale: mean |w| of the layer; weights straight through everywhere
    bireal      Liu et al. 2018, arXiv:1808.00278. Activations by the slope of a piecewise parabola, max(0, 2 - 2 |x|)
    xnor++      Bulat & Tzimiropoulos 2019, arXiv:1909.13863. Scale: learned a channel (its factors over places are
                not here: they belong to a size of picture)
    reactnet    Liu et al. 2020, arXiv:2003.03488. Threshold: learned a channel of x; else as bireal
    recu        Xu et al. 2021, arXiv:2103.12369. Weights of mean 0 and variance 1 are cut off at their `tau` quantiles,
                so that those far out are moved too; activations as bireal. tau is fixed here, where the paper raises it
    fda         Xu et al. 2021, arXiv:2103.00841. Slope: 4 omega / pi sum_i cos((2 i + 1) omega x), the Fourier series
                of the sign cut off behind n terms. Its module for noise is left out
    irnet       Qin et al. 2020, arXiv:1909.10788. Weights of mean 0 and variance 1, scale: the power of two next to
                mean |w|; slope of tanh, which is fixed here, where the paper sharpens it
    insta       Lee et al. 2022, arXiv:2204.07439. Threshold: beta + alpha m, m the mean over places of x^3, a channel
                and an example; else as reactnet. Behind a BatchNorm x is the paper's normalised input
    insta_plus  the same paper's form with a squeeze-excite block: beta + alpha m 2 sigmoid(relu(m S) E), S [C, C / 4]
                and E [C / 4, C] drawn. Where the block stands, its ratio and the 2, by which it is insta where E is 0,
                are our reading. Slopes of a PReLU by such a block are left out: an activation is no part of an operator
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.compression.quantization.products import key_of
from lissom.models.products import Convolution, Quantizer
from lissom.models.variables import Frozen, Param, freeze
from lissom.ops.binary_matmul import binary_matmul, pack_signs


def clipped(x: jax.Array) -> jax.Array:
    return (jnp.abs(x) <= 1).astype(x.dtype)


def everywhere(x: jax.Array) -> jax.Array:
    return jnp.ones_like(x)


def parabola(x: jax.Array) -> jax.Array:
    return jnp.maximum(2 - 2 * jnp.abs(x), 0)


def fourier(x: jax.Array, omega: float = 0.1, terms: int = 10) -> jax.Array:
    odd = omega * (2 * jnp.arange(terms + 1) + 1)
    return 4 * omega / math.pi * sum(jnp.cos(w * x) for w in odd)


def hyperbolic(x: jax.Array) -> jax.Array:
    return 1 - jnp.square(jnp.tanh(x))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def sign(slope: Callable, x: jax.Array) -> jax.Array:
    """1 where x >= 0, else -1; with the derivative `slope`(x)."""
    del slope
    return jnp.where(x >= 0, 1, -1).astype(x.dtype)


@sign.defjvp
def _sign_jvp(slope, primals, tangents):
    return sign(slope, *primals), slope(*primals) * tangents[0]


@dataclass(frozen=True)
class Operator:
    """scale: "none", "channel" or "layer" (mean |w|), "power" (of two, next to that of the channel), "learned".
    threshold: "none", "learned", "instance", "excited" (the same behind a squeeze-excite block). standardized: weights
    of mean 0 and variance 1 a channel, and then within their quantiles 1 - tau and tau."""

    weights: Callable = clipped
    activations: Callable = clipped
    scale: str = "channel"
    threshold: str = "none"
    standardized: bool = False
    tau: float = 1.0


OPERATORS = {
    "bnn": Operator(scale="none"),
    "xnor": Operator(),
    "dorefa": Operator(weights=everywhere, scale="layer"),
    "bireal": Operator(activations=parabola),
    "xnor++": Operator(scale="learned"),
    "reactnet": Operator(activations=parabola, threshold="learned"),
    "recu": Operator(activations=parabola, standardized=True, tau=0.99),
    "fda": Operator(weights=fourier, activations=fourier),
    "irnet": Operator(weights=hyperbolic, activations=hyperbolic, scale="power", standardized=True),
    "insta": Operator(activations=parabola, threshold="instance"),
    "insta_plus": Operator(activations=parabola, threshold="excited"),
}
REDUCTION = 4  # channels of a squeeze-excite block / those in its middle
SCORED = ("bnn", "xnor", "dorefa", "bireal", "xnor++", "reactnet", "recu", "fda")  # BiBench's eight


class Binary(Quantizer):
    """The quantizer of a layer that is trained with an operator. ValueError where that is not for such a layer."""

    simulated, bits = True, 1

    def __init__(self, operator: str, kernel: jax.Array, product: Any):
        self.operator, self.settings = operator, OPERATORS[operator]
        axes = product.kernel_axes(kernel.ndim)
        channels = kernel.shape[axes[-1]]
        learned = self.settings.scale == "learned"
        first = jnp.abs(kernel).mean(axes, keepdims=True)
        self.scale = Param(first, out_sharding=(None,) * kernel.ndim) if learned else None
        threshold = self.settings.threshold
        moved, instance = threshold != "none", threshold in ("instance", "excited")
        if instance and not isinstance(product, Convolution):
            raise ValueError(f"operator={operator!r} takes means over places, and only a convolution has any")
        self.beta = Param(jnp.zeros(channels), out_sharding=(None,)) if moved else None
        self.alpha = Param(jnp.zeros(channels), out_sharding=(None,)) if instance else None
        self.excitation = Excitation(channels, key_of(kernel)) if threshold == "excited" else None

    def __call__(self, product: Any, x: jax.Array, kernel: Any) -> jax.Array:
        # Of the float32 kernel, as it is when it is stored.
        axes = product.kernel_axes(len(kernel.shape))
        signs, scale = self.weights(kernel[...], axes)
        signs, x = signs.astype(x.dtype), sign(self.settings.activations, self.moved(x))
        y = product(x, signs, outside=1) if isinstance(product, Convolution) else product(x, signs)
        # Behind the sum, which is exact: sums of scaled signs that cancel are not 0, and the next sign is another one.
        return y if scale is None else y * scale.reshape(scale.shape[len(axes) :]).astype(x.dtype)

    def rounding_operations(self, call: Any) -> int:
        """Of one training step: a comparison a number, a difference with a threshold, four operations a number of its
        instance's, and the squeeze-excite block of each example; a mean of the weights and a product, and five
        operations where they are standardised."""
        of_x = {"none": 1, "learned": 2, "instance": 6, "excited": 6}[self.settings.threshold]
        of_w = 1 + 2 * (self.settings.scale != "none") + 5 * self.settings.standardized
        of_block = 0 if self.excitation is None else call.examples * self.excitation.operations
        return call.rows * call.length * of_x + call.weights * of_w + of_block

    def moved(self, x: jax.Array) -> jax.Array:
        """x - threshold."""
        if self.beta is None:
            return x
        threshold = self.beta[...]
        if self.alpha is not None:
            mean = (x**3).mean(tuple(range(1, x.ndim - 1)), keepdims=True)
            threshold += self.alpha[...] * (mean if self.excitation is None else mean * self.excitation(mean))
        return x - threshold.astype(x.dtype)

    def weights(self, kernel: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array | None]:
        """(signs, scale or None) of the kernel."""
        w, settings = kernel, self.settings
        if settings.standardized:
            w = (w - w.mean(axes, keepdims=True)) / (w.std(axes, keepdims=True) + 1e-8)
        if settings.tau < 1:
            # The quantiles of what is cut are constants: what lies beyond moves with nothing but itself.
            low, high = (jnp.quantile(jax.lax.stop_gradient(w), q) for q in (1 - settings.tau, settings.tau))
            w = jnp.clip(w, low, high)
        mean = partial(jnp.mean, jnp.abs(w), keepdims=True)
        scales = {
            "none": lambda: None,
            "channel": lambda: mean(axes),
            "layer": lambda: jax.lax.stop_gradient(mean()),
            "power": lambda: jnp.exp2(jnp.round(jnp.log2(jax.lax.stop_gradient(mean(axes)) + 1e-12))),
            "learned": lambda: self.scale[...],
        }
        return sign(settings.weights, w), scales[settings.scale]()

    def stored(self, kernel: jax.Array, product: Any) -> tuple["PackedSigns", "StoredBinary"]:
        """What the layer is exported as: (kernel, quantizer)."""
        signs, scale = self.weights(kernel, product.kernel_axes(kernel.ndim))
        copy = nnx.merge(*nnx.split(self))
        copy.scale = None
        return PackedSigns(signs, scale, product), StoredBinary(freeze(copy))


class Excitation(nnx.Module):
    """2 sigmoid(relu(m S) E) of m[..., C]: a squeeze-excite block (Hu et al. 2017, arXiv:1709.01507) without biases."""

    def __init__(self, channels: int, key: jax.Array):
        middle = max(channels // REDUCTION, 1)
        keys, init = jax.random.split(key), nnx.initializers.lecun_normal()
        self.squeeze = Param(init(keys[0], (channels, middle), jnp.float32), out_sharding=(None, None))
        self.excite = Param(init(keys[1], (middle, channels), jnp.float32), out_sharding=(None, None))

    def __call__(self, m: jax.Array) -> jax.Array:
        return 2 * jax.nn.sigmoid(jax.nn.relu(m @ self.squeeze[...]) @ self.excite[...])

    @property
    def operations(self) -> int:
        """Of one example: two products, a relu, and a sigmoid and two products with it a channel."""
        channels, middle = self.squeeze.shape
        return 4 * channels * middle + middle + 3 * channels


class PackedSigns(nnx.Module):
    """The kernel of a product of signs: a bit each, in words of 32 [N, ceil(K / 32)], and a float32 scale a channel, or
    one of the layer; reads as scale x sign."""

    def __init__(self, signs: jax.Array, scale: jax.Array | None, product: Any):
        self.product, self.shape = product, tuple(signs.shape)
        matrix = product.matrix(signs).T
        self.length = matrix.shape[1]
        self.words = Frozen(pack_signs(matrix), out_sharding=(None, None))
        self.scale = None if scale is None else Frozen(product.matrix(scale).reshape(-1), out_sharding=(None,))

    @property
    def further_scalars(self) -> int:
        """How many more scalars the kernel has than there are numbers here."""
        return math.prod(self.shape) - self.words.size - (0 if self.scale is None else self.scale.size)

    def __getitem__(self, _: type(Ellipsis)) -> jax.Array:
        bits = (self.words[...][:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        signs = 2.0 * bits.reshape(len(bits), -1)[:, : self.length] - 1
        rows = signs if self.scale is None else signs * jnp.broadcast_to(self.scale[...], (len(signs),))[:, None]
        return self.product.kernel(rows.T, self.shape)


class StoredBinary(Quantizer):
    """The quantizer of a layer whose kernel is `PackedSigns`: bits are compared and counted (ops/binary_matmul)."""

    bits = 1

    def __init__(self, trained: Binary):
        self.trained = trained

    def __call__(self, product: Any, x: jax.Array, kernel: PackedSigns) -> jax.Array:
        bits = _packed_rows(product, self.trained.moved(x), kernel)
        y = binary_matmul(bits, kernel.words[...], length=kernel.length).astype(x.dtype)
        return product.result(y if kernel.scale is None else y * kernel.scale[...].astype(x.dtype), x, kernel)


def _packed_rows(product: Any, x: jax.Array, kernel: PackedSigns) -> jax.Array:
    """The signs of the rows of the product, as `pack_signs` packs them. Windows are gathered of bytes, eight channels
    each, where they come out even: of float32 that takes longer than the product itself."""
    if not isinstance(product, Convolution):
        return pack_signs(product.rows(x, kernel))
    channels = x.shape[-1]
    if channels % 8:
        return pack_signs(product.rows(jnp.where(x >= 0, 1, -1).astype(jnp.int8), kernel, outside=1))
    octets = jax.lax.bitcast_convert_type(pack_signs(x), jnp.uint8)
    octets = octets.reshape(*x.shape[:-1], -1)[..., : channels // 8]
    windows = product.rows(octets, kernel, outside=255)
    windows = jnp.pad(windows, ((0, 0), (0, -windows.shape[1] % 4)))
    return jax.lax.bitcast_convert_type(windows.reshape(len(windows), -1, 4), jnp.uint32)
