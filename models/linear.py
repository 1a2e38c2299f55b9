"""Products with a parameter: dense, embedding, convolution; dropout with an explicit key.

Parameters are float32, the product is computed in `dtype`; kernels are initialised with variance 1 / fan_in.
A layer's `quantizer`, where a transform gave it one, computes the product in its stead (`models/products.py`).
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.products import Convolution, Dense, Depthwise, Logits, Stacked, multiplied
from lissom.models.variables import Param

KERNEL_INIT = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def stacked_kernels(count: int, inputs: int, outputs: int, rngs: nnx.Rngs) -> jax.Array:
    """float32 [count, inputs, outputs]: kernels of as many layers, each drawn as one alone."""
    keys = jax.random.split(rngs.params(), count)
    return jax.vmap(lambda key: KERNEL_INIT(key, (inputs, outputs), jnp.float32))(keys)


class Linear(nnx.Module):
    """y[..., out] = x[..., in] W[in, out] + b[out]; `out` may be several axes, e.g. (heads, head_dim). `kernel_alone`:
    its owner reads the kernel and not the product, which no quantizer can stand for."""

    kernel_alone = False

    def __init__(
        self,
        inputs: int,
        outputs: int | Sequence[int],
        *,
        axes: tuple,
        bias: bool = True,
        dtype: jnp.dtype = jnp.float32,
        init: nnx.Initializer = KERNEL_INIT,
        rngs: nnx.Rngs,
    ):
        shape = (outputs,) if isinstance(outputs, int) else tuple(outputs)
        flat = 1
        for size in shape:
            flat *= size
        kernel = init(rngs.params(), (inputs, flat), jnp.float32).reshape(inputs, *shape)
        self.kernel = Param(kernel, out_sharding=axes)
        self.bias = Param(jnp.zeros(shape), out_sharding=axes[1:]) if bias else None
        self.dtype, self.quantizer = dtype, None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = multiplied(Dense(), x, self.kernel, self.dtype, self.quantizer)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class StackedLinear(nnx.Module):
    """The kernels [experts, inputs, *outputs] of as many products, biases [experts, *outputs] or None. Who brings rows
    to experts multiplies them, rounded by `rounding` where that is not None, by `weights`."""

    kernel_alone = False

    def __init__(
        self,
        inputs: int,
        outputs: int | Sequence[int],
        *,
        experts: int,
        axes: tuple,
        bias: bool = True,
        rngs: nnx.Rngs,
    ):
        shape = (outputs,) if isinstance(outputs, int) else tuple(outputs)
        kernels = stacked_kernels(experts, inputs, math.prod(shape), rngs).reshape(experts, inputs, *shape)
        self.kernel = Param(kernels, out_sharding=("experts", *axes))
        self.bias = Param(jnp.zeros((experts, *shape)), out_sharding=("experts", *axes[1:])) if bias else None
        self.quantizer = None

    @property
    def weights(self) -> jax.Array:
        return self.kernel[...] if self.quantizer is None else self.quantizer.kernel(Stacked(), self.kernel)

    @property
    def rounding(self) -> Callable | None:
        return None if self.quantizer is None else self.quantizer.rounding(Stacked())


class Embedding(nnx.Module):
    """Table[vocab, width]: `multiplier` x rows by index, and logits[..., vocab] = x[..., width] Table^T when tied.

    Entries begin normal with standard deviation 1 / sqrt(width), so that tied logits of a normed x have unit variance.
    multiplier None is sqrt(width) (Vaswani et al. 2017, arXiv:1706.03762, section 3.4): rows enter the stream with unit
    variance, like what layers add to it, whose kernels have variance 1 / fan_in. Rows far below that stand behind the
    first layer's output as little beside much; docs/attention.md has what it costs.
    """

    def __init__(
        self,
        vocab: int,
        width: int,
        *,
        axes: tuple = ("vocab", "embed"),
        multiplier: float | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.table = Param(width**-0.5 * jax.random.normal(rngs.params(), (vocab, width)), out_sharding=axes)
        self.multiplier = width**0.5 if multiplier is None else multiplier
        self.dtype, self.quantizer = dtype, None

    def __call__(self, index: jax.Array) -> jax.Array:
        if self.quantizer is not None:
            return self.quantizer.rows_of(self.table, index).astype(self.dtype) * self.multiplier
        return self.table[...].astype(self.dtype)[index] * self.multiplier

    def logits(self, x: jax.Array) -> jax.Array:
        return multiplied(Logits(), x, self.table, self.dtype, self.quantizer)


class Conv(nnx.Module):
    """Convolution over any number of spatial axes: x[B, *spatial, in] -> y[B, *spatial', out], 'SAME' padding."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: Sequence[int],
        *,
        stride: int = 1,
        bias: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (*kernel, inputs, outputs)
        # One mesh axis at most: XLA's partitioner gave wrong gradients (by as much as their size) for a convolution
        # whose batch, input and output channels lay on three axes (jax 0.11.2, CPU; tests/training/test_loop.py).
        axes = (*("spatial",) * len(kernel), None, "channels")
        init = nnx.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")
        self.kernel = Param(init(rngs.params(), shape, jnp.float32), out_sharding=axes)
        self.bias = Param(jnp.zeros(outputs), out_sharding=("channels",)) if bias else None
        self.stride, self.spatial, self.dtype, self.quantizer = stride, len(kernel), dtype, None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = multiplied(Convolution(self.stride), x, self.kernel, self.dtype, self.quantizer)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class DepthwiseConv(nnx.Module):
    """y[b, i, j, c] = sum_uv W[u, v, c] x[b, i + u - size // 2, j + v - size // 2, c]: each channel of x[B, rows,
    columns, C] alone, 'SAME' padding, an odd `size`. Outside of the grid x is 0, or `border` [C]."""

    def __init__(self, channels: int, size: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        kernel = jax.random.normal(rngs.params(), (size, size, channels)) / size
        self.kernel = Param(kernel, out_sharding=(None, None, "channels"))
        self.size, self.dtype, self.quantizer = size, dtype, None

    def __call__(self, x: jax.Array, border: jax.Array | None = None) -> jax.Array:
        reach, (rows, columns) = self.size // 2, x.shape[1:3]
        padded = jnp.pad(x.astype(self.dtype), ((0, 0), (reach, reach), (reach, reach), (0, 0)))
        if border is not None:
            outside = jnp.pad(jnp.zeros((rows, columns, 1), self.dtype), ((reach, reach), (reach, reach), (0, 0)),
                              constant_values=1)  # fmt: skip
            padded += outside * border.astype(self.dtype)
        return multiplied(Depthwise(), padded, self.kernel, self.dtype, self.quantizer)


def needed(key: jax.Array | None, what: str) -> jax.Array:
    """The key, or ValueError that says what needs one in training."""
    if key is None:
        raise ValueError(f"{what} in training needs a random key: pass key= down the call")
    return key


def dropout(x: jax.Array, rate: float, key: jax.Array | None, train: bool) -> jax.Array:
    """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate), in training only."""
    if rate == 0.0 or not train:
        return x
    keep = jax.random.bernoulli(needed(key, "dropout"), 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
