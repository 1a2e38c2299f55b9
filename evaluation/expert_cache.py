"""How often the expert that is wanted lies in a fast memory that holds a few of them: caches, simulated.

Requests are experts in the order in which they are wanted; a request for one that is not there loads it and evicts
another. Which one:

    lru          the one whose last use is longest ago
    lookahead    of those not among the next `window` requests the one whose last use is longest ago; where all are, the
                 one whose next use is last. A router in front of the network knows the requests of a prompt beforehand
                 (Read-ME, Cai et al. 2024, arXiv:2410.19123). window 0 is lru
    belady       the one whose next use is last: the best that any cache can do, and the limit of a long window
                 (Belady 1966)
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

NEVER = float("inf")


def hit_rate(requests: Sequence[int], capacity: int, *, window: float = 0) -> float:
    """The share of requests that find their expert in a cache of `capacity`, empty at the start. `window` 0 is lru,
    infinity is belady. ValueError for no requests, or a capacity below 1."""
    if capacity < 1:
        raise ValueError(f"a cache holds at least 1 expert, not {capacity}")
    if len(requests) == 0:
        raise ValueError("there are no requests")
    if window < 0:
        raise ValueError(f"a window of {window} requests must be at least 0")
    uses: dict[int, list[int]] = {}
    for at, expert in enumerate(requests):
        uses.setdefault(expert, []).append(at)
    held: set[int] = set()
    hits = 0
    for at, expert in enumerate(requests):
        if expert in held:
            hits += 1
            continue
        if len(held) == capacity:
            held.remove(max(held, key=lambda other: _worth_losing(uses[other], at, window)))
        held.add(expert)
    return hits / len(requests)


def _worth_losing(uses: list[int], at: int, window: float) -> tuple[bool, float]:
    """The larger, the sooner it is evicted: (no use within the window, how long ago it was used) or (False, when it is
    used next)."""
    behind = bisect_right(uses, at)
    coming = uses[behind] if behind < len(uses) else NEVER
    if coming - at <= window and coming is not NEVER:
        return False, coming
    return True, at - uses[bisect_left(uses, at) - 1]
