"""A multilayer perceptron, for few numbers in and few out."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.activations import activation as activation_named
from lissom.models.bounds import at_least_one
from lissom.models.ffn import NO_AUX
from lissom.models.linear import Linear


class Perceptron(nnx.Module):
    """inputs [B, ...] -> logits [B, classes], or numbers [B, outputs] where the data has no classes: dense layers of
    `hidden` features with relu (`activation`), then one product (`head`; without it its inputs, the `features` [B,
    feature_size], are the output). Hidden (40, 40) is the network of Finn et al. 2017, arXiv:1703.03400, for
    sinusoids."""

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        classes: int | None = None,
        outputs: int | None = None,
        hidden: Sequence[int] = (40, 40),
        activation: str = "relu",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        at_least_one("model", hidden=hidden)
        if (classes is None) == (outputs is None):
            raise ValueError("model 'mlp' is for data with classes, or with targets of so many numbers")
        self.activation = activation_named(activation)
        sizes = (math.prod(input_shape), *hidden)
        layers = itertools.pairwise(sizes)
        self.layers = nnx.List([Linear(i, o, axes=("embed", "mlp"), dtype=dtype, rngs=rngs) for i, o in layers])
        self.feature_size = sizes[-1]
        self.head = Linear(self.feature_size, classes or outputs, axes=("mlp", "classes"), rngs=rngs)

    def features(self, inputs: jax.Array, *, train: bool = False, key: jax.Array | None = None) -> jax.Array:
        """What the head reads, float32."""
        del train, key
        x = inputs.reshape(len(inputs), -1)
        for layer in self.layers:
            x = self.activation(layer(x))
        return x.astype(jnp.float32)

    def __call__(self, inputs: jax.Array, *, train: bool = False, key: jax.Array | None = None):
        x = self.features(inputs, train=train, key=key)
        return x if self.head is None else self.head(x), NO_AUX
