"""Read-ME: a decoder whose feed-forward layers were carved into experts, with one router in front of all layers.

After Cai et al. 2024, "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design",
arXiv:2410.19123. `compression/read_me.py` makes these of a dense decoder, `training/objectives/router_tuning.py`
teaches the router.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import UnsupportedForm
from lissom.models.context import Context
from lissom.models.ffn import NO_AUX
from lissom.models.linear import Linear, dropout
from lissom.models.moe.experts import Experts
from lissom.models.moe.forms import activated, inner_of_all
from lissom.models.moe.routing import Choices, counts_of, domain_use, load_metrics
from lissom.models.transformer import Transformer
from lissom.models.variables import Frozen
from lissom.ops.attention import masks


class Carved(nnx.Module):
    """A gated feed-forward layer of H channels, of which a token has R + F: y = common(x) + f_e(x) with e the token's
    expert, `context.expert` [B, T].

    common: R channels that every token has. experts: E times F others, which may overlap. `channels` int32 [E, F] and
    `common_channels` int32 [R] say which of the dense layer's they were.

    Where the context compares (`context.compare`), the metrics hold `overlap` [B, T, E]: of the R + F most active
    channels of a token, the share that expert e would compute; a channel that is in no expert is not known, and not
    counted. That costs all experts' inner products.
    """

    def __init__(
        self,
        width: int,
        *,
        channels: int,
        common: int,
        hidden: int,
        experts: int,
        rate: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds = {"bias": False, "dtype": dtype, "rngs": rngs}
        self.gate = Linear(width, common, axes=("embed", "mlp"), **kinds)
        self.up = Linear(width, common, axes=("embed", "mlp"), **kinds)
        self.down = Linear(common, width, axes=("mlp", "embed"), **kinds)
        self.experts = Experts(width, hidden, experts=experts, gated=True, dtype=dtype, rngs=rngs)
        self.common_channels = Frozen(jnp.arange(common, dtype=jnp.int32))
        self.channels = Frozen(jnp.tile(jnp.arange(hidden, dtype=jnp.int32) + common, (experts, 1)))
        self.count, self.dropout = channels, rate

    def __call__(self, x: jax.Array, context: Context, key: jax.Array | None = None):
        if context.expert is None:
            raise UnsupportedForm("layers that Read-ME carved need the experts that its router names")
        inner = jax.nn.silu(self.gate(x)) * self.up(x)
        routing = Choices(context.expert[..., None], jnp.ones((*context.expert.shape, 1)))
        y = self.down(inner) + self.experts(x, routing, None)[0]
        experts = len(self.channels[...])
        metrics = load_metrics(counts_of(routing.experts, experts))
        metrics |= domain_use(context, routing, x.shape[:2], experts)
        if context.compare:
            metrics["overlap"] = self._overlap(x, inner)
        y = dropout(y, self.dropout, key, context.train)
        return y, {"losses": NO_AUX["losses"], "metrics": metrics}

    def _overlap(self, x: jax.Array, common: jax.Array) -> jax.Array:
        active = self.channels.shape[1] + self.common_channels.shape[0]
        inner = activated(inner_of_all(self.experts.kernels, x))
        known = jnp.full((*x.shape[:2], self.count), -1.0).at[..., self.common_channels[...]].set(jnp.abs(common))
        # Copies of a channel drift apart once they are tuned: the most active one speaks for it.
        known = known.at[..., self.channels[...].reshape(-1)].max(jnp.abs(inner).reshape(*x.shape[:2], -1))
        least = jax.lax.top_k(known, active)[0][..., -1:]
        most = (known >= least) & (known >= 0)
        own = most[..., self.channels[...]].sum(-1)
        return (own + most[..., self.common_channels[...]].sum(-1, keepdims=True)) / active


class Router(Transformer):
    """Embedded tokens [B, T, M] -> scores [B, T, E]: a small causal transformer, one for all layers."""

    def __init__(
        self, inputs: int, experts: int, *, width: int, depth: int, heads: int, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.inner = Linear(inputs, width, axes=("embed", None), bias=False, dtype=dtype, rngs=rngs)
        super().__init__(
            width=width, depth=depth, heads=heads, ffn="swiglu", norm="rmsnorm", stack="loop", dtype=dtype, rngs=rngs
        )
        self.scores = Linear(width, experts, axes=("embed", None), bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scores(self.features(self.inner(x), Context(mask=masks.Causal()))[0].astype(jnp.float32))

    def extend(self, x: jax.Array, cache: dict) -> tuple[jax.Array, dict]:
        """The scores of the t next tokens."""
        x, layers = self.continued(self.inner(x), cache["layers"], cache["length"])
        return self.scores(x.astype(jnp.float32)), {"layers": layers, "length": cache["length"] + x.shape[1]}


class PreGated(nnx.Module):
    """A `LanguageModel` of carved layers behind its router: expert(t) = argmax of the scores at t, which the embedded
    tokens up to t decide, one for all layers. So which experts a prompt needs is known before a layer runs.

    No gradient passes the choice: the router learns by `router_tuning` alone, and the embedding not from it.
    """

    period = 1

    def __init__(self, network: nnx.Module, router: Router):
        self.network, self.router = network, router

    def __call__(
        self,
        inputs: jax.Array,
        *,
        domains: jax.Array | None = None,
        train: bool = False,
        key: jax.Array | None = None,
        compare: bool = False,
    ):
        expert = self.scores(inputs).argmax(-1).astype(jnp.int32)
        return self.network(inputs, domains=domains, expert=expert, compare=compare, train=train, key=key)

    def scores(self, inputs: jax.Array) -> jax.Array:
        """[B, T, E] of the router."""
        return self.router(jax.lax.stop_gradient(self.network.embed(inputs)))

    def init_cache(self, batch: int, length: int) -> dict:
        """Of the network and of the router, each for `batch` sequences of at most `length` tokens."""
        layers = self.router.blocks.init_cache(batch, length, self.router.dtype)
        return {
            "network": self.network.init_cache(batch, length),
            "router": {"layers": layers, "length": jnp.zeros(batch, jnp.int32)},
        }

    def extend(self, inputs: jax.Array, cache: dict) -> tuple[jax.Array, dict]:
        """As `LanguageModel.extend`."""
        scores, router = self.router.extend(self.network.embed(inputs), cache["router"])
        expert = scores.argmax(-1).astype(jnp.int32)
        logits, network = self.network.extend(inputs, cache["network"], expert=expert)
        return logits, {"network": network, "router": router}
