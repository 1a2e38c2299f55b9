"""Selectors that look at positions alone: strided shards, sink and window, and the random control."""

import numpy as np

from lissom.models.bounds import at_least_one
from lissom.models.selectors.base import StaticSelector, fraction


class Strided(StaticSelector):
    """Heterogeneous strided shards (S2-Attention; Lin et al. 2024, arXiv:2407.17678).

    A query in block i of key-value head h sees the `local` last blocks i - local + 1 .. i, its own included, and every
    block j <= i with

        (j + h step + shift) mod stride = 0        step = max(1, stride // heads)

    with absolute block numbers and h counted over the sparse key-value heads; the query heads of a group share the
    list. So the heads hold different shards, whose union is the whole context when every residue occurs: exactly when
    there are at least `stride` sparse key-value heads. With fewer the constructor raises, unless `gaps` says that they
    are meant or some head is dense.

    stride: None takes the number of sparse key-value heads, the widest that covers. dense_heads: so many of the first
    key-value heads see everything. The paper also keeps whole layers dense: here a pattern of mixers,
    `model.mixer=("attention", "block_sparse")`. Its cache leaves out what a head will never see again; here it keeps
    everything, so that a cached token costs what it costs in attention.
    """

    def __init__(
        self,
        *,
        stride: int | None = None,
        local: int = 1,
        shift: int = 0,
        dense_heads: int = 0,
        gaps: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        at_least_one("selector", stride=stride, local=local)
        sparse = self.kv_heads - dense_heads
        if not 0 <= dense_heads < self.kv_heads:
            raise ValueError(
                f"selector.dense_heads={dense_heads} must be 0 .. {self.kv_heads - 1}, fewer than kv_heads"
            )
        stride = sparse if stride is None else stride
        if sparse < stride and not dense_heads and not gaps:
            raise ValueError(
                f"selector.stride={stride} leaves blocks that no head sees, since there are {sparse} key-value heads: "
                f"take a stride of at most {sparse}, or set gaps=True"
            )
        self.stride, self.local, self.shift, self.dense_heads = stride, local, shift, dense_heads

    def table(self, blocks):
        i, j = np.arange(blocks)[:, None], np.arange(blocks)
        sparse = self.kv_heads - self.dense_heads
        h = np.arange(sparse)[:, None, None]
        step = max(1, self.stride // sparse)
        seen = ((j + h * step + self.shift) % self.stride == 0) | (i - j < self.local)
        return np.concatenate([np.ones((self.dense_heads, blocks, blocks), bool), seen]) & (j <= i)


class AShape(StaticSelector):
    """Sink and window: the `sink` first blocks and the `window` last ones, the query's own included (the A-shape of
    MInference, arXiv:2407.02490, and of its streaming ancestors: Xiao et al. 2023, arXiv:2309.17453). The papers count
    tokens; here whole blocks are listed, so a query sees up to block - 1 keys more at the far end of its window."""

    def __init__(self, *, sink: int = 1, window: int = 2, **kwargs):
        super().__init__(**kwargs)
        at_least_one("selector", window=window)
        if sink < 0:
            raise ValueError(f"selector.sink={sink} must be at least 0")
        self.sink, self.window = sink, window

    def table(self, blocks):
        return sink_and_window(blocks, self.sink, self.window)[None]


class Random(StaticSelector):
    """The control: each head and block of queries sees its own block and others drawn at random, together
    ceil(density x visible blocks). The draw depends on `seed`, head and block only: the same in every call, so that a
    cache sees what the parallel form sees. Layers draw alike."""

    def __init__(self, *, density: float = 0.5, seed: int = 0, **kwargs):
        super().__init__(**kwargs)
        fraction(density=density)
        self.density, self.seed = density, seed

    def table(self, blocks):
        seen = np.tile(np.eye(blocks, dtype=bool), (self.heads, 1, 1))
        for head in range(self.heads):
            for i in range(blocks):
                others = int(np.ceil(self.density * (i + 1) - 1e-9)) - 1
                seen[head, i, np.random.default_rng((self.seed, head, i)).permutation(i)[:others]] = True
        return seen


def sink_and_window(blocks: int, sink: int, window: int) -> np.ndarray:
    """Bool [blocks, blocks], lower triangular: the first `sink` and the last `window` blocks."""
    i, j = np.arange(blocks)[:, None], np.arange(blocks)
    return ((j < sink) | (i - j < window)) & (j <= i)
