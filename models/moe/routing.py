"""What a gate answers, in one of four forms, and what is said of any of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lissom.models.context import Context


class Choices(NamedTuple):
    """Every token names k experts. experts: int32 [B, T, k], a number outside of 0 <= e < E is no expert; weights:
    float32 [B, T, k] of their outputs."""

    experts: jax.Array
    weights: jax.Array


class Everyone(NamedTuple):
    """Every expert sees every token. weights: float32 [B, T, E]."""

    weights: jax.Array


class Picks(NamedTuple):
    """Every expert names c tokens. tokens: int32 [E, c], numbers b T + t; weights: float32 [E, c] of the outputs."""

    tokens: jax.Array
    weights: jax.Array


class Slots(NamedTuple):
    """Experts see mixtures of tokens. In each of n groups of g tokens, slot s of expert e is sum_g dispatch x, and a
    token gets sum_es combine y.

    tokens: int32 [n, g], which tokens are a group, numbers b T + t; dispatch, combine: float32 [n, g, E, s].
    """

    tokens: jax.Array
    dispatch: jax.Array
    combine: jax.Array


Routing = Choices | Everyone | Picks | Slots


def rows_of(routing: Routing) -> int:
    """How many rows are brought to all experts together; choices that name no expert count."""
    match routing:
        case Choices(experts, _):
            return experts.size
        case Everyone(weights):
            return weights.size
        case Picks(tokens, _):
            return tokens.size
        case Slots(tokens, dispatch, _):
            return dispatch.size // tokens.shape[1]


def counts_of(experts: jax.Array, count: int) -> jax.Array:
    """float32 [count]: how often each expert stands in `experts`."""
    return (experts.reshape(-1, 1) == jnp.arange(count)).sum(0, dtype=jnp.float32)


def used(routing: Routing, shape: tuple[int, int], experts: int) -> jax.Array:
    """float32 [B, E]: how often the tokens of each of B sequences are brought to each expert; of `Everyone` and `Slots`
    the sum of their weights."""
    match routing:
        case Choices(chosen, _):
            return (chosen[..., None] == jnp.arange(experts)).sum((1, 2), dtype=jnp.float32)
        case Everyone(weights):
            return weights.sum(1)
        case Picks(tokens, _):
            sequences = jax.nn.one_hot(tokens // shape[1], shape[0])
            return sequences.sum(1).T
        case Slots(tokens, _, combine):
            flat = (
                jnp.zeros((shape[0] * shape[1], experts))
                .at[tokens.reshape(-1)]
                .set(combine.sum(-1).reshape(-1, experts))
            )
            return flat.reshape(*shape, experts).sum(1)


def domain_use(context: Context, routing: Routing, shape: tuple[int, int], experts: int) -> dict[str, jax.Array]:
    """{"domain_use": float32 [D, E]} (`models/tallies.py`) where the context knows the domains of the B sequences."""
    return {} if context.domains is None else {"domain_use": context.domains.T @ used(routing, shape, experts)}


def load_metrics(counts: jax.Array) -> dict[str, jax.Array]:
    """Of float counts [E]: `load_entropy`, -sum f log f / log E of the shares f (1: all alike; 1 for one expert), and
    `max_load`, E max f (1: all alike; E: all to one)."""
    shares = counts / jnp.maximum(counts.sum(), 1e-9)
    entropy = -jnp.sum(jax.scipy.special.xlogy(shares, shares))
    experts = counts.shape[0]
    # One expert has no other way.
    relative = entropy / jnp.log(float(experts)) if experts > 1 else jnp.ones(())
    return {"load_entropy": relative, "max_load": experts * shares.max()}
