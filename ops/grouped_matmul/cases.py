"""Shapes of grouped matmuls in real models, by name: tests take `TINY`, benchmarks `REAL`."""

from dataclasses import dataclass

import numpy as np

SPREADS = ("equal", "random", "zipf", "one", "some_empty", "short")


@dataclass(frozen=True)
class Case:
    """x [m, k] and w [g, k, n]; `spread`: how the rows are spread over the groups (`sizes`)."""

    m: int
    k: int
    n: int
    g: int
    spread: str
    origin: str


def sizes(case: Case, seed: int = 0) -> np.ndarray:
    """int32 [g]: equal; random (Dirichlet of ones); zipf (1 / rank, ranks in random order); one (all rows of one
    group); some_empty (random, every second group empty); short (random, a third of the rows of no group)."""
    rng = np.random.default_rng(seed)
    rows = case.m - case.m // 3 if case.spread == "short" else case.m
    if case.spread == "equal":
        shares = np.ones(case.g)
    elif case.spread == "zipf":
        shares = rng.permutation(1.0 / np.arange(1, case.g + 1))
    elif case.spread == "one":
        shares = np.eye(case.g)[rng.integers(case.g)]
    else:
        shares = rng.dirichlet(np.ones(case.g))
    if case.spread == "some_empty":
        shares[1::2] = 0
    # Each the whole part of its share, and what is left to the largest fractions.
    exact = rows * shares / shares.sum()
    counts = np.floor(exact).astype(np.int32)
    counts[np.argsort(counts - exact, kind="stable")[: rows - counts.sum()]] += 1
    return counts


REAL = {
    "cpu_equal": Case(4096, 512, 1024, 16, "equal", "the CPU target's yardstick"),
    "cpu_random": Case(4096, 512, 1024, 16, "random", "the CPU target"),
    "cpu_zipf": Case(4096, 512, 1024, 16, "zipf", "the CPU target, uneven"),
    "cpu_decode": Case(64, 512, 1024, 64, "random", "a step of decoding: about a row a group"),
    "qwen3_up": Case(262144, 2048, 768, 128, "equal", "32768 tokens, 8 of 128 experts, as Qwen3-30B-A3B"),
    "qwen3_up_zipf": Case(262144, 2048, 768, 128, "zipf", "the same, uneven"),
    "qwen3_down": Case(262144, 768, 2048, 128, "equal", "and back"),
    "mixtral_up": Case(16384, 4096, 14336, 8, "random", "8192 tokens, 2 of 8 experts, as Mixtral 8x7B"),
}

TINY = {
    "equal": Case(12, 5, 7, 3, "equal", "cpu_equal"),
    "random": Case(45, 6, 9, 5, "random", "cpu_random"),
    "one": Case(20, 4, 3, 4, "one", "all tokens to one expert"),
    "some_empty": Case(33, 8, 5, 6, "some_empty", "experts without tokens"),
    "short": Case(31, 5, 4, 3, "short", "dropped choices"),
    "one_group": Case(9, 3, 4, 1, "equal", "one expert"),
    "one_row": Case(1, 3, 4, 3, "one", "one token"),
}
