"""The equation: codes to numbers, times scales, a product. Of integers first the sums of each group, in int32."""

import jax
import jax.numpy as jnp

from lissom.ops.quantized_matmul.decoding import halves, in_order, result_dtype, working_dtype

LOCAL = False


def check(x, codes, scale, x_scale, *, bits: int) -> None:
    """Does everything."""


def run(x, codes, scale, x_scale, *, bits: int) -> jax.Array:
    wide, groups = working_dtype(x, scale), scale.shape[1]
    numbers = in_order(halves(codes, bits), bits)
    of_group = numbers.reshape(len(numbers), groups, -1)
    if x.dtype == jnp.int8:
        rows = x.reshape(*x.shape[:-1], groups, -1)
        sums = jnp.einsum("...gk,ngk->...ng", rows.astype(jnp.int32), of_group.astype(jnp.int32))
        y = (sums.astype(wide) * scale).sum(-1)
    else:
        weights = (of_group.astype(wide) * scale[..., None].astype(wide)).reshape(numbers.shape)
        y = jnp.einsum("...k,nk->...n", x.astype(wide), weights)
    return (y if x_scale is None else x_scale * y).astype(result_dtype(x, scale))
