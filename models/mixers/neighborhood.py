"""Neighbourhood attention: each token sees the nearest ones, in a sequence or on an image's grid."""

import jax
import jax.numpy as jnp

from lissom.models.bounds import UnsupportedForm, at_least_one
from lissom.models.context import Context
from lissom.models.ffn import NO_AUX
from lissom.models.mixers.attention import WindowAttention
from lissom.ops.attention import attention, masks


class NeighborhoodAttention(WindowAttention):
    """`Attention` in which a query sees the `window` keys that are nearest, in each dimension of `context.grid`, or of
    the sequence where there is none (Hassani et al. 2023, arXiv:2204.07143). At a border the window is shifted and
    keeps its size, where `window` attention cuts it. `dilation` takes every d-th key (Hassani & Shi 2022,
    arXiv:2209.15001), `stride` lets neighbours share a window (arXiv:2504.16922); each is one number for all
    dimensions. `masks.Neighbourhood` has the equations.

    Under a causal mask (sequences only) the window ends at the query, and a cache holds the last (window - 1) dilation
    keys and values. A stride is refused there: the leader of the last group is where the sequence ends, so what a token
    sees would change with the tokens behind it.
    """

    def __init__(self, width: int, *, heads: int, window: int = 7, dilation: int = 1, stride: int = 1, **kwargs):
        at_least_one("mixer", window=window, dilation=dilation, stride=stride)
        super().__init__(width, heads=heads, window=window, **kwargs)
        self.dilation, self.stride = dilation, stride

    def attend(self, q, k, v, context: Context, cache: dict | None, key: jax.Array | None):
        """(weighted values, cache, aux)."""
        causal = isinstance(context.mask, masks.Causal)
        if causal and self.stride > 1:
            raise UnsupportedForm(f"mixer.stride={self.stride}: neighborhoods with a stride have no causal form")
        if cache is not None:
            return super().attend(q, k, v, context, cache, key)
        if not causal and not isinstance(context.mask, masks.Full):
            raise UnsupportedForm(f"neighborhood attention takes a causal mask or none, not {context.mask!r:.60}")
        grid = (q.shape[1],) if context.grid is None else context.grid
        if causal and len(grid) > 1:
            raise UnsupportedForm("neighborhood attention on a grid has no causal form.")
        each = lambda value: (value,) * len(grid)
        if causal and self.window * self.dilation > grid[0]:
            # A sequence that is shorter than a whole window: what there is of it.
            classes = jnp.arange(grid[0])[None] % self.dilation
            mask = self.see(context) & masks.Segments(classes)
        else:
            mask = masks.Neighbourhood(grid, each(self.window), each(self.dilation), each(self.stride), each(causal))
        return attention(q, k, v, mask=mask, implementation=self.implementation), None, NO_AUX
