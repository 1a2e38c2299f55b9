"""Few-shot classification of features: hand-made cases, and the energy that falls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.models import transductive
from lissom.models.transductive import Clustering
from scripts.transductive import SLACK

WAYS = 3


def episode(seed=0, shots=2, queries=12, spread=0.8, dims=6):
    """Gaussian classes, queries class by class."""
    keys = jax.random.split(jax.random.key(seed), 3)
    means = jax.random.normal(keys[0], (WAYS, dims))
    labels = lambda each: jnp.repeat(jnp.arange(WAYS), each)
    support = means[labels(shots)] + spread * jax.random.normal(keys[1], (WAYS * shots, dims))
    asked = means[labels(queries)] + spread * jax.random.normal(keys[2], (WAYS * queries, dims))
    return (*transductive.centred(support, asked), labels(shots), labels(queries))


def test_prototypes_by_hand():
    support, labels = jnp.array([[0.0, 0], [2, 0], [0, 4], [0, 8]]), jnp.array([0, 0, 1, 1])
    np.testing.assert_allclose(transductive.prototypes(support, labels, 2), [[1, 0], [0, 6]])
    # (1, 1): 1 from the first mean, 1 + 25 from the second.
    scores = transductive.nearest_prototype(support, labels, jnp.array([[1.0, 1.0]]), 2)
    np.testing.assert_allclose(scores, [[-1, -26]])


def test_centred_rows_are_of_norm_one_around_the_mean():
    support, queries = jnp.array([[1.0, 0]]), jnp.array([[3.0, 0], [2.0, 3]])  # mean (2, 1)
    given, asked = transductive.centred(support, queries)
    np.testing.assert_allclose(given, [[-(0.5**0.5), -(0.5**0.5)]], rtol=1e-6)
    np.testing.assert_allclose(asked, [[0.5**0.5, -(0.5**0.5)], [0, 1]], atol=1e-6)


def test_k_means_by_hand():
    """On a line, the support of class 0 lies at 0 and that of class 1 at 10. The queries 4, 4, 4, 6 go to 0, 0, 0, 1;
    the means become 3 and 8, of which 5.4 is nearer to 3 and 5.6 to 8."""
    support, labels = jnp.array([[0.0], [10.0]]), jnp.array([0, 1])
    queries = jnp.array([[4.0], [4.0], [4.0], [6.0]])
    scores = transductive.k_means(support, labels, queries, 2, rounds=1)
    np.testing.assert_allclose(scores[0], [-(1.0**2), -(4.0**2)], rtol=1e-5)
    assert scores[3].argmax() == 1


def test_k_means_finds_what_a_single_bad_shot_misses():
    """The shot of class 0 lies near class 1's cluster; its own cluster is far away on the other side."""
    rng = np.random.default_rng(0)
    cluster = lambda at: np.array([at, 0.0]) + 0.3 * rng.standard_normal((20, 2))
    queries = jnp.asarray(np.concatenate([cluster(-4.0), cluster(4.0)]))
    support, labels = jnp.array([[3.2, 0.0], [4.5, 0.0]]), jnp.array([0, 1])
    truth = np.repeat([0, 1], 20)
    right = lambda scores: (np.asarray(scores.argmax(-1)) == truth).mean()
    by_means, by_clusters = (
        right(method(support, labels, queries, 2)) for method in (transductive.nearest_prototype, transductive.k_means)
    )
    assert by_clusters == 1.0 and by_means < 0.95
    # The prototype itself moved to its cluster: the score of its middle is nearly 0.
    assert transductive.k_means(support, labels, jnp.asarray(queries), 2)[:20, 0].min() > -8


def test_affinity_is_symmetric_and_positive_semidefinite_once_shifted():
    rows = episode()[1]
    plain, shifted = (transductive.affinity(rows, 3, flag) for flag in (False, True))
    np.testing.assert_allclose(plain, plain.T)
    assert np.diag(plain).max() == 0 and plain.sum() == 3 * len(rows)
    assert np.linalg.eigvalsh(plain).min() < -0.5
    np.testing.assert_allclose(np.linalg.eigvalsh(shifted).min(), 0, atol=1e-4)


