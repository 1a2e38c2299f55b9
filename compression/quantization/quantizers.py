"""What layers compute their product with while they are trained for few bits: operands that are rounded, in float
arithmetic and with gradients.

    quantizer(product, x, kernel)       the product (`models/products.py`)
    quantizer.kernel(product, kernel)   the kernel of a product that others compute,
    quantizer.rounding(product)         and what rounds the rows that it is multiplied with
    quantizer.rows_of(table, index)     rows of an embedding
    quantizer.simulated                 whether it imitates the arithmetic that it is about

What such a layer is exported as is in `stored.py`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lissom.compression.quantization import products
from lissom.compression.quantization.products import hadamard
from lissom.compression.quantization.ranges import KINDS
from lissom.compression.quantization.rounding import LEAST, initial_scale, with_learned_scale
from lissom.compression.quantization.rules import LayerRule
from lissom.compression.quantization.scaling import Scaled, quantize, scale_shape, spread
from lissom.compression.quantization.stored import Packed, Stored
from lissom.models.products import Dense, Depthwise, Quantizer, leading
from lissom.models.variables import Param


class Fake(Quantizer):
    """ValueError where groups do not divide the kernel, or the product has no form that the rule needs."""

    simulated = True

    def __init__(self, rule: LayerRule, kernel: jax.Array, product: Any):
        self.rule, weights, activations = rule, rule.weights, rule.activations
        axes = product.kernel_axes(kernel.ndim)
        if rule.gradients is not None and product.stack_axis is not None:
            raise ValueError("experts and depthwise convolutions take rounded weights and activations, not 'gradients'")
        if weights.operand.rotation and kernel.shape[axes[-1]] % weights.operand.rotation:
            raise ValueError(
                f"rotation={weights.operand.rotation} does not divide axis {axes[-1]} of {list(kernel.shape)}"
            )
        of_kernel = scale_shape(kernel.shape, weights.scheme.per, axes)
        if activations is not None:
            # Channels of activations lie along the same axis.
            scale_shape(kernel.shape, activations.scheme.per, axes)
            if activations.exact_first and not isinstance(product, Dense):
                raise ValueError("exact_first is of tokens [B, T, ...]: of dense layers, and no others")
            if isinstance(product, Depthwise) and not isinstance(activations.scheme.per, str):
                raise ValueError("windows of a depthwise convolution cut groups of activations apart: take per='row'")
        learned = None
        if weights.range == "learned":
            turned = hadamard(kernel, axes[-1], weights.operand.rotation)
            first = initial_scale(turned, of_kernel, weights.scheme.numbers)
            learned = Param(first, out_sharding=(None,) * kernel.ndim)
        self.scale = learned
        dynamic = activations is None or activations.range == "dynamic"
        self.range = None if dynamic else KINDS[activations.range](activations)

    def __call__(self, product: Any, x: jax.Array, kernel: Any) -> jax.Array:
        if self.rule.gradients is not None:
            w = kernel[...]
            y = products.product(product.rows(x, w), product.matrix(w), self.rule.three)
            return product.result(y, x, w)
        return product(self.inputs(product, x), self.kernel(product, kernel).astype(x.dtype))

    def kernel(self, product: Any, kernel: Any) -> jax.Array:
        # What is rounded is the float32 kernel, as it is when it is stored.
        w = kernel[...]
        return w if self.observing else self.weights(w, product.kernel_axes(w.ndim))

    def rounding(self, product: Any) -> Callable | None:
        return None if self.rule.activations is None else functools.partial(self.inputs, product)

    def inputs(self, product: Any, x: jax.Array) -> jax.Array:
        """What the product takes of x: rounded; while the range is measured, x as it is, which the range sees."""
        axes = product.x_axes(x.ndim)
        if self.observing:
            self.range.note(self._later(hadamard(x, axes[-1], self.rule.activations.operand.rotation)))
            return x
        return self.activations(x, axes)

    @property
    def observing(self) -> bool:
        return self.range is not None and self.range.observing

    @property
    def bits(self) -> int:
        return self.rule.bits

    def rounding_operations(self, call: Any) -> int:
        """Of one training step: each operand of each product, rounded for it."""
        x, w, d_y = call.rows * call.length, call.weights, call.rows * call.outputs
        of = lambda side, size: 0 if side is None else side.operand.extra_operations(size)
        rule = self.rule
        forward = of(rule.activations, x) + of(rule.weights, w)
        return forward if rule.gradients is None else 2 * (forward + of(rule.gradients, d_y))

    def weights(self, kernel: jax.Array, axes: Sequence[int]) -> jax.Array:
        """Rounded, and turned where the rule turns operands."""
        operand = self.rule.weights.operand
        if self.scale is None:
            return products.rounded(kernel, operand, axes, None)
        turned = hadamard(kernel, axes[-1], operand.rotation)
        return with_learned_scale(turned, self.scale[...], operand.scheme.numbers)

    def activations(self, x: jax.Array, axes: Sequence[int]) -> jax.Array:
        """The same."""
        if self.rule.activations is None:
            return x
        operand, exact = self.rule.activations.operand, self.rule.activations.exact_first
        if self.range is None:
            few = products.rounded(x, operand, axes, None)
        else:
            few = self.range.rounded(self._later(hadamard(x, axes[-1], operand.rotation)))
        return jnp.where(leading(x, exact), hadamard(x, axes[-1], operand.rotation), few) if exact else few

    def _later(self, x: jax.Array) -> jax.Array:
        """x without the tokens that stay exact: zeros, which no largest magnitude minds."""
        exact = self.rule.activations.exact_first
        return jnp.where(leading(x, exact), 0, x) if exact else x

    def rows_of(self, table: Any, index: jax.Array) -> jax.Array:
        """Rows of a table, which are summed over in a product: rounded as they would be there, but not turned;
        while the range is measured as they are."""
        operand, rows = self.rule.weights.operand, table[...][index]
        if self.observing:
            return rows
        if self.scale is not None or operand.scheme.per == "tensor" or operand.scheme.tensor_scale:
            return hadamard(self.weights(table[...], (1,)), 1, operand.rotation)[index]
        axis = (rows.ndim - 1,)
        return hadamard(products.rounded(rows, operand, axis, None), axis[0], operand.rotation)

    def stored(self, kernel: jax.Array, product: Any) -> tuple[Packed, Stored]:
        """What the layer is exported as: (kernel, quantizer)."""
        weights, scaled = self.rule.weights, self.scaled(kernel, product.kernel_axes(kernel.ndim))
        scale = None if self.range is None else self.range.scale
        stored = Stored(self.rule, scale, one_matrix=product.stack_axis is None)
        return Packed(scaled, weights.scheme, product, weights.operand.rotation), stored

    def scaled(self, kernel: jax.Array, axes: Sequence[int]) -> Scaled:
        """Numbers and scales of the weights, as `weights` has them."""
        turned = hadamard(kernel.astype(jnp.float32), axes[-1], self.rule.weights.operand.rotation)
        scheme = self.rule.weights.scheme
        if self.scale is None:
            return quantize(turned, scheme, axes)
        scale = jnp.maximum(self.scale[...], LEAST)
        return Scaled(scheme.numbers.round(turned / spread(scale, turned.shape)), scale)
