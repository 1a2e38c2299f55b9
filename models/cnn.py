"""A plain convolutional classifier over one to three axes of space, or of time and space."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.activations import activation as activation_named
from lissom.models.bounds import at_least_one, rate
from lissom.models.ffn import NO_AUX
from lissom.models.linear import Conv, Linear, dropout


class ConvNet(nnx.Module):
    """inputs [B, *spatial, C] -> logits [B, classes]: strided convolutions with relu (`activation`), then one product
    over the flattened rest. With channels (25, 25, 25), kernel 5 and stride 2 on 40 samples it is the convolutional
    baseline of MNIST-1D (Greydanus & Kobak 2020, arXiv:2011.14439)."""

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
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        at_least_one("model", channels=channels, kernel=kernel, stride=stride)
        rate("model", dropout=dropout)
        self.activation = activation_named(activation)
        *spatial, inputs = input_shape
        layers = []
        for outputs in channels:
            layers.append(
                Conv(
                    inputs,
                    outputs,
                    (kernel,) * len(spatial),
                    stride=stride,
                    bias=True,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
            inputs, spatial = outputs, [-(-size // stride) for size in spatial]
        self.convs = nnx.List(layers)
        flat = inputs
        for size in spatial:
            flat *= size
        self.head = Linear(flat, classes, axes=("mlp", "classes"), rngs=rngs)
        self.dropout = dropout

    def __call__(self, inputs: jax.Array, *, train: bool = False, key: jax.Array | None = None):
        x = inputs
        for conv in self.convs:
            x = self.activation(conv(x))
        x = dropout(x.reshape(x.shape[0], -1), self.dropout, key, train)
        return self.head(x.astype(jnp.float32)), NO_AUX
