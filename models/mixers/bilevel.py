"""Bi-level routing attention: regions choose regions, then their tokens attend to each other."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lissom.models.bounds import UnsupportedForm, at_least_one
from lissom.models.context import Context
from lissom.models.ffn import NO_AUX
from lissom.models.linear import DepthwiseConv
from lissom.models.mixers.attention import Attention
from lissom.ops.attention import BlockSparse, attention, masks


class BilevelAttention(Attention):
    """Bi-level routing attention (Zhu et al. 2023, BiFormer, arXiv:2303.08810, section 3.2), on `context.grid`:

        the grid is cut into regions x regions; q_r, k_r: means of q and k over a region, all heads together
        A = q_r k_r^T [regions^2, regions^2]; each region is routed to the `top_k` regions of its row of A
        y = softmax attention over the tokens of these regions, + depthwise convolution of v (`local` wide; 0: none)

    The routing has no gradient; queries and keys learn through the attention. With top_k = regions^2 and local = 0 it
    is full attention. It has no causal form and no cache: a region's mean holds tokens behind the query.
    """

    cache_axes: ClassVar = {}

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        regions: int = 4,
        top_k: int = 4,
        local: int = 5,
        rope_theta: float = 0.0,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
        **kwargs,
    ):
        at_least_one("mixer", regions=regions, top_k=top_k)
        if top_k > regions**2:
            raise ValueError(f"mixer.top_k={top_k} must be at most regions^2 = {regions**2}")
        if local < 0 or (local and local % 2 == 0):
            raise ValueError(f"mixer.local={local} must be 0 or odd")
        super().__init__(width, heads=heads, rope_theta=rope_theta, dtype=dtype, rngs=rngs, **kwargs)
        self.regions, self.top_k = regions, top_k
        channels = self.kv_heads * self.head_dim
        self.near = DepthwiseConv(channels, local, dtype=dtype, rngs=rngs) if local else None

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype):
        """ValueError: there is none."""
        raise ValueError("bilevel attention routes over regions of a whole grid: it has no causal form and no cache.")

    def route(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """q [B, regions^2, n, H, D], k [B, regions^2, n, K, D] -> int32 [B, regions^2, top_k]: the regions that each
        region sees, best first."""
        q, k = (x.astype(jnp.float32).mean(2) for x in (q, k))
        k = jnp.repeat(k, q.shape[2] // k.shape[2], 2)
        affinity = jnp.einsum("brhd,bshd->brs", q, k)
        return jax.lax.top_k(jax.lax.stop_gradient(affinity), self.top_k)[1]

    def attend(self, q, k, v, context: Context, cache: dict | None, key: jax.Array | None):
        """(weighted values [B, T, H, D], no cache, aux)."""
        if not isinstance(context.mask, masks.Full) or context.grid is None or len(context.grid) != 2:
            raise UnsupportedForm("bilevel attention is for images: it needs a context.grid of two dimensions, no mask")
        order = region_order(context.grid, self.regions)
        size = len(order) // self.regions**2
        q_at, k_at, v_at = (x[:, order] for x in (q, k, v))
        apart = lambda x: x.reshape(x.shape[0], self.regions**2, size, *x.shape[2:])
        index = self.route(apart(q_at), apart(k_at))
        # In the order of regions a region is a block: what is routed is a list of blocks for each block.
        mask = BlockSparse(index[:, None], block_q=size, block_k=size)
        y = attention(q_at, k_at, v_at, mask=mask, implementation=self.implementation)[:, np.argsort(order)]
        if self.near is not None:
            near = self.near(v.reshape(v.shape[0], *context.grid, -1)).reshape(v.shape)
            y = y + jnp.repeat(near, q.shape[2] // v.shape[2], 2)
        return y, None, NO_AUX


def region_order(grid: tuple[int, int], regions: int) -> np.ndarray:
    """[T]: the tokens of a grid (rows, columns), which lie row by row, region by region. ValueError where the regions
    do not divide the grid."""
    rows, columns = grid
    if rows % regions or columns % regions:
        raise ValueError(f"mixer.regions={regions} must divide the grid of {rows} x {columns} tokens")
    places = np.arange(rows * columns).reshape(regions, rows // regions, regions, columns // regions)
    return places.transpose(0, 2, 1, 3).reshape(-1)
