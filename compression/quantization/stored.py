"""Layers of few bits as they are exported: codes, several in a byte, and products of integers where both operands are.
Those of experts and of depthwise convolutions are of floats, the numbers that the integers stand for.

What differs from the network that was trained is rounding in float32; where that moves an activation over the middle
between two numbers of its format, the next layer sees a step of it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.compression.quantization import products
from lissom.compression.quantization.formats import SCALE_FORMATS, Integer
from lissom.compression.quantization.packing import pack, unpack
from lissom.compression.quantization.products import hadamard
from lissom.compression.quantization.rounding import at_scale
from lissom.compression.quantization.rules import LayerRule
from lissom.compression.quantization.scaling import Scaled, Scheme, quantize
from lissom.models.products import Convolution, Quantizer, is_continued, leading
from lissom.models.variables import Frozen
from lissom.ops.quantized_matmul import quantized_matmul


class Packed(nnx.Module):
    """The kernel of a product as codes and scales; `packed[...]` reads as the kernel that it stands for.

    codes: uint8 [N, bytes of K codes], the first code of a byte in its lowest bits; scale [N or 1, groups], float32 or
    a code of `scale_format`, and with tensor_scale a float32 number beside it. A turned kernel is stored as it is in
    products of turned activations."""

    def __init__(self, scaled: Scaled, scheme: Scheme, product: Any, rotation: int):
        self.scheme, self.product, self.rotation = scheme, product, rotation
        self.shape = tuple(scaled.numbers.shape)
        matrix = product.matrix(scaled.numbers).T
        self.length = matrix.shape[1]
        codes = pack(scheme.numbers.encode(matrix).T, scheme.numbers.bits).T
        own = scaled.scale if scaled.tensor is None else scaled.scale / scaled.tensor
        scale = product.matrix(own).T
        if scheme.scale_format != "float32":
            # The quotient is a number of the format but for a rounding of float32.
            format = SCALE_FORMATS[scheme.scale_format]
            scale = format.encode(format.round(scale))
        self.codes, self.scale = Frozen(codes, out_sharding=(None, None)), Frozen(scale, out_sharding=(None, None))
        self.tensor = None if scaled.tensor is None else Frozen(scaled.tensor.reshape(()), out_sharding=())

    @property
    def further_scalars(self) -> int:
        """How many more scalars the kernel has than there are numbers here."""
        held = sum(variable[...].size for variable in (self.codes, self.scale, self.tensor) if variable is not None)
        return math.prod(self.shape) - held

    @property
    def scales(self) -> jax.Array:
        """float32 [N, groups]."""
        scale = self.scale[...]
        if self.scheme.scale_format != "float32":
            scale = SCALE_FORMATS[self.scheme.scale_format].decode(scale)
        if self.tensor is not None:
            scale = scale * self.tensor[...]
        return jnp.broadcast_to(scale, (len(self.codes[...]), scale.shape[1]))

    def rows(self, index: Any = slice(None)) -> jax.Array:
        """float32 [..., K]: the channels that `index` names, as they are stored."""
        codes = self.codes[...][index]
        codes = jnp.moveaxis(unpack(jnp.moveaxis(codes, -1, 0), self.scheme.numbers.bits, self.length), 0, -1)
        scale = self.scales[index]
        return self.scheme.numbers.decode(codes) * jnp.repeat(scale, self.length // scale.shape[-1], -1)

    @property
    def turned(self) -> jax.Array:
        """The kernel as it is stored."""
        return self.product.kernel(self.rows().T, self.shape)

    def __getitem__(self, _: type(Ellipsis)) -> jax.Array:
        kernel = self.turned
        return hadamard(kernel, self.product.kernel_axes(kernel.ndim)[-1], self.rotation)

    @property
    def integers(self) -> tuple[jax.Array, int]:
        """(codes, bits) for `quantized_matmul`, of a format of integers."""
        codes, bits = self.codes[...], self.scheme.numbers.bits
        # Two numbers of a byte belong to one group.
        if bits == 4 and self.length // self.scale.shape[1] % 2 == 0:
            return codes, 4
        if bits == 8:
            return jax.lax.bitcast_convert_type(codes, jnp.int8), 8
        unpacked = unpack(codes.T, bits, self.length).T
        return self.scheme.numbers.decode(unpacked).astype(jnp.int8), 8


class Stored(Quantizer):
    """The quantizer of a layer whose kernel is `Packed`. `scale`: of activations whose range is fixed; `one_matrix`:
    whether its product is one of matrices."""

    def __init__(self, rule: LayerRule, scale: jax.Array | None, one_matrix: bool):
        self.rule, self.scale = rule, None if scale is None else Frozen(scale, out_sharding=())
        self.one_matrix = one_matrix

    @property
    def further_scalars(self) -> int:
        """A range is none of the network's parameters."""
        return 0 if self.scale is None else -1

    @property
    def simulated(self) -> bool:
        """Where activations are rounded, and there are no products of such numbers here. A kernel of few bits that is
        read and multiplied by floats is what it is."""
        return self.rule.activations is not None and not self._integers

    @property
    def bits(self) -> int:
        return self.rule.bits

    @property
    def _integers(self) -> bool:
        """Whether both operands are integers, and the scales of activations can be taken out of the sums."""
        w, x = self.rule.weights.scheme, self.rule.activations
        both = x is not None and isinstance(w.numbers, Integer) and isinstance(x.scheme.numbers, Integer)
        return self.one_matrix and both and isinstance(x.scheme.per, str)

    def __call__(self, product: Any, x: jax.Array, kernel: Packed) -> jax.Array:
        activations = self.rule.activations
        if activations is None:
            apart = isinstance(product, Convolution) or not self.one_matrix
            if apart or not isinstance(kernel.scheme.numbers, Integer):
                return product(x, kernel[...].astype(x.dtype))
            return _float_product(product, x, kernel)
        # Where the three products of training were rounded, each row of the product was.
        by_rows = self.rule.gradients is not None
        given, axes = (product.rows(x, kernel), (1,)) if by_rows else (x, product.x_axes(x.ndim))
        if self._integers:
            numbers, scale = self._numbers(given, axes)
            # Numbers above 127, which int8 has not, are moved down by 128.
            moved = 128 if activations.scheme.numbers.largest > 127 else 0
            numbers = (numbers - moved).astype(jnp.int8)
            if not by_rows:
                # Windows of bytes: gathering those of float32 takes most of a convolution's time.
                numbers, scale = product.rows(numbers, kernel, outside=-moved), _of_rows(scale, product, x)
            y = _integer_product(numbers, moved, scale, kernel)
            y = product.result(y, x, kernel).astype(x.dtype)
            return self._with_exact(y, product, x, kernel) if activations.exact_first else y
        few, turned = self._rounded(given, axes), self.kernel(product, kernel).astype(x.dtype)
        return product.result(few @ product.matrix(turned), x, kernel) if by_rows else product(few, turned)

    def _with_exact(self, y: jax.Array, product: Any, x: jax.Array, kernel: Packed) -> jax.Array:
        """y, but of the first tokens the product of floats with codes. Where a sequence is continued, that is computed
        only if one of them is there."""

        def exact(x: jax.Array) -> jax.Array:
            return _float_product(product, self._turned(x, product.x_axes(x.ndim)), kernel).astype(x.dtype)

        count = self.rule.activations.exact_first
        first = leading(x, count)
        if not is_continued():
            return jnp.concatenate([exact(x[:, :count]), y[:, count:]], 1)
        of_y = first.reshape(*first.shape[:2], *(1,) * (y.ndim - 2))
        return jax.lax.cond(first.any(), lambda: jnp.where(of_y, exact(x), y), lambda: y)

    def kernel(self, product: Any, kernel: Packed) -> jax.Array:
        del product
        return kernel.turned

    def rounding(self, product: Any) -> Callable | None:
        return None if self.rule.activations is None else lambda x: self._rounded(x, product.x_axes(x.ndim))

    def _turned(self, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        return hadamard(x, axes[-1], self.rule.activations.operand.rotation)

    def _numbers(self, x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """(numbers of the format, scale)."""
        scheme, x = self.rule.activations.scheme, self._turned(x, axes)
        if self.scale is None:
            scaled = quantize(x, scheme, axes)
            return scaled.numbers, scaled.scale
        # A NaN has no code: what sums over it is NaN by its scale.
        scale = jnp.where(jnp.isnan(x).any(axes, keepdims=True), jnp.nan, self.scale[...])
        return scheme.numbers.round(jnp.where(jnp.isnan(x), 0.0, x.astype(jnp.float32)) / self.scale[...]), scale

    def _rounded(self, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        operand, x = self.rule.activations.operand, self._turned(x, axes)
        if self.scale is not None:
            few = at_scale(x, self.scale[...], operand.scheme.numbers)
        else:
            few = products.fake(x, operand.scheme, axes)
        exact = self.rule.activations.exact_first
        return jnp.where(leading(x, exact), x, few) if exact else few

    def rows_of(self, table: Packed, index: jax.Array) -> jax.Array:
        rows = table.rows(index)
        return hadamard(rows, rows.ndim - 1, table.rotation)


def _of_rows(scale: jax.Array, product: Any, x: jax.Array) -> jax.Array:
    """The scales of the rows of a product: of a convolution, that of the example to which a row belongs."""
    if scale.ndim and isinstance(product, Convolution):
        return jnp.repeat(scale.reshape(-1, 1), product.places(x), 0)
    return scale.reshape(-1, 1) if scale.ndim else scale


def _float_product(product: Any, x: jax.Array, kernel: Packed) -> jax.Array:
    """Of floats with codes, which are read as such."""
    codes, bits = kernel.integers
    return product.result(quantized_matmul(product.rows(x, kernel), codes, kernel.scales, bits=bits), x, kernel)


def _integer_product(numbers: jax.Array, moved: int, scale: jax.Array, kernel: Packed) -> jax.Array:
    """float32 [rows, N] of int8 numbers that were moved down by so much. What that takes from the sums, `moved` times
    the sum of a channel's weights, is put back."""
    codes, bits = kernel.integers
    y = quantized_matmul(numbers, codes, kernel.scales, bits=bits, x_scale=scale)
    return y + scale * moved * kernel.rows().sum(-1) if moved else y
