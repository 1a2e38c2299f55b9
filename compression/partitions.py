"""Equal parts of the channels of a layer, and how much channels of one part have to do with each other.

A partition is int [n]: the part of each channel, n / count channels in each of `count` parts.

Co-activation graph and parameter clustering: Zhang et al. 2022, MoEfication, arXiv:2110.01786. What a channel detects:
Zhang et al. 2023, Emergent Modularity in Pre-trained Transformers, arXiv:2305.18390.
"""

import numpy as np


def active(activity: np.ndarray, share: float) -> np.ndarray:
    """activity [N, n] -> bool [N, n]: the round(share x n), at least one, most active channels of each token (channels
    of equal activity all, so that it may be more). Networks without a ReLU have no zeros to tell them by."""
    count = max(1, round(share * activity.shape[1]))
    least = np.partition(activity, -count, axis=1)[:, -count, None]
    return activity >= least


def coactivation(active: np.ndarray) -> np.ndarray:
    """bool [N, n] -> float64 [n, n]: how often two channels are active on one token; 0 on the diagonal."""
    ones = active.astype(np.float64)
    together = ones.T @ ones
    np.fill_diagonal(together, 0)
    return together


def random(n: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Equal parts, drawn."""
    return rng.permutation(np.arange(n) % count)


def balanced_k_means(points: np.ndarray, count: int, rng: np.random.Generator, iterations: int = 30) -> np.ndarray:
    """points [n, d] -> a partition of a small sum of squared distances to the parts' means.

    Means and assignments in turns, the assignment to equal parts being the cheapest there is, by the Hungarian method
    (Malinen & Fränti 2014); until nothing moves, or so many times. The first means are points, each drawn by its
    squared distance to those before it (k-means++). O(n^3).
    """
    from scipy.optimize import linear_sum_assignment

    n, size = len(points), len(points) // count
    distances = lambda means: np.square(points[:, None] - means).sum(-1)
    means = points[rng.integers(n)][None]
    while len(means) < count:
        far = distances(means).min(1)
        # Where all points are means already any will do.
        means = np.append(means, points[rng.choice(n, p=far / far.sum() if far.any() else None)][None], 0)
    parts = None
    for _ in range(iterations):
        places = linear_sum_assignment(np.repeat(distances(means), size, axis=1))[1] // size
        if parts is not None and (places == parts).all():
            break
        parts = places
        means = np.stack([points[parts == part].mean(0) for part in range(count)])
    return parts


def graph_parts(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """weights [n, n], symmetric, no diagonal -> a partition that keeps much of their sum within parts.

    It starts as `balanced_k_means` of the rows of the `count` leading eigenvectors of D^-1/2 W D^-1/2, set to length 1
    (Ng et al. 2001), and swaps the two channels whose swap gains most until none gains (Kernighan & Lin 1970). The
    paper has METIS for it.
    """
    degrees = np.maximum(weights.sum(1), 1e-12)
    scaled = weights / np.sqrt(degrees[:, None] * degrees)
    leading = np.linalg.eigh(scaled)[1][:, -count:]
    leading /= np.maximum(np.linalg.norm(leading, axis=1, keepdims=True), 1e-12)
    return swapped(weights, balanced_k_means(leading, count, rng), count)


def swapped(weights: np.ndarray, parts: np.ndarray, count: int) -> np.ndarray:
    """The partition after swaps of two channels, the best one first, until none keeps more weight within parts."""
    parts, each = parts.copy(), np.arange(len(parts))
    to = weights @ np.eye(count)[parts]  # [n, count]: the weight between a channel and a part
    least = 1e-9 * max(1.0, float(weights.max(initial=0)))
    while True:
        moves = to[:, parts] - to[each, parts][:, None]  # [i, j]: what i gains in the part of j
        gains = np.where(parts[:, None] == parts, 0, moves + moves.T - 2 * weights)
        i, j = np.unravel_index(gains.argmax(), gains.shape)
        if gains[i, j] <= least:
            return parts
        change = weights[:, j] - weights[:, i]
        to[:, parts[i]] += change
        to[:, parts[j]] -= change
        parts[i], parts[j] = parts[j], parts[i]


def within(weights: np.ndarray, parts: np.ndarray) -> float:
    """The share of all weight that lies within parts."""
    return float((weights * (parts[:, None] == parts)).sum() / weights.sum())


def predictivity(activity: np.ndarray, domains: np.ndarray) -> np.ndarray:
    """activity [N, n] of N examples and their domains, one-hot [N, D] -> [D, n]: how well the activity of a channel
    alone finds a domain, the average precision of ranking the examples by it. 1: all examples of the domain before all
    others; by chance the domain's share of the examples."""
    order = np.argsort(-activity, axis=0, kind="stable")
    hits = domains.T[:, order]  # [D, N, n]
    precision = hits.cumsum(1) / np.arange(1, len(activity) + 1)[:, None]
    return (precision * hits).sum(1) / np.maximum(domains.sum(0)[:, None], 1)


def specialisation(predictivity: np.ndarray, parts: np.ndarray, count: int) -> float:
    """How far the channels of a domain lie in one part: of the n / count channels that find it best, the share in the
    part that has most of them, a mean over domains. 1: the parts are the domains' channels; chance is what a random
    partition has."""
    size = len(parts) // count
    best = np.argsort(-predictivity, axis=1, kind="stable")[:, :size]
    return float(np.mean([np.bincount(parts[own], minlength=count).max() / size for own in best]))


def numbered(parts: np.ndarray, count: int) -> np.ndarray:
    """int [count, n / count]: the channels of each part, in order."""
    return np.argsort(parts, kind="stable").reshape(count, -1)
