"""Few-shot classification of frozen features, by the support alone or by all queries at once.

Support features [S, D] with labels [S] in 0..ways - 1, query features [Q, D] -> scores [Q, ways], the largest of which
is the answer. Functions of one episode, to be vmapped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lissom.models.transport import sinkhorn


def unit(features: jax.Array) -> jax.Array:
    """Each row divided by its norm; a row of zeros stays, and has a gradient."""
    # The bound lies within the root: the derivative of a norm at zero is no number.
    return features / jnp.sqrt(jnp.maximum(jnp.square(features).sum(-1, keepdims=True), 1e-12))


def centred(support: jax.Array, queries: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both less their common mean, every row then of norm 1: the space of the transductive methods below. (The mean
    reads the queries: it is transductive itself.)"""
    mean = jnp.concatenate([support, queries]).mean(0)
    return unit(support - mean), unit(queries - mean)


def squared_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    """||x_i - y_j||^2 [N, M]."""
    products = jnp.matmul(x, y.T, precision="highest")  # the difference below cancels what both norms share
    return jnp.maximum(jnp.square(x).sum(-1)[:, None] + jnp.square(y).sum(-1)[None] - 2 * products, 0)


def means(weights: jax.Array, features: jax.Array) -> jax.Array:
    """sum_i w_in z_i / sum_i w_in [ways, D]."""
    return (weights.T @ features) / jnp.maximum(weights.sum(0), 1e-9)[:, None]


def prototypes(support: jax.Array, labels: jax.Array, ways: int) -> jax.Array:
    """The mean of each class's support [ways, D] (Snell et al. 2017, arXiv:1703.05175)."""
    return means(jax.nn.one_hot(labels, ways), support)


def nearest_prototype(support: jax.Array, labels: jax.Array, queries: jax.Array, ways: int) -> jax.Array:
    """-||z - c_n||^2."""
    return -squared_distances(queries, prototypes(support, labels, ways))


def k_means(support: jax.Array, labels: jax.Array, queries: jax.Array, ways: int, *, rounds: int = 10) -> jax.Array:
    """Lloyd's algorithm from the prototypes on: every query goes to its nearest centre, the support stays with its
    class, and centres become means of both. What clustering alone gives (Ziko et al. 2021, arXiv:2106.09516, report
    it as a strong baseline of few-shot classification)."""
    fixed, rows = jax.nn.one_hot(labels, ways), jnp.concatenate([support, queries])

    def one(_, centres):
        taken = jax.nn.one_hot((-squared_distances(queries, centres)).argmax(-1), ways)
        return means(jnp.concatenate([fixed, taken]), rows)

    centres = jax.lax.fori_loop(0, rounds, one, means(fixed, support))
    return -squared_distances(queries, centres)


class Clustering(NamedTuple):
    """Settings of `laplacian`. sharpness: what squared distances, at most 4 between rows of norm 1, are multiplied by
    (the paper's energies have none, and its features any norm); strength: lambda; neighbours: of a row in the graph."""

    sharpness: float = 3.0
    strength: float = 0.3
    neighbours: int = 3
    shifted: bool = True
    rounds: int = 20


def affinity(rows: jax.Array, neighbours: int, shifted: bool = True) -> jax.Array:
    """w [n, n]: (a + a^T) / 2, a_ij = 1 where j is among the nearest `neighbours` of i. `shifted`: less its least
    eigenvalue on the diagonal, which makes it positive semidefinite. By no more than that: what stands on the diagonal
    holds each row to what it is already, so that with a bound of the eigenvalue (the largest sum of a row) in its place
    fewer rows change their class."""
    apart = squared_distances(rows, rows) + 1e9 * jnp.eye(len(rows))
    _, near = jax.lax.top_k(-apart, min(neighbours, len(rows) - 1))
    chosen = jax.nn.one_hot(near, len(rows)).sum(1)
    w = (chosen + chosen.T) / 2
    return w - jnp.linalg.eigvalsh(w)[0] * jnp.eye(len(rows)) if shifted else w