def test_a_larger_shift_holds_rows_to_their_class(monkeypatch):
    """Queries of 40 episodes that end in another class than that of the nearest prototype: fewer of them where the
    largest sum of a row stands in the place of the least eigenvalue."""
    settings = Clustering(sharpness=10.0, strength=1.0)

    def moved():
        counts = []
        for seed in range(40):
            support, queries, labels, _ = episode(seed)
            logits, _ = transductive.laplacian(support, labels, queries, WAYS, settings)
            first = transductive.nearest_prototype(support, labels, queries, WAYS).argmax(-1)
            counts.append(int((logits.argmax(-1) != first).sum()))
        return sum(counts)

    least, plain = moved(), transductive.affinity

    def bounded(rows, neighbours, shifted):
        w = plain(rows, neighbours, False)
        return w + w.sum(1).max() * jnp.eye(len(rows))

    monkeypatch.setattr(transductive, "affinity", bounded)
    assert moved() < 0.8 * least


@pytest.mark.parametrize("strength", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_energy_falls_every_step_once_shifted(seed, strength):
    support, queries, labels, _ = episode(seed)
    settings = Clustering(strength=strength, rounds=30)
    _, energies = transductive.laplacian(support, labels, queries, WAYS, settings)
    steps = np.diff(np.asarray(energies))
    assert (steps <= 1e-3).all(), steps.max()
    assert energies[-1] < energies[0] - 1e-3


def test_energy_may_rise_without_the_shift():
    """Two rows, each the other's neighbour, that want to be what the other is: they swap for ever."""
    support, labels = jnp.array([[1.0, 0.0], [-1.0, 0.0]]), jnp.array([0, 1])
    rows = jnp.array([[0.1, 1.0], [-0.1, 1.0]])
    energies = {}
    for shifted in (False, True):
        settings = Clustering(sharpness=2.0, strength=30.0, neighbours=1, shifted=shifted, rounds=12)
        energies[shifted] = np.asarray(transductive.laplacian(support, labels, rows, 2, settings)[1])
    assert np.diff(energies[False]).max() > 1.0
    assert np.diff(energies[True]).max() <= 1e-3


def test_energy_by_hand():
    """Two rows, one centre a class at 0 and 1; y = (3/4, 1/4) and (0, 1); w_12 = w_21 = 1."""
    y, centres, rows = jnp.array([[0.75, 0.25], [0.0, 1.0]]), jnp.array([[0.0], [1.0]]), jnp.array([[0.5], [1.0]])
    w = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    distances = 0.75 * 0.25 + 0.25 * 0.25 + 0.0 + 0.0  # (1/2)^2 to both, then 1 x 0
    pairs = 2 * (0.75 * 0 + 0.25 * 1)
    entropy = 0.75 * np.log(0.75) + 0.25 * np.log(0.25)
    settings = Clustering(sharpness=2.0, strength=0.6)
    expected = 2 * distances - 0.3 * pairs + entropy
    np.testing.assert_allclose(transductive.energy(y, centres, rows, w, settings), expected, rtol=1e-6)


def test_laplacian_without_graph_is_soft_k_means():
    """One round by hand: y = softmax(-d), the means weighted by y and the support, y again."""
    support, queries, labels, _ = episode(1)
    settings = Clustering(sharpness=10.0, strength=0.0, rounds=1)
    logits, _ = transductive.laplacian(support, labels, queries, WAYS, settings)
    apart = lambda centres: 10 * np.square(np.asarray(queries)[:, None] - centres[None]).sum(-1)
    soft = lambda d: np.exp(-d) / np.exp(-d).sum(1, keepdims=True)
    fixed = np.eye(WAYS)[np.asarray(labels)]
    first = np.stack([np.asarray(support)[np.asarray(labels) == n].mean(0) for n in range(WAYS)])
    weights = np.concatenate([fixed, soft(apart(first))])
    rows = np.concatenate([support, queries])
    second = weights.T @ rows / weights.sum(0)[:, None]
    # The round begins with y of the first centres, again, since nothing but the graph could have changed it.
    np.testing.assert_allclose(np.exp(logits), soft(apart(first)), rtol=1e-4)
    two, _ = transductive.laplacian(support, labels, queries, WAYS, settings._replace(rounds=2))
    np.testing.assert_allclose(np.exp(two), soft(apart(second)), rtol=1e-3)


def test_transport_moves_prototypes_to_the_queries():
    """A query cluster a class, each shot off by the same vector: the moved prototypes are the clusters' means."""
    rng = np.random.default_rng(0)
    centres = np.array([[-3.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    queries = jnp.asarray((centres[:, None] + 0.2 * rng.standard_normal((3, 15, 2))).reshape(-1, 2))
    support, labels = jnp.asarray(centres + np.array([0.8, -0.8])), jnp.arange(3)
    scores = transductive.transported(support, labels, queries, 3)
    means = np.asarray(queries).reshape(3, 15, 2).mean(1)
    np.testing.assert_allclose(scores, -np.square(np.asarray(queries)[:, None] - means[None]).sum(-1), atol=0.1)
    # Of more shots than one, 0.3 of the prototype stays.
    twice, both = jnp.concatenate([support, support]), jnp.concatenate([labels, labels])
    kept = 0.3 * np.asarray(support) + 0.7 * means
    expected = -np.square(np.asarray(queries)[:, None] - kept[None]).sum(-1)
    np.testing.assert_allclose(transductive.transported(twice, both, queries, 3, passes=5), expected, atol=0.1)
    # What is so by default: five passes and nothing kept of one shot, one pass and 0.3 of more.
    of = lambda passes, kept, *given: transductive.transported(*given, 3, passes=passes, kept=kept)
    np.testing.assert_array_equal(scores, of(5, 0.0, support, labels, queries))
    np.testing.assert_array_equal(transductive.transported(twice, both, queries, 3), of(1, 0.3, twice, both, queries))


def test_transport_does_not_know_units():
    """Of features ten times as large scores are a hundred times as large."""
    rng = np.random.default_rng(1)
    support, queries = (jnp.asarray(rng.standard_normal((n, 4))) for n in (3, 12))
    small, large = (transductive.transported(f * support, jnp.arange(3), f * queries, 3) for f in (1.0, 10.0))
    np.testing.assert_allclose(large, 100 * small, rtol=1e-3, atol=1e-3)


def test_transport_is_wrong_where_classes_are_not_even():
    """All queries lie in one cluster of class 0: the even marginal gives a third of them to each."""
    rng = np.random.default_rng(0)
    queries = jnp.asarray(np.array([-3.0, 0.0]) + 0.2 * rng.standard_normal((15, 2)))
    support, labels = jnp.asarray([[-3.0, 0.0], [3.0, 0.0], [0.0, 4.0]]), jnp.arange(3)
    right = lambda scores: (np.asarray(scores.argmax(-1)) == 0).mean()
    assert right(transductive.nearest_prototype(support, labels, queries, 3)) == 1
    assert right(transductive.transported(support, labels, queries, 3)) < 0.7


def test_shares_of_transport_may_be_a_penalty():
    """Ten queries of class 0, three and two of the others: balanced, some of the ten are given away. Without end the
    penalty is the balanced plan."""
    rng = np.random.default_rng(0)
    support, labels = jnp.asarray([[-3.0, 0.0], [3.0, 0.0], [0.0, 4.0]]), jnp.arange(3)
    asked = np.repeat([0, 1, 2], [10, 3, 2])
    queries = jnp.asarray(np.asarray(support)[asked] + 0.5 * rng.standard_normal((15, 2)))
    scores = {slack: transductive.transported(support, labels, queries, 3, slack=slack) for slack in (None, 0.05, 1e6)}
    right = {slack: (np.asarray(found).argmax(-1) == asked).mean() for slack, found in scores.items()}
    assert right[None] < 0.9 and right[0.05] == 1
    np.testing.assert_allclose(scores[1e6], scores[None], rtol=1e-2, atol=1e-2)


def test_slack_is_for_uneven_queries():
    """Of 100 episodes of five Gaussian classes, one shot: where shares come from a Dirichlet distribution the slack of
    scripts/transductive.py is worth more than ten points of accuracy, and on even ones it costs less than five."""
    rng = np.random.default_rng(0)
    method = {slack: jax.jit(jax.vmap(functools.partial(moved, slack=slack))) for slack in (None, SLACK)}
    accuracy = {}
    for concentration in (None, 2.0):
        supports, queries, asked = [], [], []
        for _ in range(100):
            means = rng.standard_normal((5, 16))
            shares = np.full(5, 0.2) if concentration is None else rng.dirichlet(np.full(5, concentration))
            labels = np.repeat(np.arange(5), 15) if concentration is None else rng.choice(5, 75, p=shares)
            supports.append(means + rng.standard_normal((5, 16)))
            queries.append(means[labels] + rng.standard_normal((75, 16)))
            asked.append(labels)
        given = jax.vmap(transductive.centred)(*(jnp.asarray(part, jnp.float32) for part in (supports, queries)))
        for slack, scores in method.items():
            accuracy[concentration, slack] = (np.asarray(scores(*given)).argmax(-1) == np.array(asked)).mean()
    assert accuracy[2.0, SLACK] > accuracy[2.0, None] + 0.1
    assert accuracy[None, None] > accuracy[None, SLACK] > accuracy[None, None] - 0.05


def moved(support, queries, slack):
    return transductive.transported(support, jnp.arange(5), queries, 5, slack=slack)
