"""The feed-forward layer "moe"."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import at_least_one, rate
from lissom.models.context import Context
from lissom.models.ffn import MLP, SwiGLU
from lissom.models.linear import dropout as dropped_out
from lissom.models.moe import GATES
from lissom.models.moe.experts import Experts
from lissom.models.moe.local_search import LocalSearch
from lissom.models.moe.routing import Routing, domain_use
from lissom.models.registry import construct, resolve, settings_of


class MoE(nnx.Module):
    """y = sum_e w_e(x) f_e(x) + shared(x): a gate brings each token to some of E feed-forward layers.

    gate, gate_kwargs: a name of `models.moe.GATES`, settings under its name. k: experts a token (of `expert_choice` on
        average; `soft` has `slots`).
    experts, expansion, gated: E layers of hidden width expansion x M (x 2/3 if gated, as `SwiGLU`), without biases.
        Fine-grained experts (Dai et al. 2024, DeepSeekMoE, arXiv:2401.06066) are more and narrower, with a larger k.
    shared: so many more experts that every token has, as one layer (the same paper).
    capacity: None drops no choice; c lets an expert take ceil(c N k / E) of the batch's N k choices. The rest is
        dropped (`dropped` is its share), by `with_capacity`, which `priority` goes to.
    buffer: on a mesh with an axis `expert`, how many times their even share devices send each other in one round; a
        layer that is loaded unevenly needs several (`models/moe/devices.py`). Nothing is dropped by it.
    search, search_temperatures, search_entropy: for so many training batches (or micro-batches), which expert stands
        where at the gate is searched (`LocalSearch`).

    The gate computes in float32. aux: the gate's losses, weighted; metrics load_entropy, max_load, dropped, the gate's
    own, and domain_use (`models/tallies.py`) where the context knows domains. Shazeer et al. 2017, arXiv:1701.06538;
    without dropping: Gale et al. 2022, arXiv:2211.15841.
    """

    def __init__(
        self,
        width: int,
        *,
        gate: str = "top_k",
        gate_kwargs: Mapping | None = None,
        experts: int = 8,
        k: int = 2,
        expansion: float = 4.0,
        gated: bool = True,
        shared: int = 0,
        capacity: float | None = None,
        priority: bool = False,
        buffer: float = 1.5,
        search: int = 0,
        search_temperatures: tuple[float, float] = (0.1, 1e-3),
        search_entropy: float = 0.0,
        dropout: float = 0.0,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        at_least_one("ffn", experts=experts, k=k)
        rate("ffn", dropout=dropout)
        if shared < 0:
            raise ValueError(f"ffn.shared={shared} must be at least 0")
        if capacity is not None and not 0 < capacity < math.inf:
            raise ValueError(f"ffn.capacity={capacity} must be above 0, or None: nothing is dropped")
        if not 0 < buffer < math.inf:
            raise ValueError(f"ffn.buffer={buffer} must be above 0")
        hidden = round(expansion * width * 2 / 3 if gated else expansion * width)
        if hidden < 1:
            raise ValueError(f"ffn.expansion={expansion} of a width of {width} leaves no hidden feature")
        given = {"k": k} if "k" in settings_of(resolve(GATES, gate, "gate")) else {}
        self.gate = construct(GATES, gate, gate_kwargs, "gate", width=width, experts=experts, rngs=rngs, **given)
        self.experts = Experts(width, hidden, experts=experts, gated=gated, buffer=buffer, dtype=dtype, rngs=rngs)
        always = SwiGLU if gated else MLP
        self.shared = always(width, expansion=shared * expansion, dtype=dtype, rngs=rngs) if shared else None
        if priority and capacity is None:
            raise ValueError("ffn.priority=True is of what a capacity drops: set ffn.capacity")
        self.capacity, self.priority, self.dropout = capacity, priority, dropout
        if search < 0:
            raise ValueError(f"ffn.search={search} must be at least 0")
        self.search = (
            LocalSearch(experts, steps=search, temperatures=search_temperatures, entropy=search_entropy)
            if search
            else None
        )

    def __call__(self, x: jax.Array, context: Context, key: jax.Array | None = None):
        gate_key, drop_key = (None, None) if key is None else jax.random.split(key)
        routing, aux = self.gate(x.astype(jnp.float32), context, gate_key)
        losses = aux["losses"]
        if self.search is None:
            y, metrics = self.experts(x, routing, self.capacity, self.priority)
        else:
            y, metrics = self._searched(x, routing, context.train)
            losses = {**losses, **(self.search.losses() if context.train else {})}
            if context.train:
                self.search.step()
        chosen = routing if self.search is None else self.search.hard(routing)
        metrics |= domain_use(context, chosen, x.shape[:2], self.experts.down.kernel.shape[0])
        if self.shared is not None:
            y = y + self.shared(x, context)[0]
        y = dropped_out(y, self.dropout, drop_key, context.train)
        return y, {"losses": losses, "metrics": {**aux["metrics"], **metrics}}

    def _searched(self, x: jax.Array, routing: Routing, train: bool) -> tuple[jax.Array, dict]:
        fixed = lambda: self.experts(x, self.search.hard(routing), self.capacity, self.priority)
        if not train:
            return fixed()
        mixed = lambda: self.experts(x, self.search.soft(routing, x.shape[:2]), None)
        return jax.lax.cond(self.search.searching, mixed, fixed)


class Telling(nnx.Module):
    """A mixture that says, outside of training, which experts its tokens chose: the metric `chosen`, int32 [B, T, k] as
    in `Choices`. For gates by which tokens choose."""

    def __init__(self, layer: MoE):
        self.layer = layer

    def __call__(self, x: jax.Array, context: Context, key: jax.Array | None = None):
        routing, _ = self.layer.gate(x.astype(jnp.float32), context, None)
        if self.layer.search is not None:
            routing = self.layer.search.hard(routing)
        y, aux = self.layer(x, context, key)
        return y, {"losses": aux["losses"], "metrics": {**aux["metrics"], "chosen": routing.experts}}
