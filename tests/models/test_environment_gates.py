"""MixER's update by hand: clusters of contexts, their experts, the gate that follows; when it is skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.models.environment_gates import (
    MixerGate,
    SoftmaxGate,
    farthest_points,
    k_means,
    least_squares,
    matching,
    medians,
)
from lissom.models.variables import merge, split

# Three groups of contexts, of 3, 2 and 3 environments, and the group of each.
CONTEXTS = jnp.array([[0.0, 0], [0.2, 0], [0, 0.2], [5, 5], [5.2, 5], [-4, 3], [-4, 3.4], [-4.4, 3]])
GROUPS = np.array([0, 0, 0, 1, 1, 2, 2, 2])


def test_points_far_from_each_other():
    """From (0, 0), the farthest is (5.2, 5); the point farthest from both is (-4.4, 3): 28.4 from the first."""
    np.testing.assert_allclose(farthest_points(CONTEXTS, 3), [[0, 0], [5.2, 5], [-4.4, 3]])


def test_k_means_finds_separated_clusters():
    found = k_means(CONTEXTS, farthest_points(CONTEXTS, 3), 5)
    assert found.labels.tolist() == GROUPS.tolist() and found.whole
    means = [[0.2 / 3, 0.2 / 3], [5.1, 5], [-12.4 / 3, 9.4 / 3]]
    np.testing.assert_allclose(found.centroids, means, rtol=1e-5)


def test_k_means_is_scikit_learns():
    from sklearn.cluster import KMeans

    points = jax.random.normal(jax.random.key(0), (40, 3))
    start = farthest_points(points, 4)
    ours = k_means(points, start, 50)
    theirs = KMeans(4, init=np.asarray(start), n_init=1, max_iter=50, tol=0, algorithm="lloyd").fit(np.asarray(points))
    assert ours.whole and ours.labels.tolist() == theirs.labels_.tolist()
    np.testing.assert_allclose(ours.centroids, theirs.cluster_centers_, rtol=1e-4, atol=1e-5)


def test_a_clustering_that_is_not_whole():
    """An iteration that still moves a point, and a centroid that no point is nearest to."""
    line, start = jnp.array([[0.0], [1.0], [2.0], [3.0], [10.0]]), jnp.array([[0.0], [1.0]])
    # Labels 0 1 1 1 1, means 0 and 4; then 0 0 1 1 1 (2 is as near to both: the first has it) ...
    assert [bool(k_means(line, start, n).whole) for n in (1, 2, 3)] == [False, False, False]
    found = k_means(line, start, 10)
    assert found.whole and found.labels.tolist() == [0, 0, 0, 0, 1]
    empty = k_means(CONTEXTS, jnp.array([[0.0, 0], [5, 5], [100, 100]]), 10)
    assert not empty.whole and empty.centroids[2].tolist() == [100, 100]


def test_medians_by_hand():
    """Of a cluster, over the environments that are known; a mean would be drawn away by the 100."""
    losses = jnp.array([[1.0, 5], [3, 6], [100, 7], [2, 2], [9, 9]])
    known, labels = jnp.array([True, True, True, True, False]), jnp.array([0, 0, 0, 1, 2])
    found = medians(losses, known, labels, 3)
    np.testing.assert_array_equal(found, [[3, 6], [2, 2], [np.nan, np.nan]])


def test_matching_by_hand():
    """Both the first and the second cluster would have expert 1; the first has it. The third takes what is left."""
    table = jnp.array([[3.0, 1.0, 2.0], [5.0, 0.5, 4.0], [0.1, 0.1, 9.0]])
    assert matching(table).tolist() == [1, 2, 0]
    # The worst or an endless loss is still one expert, each expert once.
    assert sorted(matching(jnp.full((3, 3), jnp.inf)).tolist()) == [0, 1, 2]
    assert matching(jnp.array([[jnp.nan, 1.0], [1.0, 1.0]])).tolist() == [1, 0]


def test_least_squares_is_exact_where_it_can_be():
    """Four points in general position, three unknowns and a bias a column: the targets themselves."""
    contexts = jax.random.normal(jax.random.key(0), (4, 3))
    targets = jax.random.normal(jax.random.key(1), (4, 2))
    w = least_squares(contexts, targets)
    np.testing.assert_allclose(contexts @ w[:-1] + w[-1], targets, atol=1e-4)
    # Contexts that are all alike leave W open: the smallest is a half from the feature 1, a half from the bias.
    w = least_squares(jnp.ones((4, 1)), jnp.ones((4, 1)))
    np.testing.assert_allclose(w, [[0.5], [0.5]], rtol=1e-5)


def gate(experts=3, every=1, **settings):
    return MixerGate(2, experts=experts, every=every, rngs=nnx.Rngs(0), **settings)


def table(*best):
    """Losses of 3 experts on the 8 environments, least for the expert that is named of each group."""
    losses = np.full((8, 3), 2.0)
    losses[np.arange(8), np.array(best)[GROUPS]] = 1.0
    return lambda: (jnp.asarray(losses), jnp.ones(8, bool))


def test_an_update_routes_each_context_to_its_clusters_expert():
    mine = gate()
    chosen, weights, aux = mine(CONTEXTS, table(2, 0, 1), True)
    assert chosen.tolist() == [2, 2, 2, 0, 0, 1, 1, 1]
    assert weights.tolist() == [1.0] * 8 and aux["metrics"]["skipped_updates"] == 0
    # The least sum of squares, by numpy.
    targets = np.eye(3)[np.array([2, 0, 1])[GROUPS]]
    expected = np.linalg.lstsq(np.column_stack([CONTEXTS, np.ones(8)]), targets, rcond=None)[0]
    np.testing.assert_allclose(mine.kernel[...], expected, atol=1e-5)


def test_updates_are_every_so_many_training_calls():
    mine, before = gate(every=3), gate(every=3).kernel[...]
    for call in (1, 2):
        mine(CONTEXTS, table(0, 1, 2), True)
        np.testing.assert_array_equal(mine.kernel[...], before, err_msg=f"call {call}")
    mine(CONTEXTS, table(0, 1, 2), False)
    assert mine.calls[...] == 2
    mine(CONTEXTS, table(0, 1, 2), True)
    assert mine.calls[...] == 3 and (mine.kernel[...] != before).any()


@pytest.mark.parametrize("why", ["an empty cluster", "no convergence", "no environment known"])
def test_an_update_is_skipped(why):
    mine = gate(iterations=1 if why == "no convergence" else 20)
    contexts = jnp.zeros((8, 2)) if why == "an empty cluster" else CONTEXTS
    losses, known = table(0, 1, 2)()
    if why == "no environment known":  # of the second group
        known = jnp.asarray(GROUPS != 1)
    before, centroids = mine.kernel[...], mine.centroids[...]
    aux = mine(contexts, lambda: (losses, known), True)[2]
    np.testing.assert_array_equal(mine.kernel[...], before)
    np.testing.assert_array_equal(mine.centroids[...], centroids)
    assert aux["metrics"]["skipped_updates"] == 1 and mine.settled[...] == 0


def test_clusters_go_on_where_they_were():
    """Contexts that move a little keep their clusters' numbers; a skipped update changes nothing of that."""
    mine = gate()
    mine(CONTEXTS, table(0, 1, 2), True)
    first = mine.centroids[...]
    mine(jnp.zeros((8, 2)), table(0, 1, 2), True)
    np.testing.assert_array_equal(mine.centroids[...], first)
    mine(CONTEXTS[::-1] + 0.1, table(0, 1, 2), True)
    np.testing.assert_allclose(mine.centroids[...], first + 0.1, atol=1e-5)
    # 2 of 3 updates found clusters.
    assert mine(CONTEXTS, table(0, 1, 2), False)[2]["metrics"]["skipped_updates"] == pytest.approx(1 / 3)


