"""How much of attention a selection keeps: recall of mass, error of the output, beside the measured density."""

import functools

import jax
import jax.numpy as jnp

from lissom.models.selectors.base import Offset, Selector
from lissom.models.variables import Parts, merge, split
from lissom.ops.attention import Causal, Mask, attention

Whole = tuple[jax.Array, jax.Array]


def whole_of(q: jax.Array, k: jax.Array, v: jax.Array, offset: Offset = 0) -> Whole:
    """(y, lse) of causal attention in float32: what all selections on the same q, k, v are compared with."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return attention(q, k, v, mask=Causal(offset), return_lse=True)


def quality(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, offset: Offset = 0, whole: Whole | None = None
) -> dict[str, jax.Array]:
    """Of the causal attention of one layer, by head [H]:

        recall = mean over rows of sum_{j listed} a[i, j] = mean exp(lse of the listed keys - lse of all keys)
        error  = |y of the listed keys - y of all keys| / |y of all keys|        (Frobenius norm, over batch and rows)

    q [B, T, H, D], k, v [B, S, K, D]; `whole` is `whole_of` them, None: computed here. Two calls of the op in float32:
    no array [T, S] is made. A row that sees nothing has recall 0.
    """
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    whole, all_mass = whole_of(q, k, v, offset) if whole is None else whole
    part, mass = attention(q, k, v, mask=mask, return_lse=True)
    size = lambda x: jnp.sqrt(jnp.square(x).sum((0, 1, 3)))
    return {"recall": jnp.exp(mass - all_mass).mean((0, 2)), "error": size(part - whole) / size(whole)}


def judged(
    selector: Selector,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    key: jax.Array | None = None,
    raw: tuple | None = None,
    whole: Whole | None = None,
) -> dict[str, jax.Array]:
    """`quality` of a selector on one layer's q, k, v, with the density that it had: {"density", "recall", "error"},
    each [H]."""
    mask, info = selector(q, k, 0, key, raw)
    return {"density": info["per_head"], **quality(q, k, v, mask, whole=whole)}


def judged_by_program(selector: Selector, q, k, v, **options) -> dict[str, jax.Array]:
    """`judged`, compiled: one program for all layers on which a selector has the same settings."""
    graph, *variables = split(selector)
    return _judged(graph, variables, q, k, v, options)


@functools.partial(jax.jit, static_argnums=0)
def _judged(graph, variables, q, k, v, options):
    return judged(merge(Parts(graph, *variables)), q, k, v, **options)
