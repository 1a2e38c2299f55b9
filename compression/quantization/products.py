"""Matrix products whose operands are rounded to few bits, each of the three of training by its own rule.

    forward         Y = X W         contracted: the inputs
    backward        dX = dY W^T     the outputs
                    dW = X^T dY     the rows

An `Operand` says how one of the two is rounded; operands without one stay as they are. What is summed over together
shares scales: those of a group lie along the contracted axis, so that each product has another quantization of the same
array (a kernel is rounded along its inputs forward and along its outputs backward).

rotation: both operands are multiplied by an orthogonal Hadamard matrix along the contracted axis, block by block, which
spreads what lies far out over the block: (X H)(H^T W) = X W. stochastic: rounding is random, so that the mean of what
is rounded is right; the products of gradients want it (Chmiel et al. 2021, arXiv:2112.10769). The gradient of rounding
itself is `fake`'s, of the operands forward.

The options are those of the design space of training in FP4; which of them cost how much is
`extra_operations`.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lissom.compression.quantization.rounding import GRADIENTS, fake
from lissom.compression.quantization.scaling import Scheme


@dataclass(frozen=True)
class Operand:
    """rotation: the size of a block, a power of two, or 0. through_scale, gradient: as `fake` has them, of operands
    forward."""

    scheme: Scheme
    rotation: int = 0
    stochastic: bool = False
    through_scale: bool = False
    gradient: str = GRADIENTS[0]

    def __post_init__(self):
        if self.gradient not in GRADIENTS:
            raise ValueError(f"gradient={self.gradient!r} must be one of {', '.join(GRADIENTS)}")
        if self.rotation < 0 or self.rotation & (self.rotation - 1):
            raise ValueError(f"rotation={self.rotation} must be a power of two, or 0")

    def extra_operations(self, size: int) -> int:
        """What rounding `size` numbers costs beside the product: of each number its magnitude, the largest so far, a
        quotient and the rounding; a rotation log2(block) sums and a product; a draw and a sum; of
        groups the largest scale."""
        rotated = 1 + int(math.log2(self.rotation)) if self.rotation > 1 else 0
        groups = 0 if isinstance(self.scheme.per, str) else size // self.scheme.per
        return size * (4 + rotated + 2 * self.stochastic) + self.scheme.tensor_scale * groups


@dataclass(frozen=True)
class Rule:
    """Pairs of operands, left and right; an operand None is not rounded. A pair None: the product of the gradient as
    it is with what forward was rounded to, which is what differentiating rounded operands gives."""

    forward: tuple[Operand | None, Operand | None] = (None, None)
    by_inputs: tuple[Operand | None, Operand | None] | None = None
    by_weights: tuple[Operand | None, Operand | None] | None = None

    def __post_init__(self):
        for name in ("forward", "by_inputs", "by_weights"):
            left, right = getattr(self, name) or (None, None)
            blocks = [0 if operand is None else operand.rotation for operand in (left, right)]
            rotations = {block if block > 1 else 0 for block in blocks}
            if len(rotations) > 1:
                raise ValueError(f"{name}: both operands are rotated by the same blocks, or neither is")

    @property
    def draws(self) -> bool:
        """Whether it needs a key."""
        pairs = (self.forward, self.by_inputs or (), self.by_weights or ())
        return any(operand is not None and operand.stochastic for pair in pairs for operand in pair)


def hadamard(x: jax.Array, axis: int, block: int) -> jax.Array:
    """x with each `block` numbers along the axis multiplied by H / sqrt(block), H[i, j] = (-1)^(bits that i and j
    share) (Sylvester's), which is its own transpose and inverse. ValueError where blocks do not divide the axis."""
    if block <= 1:
        return x
    size = x.shape[axis]
    if size % block:
        raise ValueError(f"rotation={block} does not divide axis {axis} of {list(x.shape)}")
    index = np.arange(block)
    shared = np.bitwise_count(index[:, None] & index[None]).astype(np.int64)
    matrix = jnp.asarray((-1.0) ** shared / math.sqrt(block), x.dtype)
    moved = jnp.moveaxis(x, axis, -1)
    blocks = moved.reshape(*moved.shape[:-1], size // block, block)
    return jnp.moveaxis((blocks @ matrix).reshape(moved.shape), -1, axis)


def rounded(x: jax.Array, operand: Operand | None, contracted: Sequence[int], key: jax.Array | None) -> jax.Array:
    """The operand of a product."""
    if operand is None:
        return x
    x = hadamard(x, contracted[-1], operand.rotation)
    uniform = jax.random.uniform(key, x.shape) if operand.stochastic else None
    kinds = {"through_scale": operand.through_scale, "gradient": operand.gradient}
    return fake(x, operand.scheme, contracted, uniform, **kinds)


def key_of(*arrays: jax.Array) -> jax.Array:
    """A random key that is a sum over the bits of the arrays: the same for the same values, another for others."""
    total = jnp.zeros((), jnp.uint32)
    for array in arrays:
        bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(array).astype(jnp.float32), jnp.uint32)
        # Weighed by place, so that a permutation is another array.
        places = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(2654435761) | jnp.uint32(1)
        total = total * jnp.uint32(31) + (bits.reshape(-1) * places).sum(dtype=jnp.uint32)
    return jax.random.key(total)


def product(x: jax.Array, w: jax.Array, rule: Rule, key: jax.Array | None = None) -> jax.Array:
    """x[rows, in] w[in, out] -> [rows, out]. key: of what is drawn; None: `key_of` both. ValueError where an operand
    has not two axes."""
    if x.ndim != 2 or w.ndim != 2:
        raise ValueError(f"a product of {list(x.shape)} and {list(w.shape)}: flatten both to two axes")
    if key is None:
        key = key_of(x, w) if rule.draws else jax.random.key(0)
    return _product(rule, x, w, key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(rule: Rule, x: jax.Array, w: jax.Array, key: jax.Array) -> jax.Array:
    return _pair(rule.forward, x, w, jax.random.split(key, 4)[:2])


def _pair(operands, left: jax.Array, right: jax.Array, keys: jax.Array) -> jax.Array:
    return rounded(left, operands[0], (1,), keys[0]) @ rounded(right, operands[1], (0,), keys[1])


def _filled_pair(operands, left: jax.Array, right: jax.Array, keys: jax.Array) -> jax.Array:
    """The same, where what is summed over need not be a multiple of groups and blocks: rows and outputs are as many as
    they are. Zeros fill the last group, and add nothing."""
    sizes = [1]
    for operand in operands:
        if operand is not None:
            sizes += [max(operand.rotation, 1), *([] if isinstance(operand.scheme.per, str) else [operand.scheme.per])]
    more = -left.shape[1] % math.lcm(*sizes)
    return _pair(operands, jnp.pad(left, ((0, 0), (0, more))), jnp.pad(right, ((0, more), (0, 0))), keys)


def _forward(rule, x, w, key):
    return _product(rule, x, w, key), (x, w, key)


def _backward(rule, kept, d_y):
    x, w, key = kept
    of_x, of_w, by_inputs, by_weights = jax.random.split(key, 4)  # the first two as forward
    x_rounded, pull_x = jax.vjp(lambda x: rounded(x, rule.forward[0], (1,), of_x), x)
    w_rounded, pull_w = jax.vjp(lambda w: rounded(w, rule.forward[1], (0,), of_w), w)
    block = 0 if rule.forward[0] is None else rule.forward[0].rotation
    # What stands behind the rounding is rotated, and so is the gradient by it.
    if rule.by_inputs is None:
        d_x = d_y @ w_rounded.T
    else:
        d_x = hadamard(_filled_pair(rule.by_inputs, d_y, w.T, jax.random.split(by_inputs)), 1, block)
    if rule.by_weights is None:
        d_w = x_rounded.T @ d_y
    else:
        d_w = hadamard(_filled_pair(rule.by_weights, x.T, d_y, jax.random.split(by_weights)), 0, block)
    return *pull_x(d_x.astype(x_rounded.dtype)), *pull_w(d_w.astype(w_rounded.dtype)), None


_product.defvjp(_forward, _backward)
