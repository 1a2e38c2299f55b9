"""Spike-driven self-attention (SDSA) on spikes: sums and masks, no softmax."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.registry import construct
from lissom.models.spiking import ACTIVATIONS
from lissom.models.spiking.spike_maps import RepConv
from lissom.models.spiking.walk import Walk

Fire = Callable[[jax.Array], jax.Array]

# Each with its threshold: 0.5 of a mask, so that one spike opens it (the first Spike-driven Transformer's code); of
# Q (K^T V), which the paper scales by 0.125 and compares with 0.5, that many times 8.
THRESHOLDS = {"sdsa1": 0.5, "sdsa2": 0.5, "sdsa3": 4.0, "sdsa4": 4.0}


def attend(form: str, q: jax.Array, k: jax.Array | None, v: jax.Array, fire: Fire) -> jax.Array:
    """Spikes [T, B, N, H, D] of q, k, v [T, B, N, H, D] in {0, 1}; N tokens, H heads of D channels each.

        sdsa1    q * fire(sum_n k * v)    a channel is let through where keys and values met often enough
        sdsa2    fire(sum_n q) * v        the same without keys
        sdsa3    fire(q (k^T v))          of each head: linear in N; sdsa4 is it with a learned threshold

    Counts are taken in float32, in which they are exact.
    """
    wide = jnp.float32
    if form == "sdsa1":
        return q * fire((k * v).astype(wide).sum(2, keepdims=True)).astype(q.dtype)
    if form == "sdsa2":
        return fire(q.astype(wide).sum(2, keepdims=True)).astype(v.dtype) * v
    met = jnp.einsum("tbnhd,tbnhe->tbhde", k, v, preferred_element_type=wide)
    return fire(jnp.einsum("tbnhd,tbhde->tbnhe", q.astype(wide), met)).astype(q.dtype)


class SpikeAttention(nnx.Module):
    """Spikes x[T, B, rows, columns, C] -> currents of the same shape (Yao et al. 2024, arXiv:2404.03663):

        RepConv(attend(SN(RepConv_q x), SN(RepConv_k x), SN(RepConv_v x)))

    with neurons SN as everywhere, but for those within `attend`: their threshold is their own, learned in "sdsa4", and
    they have no membrane norm, since what they compare is a count. Its scale is part of the threshold.

    threshold: None: THRESHOLDS. Currents here weigh 1, as in the paper's equations; the authors' code halves them in
    front of the neuron, so that its 0.5 at a scale of 0.125 is a threshold of 8. Only sdsa1 (of the first Spike-driven
    Transformer) and sdsa3 are in the authors' code: that the mask of sdsa2 is a sum over tokens, as that of sdsa1, is
    our reading. In both channels are apart anyway, and heads have no part.

    Noted as work: of sdsa1 the pairs of a key and a value that are both 1, of sdsa2 the spikes of q, one addition each;
    of the others such pairs of channels of a head in a token, and D additions for each spike of q. Masks add nothing.
    How many spikes are moved is read off the additions, as if each went to as many outputs as any other, which pairs
    do not: an estimate.
    What is held in place of weights is k^T v, or the mask.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        form: str,
        threshold: float | None,
        neurons: Callable[[int], nnx.Module],
        neuron: str,
        neuron_kwargs: Mapping[str, Mapping[str, Any]] | None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        # The order of an nnx.Dict is lost where a network is split and merged.
        self.names = ("q", "v") if form == "sdsa2" else ("q", "k", "v")
        self.maps = nnx.Dict({name: RepConv(width, width, dtype=dtype, rngs=rngs) for name in self.names})
        self.neurons = nnx.Dict({name: neurons(width) for name in self.names})
        own = neuron if neuron in ACTIVATIONS else neuron.rpartition(":")[2]
        settings = dict((neuron_kwargs or {}).get(own, {})) | {
            "threshold": THRESHOLDS[form] if threshold is None else threshold,
            "learn_threshold": form == "sdsa4",
        }
        settings.pop("membrane_norm", None)
        self.attending = construct(
            ACTIVATIONS, neuron, {own: settings}, "neuron", channels=width, space=(), rngs=rngs
        )  # fmt: skip
        self.project = RepConv(width, width, dtype=dtype, rngs=rngs)
        self.form, self.heads = form, heads

    def __call__(self, x: jax.Array, walk: Walk, binary: bool) -> jax.Array:
        spikes = {}
        for name in self.names:
            spikes[name] = walk.fire(self.neurons[name], walk.map(self.maps[name], x, binary=binary))
        parts = {name: s.reshape(*x.shape[:2], -1, self.heads, x.shape[-1] // self.heads) for name, s in spikes.items()}
        self._note(parts, walk)
        fire = lambda current: walk.fire(self.attending, current)
        y = attend(self.form, parts["q"], parts.get("k"), parts["v"], fire)
        return walk.map(self.project, y.reshape(x.shape))

    def _note(self, parts: Mapping[str, jax.Array], walk: Walk) -> None:
        steps, examples, tokens, heads, channels = parts["q"].shape
        width, wide = heads * channels, {name: part.astype(jnp.float32) for name, part in parts.items()}
        masks = self.form in ("sdsa1", "sdsa2")
        if self.form == "sdsa1":
            additions = (wide["k"] * wide["v"]).sum()
        elif self.form == "sdsa2":
            additions = wide["q"].sum()
        else:
            additions = (wide["k"].sum(-1) * wide["v"].sum(-1)).sum() + wide["q"].sum() * channels
        walk.row(
            additions,
            examples,
            products=tokens * width * (1 if masks else 2 * channels),
            passes=steps,
            weights=width * (1 if masks else channels),
            inputs=len(parts) * tokens * width,
            outputs=width * (1 if masks else tokens),
            binary=True,
        )
