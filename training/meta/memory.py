"""The dynamic clustered memory of BECLR: the newest embeddings, cut into partitions that each have a prototype."""

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models import transductive
from lissom.models.transport import sinkhorn
from lissom.models.variables import Stat

LLOYD = 10  # rounds of the k-means that makes the first prototypes
SINKHORN = 10  # rounds of the plan: as many as the authors' code has


class ClusteredMemory(nnx.Module):
    """DyCE (Poulakakis-Daktylidis & Jamali-Rad 2024, arXiv:2402.02444): the last `size` embeddings, rows of norm 1 of
    `width` numbers, first in, first out, in `clusters` partitions (0: in none).

    Until it is full it takes rows as they come. The rows that fill it are followed by k-means over all of it, which
    makes the prototypes and the partitions. From then on rows that come are spread evenly over the prototypes
    (`assigned`), enter with these labels in the place of the oldest, and then each prototype moves to the mean of the
    rows that have its label,

        c_n <- momentum c_n + (1 - momentum) mean of the rows with label n

    but for one that no row is left of, which stays.

    Open in the paper, or other in the authors' code: rows and means are of unit vectors (there rows and means are not,
    the first prototypes are; only directions are ever compared). k-means begins once, from k-means++, and not ten
    times. The memory wraps anywhere (there it is cut at its end). Momentum is 0.9 (the default of their function; their
    training command's is 0).
    """

    def __init__(self, size: int, width: int, *, clusters: int, momentum: float = 0.9, epsilon: float = 0.05):
        self.rows = Stat(jnp.zeros((size, width)))
        self.next = Stat(jnp.zeros((), jnp.int32))  # where the next row goes
        self.filled = Stat(jnp.zeros((), jnp.int32))
        self.labels = Stat(jnp.zeros(size, jnp.int32)) if clusters else None
        self.prototypes = Stat(jnp.zeros((clusters, width))) if clusters else None
        self.size, self.momentum, self.epsilon = size, momentum, epsilon

    def update(self, new: jax.Array, key: jax.Array) -> None:
        """Takes the rows [n, width] of norm 1, n at most the size; the key is for k-means."""
        was_full = self.filled[...] == self.size
        at = (self.next[...] + jnp.arange(len(new))) % self.size
        rows = self.rows[...].at[at].set(new)
        self.rows[...], self.next[...] = rows, (self.next[...] + len(new)) % self.size
        self.filled[...] = jnp.minimum(self.filled[...] + len(new), self.size)
        if self.prototypes is None:
            return
        is_full, centres, labels = self.filled[...] == self.size, self.prototypes[...], self.labels[...]

        def later():
            found = labels.at[at].set(assigned(new, centres, self.epsilon))
            return moved(centres, rows, found, self.momentum), found

        def first():
            return k_means(rows, len(centres), key)

        def before():
            return centres, labels

        found = jax.lax.cond(was_full, later, lambda: jax.lax.cond(is_full, first, before))
        self.prototypes[...], self.labels[...] = found

    def nearest(self, queries: jax.Array, count: int) -> jax.Array:
        """[n, count, width]: for each of the queries [n, width] of norm 1 the `count` rows of largest cosine in the
        partition of its nearest prototype (by cosine, too). All rows are searched where that partition has `count` or
        fewer, and as long as there are no partitions."""
        rows, filled = self.rows[...], self.filled[...]
        alike = jnp.where(jnp.arange(self.size) < filled, queries @ rows.T, -jnp.inf)
        if self.prototypes is not None:
            own = (queries @ transductive.unit(self.prototypes[...]).T).argmax(-1)
            within = (self.labels[...] == own[:, None]) & (filled == self.size)
            enough = within.sum(-1, keepdims=True) > count
            alike = jnp.where(within | ~enough, alike, -jnp.inf)
        return rows[jax.lax.top_k(alike, count)[1]]


def assigned(rows: jax.Array, prototypes: jax.Array, epsilon: float) -> jax.Array:
    """int32 [n]: the prototype of each row [n, D] by optimal transport, in which every prototype has an even share:

        argmax over prototypes of sinkhorn(||row - prototype||, epsilon),  prototypes divided by their norms

    The authors' code exponentiates plus the distance over epsilon, by which a row goes to a far prototype, and raises
    its epsilon of 1e-5 by 0.1 until that does not overflow; the paper's cost is a distance, and so is this one.
    """
    cost = jnp.sqrt(transductive.squared_distances(rows, transductive.unit(prototypes)))
    return sinkhorn(cost, epsilon=epsilon, rounds=SINKHORN).argmax(-1).astype(jnp.int32)


def moved(prototypes: jax.Array, rows: jax.Array, labels: jax.Array, momentum: float) -> jax.Array:
    """momentum c + (1 - momentum) mean of the rows with its label, for each prototype c that any row has the label
    of."""
    members = jax.nn.one_hot(labels, len(prototypes))
    means = momentum * prototypes + (1 - momentum) * transductive.means(members, rows)
    return jnp.where(members.sum(0)[:, None] > 0, means, prototypes)


def k_means(rows: jax.Array, clusters: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(centres [clusters, D], labels int32 [n]) by `LLOYD` rounds of Lloyd's algorithm from the centres of k-means++
    (Arthur & Vassilvitskii 2007): each is a row, drawn by its squared distance to the nearest one before. A centre that
    no row is nearest to stays."""

    def draw(nearest, key):
        # Where every row is a centre already the distances are all 0, and any row will do.
        at = jax.random.categorical(key, jnp.log(nearest + 1e-12))
        centre = rows[at]
        return jnp.minimum(nearest, jnp.square(rows - centre).sum(-1)), centre

    # Before the first all are equally far, and farther than any row is.
    _, centres = jax.lax.scan(draw, jnp.full(len(rows), 1e30), jax.random.split(key, clusters))
    label = lambda centres: transductive.squared_distances(rows, centres).argmin(-1).astype(jnp.int32)
    one = lambda _, centres: moved(centres, rows, label(centres), 0.0)
    centres = jax.lax.fori_loop(0, LLOYD, one, centres)
    return centres, label(centres)
