"""Fake quantization: numbers of a format in float32 arithmetic, with gradients by which a network learns to live with
them.

    y = fake(x, scheme, contracted)         y = scale(x) round(x / scale(x))

Rounding has no gradient, and so one is made up: `straight_through` takes round for the identity, and beyond the range
for a constant (Bengio et al. 2013, arXiv:1308.3432). A range that is the largest magnitude is not meant to cut anything
off: what is beyond it, because a scale of few bits was rounded down, keeps its gradient, up to twice the range; what is
further out has met the end of the scale's own format. The scale is taken for a constant, or with
through_scale=True for what it is, the largest magnitude of x times a number (rounded straight through where it has a
format of its own): then the numbers on the edge of the range get the gradient of all that is scaled by them.

`differentiable` replaces the identity by the derivative of a smooth staircase, of an x that lies a share t from the
middle of two neighbouring numbers (-1 at the lower, 1 at the upper) min(|t|^(1/k - 1) / k, 3), k = 5: steep half-way
between two numbers, flat near either (Wang et al. 2025, arXiv:2501.17116, section 3.1).

Learned step sizes (LSQ, Esser et al. 2020, arXiv:1902.08153) learn the scale s itself, whose gradient is, by the same
rule,

    dy/ds = round(x / s) - x / s within the range, outside its end: -largest (unsigned: 0) or largest

times 1 / sqrt(n largest) for n numbers that share it, so that steps of s and of weights are as large, each as a share
of what it changes.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lissom.compression.quantization.formats import Format
from lissom.compression.quantization.scaling import Scheme, over_groups, peaks, scale_shape, scales, spread

LEAST = 1e-12  # of learned scales
GRADIENTS = ("straight_through", "differentiable")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 3, 4))
def straight_through(
    format: Format, x: jax.Array, uniform: jax.Array | None = None, reach: float = 1.0, gradient: str = GRADIENTS[0]
) -> jax.Array:
    """`format.round`, and the derivative of clipping to `reach` times its range; below 0 an unsigned one has none.
    gradient "differentiable": times that of the smooth staircase."""
    del reach, gradient
    return format.round(x, uniform)


@straight_through.defjvp
def _straight_through_jvp(format, reach, gradient, primals, tangents):
    x, uniform = primals
    # x is divided by a scale: what lies on the edge of the range may lie a rounding beyond it.
    furthest = reach * format.largest * (1 + 1e-6)
    inside = (x >= (-furthest if format.signed else 0.0)) & (x <= furthest)
    tangent = tangents[0].astype(jnp.float32)
    if gradient == "differentiable":
        tangent = tangent * staircase_slope(format, x)
    return format.round(x, uniform), jnp.where(inside, tangent, 0.0)


def staircase_slope(format: Format, x: jax.Array, power: float = 5.0, largest: float = 3.0) -> jax.Array:
    """min(|t|^(1/power - 1) / power, largest), t the share from the middle between x's neighbours to one of them. A
    number of the format, and what lies beyond the range, is at its end: 1 / power."""
    low, high = format.round(x, way="down"), format.round(x, way="up")
    step = high - low
    share = jnp.where(step > 0, jnp.abs(2 * x - low - high) / jnp.where(step > 0, step, 1.0), 1.0)
    # Towards the middle the power grows beyond all bounds, and is cut there.
    return jnp.minimum(jnp.maximum(share, 1e-6) ** (1 / power - 1) / power, largest)


@jax.custom_jvp
def _as_given(value: jax.Array, stands_for: jax.Array) -> jax.Array:
    """value, with the gradient of what it stands for."""
    del stands_for
    return value


@_as_given.defjvp
def _as_given_jvp(primals, tangents):
    return primals[0], tangents[1]


def fake(
    x: jax.Array,
    scheme: Scheme,
    contracted: Sequence[int],
    uniform: jax.Array | None = None,
    *,
    through_scale: bool = False,
    gradient: str = GRADIENTS[0],
) -> jax.Array:
    """x's shape and dtype. uniform: numbers in [0, 1), for stochastic rounding."""
    wide = x.astype(jnp.float32)
    peak = peaks(wide, scale_shape(x.shape, scheme.per, contracted))
    scale, reach = jax.lax.stop_gradient(scales(peak, scheme, contracted)[0]), 1.0 if scheme.clip < 1 else 2.0
    if through_scale:
        # What saturates moves with the scale, and not by itself. Rounding moves a scale by less than a factor of 2:
        # one that is further off is the largest or the smallest that its format has, and moves with nothing.
        wanted, reach = scheme.clip * peak / scheme.numbers.largest, 1.0
        scale = _as_given(scale, jnp.where((wanted <= 2 * scale) & (wanted >= scale / 2), wanted, scale))
    scale = spread(scale, x.shape)
    return (scale * straight_through(scheme.numbers, wide / scale, uniform, reach, gradient)).astype(x.dtype)


def at_scale(x: jax.Array, scale: jax.Array, format: Format, gradient: str = GRADIENTS[0]) -> jax.Array:
    """s round(x / s) for a scale that is known before x, and cuts off what is beyond its range."""
    scale = jax.lax.stop_gradient(scale)
    return (scale * straight_through(format, x.astype(jnp.float32) / scale, None, 1.0, gradient)).astype(x.dtype)


def with_learned_scale(x: jax.Array, scale: jax.Array, format: Format, shared: int | None = None) -> jax.Array:
    """s round(x / s) for scales [as x, 1 where they are shared], which are parameters (LSQ). One that a step took to 0
    or below counts as LEAST, with the gradient that it has there. shared: the n of the gradient; None: those of x."""
    shared = x.size // scale.size if shared is None else shared
    factor = 1 / math.sqrt(shared * format.largest)
    scale = spread(_as_given(jnp.maximum(scale, LEAST), factor * scale), x.shape)
    return (scale * straight_through(format, x.astype(jnp.float32) / scale)).astype(x.dtype)


def initial_scale(x: jax.Array, shape: Sequence[int], format: Format) -> jax.Array:
    """What LSQ begins with: 2 mean |x| / sqrt(largest) of those that share a scale [shape]; where all are 0: 1."""
    scale = 2 * over_groups(jnp.mean, jnp.abs(x.astype(jnp.float32)), shape) / math.sqrt(format.largest)
    return jnp.where(scale > 0, scale, 1.0)


def clipped_at(x: jax.Array, largest: jax.Array, format: Format) -> jax.Array:
    """PACT (Choi et al. 2018, arXiv:1805.06085): activations between 0 and a learned `largest`, above 0, in an unsigned
    format; dy/dlargest is 1 where x is beyond it, and 0 elsewhere."""
    if format.signed:
        raise ValueError(f"clipped activations are never below 0: take an unsigned format, not {format.name}")
    wide = x.astype(jnp.float32)
    clipped = jnp.where(wide >= largest, largest, jnp.where(wide <= 0, 0.0, wide))
    step = jax.lax.stop_gradient(largest) / format.largest
    # The gradients are those of clipping; what comes behind it is the identity for them.
    return _as_given(step * format.round(clipped / step), clipped).astype(x.dtype)
