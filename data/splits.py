"""The fixed stratified split of the small real datasets."""

import numpy as np


def stratified_split(labels: np.ndarray, *, train_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train indices, test indices): every class in proportion, all examples used.

    The same indices, in the same order, as scikit-learn's `train_test_split(range(n), train_size=train_size,
    stratify=labels, random_state=seed)`; written out because importing scikit-learn costs 3 s on 2 cores and
    the first command a user runs is on `digits`.
    """
    rng = np.random.RandomState(seed)
    counts = np.bincount(labels)
    train_counts = _proportional(counts, train_size, rng)
    _proportional(counts - train_counts, len(labels) - train_size, rng)  # draws nothing, or what scikit-learn draws
    train, test = [], []
    for label, count in enumerate(train_counts):
        members = np.flatnonzero(labels == label)[rng.permutation(counts[label])]
        train.append(members[:count])
        test.append(members[count:])
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(test))


def _proportional(counts: np.ndarray, draws: int, rng: np.random.RandomState) -> np.ndarray:
    """`draws` shared out in proportion to `counts`, largest remainders first, ties drawn at random."""
    exact = counts / counts.sum() * draws
    floored = np.floor(exact)
    missing = int(draws - floored.sum())
    remainder = exact - floored
    for value in np.sort(np.unique(remainder))[::-1]:
        if missing <= 0:
            break
        tied = np.flatnonzero(remainder == value)
        chosen = rng.choice(tied, size=min(len(tied), missing), replace=False)
        floored[chosen] += 1
        missing -= len(chosen)
    return floored.astype(int)
