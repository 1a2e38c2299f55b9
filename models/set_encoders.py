"""Set encoders: elements h [B, N, M] -> slots [B, K, M], the same for every order of the elements.

`Pooling` ones sum over the elements, and so give the same for every partition of the set into chunks too (mini-batch
consistency): a set of any size is read in the memory of one chunk, in training as well (`gradient_chunks`). `Attention`
lets elements see each other and needs the whole set at once. Names: `SET_ENCODERS` in models/__init__.py.
"""

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models import NORMS
from lissom.models.block import Block
from lissom.models.bounds import at_least_one
from lissom.models.context import Context
from lissom.models.linear import Linear
from lissom.models.registry import construct
from lissom.models.set_chunks import present as counted
from lissom.models.set_chunks import without_padding
from lissom.models.stack import Stack
from lissom.models.variables import Param
from lissom.ops.attention import masks

State = dict[str, jax.Array]

WEIGHTS = ("softmax", "sigmoid", "slot_sigmoid", "slot_softmax")
POOLINGS = ("mean", "sum", "max")


class Pooling(nnx.Module):
    """An encoder by sums over the elements: `init_state`, then `update` a chunk, then `finish`; a call is the three.

    state = init_state(B, train=..., key=...); state = update(state, h [B, n, M], present [B, n] or None); z [B, K, M] =
    finish(state). `present` says which elements count (None: all). `share(state, h, present)` is what a chunk adds to
    the entries of the state that it names, measured on the scale of that state: of a state that holds the whole set,
    the shares of the chunks of any partition sum to those entries, and their gradients to its gradient. `read` names
    the entries that depend on the elements at all.

    chunk: elements that are in memory at a time, None: the whole set. gradient_chunks: how many of the chunks of a set,
    drawn anew in each training step, have a gradient (`models/set_clusterer.py`); None: all.
    """

    read: ClassVar[tuple[str, ...]]

    def __init__(self, name: str, *, chunk: int | None, gradient_chunks: int | None):
        at_least_one(f"encoder_kwargs.{name}", chunk=chunk, gradient_chunks=gradient_chunks)
        if gradient_chunks is not None and chunk is None:
            raise ValueError(
                f"encoder_kwargs.{name}.gradient_chunks={gradient_chunks} needs chunk: without it the set is one chunk"
            )
        self.chunk, self.gradient_chunks = chunk, gradient_chunks

    def init_state(self, batch: int, *, train: bool = False, key: jax.Array | None = None) -> State:
        """The state of `batch` sets of which nothing was read."""
        raise NotImplementedError

    def update(self, state: State, h: jax.Array, present: jax.Array | None = None) -> State:
        """The state with the elements of one more chunk."""
        raise NotImplementedError

    def share(self, state: State, h: jax.Array, present: jax.Array | None = None) -> State:
        """What these elements have added, or are to add, to entries of `state`."""
        raise NotImplementedError

    def finish(self, state: State) -> jax.Array:
        """Slots [B, K, M]."""
        raise NotImplementedError

    def __call__(
        self, h: jax.Array, sizes: jax.Array | None = None, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        state = self.init_state(h.shape[0], train=train, key=key)
        return self.finish(self.update(state, h, counted(sizes, h.shape[1])))


class UMBC(Pooling):
    """K slots that attend to the elements of a set of any size (Willette et al. 2023, UMBC, arXiv:2208.12401).

        q_k = LayerNorm(slot_k) Wq,   s_ki = q_k . (h_i Wk) / sqrt(D)                               a head
        z_k = LayerNorm(sum_i w(s)_ki (h_i Wv) / sum_i w(s)_ki + q_k)

        weight         w(s)_ki                        sum over
        softmax        exp s_ki                       nothing: attention to the whole set
        sigmoid        sigma(s_ki)                    nothing
        slot_sigmoid   sigma(s_ki) / sum_k sigma      the slots (the Slot Set Encoder, arXiv:2103.01615)
        slot_softmax   exp s_ki / sum_k exp s_ki      the slots (Slot Attention, arXiv:2006.15055)

    Both sums over i run over chunks and are divided at the end, which is what allows a softmax over the set. With
    slots K = outputs and weight softmax this is Set Transformer's pooling by attention (PMA, arXiv:1810.00825).

    slots: K. sampled: slots are mean + softplus(spread) x normal noise, drawn once a set in training (all chunks see
    the same), the mean elsewhere; else they are learned vectors. residual: + q_k.

    The paper has the exponential; that it overflows is left open (the authors' code clips s at 10). Here every weight
    is kept as its logarithm less the largest one so far, of each slot and head, and sums are rescaled when that grows,
    so that no weight over- or underflows as long as the ratio does not. Left open too: where a set has no element, z_k
    is LayerNorm(q_k). The residual is the projected slot, as in the authors' code; `norm` stands for both LayerNorms.
    State: queries [B, K, H, D]; peak [B, K, H], sums weight [B, K, H] and value [B, K, H, D], in float32 at least.
    """

    read = ("peak", "weight", "value")

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        slots: int = 16,
        sampled: bool = False,
        weight: str = "softmax",
        residual: bool = True,
        norm: str = "layernorm",
        norm_kwargs: Mapping | None = None,
        chunk: int | None = None,
        gradient_chunks: int | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__("umbc", chunk=chunk, gradient_chunks=gradient_chunks)
        at_least_one("model", width=width, heads=heads)
        at_least_one("encoder_kwargs.umbc", slots=slots)
        if weight not in WEIGHTS:
            raise ValueError(f"encoder_kwargs.umbc.weight={weight!r} must be one of {', '.join(WEIGHTS)}")
        if width % heads:
            raise ValueError(f"model.width={width} must be a multiple of model.heads={heads}")
        # The sizes of the authors' code: Glorot's bound of learned slots, a narrow Gaussian of sampled ones.
        bound = 0.2 if sampled else (6 / (slots + width)) ** 0.5
        table = jax.random.uniform(rngs.params(), (slots, width), minval=-bound, maxval=bound)
        self.slots = Param(table, out_sharding=("positions", "embed"))
        spread = lambda: jax.random.uniform(rngs.params(), (slots, width), minval=-5.0, maxval=-4.0)
        self.spread = Param(spread(), out_sharding=("positions", "embed")) if sampled else None
        per_head = {"axes": ("embed", "heads", "head_dim"), "dtype": dtype, "rngs": rngs}
        self.slot_norm = construct(NORMS, norm, norm_kwargs, "norm", width=width, rngs=rngs)
        self.q, self.k, self.v = (Linear(width, (heads, width // heads), **per_head) for _ in range(3))
        self.norm = construct(NORMS, norm, norm_kwargs, "norm", width=width, rngs=rngs)
        self.weight, self.residual, self.dtype = weight, residual, dtype

    def init_state(self, batch: int, *, train: bool = False, key: jax.Array | None = None) -> State:
        slots = jnp.broadcast_to(self.slots[...], (batch, *self.slots.shape))
        if self.spread is not None and train:
            if key is None:
                raise ValueError("encoder_kwargs.umbc.sampled needs a random key in training: pass key= down the call")
            slots = slots + jax.nn.softplus(self.spread[...]) * jax.random.normal(key, slots.shape)
        queries = self.q(self.slot_norm(slots.astype(self.dtype)))
        exact = jnp.promote_types(queries.dtype, jnp.float32)
        sums = queries.shape[:-1]
        return {
            "queries": queries,
            # Finite: -inf - -inf, where a set has no element yet, would be NaN.
            "peak": jnp.full(sums, jnp.finfo(exact).min / 2, exact),
            "weight": jnp.zeros(sums, exact),
            "value": jnp.zeros(queries.shape, exact),
        }

    def update(self, state: State, h: jax.Array, present: jax.Array | None = None) -> State:
        logs, values = self._weighed(state, h, present)
        # The result does not depend on the peak, so that its gradient is 0 as a whole: it is left out of every part.
        peak = jnp.maximum(state["peak"], jax.lax.stop_gradient(logs.max(-1)))
        old, new = jnp.exp(state["peak"] - peak), _summed(logs, values, peak)
        weight, value = state["weight"] * old, state["value"] * old[..., None]
        return {**state, "peak": peak, "weight": weight + new["weight"], "value": value + new["value"]}

    def share(self, state: State, h: jax.Array, present: jax.Array | None = None) -> State:
        return _summed(*self._weighed(state, h, present), state["peak"])

    def finish(self, state: State) -> jax.Array:
        seen = state["weight"] > 0
        mean = state["value"] / jnp.where(seen, state["weight"], 1)[..., None]
        z = mean.astype(state["queries"].dtype)
        if self.residual:
            z = z + state["queries"]
        return self.norm(z.reshape(*z.shape[:2], -1))

    def _weighed(self, state, h, present):
        """(log w [B, K, H, n], h Wv [B, n, H, D]) of one chunk."""
        h = without_padding(h, present)
        queries, exact = state["queries"], state["weight"].dtype
        keys, values = self.k(h), self.v(h)
        scores = jnp.einsum("bkhd,bnhd->bkhn", queries, keys, preferred_element_type=exact)
        logs = scores * queries.shape[-1] ** -0.5
        if "sigmoid" in self.weight:
            logs = jax.nn.log_sigmoid(logs)
        if "slot" in self.weight:
            logs = jax.nn.log_softmax(logs, axis=1)
        return logs if present is None else jnp.where(present[:, None, None], logs, -jnp.inf), values


def _summed(logs: jax.Array, values: jax.Array, peak: jax.Array) -> State:
    """Sums over the elements of exp(log w - peak) and of it times the values."""
    weights = jnp.exp(logs - peak[..., None])
    value = jnp.einsum("bkhn,bnhd->bkhd", weights, values.astype(weights.dtype))
    return {"weight": weights.sum(-1), "value": value}


class DeepSets(Pooling):
    """z = LayerNorm(pool_i h_i) [B, 1, M], pool the mean, the sum or the maximum over the set (Zaheer et al. 2017, Deep
    Sets, arXiv:1703.06114): elements meet nowhere but in it.

    The LayerNorm is not the paper's; it keeps the scale of a sum from growing with the set. An empty set gives
    LayerNorm(0). State: count [B]; total [B, M], a sum or the maximum so far, in float32 at least. A maximum is no sum
    of shares, so it takes `chunk` and no `gradient_chunks`.
    """

    read = ("count", "total")

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        pooling: str = "mean",
        norm: str = "layernorm",
        norm_kwargs: Mapping | None = None,
        chunk: int | None = None,
        gradient_chunks: int | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del heads
        super().__init__("deep_sets", chunk=chunk, gradient_chunks=gradient_chunks)
        if pooling not in POOLINGS:
            raise ValueError(f"encoder_kwargs.deep_sets.pooling={pooling!r} must be one of {', '.join(POOLINGS)}")
        if pooling == "max" and gradient_chunks is not None:
            raise ValueError(
                f"encoder_kwargs.deep_sets.gradient_chunks={gradient_chunks} estimates the gradient of a sum over "
                "chunks, and pooling='max' is none"
            )
        self.norm = construct(NORMS, norm, norm_kwargs, "norm", width=width, rngs=rngs)
        self.pooling, self.width, self.dtype = pooling, width, dtype

    def init_state(self, batch: int, *, train: bool = False, key: jax.Array | None = None) -> State:
        del train, key
        exact = jnp.promote_types(self.dtype, jnp.float32)
        start = jnp.finfo(exact).min if self.pooling == "max" else 0
        return {"count": jnp.zeros(batch, exact), "total": jnp.full((batch, self.width), start, exact)}

    def update(self, state: State, h: jax.Array, present: jax.Array | None = None) -> State:
        new = self.share(state, h, present)
        joined = jnp.maximum if self.pooling == "max" else jnp.add
        return {"count": state["count"] + new["count"], "total": joined(state["total"], new["total"])}

    def share(self, state: State, h: jax.Array, present: jax.Array | None = None) -> State:
        exact = state["total"].dtype
        h = without_padding(h, present).astype(exact)
        if self.pooling == "max" and present is not None:
            h = jnp.where(present[..., None], h, jnp.finfo(exact).min)
        count = jnp.full(h.shape[0], h.shape[1], exact) if present is None else present.sum(1).astype(exact)
        return {"count": count, "total": h.max(1) if self.pooling == "max" else h.sum(1)}

    def finish(self, state: State) -> jax.Array:
        seen, total = state["count"][:, None] > 0, state["total"]
        if self.pooling == "max":
            total = jnp.where(seen, total, 0)
        if self.pooling == "mean":
            total = total / jnp.where(seen, state["count"][:, None], 1)
        return self.norm(total.astype(self.dtype))[:, None]


class Attention(nnx.Module):
    """z = PMA_K(blocks(h)): `depth` blocks in which all elements attend to all, then K slots that attend to them (Lee
    et al. 2019, Set Transformer, arXiv:1810.00825, with full attention (SAB) and blocks whose norm comes first).

    The baseline that is not mini-batch consistent: a chunk cannot be encoded before the whole set is there. Memory of
    training grows with N (N^2 where the op keeps its scores).
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        depth: int = 2,
        slots: int = 16,
        norm: str = "layernorm",
        norm_kwargs: Mapping | None = None,
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        at_least_one("encoder_kwargs.attention", depth=depth, slots=slots)
        normed = {"norm": norm, "norm_kwargs": norm_kwargs, "dtype": dtype}
        self.blocks = set_blocks(width, heads=heads, depth=depth, remat=remat, rngs=rngs, **normed)
        self.pool = UMBC(width, heads=heads, slots=slots, rngs=rngs, **normed)

    def __call__(
        self, h: jax.Array, sizes: jax.Array | None = None, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        mask = masks.Full() if sizes is None else masks.Lengths(sizes)
        h, _, _ = self.blocks(without_padding(h, counted(sizes, h.shape[1])), Context(mask=mask, train=train), key=key)
        return self.pool(h, sizes)


def set_blocks(width: int, *, heads: int, depth: int, remat: bool = False, rngs: nnx.Rngs, **settings) -> Stack:
    """`depth` blocks of self-attention that know no positions: what they do to a set does not depend on its order."""
    positionless = {"attention": {"rope_theta": 0.0}}
    make = lambda rngs: Block(width, heads=heads, mixer_kwargs=positionless, rngs=rngs, **settings)
    return Stack([make], depth=depth, remat=remat, rngs=rngs)
