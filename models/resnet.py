"""A small residual network with BatchNorm, over one or two spatial axes."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.activations import activation as activation_named
from lissom.models.bounds import at_least_one
from lissom.models.ffn import NO_AUX
from lissom.models.linear import Conv, Linear
from lissom.models.norms import BatchNorm


class ResidualBlock(nnx.Module):
    """relu(x + BN(conv(relu(BN(conv(x)))))); where shape changes, x goes through a strided 1x1 conv and BN. The relu is
    `activation`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        spatial: int,
        *,
        stride: int,
        activation: Callable[[jax.Array], jax.Array],
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "rngs": rngs}
        self.conv1 = Conv(inputs, outputs, (3,) * spatial, stride=stride, **kinds)
        self.norm1 = BatchNorm(outputs, rngs=rngs)
        self.conv2 = Conv(outputs, outputs, (3,) * spatial, **kinds)
        self.norm2 = BatchNorm(outputs, rngs=rngs)
        changes = stride != 1 or inputs != outputs
        self.project = Conv(inputs, outputs, (1,) * spatial, stride=stride, **kinds) if changes else None
        self.project_norm = BatchNorm(outputs, rngs=rngs) if changes else None
        self.activation = activation

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = self.activation(self.norm1(self.conv1(x), train=train))
        y = self.norm2(self.conv2(y), train=train)
        if self.project is not None:
            x = self.project_norm(self.project(x), train=train)
        return self.activation(x + y)


class ResNet(nnx.Module):
    """inputs [B, *spatial, C] -> logits [B, classes]: a 3-wide stem, `blocks[i]` residual blocks of `widths[i]`
    channels in stage i (stride 2 between stages), mean over space (He et al. 2015, arXiv:1512.03385, section 4.2;
    the shortcut is a projection where the shape changes, the paper's option B)."""

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        classes: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        activation: str = "relu",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        at_least_one("model", widths=widths, blocks=blocks)
        if len(widths) != len(blocks):
            raise ValueError(f"model.widths {tuple(widths)} and model.blocks {tuple(blocks)} must be as long")
        *space, channels = input_shape
        self.stem = Conv(channels, widths[0], (3,) * len(space), dtype=dtype, rngs=rngs)
        self.stem_norm = BatchNorm(widths[0], rngs=rngs)
        self.activation = activation_named(activation)
        shared = {"activation": self.activation, "dtype": dtype, "rngs": rngs}
        layers, inputs = [], widths[0]
        for stage, (outputs, count) in enumerate(zip(widths, blocks, strict=True)):
            for i in range(count):
                stride = 2 if stage and i == 0 else 1
                layers.append(ResidualBlock(inputs, outputs, len(space), stride=stride, **shared))
                inputs = outputs
        self.blocks, self.feature_size = nnx.List(layers), inputs
        self.head = Linear(inputs, classes, axes=("mlp", "classes"), rngs=rngs)

    def features(self, inputs: jax.Array, *, train: bool = False, key: jax.Array | None = None) -> jax.Array:
        """What the head reads [B, feature_size], float32; the output of a network without a head."""
        del key
        x = self.activation(self.stem_norm(self.stem(inputs), train=train))
        for block in self.blocks:
            x = block(x, train=train)
        return x.astype(jnp.float32).mean(tuple(range(1, x.ndim - 1)))

    def __call__(self, inputs: jax.Array, *, train: bool = False, key: jax.Array | None = None):
        x = self.features(inputs, train=train, key=key)
        return x if self.head is None else self.head(x), NO_AUX
