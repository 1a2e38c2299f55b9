"""Bricks: a trained feed-forward layer whose channels lie in groups, of which a token goes through a few.

Zhang et al. 2022, "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts", arXiv:2110.01786; the groups
are the emergent bricks of Xiao et al. 2024, "Configurable Foundation Models", arXiv:2409.02877.
`compression/bricks.py` makes these of a trained network.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.context import Context
from lissom.models.linear import Linear, dropout
from lissom.models.moe.experts import Experts
from lissom.models.moe.forms import activated, inner_of_all
from lissom.models.moe.routing import Choices, counts_of, domain_use, load_metrics
from lissom.models.variables import Frozen, freeze

ROUTERS = ("learned", "centre", "oracle")


class Scores(nnx.Module):
    """x [..., M] -> tanh(x W1 + b1) W2 + b2, float32 [..., E]."""

    def __init__(self, width: int, hidden: int, bricks: int, *, rngs: nnx.Rngs):
        self.inner = Linear(width, hidden, axes=("embed", None), rngs=rngs)
        self.outer = Linear(hidden, bricks, axes=(None, None), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.outer(jnp.tanh(self.inner(x.astype(jnp.float32))))


class Bricked(nnx.Module):
    """A gated feed-forward layer of H = E F channels in E bricks: y = sum f_e(x) over the k bricks of the largest
    scores s_e(x), each as it is. k = E is the layer that it was.

    router:
        learned   s = a small network on x (`Scores`), which was taught the bricks' shares of all activity
        centre    s_e = cosine of x and the mean of the gate's columns of brick e, each at length 1 (the paper's, for
                  layers without a gate, is of the first kernel's)
        oracle    s_e = the sum of |activation| in brick e, for which all are computed: what a router can hope for

    Routers do not learn; the bricks do. `channels` int32 [E, F] says which of the layer's channels they are.
    """

    def __init__(
        self,
        width: int,
        *,
        bricks: int,
        size: int,
        k: int,
        router: str,
        router_width: int,
        rate: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        if router not in ROUTERS:
            raise ValueError(f"router={router!r} is none of {', '.join(ROUTERS)}")
        if not 1 <= k <= bricks:
            raise ValueError(f"k={k} must be at least 1 and at most bricks={bricks}")
        self.experts = Experts(width, size, experts=bricks, gated=True, dtype=dtype, rngs=rngs)
        self.channels = Frozen(jnp.arange(bricks * size, dtype=jnp.int32).reshape(bricks, size))
        self.learned = freeze(Scores(width, router_width, bricks, rngs=rngs)) if router == "learned" else None
        self.centres = Frozen(jnp.zeros((bricks, width))) if router == "centre" else None
        self.k, self.dropout = k, rate

    def scores(self, x: jax.Array) -> jax.Array:
        """float32 [B, T, E]."""
        if self.learned is not None:
            return self.learned(x)
        if self.centres is not None:
            # The length of x changes no order.
            centres = self.centres[...]
            return x.astype(jnp.float32) @ (centres / jnp.linalg.norm(centres, axis=1, keepdims=True)).T
        return self.activity(x)

    def activity(self, x: jax.Array) -> jax.Array:
        """float32 [B, T, E]: the sum of |activation| of each brick."""
        inner = activated(inner_of_all(self.experts.kernels, x.astype(self.experts.dtype)))
        return jnp.abs(inner).sum(-1).astype(jnp.float32)

    def __call__(self, x: jax.Array, context: Context, key: jax.Array | None = None):
        chosen = jax.lax.top_k(self.scores(x), self.k)[1]
        routing = Choices(chosen, jnp.ones(chosen.shape))
        y, _ = self.experts(x, routing, None)
        experts = len(self.channels[...])
        metrics = load_metrics(counts_of(chosen, experts))
        metrics |= domain_use(context, routing, x.shape[:2], experts)
        return dropout(y, self.dropout, key, context.train), {"losses": {}, "metrics": metrics}
