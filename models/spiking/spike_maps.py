"""Maps from spikes to currents that are one convolution each, however many products they are trained as.

    current[N, rows', columns', C'] = map(spikes[N, rows, columns, C], train=...)

BatchNorm of the batch stands between the products in training; with its running statistics it is affine,

    BN(x) = a x + b,    a = scale / sqrt(var + epsilon),    b = bias - a mean,

and the whole map is a convolution with a bias, which `folded` gives. A product of spikes needs additions alone, so the
network that is judged spike-driven is the folded one (`lissom.evaluation.binary_operands`).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.linear import Conv, DepthwiseConv, Linear
from lissom.models.norms import BatchNorm


class SpikeMap(nnx.Module):
    """`size` x `size` and `stride`: those of the convolution that it is."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1):
        self.inputs, self.outputs, self.size, self.stride = inputs, outputs, size, stride

    def folded(self) -> "FoldedMap":
        """What it computes in evaluation, as one convolution."""
        raise NotImplementedError


class FoldedMap(SpikeMap):
    """A convolution with `kernel` [size, size, C, C'] and `bias` [C']. It has no norm, in training neither."""

    def __init__(self, kernel: jax.Array, bias: jax.Array, *, stride: int = 1, dtype: jnp.dtype = jnp.float32):
        size, _, inputs, outputs = kernel.shape
        super().__init__(inputs, outputs, size, stride)
        self.conv = Conv(inputs, outputs, (size, size), stride=stride, bias=True, dtype=dtype, rngs=nnx.Rngs(0))
        self.conv.kernel[...], self.conv.bias[...] = kernel, bias

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        del train
        return self.conv(x)

    def folded(self) -> "FoldedMap":
        return self


class NormedConv(SpikeMap):
    """BN(W x), W a `size` x `size` convolution."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(inputs, outputs, size, stride)
        self.conv = Conv(inputs, outputs, (size, size), stride=stride, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(outputs, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return self.norm(self.conv(x), train=train)

    def folded(self) -> FoldedMap:
        scale, shift = self.norm.affine()
        return FoldedMap(self.conv.kernel[...] * scale, shift, stride=self.stride, dtype=self.conv.dtype)


class DepthwiseSeparable(SpikeMap):
    """BN(P D x): D a depthwise `size` x `size` convolution, P a product over channels.

    Nothing stands between the two, neither neurons nor a norm (as in the authors' code), so that P multiplies numbers.
    Folded they are one dense convolution, W[u, v, i, o] = D[u, v, i] P[i, o].
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        super().__init__(inputs, outputs, size)
        self.depthwise = DepthwiseConv(inputs, size, dtype=dtype, rngs=rngs)
        self.pointwise = Linear(inputs, outputs, axes=(None, "channels"), bias=False, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(outputs, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return self.norm(self.pointwise(self.depthwise(x)), train=train)

    def folded(self) -> FoldedMap:
        scale, shift = self.norm.affine()
        kernel = jnp.einsum("uvi,io->uvio", self.depthwise.kernel[...], self.pointwise.kernel[...] * scale)
        return FoldedMap(kernel, shift, dtype=self.pointwise.dtype)


class RepConv(SpikeMap):
    """BN_2(P D BN_1(E x)): E and P products over channels, D a depthwise 3 x 3 convolution.

    Outside of the grid D sees BN_1(0), what the products of a grid with a border of silent inputs would be there, so
    that the map is one 3 x 3 convolution also at the border (RepVGG's re-parameterization: Ding et al. 2021,
    arXiv:2101.03697):

        W[u, v, i, o] = a_2[o] sum_c E[i, c] a_1[c] D[u, v, c] P[c, o]
        bias[o] = b_2[o] + a_2[o] sum_c b_1[c] (sum_uv D[u, v, c]) P[c, o]

    The paper does not say what BN_1(0) is in training; as in the authors' code it is that of the running statistics,
    here with its gradients. Their code has a third norm behind BN_2, and two behind one another are one.
    """

    def __init__(self, inputs: int, outputs: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        super().__init__(inputs, outputs, 3)
        products = {"axes": (None, "channels"), "bias": False, "dtype": dtype, "rngs": rngs}
        self.expand, self.project = Linear(inputs, inputs, **products), Linear(inputs, outputs, **products)
        self.depthwise = DepthwiseConv(inputs, 3, dtype=dtype, rngs=rngs)
        self.inner_norm, self.norm = BatchNorm(inputs, rngs=rngs), BatchNorm(outputs, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        inner = self.inner_norm(self.expand(x), train=train)
        return self.norm(self.project(self.depthwise(inner, self.inner_norm.affine()[1])), train=train)

    def folded(self) -> FoldedMap:
        scale, shift = self.norm.affine()
        inner_scale, inner_shift = self.inner_norm.affine()
        depthwise, project = self.depthwise.kernel[...], self.project.kernel[...] * scale
        kernel = jnp.einsum("ic,uvc,co->uvio", self.expand.kernel[...] * inner_scale, depthwise, project)
        bias = shift + jnp.einsum("c,uvc,co->o", inner_shift, depthwise, project)
        return FoldedMap(kernel, bias, dtype=self.project.dtype)
