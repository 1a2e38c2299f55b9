"""What a layer may know about the step it is called in: one frozen dataclass, passed down, never stored."""

import dataclasses
from functools import partial
from typing import Any

import jax

from lissom.ops.attention import masks

FULL = masks.Full()


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "segments", "mask", "meta", "tokens", "domains", "expert"],
    meta_fields=["train", "grid", "compare"],
)
@dataclasses.dataclass(frozen=True)
class Context:
    """positions: int32 [B, T] or None (then 0..T-1); segments: int32 [B, T] or None; mask: which keys a query may
    see, an object of `lissom.ops.attention.masks`; train: whether dropout and batch statistics are live (static);
    grid: the image's token grid (rows, columns), None for sequences (static); meta: bool [B, T], which tokens are
    meta-tokens (put there by `data/meta_tokens.py`), None where there are none; tokens: int32 [B, T], the numbers of
    the tokens, None in networks that read none; domains: float32 [B, D], which share of a sequence is of which domain,
    None where that is not known or not counted; expert: int32 [B, T], the expert that a router in front of the network
    named for each token (`models/read_me.py`), and compare: whether layers say how well each would have done (static).
    """

    positions: jax.Array | None = None
    segments: jax.Array | None = None
    mask: Any = FULL
    train: bool = False
    grid: tuple[int, ...] | None = None
    meta: jax.Array | None = None
    tokens: jax.Array | None = None
    domains: jax.Array | None = None
    expert: jax.Array | None = None
    compare: bool = False
