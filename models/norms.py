"""Normalisation, always computed in float32: the sum of squares of bfloat16 values loses the small ones.

`NORMS` are the per-token norms that a block takes by name; `BatchNorm` belongs to the convolutional networks.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.variables import Param, Stat


class LayerNorm(nnx.Module):
    """y = (x - mean) / sqrt(var + epsilon) * scale + bias over the last axis (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, width: int, *, epsilon: float = 1e-6, bias: bool = True, rngs: nnx.Rngs):
        self.scale = Param(jnp.ones(width), out_sharding=("norm",))
        self.bias = Param(jnp.zeros(width), out_sharding=("norm",)) if bias else None
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide - wide.mean(-1, keepdims=True)
        y = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon) * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + epsilon) * scale over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, *, epsilon: float = 1e-6, rngs: nnx.Rngs):
        self.scale = Param(jnp.ones(width), out_sharding=("norm",))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        y = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        return (y * self.scale[...]).astype(x.dtype)


class NoNorm(nnx.Module):
    """y = x: the control of a norm ablation."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        del width, rngs

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class BatchNorm(nnx.Module):
    """y = (x - mean) / sqrt(var + epsilon) * scale + bias a channel (Ioffe & Szegedy 2015, arXiv:1502.03167).

    In training mean and (biased) variance are the batch's, taken over the *global* batch (the compiler reduces over
    the mesh), and the running values move by 1 - momentum; the running variance is Bessel-corrected, n / (n - 1),
    as the paper's equation for inference has it. In evaluation the running values are used. (They depend on the batch
    differentiably: who normalises others by a batch's statistics has their gradient too.) With momentum 0 they are the
    batch's own mean and biased variance, so that others are normalised just as the batch is.
    """

    def __init__(self, width: int, *, momentum: float = 0.9, epsilon: float = 1e-5, rngs: nnx.Rngs):
        self.scale = Param(jnp.ones(width), out_sharding=("norm",))
        self.bias = Param(jnp.zeros(width), out_sharding=("norm",))
        self.mean = Stat(jnp.zeros(width), out_sharding=("norm",))
        self.var = Stat(jnp.ones(width), out_sharding=("norm",))
        self.momentum, self.epsilon = momentum, epsilon
        self.by_batch: bool | None = None  # whether the batch's own values are used; None: in training

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        wide = x.astype(jnp.float32)
        mean, var = self.mean[...], self.var[...]
        if train if self.by_batch is None else self.by_batch:
            over = tuple(range(x.ndim - 1))
            mean = wide.mean(over)
            var = jnp.square(wide - mean).mean(over)
            count = x.size // x.shape[-1]
            unbiased = var * count / max(count - 1, 1) if self.momentum else var
            self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean
            self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * unbiased
        y = (wide - mean) * jax.lax.rsqrt(var + self.epsilon) * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)

    @property
    def untrained(self) -> bool:
        """Whether the running values are those it began with."""
        return bool((self.mean[...] == 0).all() & (self.var[...] == 1).all())

    def affine(self) -> tuple[jax.Array, jax.Array]:
        """(a, b) of y = a x + b, which it is in evaluation: a = scale / sqrt(var + epsilon), b = bias - a mean."""
        scale = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.epsilon)
        return scale, self.bias[...] - scale * self.mean[...]
