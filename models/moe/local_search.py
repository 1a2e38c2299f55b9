"""Permutation-based local search: which expert stands at which output of a gate is learned too, for a while.

A gate's outputs are not alike: leaves of a tree share nodes, a hash names experts that follow one another. So a bad
order of the experts is a bad solution, which gradients alone do not leave (Ibrahim et al. 2023, COMET,
arXiv:2306.02824, section 4). For the first `steps` batches output i is not expert i but the mixture sum_e P_ie f_e,

    P = Sinkhorn(exp(W / t)),    rows and columns sum to one, W begins at 0

with a temperature t that falls geometrically, so that P comes near a permutation; then the nearest permutation, max
sum_i W_i,s(i), is fixed, and output i is expert s(i). While it searches every expert is computed on every token, as
dense as the gates with trees are.

What the paper leaves open, or the authors' code has otherwise: their temperatures fall from 1e-3 to 1e-7, here both
ends are settings. One permutation serves all trees of COMET. No noise is added to W.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lissom.models.moe.routing import Choices, Everyone, Picks, Routing, Slots
from lissom.models.transport import sinkhorn
from lissom.models.variables import Param, Stat

ROUNDS = 30


class LocalSearch(nnx.Module):
    """`soft(routing, shape)` and `hard(routing)`: the routing to experts in place of that to outputs of the gate;
    `searching` says which is in force, `step()` goes on by one training batch (or micro-batch)."""

    def __init__(self, experts: int, *, steps: int, temperatures: tuple[float, float], entropy: float):
        first, last = temperatures
        if not 0 < last <= first:
            raise ValueError(f"ffn.search_temperatures={temperatures} must be two, above 0, the second not above")
        if entropy < 0:
            raise ValueError(f"ffn.search_entropy={entropy} must be at least 0")
        self.steps, self.temperatures, self.entropy = steps, (first, last), entropy
        self.weights = Param(jnp.zeros((experts, experts)), out_sharding=(None, None))
        self.done = Stat(jnp.zeros(()))
        # Of the permutation, as numbers of experts.
        self.order = Stat(jnp.arange(experts, dtype=jnp.float32))

    @property
    def searching(self) -> jax.Array:
        return self.done[...] < self.steps

    @property
    def mixture(self) -> jax.Array:
        """P [outputs, experts], float32."""
        first, last = self.temperatures
        # Behind the search it stays: what is not used must not overflow either, or gradients are 0 x infinity.
        share = jnp.minimum(self.done[...], self.steps - 1) / max(self.steps - 1, 1)
        temperature = first * (last / first) ** share
        return balanced(self.weights[...] / temperature)

    def losses(self) -> dict[str, jax.Array]:
        """`search_entropy` x the mean entropy of the rows of P, while it searches."""
        if not self.entropy:
            return {}
        p = self.mixture
        rows = -jax.scipy.special.xlogy(p, jnp.maximum(p, 1e-30)).sum(-1).mean()
        return {"search_entropy": jnp.where(self.searching, self.entropy * rows, 0.0)}

    def step(self) -> None:
        """To be called once a training batch, after the routing."""
        found = jax.lax.cond(
            self.searching, lambda: nearest(jax.lax.stop_gradient(self.weights[...])), lambda: self.order[...]
        )
        self.order[...], self.done[...] = found, self.done[...] + 1

    def hard(self, routing: Routing) -> Routing:
        """Output i is expert order[i]."""
        order = self.order[...].astype(jnp.int32)
        count = len(order)
        match routing:
            case Choices(experts, _):
                named = (experts >= 0) & (experts < count)
                return routing._replace(experts=jnp.where(named, order[experts % count], count))
            case Everyone(weights):
                return Everyone(jnp.zeros_like(weights).at[..., order].set(weights))
            case Picks(tokens, weights):
                place = lambda rows: jnp.zeros_like(rows).at[order].set(rows)
                return Picks(place(tokens), place(weights))
            case Slots(tokens, dispatch, combine):
                place = lambda slots: jnp.zeros_like(slots).at[:, :, order].set(slots)
                return Slots(tokens, place(dispatch), place(combine))

    def soft(self, routing: Routing, shape: tuple[int, int]) -> Everyone | Slots:
        """Output i is the mixture of experts of row i; shape: (B, T)."""
        p = self.mixture
        if isinstance(routing, Slots):
            # Every expert sees every slot, and what comes of slot s of output i weighs P_ie.
            n, g, outputs, s = routing.dispatch.shape
            spread = lambda slots: slots.reshape(n, g, 1, outputs * s)
            dispatch = jnp.broadcast_to(spread(routing.dispatch), (n, g, outputs, outputs * s))
            combine = spread(routing.combine) * jnp.repeat(p.T, s, 1)
            return Slots(routing.tokens, dispatch, combine)
        return Everyone(dense(routing, shape, len(p)) @ p)


def dense(routing: Choices | Everyone | Picks, shape: tuple[int, int], experts: int) -> jax.Array:
    """The weights [B, T, E] that a routing says."""
    match routing:
        case Choices(chosen, weights):
            return ((chosen[..., None] == jnp.arange(experts)) * weights[..., None]).sum(2)
        case Everyone(weights):
            return weights
        case Picks(tokens, weights):
            rows = jnp.zeros((shape[0] * shape[1], experts))
            return rows.at[tokens, jnp.arange(experts)[:, None]].add(weights).reshape(*shape, experts)


def balanced(scores: jax.Array, rounds: int = ROUNDS) -> jax.Array:
    """exp(scores), its columns and rows divided by their sums in turn; rows sum to one, columns nearly."""
    ones = jnp.ones(len(scores))
    return sinkhorn(-scores, epsilon=1.0, rows=ones, columns=ones, rounds=rounds)


def nearest(weights: jax.Array) -> jax.Array:
    """s, float32 [E], of the permutation with the largest sum_i W_i,s(i)."""
    rows, columns = optax.assignment.hungarian_algorithm(-weights)
    return jnp.zeros(len(weights)).at[rows].set(columns.astype(jnp.float32))