def test_the_gate_has_no_gradient():
    parts = split(gate())

    def value(contexts):
        _, weights, _ = merge(parts)(contexts, table(0, 1, 2), True)
        return weights.sum()

    np.testing.assert_array_equal(jax.grad(value)(CONTEXTS), 0)


def test_softmax_by_hand():
    mine = SoftmaxGate(2, experts=2, balance=0.5, rngs=nnx.Rngs(0))
    mine.scores.kernel[...], mine.scores.bias[...] = jnp.array([[1.0, 0], [0, 1]]), jnp.array([0.0, jnp.log(3.0)])
    # Scores (0, log 3) -> p = (1/4, 3/4); (log 9, log 3) -> (9/12, 3/12): mean p = (1/2, 1/2), no variation.
    chosen, weights, aux = mine(jnp.array([[0.0, 0.0], [jnp.log(9.0), 0.0]]), None, True)
    assert chosen.tolist() == [1, 0]
    np.testing.assert_allclose(weights, [0.75, 0.75], rtol=1e-6)
    assert aux["losses"]["balance"] == pytest.approx(0, abs=1e-6)
    # Of the first alone: variance (1/4)^2 over mean^2 (1/2)^2 is 1/4.
    aux = mine(jnp.zeros((1, 2)), None, True)[2]
    assert aux["losses"]["balance"] == pytest.approx(0.5 * 0.25, rel=1e-5)
