"""Simulated caches of experts: by hand, against the best of all decisions, and what lies between."""

import functools

import numpy as np
import pytest

from lissom.evaluation.expert_cache import hit_rate

BELADY = float("inf")


def test_by_hand():
    # Two places. a b miss; c evicts; lru throws a away (b is newer), so a misses, throws b away, b misses: no hit.
    assert hit_rate([0, 1, 2, 0, 1], 2) == 0
    # Who sees the next request keeps a: hit at the fourth; b's next use is later. The fifth misses.
    assert hit_rate([0, 1, 2, 0, 1], 2, window=1) == 1 / 5
    assert hit_rate([0, 1, 2, 0, 1], 2, window=BELADY) == 1 / 5
    assert hit_rate([0, 0, 0, 1], 1) == 2 / 4
    assert hit_rate([0, 1, 2, 0, 1, 2], 3) == 3 / 6


def best(requests, capacity):
    """The most hits of any evictions, by trying them all."""

    @functools.cache
    def hits(at, held):
        if at == len(requests):
            return 0
        if requests[at] in held:
            return 1 + hits(at + 1, held)
        kept = [held] if len(held) < capacity else [held - {other} for other in held]
        return max(hits(at + 1, rest | {requests[at]}) for rest in kept)

    return hits(0, frozenset()) / len(requests)


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_belady_is_the_best_and_a_window_lies_between(capacity):
    for seed in range(5):
        requests = np.random.default_rng(seed).integers(0, 5, 18).tolist()
        rates = [hit_rate(requests, capacity, window=w) for w in (0, 2, 4, len(requests), BELADY)]
        assert rates[-1] == rates[-2] == best(requests, capacity) >= max(rates)
    requests = np.random.default_rng(0).integers(0, 8, 2000).tolist()
    rates = [hit_rate(requests, capacity + 1, window=w) for w in (0, 4, 16, BELADY)]
    assert rates == sorted(rates) and rates[0] < rates[-1]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="at least 1 expert, not 0"):
        hit_rate([0], 0)
    with pytest.raises(ValueError, match="no requests"):
        hit_rate([], 1)
    with pytest.raises(ValueError, match="must be at least 0"):
        hit_rate([0], 1, window=-1)