def energy(y: jax.Array, centres: jax.Array, rows: jax.Array, w: jax.Array, settings: Clustering) -> jax.Array:
    """sum_in y_in d_in - (lambda / 2) sum_ij w_ij y_i . y_j + sum_in y_in log y_in, d the squared distances times
    `sharpness`."""
    apart = settings.sharpness * squared_distances(rows, centres)
    entropy = (y * jnp.log(jnp.maximum(y, 1e-30))).sum()
    return (y * apart).sum() - settings.strength / 2 * (w * (y @ y.T)).sum() + entropy


def laplacian(
    support: jax.Array,
    labels: jax.Array,
    queries: jax.Array,
    ways: int,
    settings: Clustering | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(log assignments [Q, ways], energies [rounds + 1]): Laplacian-regularised prototypes (Ziko et al. 2021,
    arXiv:2106.09516, of which Ziko et al. 2020, arXiv:2006.15486, is the case without moving prototypes).

    Rows are the support, whose y is fixed to its classes, and the queries. In turn all y at once,

        y_i = softmax(-d_i + lambda sum_j w_ij y_j)

    and the centres, weighted means. Each lowers `energy`: the first minimises a bound of its concave part, which is one
    only where w is positive semidefinite (`affinity` shifts it); the second its distances. lambda = 0 is soft k-means.
    The paper chooses lambda by validation. The defaults here were tried out on episodes of training letters (`glyphs`),
    and are not known to be better than soft k-means.
    """
    settings = settings or Clustering()
    fixed, rows = jax.nn.one_hot(labels, ways), jnp.concatenate([support, queries])
    w = affinity(rows, settings.neighbours, settings.shifted)
    given = len(support)

    def with_support(logits):
        return jnp.concatenate([fixed, jax.nn.softmax(logits[given:])])

    def distances(centres):
        return settings.sharpness * squared_distances(rows, centres)

    def one(state, _):
        y, centres = state
        y = with_support(-distances(centres) + settings.strength * (w @ y))
        centres = means(y, rows)
        return (y, centres), energy(y, centres, rows, w, settings)

    centres = means(fixed, support)
    y = with_support(-distances(centres))
    first = energy(y, centres, rows, w, settings)
    (y, _), energies = jax.lax.scan(one, (y, centres), None, length=settings.rounds)
    return jnp.log(jnp.maximum(y[given:], 1e-30)), jnp.concatenate([first[None], energies])


def transported(
    support: jax.Array,
    labels: jax.Array,
    queries: jax.Array,
    ways: int,
    *,
    epsilon: float = 0.05,
    passes: int | None = None,
    kept: float | None = None,
    slack: float | None = None,
) -> jax.Array:
    """Scores by prototypes that optimal transport has moved to the queries (OpTA of BECLR: Poulakakis-Daktylidis &
    Jamali-Rad 2024, arXiv:2402.02444). In each of the `passes`, with even marginals over prototypes and queries and
    squared distances, divided by the largest, as the cost,

        plan = sinkhorn(cost, epsilon);    c_n <- sum_q plan_nq z_q / sum_q plan_nq

    and at the end kept x the prototype + (1 - kept) c_n. The division, and what None is, are the authors' code's: 5
    passes of one shot and 1 of more, of which 0 and 0.3 of the prototype are kept. Otherwise than there rows are
    centred by the episode (`centred`), and the nearest of the centres answers where a logistic regression does there.

    The even marginal says that every class has as many queries: where that is not so it does harm. `slack`, which is
    not the paper's, makes a penalty of it (`sinkhorn`).
    """
    first, one_shot = prototypes(support, labels, ways), len(support) == ways
    passes = (5 if one_shot else 1) if passes is None else passes
    kept = (0.0 if one_shot else 0.3) if kept is None else kept

    def one(centres, _):
        cost = squared_distances(centres, queries)
        plan = sinkhorn(cost / jnp.maximum(cost.max(), 1e-9), epsilon=epsilon, slack=slack)
        return means(plan.T, queries), None

    centres, _ = jax.lax.scan(one, first, None, length=passes)
    centres = kept * first + (1 - kept) * centres
    return -squared_distances(queries, centres)
