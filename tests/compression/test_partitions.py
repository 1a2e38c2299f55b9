"""Partitions of channels: planted ones are found, scores by hand."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from lissom.compression import partitions

RNG = lambda: np.random.default_rng(0)
PLANTED = np.random.default_rng(1).permutation(np.arange(24) % 4)


def same(parts, others):
    """Whether two partitions have the same parts, under whatever numbers."""
    return ((parts[:, None] == parts) == (others[:, None] == others)).all()


def test_active_channels_are_the_most_active_ones_of_each_token():
    activity = np.array([[4.0, 1, 3, 2], [0, 0, 5, 0]])
    assert partitions.active(activity, 0.5).astype(int).tolist() == [[1, 0, 1, 0], [1, 1, 1, 1]]
    assert partitions.active(activity, 0.01).astype(int).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]


def test_coactivation_counts_tokens():
    found = partitions.coactivation(np.array([[1, 1, 0], [1, 1, 1], [0, 0, 1]], bool))
    assert found.tolist() == [[0, 2, 1], [2, 0, 1], [1, 1, 0]]


def test_a_planted_graph_is_found():
    noise = RNG().random((24, 24))
    weights = np.where(PLANTED[:, None] == PLANTED, 1.5, 0.0) + (noise + noise.T) / 2
    np.fill_diagonal(weights, 0)
    parts = partitions.graph_parts(weights, 4, RNG())
    assert same(parts, PLANTED) and np.bincount(parts).tolist() == [6] * 4


def test_swaps_alone_find_it_and_never_lose_weight():
    weights = (PLANTED[:, None] == PLANTED) - np.eye(24)
    start = partitions.random(24, 4, RNG())
    found = partitions.swapped(weights, start, 4)
    assert partitions.within(weights, found) > partitions.within(weights, start)
    assert np.bincount(found).tolist() == [6] * 4
    # One swap, by hand: of 0-1 and 2-3 the parts 02, 13 keep nothing.
    pairs = np.zeros((4, 4))
    pairs[0, 1] = pairs[1, 0] = pairs[2, 3] = pairs[3, 2] = 1
    assert same(partitions.swapped(pairs, np.array([0, 1, 0, 1]), 2), np.array([0, 0, 1, 1]))


def test_balanced_k_means_finds_clouds_and_stays_balanced():
    clouds = 10 * np.eye(4)[PLANTED] + RNG().standard_normal((24, 4))
    assert same(partitions.balanced_k_means(clouds, 4, RNG()), PLANTED)
    # 20 points in one place and 4 in another cannot be two parts of equal size by distance alone.
    uneven = np.repeat([[0.0], [9.0]], [20, 4], 0)
    parts = partitions.balanced_k_means(uneven, 2, RNG())
    assert np.bincount(parts).tolist() == [12, 12] and len(set(parts[20:])) == 1
    assert np.bincount(partitions.balanced_k_means(np.zeros((6, 2)), 3, RNG())).tolist() == [2, 2, 2]


def test_predictivity_is_average_precision():
    activity, domains = RNG().standard_normal((40, 5)), np.eye(3)[RNG().integers(0, 3, 40)]
    found = partitions.predictivity(activity, domains)
    for d in range(3):
        for channel in range(5):
            expected = average_precision_score(domains[:, d], activity[:, channel])
            assert found[d, channel] == pytest.approx(expected)


def test_specialisation_by_hand():
    """Six channels in two parts; domain 0 is found best by 0, 1, 2 and domain 1 by 3, 4, 0."""
    found = np.array([[9.0, 8, 7, 1, 2, 3], [7, 1, 2, 9, 8, 3]])
    assert partitions.specialisation(found, np.array([0, 0, 0, 1, 1, 1]), 2) == pytest.approx((1 + 2 / 3) / 2)
    assert partitions.specialisation(found, np.array([0, 1, 0, 1, 0, 1]), 2) == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_numbers_and_shares():
    parts = np.array([1, 0, 1, 0])
    assert partitions.numbered(parts, 2).tolist() == [[1, 3], [0, 2]]
    weights = np.array([[0, 1, 2, 0], [1, 0, 0, 3], [2, 0, 0, 0], [0, 3, 0, 0]], float)
    assert partitions.within(weights, parts) == pytest.approx(10 / 12)
