"""A plain convolutional classifier over one to three axes of space, or of time and space."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.activations import activation as activation_named
from lissom.models.bounds import at_least_one, rate
from lissom.models.ffn import NO_AUX
from lissom.models.linear import Conv, Linear, dropout
from lissom.models.norms import BatchNorm


class ConvNet(nnx.Module):
    """inputs [B, *spatial, C] -> logits [B, classes]: strided convolutions with relu (`activation`), then one product
    (`head`) over the flattened rest, the `features` [B, feature_size]; these are the output of a network without a
    head. `batch_norm` stands between a convolution and its relu, in the place of its bias. With channels (25, 25, 25),
    kernel 5 and stride 2 on 40 samples it is the convolutional baseline of MNIST-1D (Greydanus & Kobak 2020,
    arXiv:2011.14439)."""

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        classes: int,
        channels: Sequence[int],
        kernel: int = 5,
        stride: int = 2,
        dropout: float = 0.0,
        activation: str = "relu",
        batch_norm: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        at_least_one("model", channels=channels, kernel=kernel, stride=stride)
        rate("model", dropout=dropout)
        self.activation = activation_named(activation)
        *spatial, inputs = input_shape
        layers, norms = [], []
        for outputs in channels:
            layers.append(
                Conv(
                    inputs,
                    outputs,
                    (kernel,) * len(spatial),
                    stride=stride,
                    bias=not batch_norm,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
            if batch_norm:
                norms.append(BatchNorm(outputs, rngs=rngs))
            inputs, spatial = outputs, [-(-size // stride) for size in spatial]
        self.convs, self.norms = nnx.List(layers), nnx.List(norms)
        self.feature_size = inputs * math.prod(spatial)
        self.head = Linear(self.feature_size, classes, axes=("mlp", "classes"), rngs=rngs)
        self.dropout = dropout

    def features(self, inputs: jax.Array, *, train: bool = False, key: jax.Array | None = None) -> jax.Array:
        """What the head reads, float32."""
        x = inputs
        for number, conv in enumerate(self.convs):
            x = conv(x)
            x = self.activation(self.norms[number](x, train=train) if self.norms else x)
        return dropout(x.reshape(x.shape[0], -1), self.dropout, key, train).astype(jnp.float32)

    def __call__(self, inputs: jax.Array, *, train: bool = False, key: jax.Array | None = None):
        x = self.features(inputs, train=train, key=key)
        return x if self.head is None else self.head(x), NO_AUX
