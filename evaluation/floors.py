"""Trivial methods: the floor that a table shows beside what was trained. All on numpy arrays, with known
answers.
"""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of equal entries."""
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.shape != labels.shape or not labels.size:
        raise ValueError(f"{predicted.shape} predictions do not match {labels.shape} labels")
    return float(np.mean(predicted == labels))


def majority_class(train_labels: np.ndarray, count: int) -> np.ndarray:
    """The most frequent training label (the smallest of equals), `count` times."""
    values, counts = np.unique(train_labels, return_counts=True)
    return np.full(count, values[np.argmax(counts)])


def nearest_neighbour(train_inputs: np.ndarray, train_labels: np.ndarray, test_inputs: np.ndarray) -> np.ndarray:
    """Label of the nearest training example by Euclidean distance between flattened inputs."""
    return KNeighborsClassifier(n_neighbors=1).fit(_flat(train_inputs), train_labels).predict(_flat(test_inputs))


def linear(train_inputs: np.ndarray, train_labels: np.ndarray, test_inputs: np.ndarray) -> np.ndarray:
    """Multinomial logistic regression on standardized, flattened inputs (L2 weight 1, scikit-learn's
    default).
    """
    if len(np.unique(train_labels)) == 1:  # a regression needs two classes
        return majority_class(train_labels, len(test_inputs))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return model.fit(_flat(train_inputs), train_labels).predict(_flat(test_inputs))


def nearest_in_context(inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For inputs [N, T, D] and labels [N, T] of N sequences, the label of the nearest earlier input of the same
    sequence (of equals the first) [N, T]; 0 at the first position, which has none."""
    predicted = np.zeros_like(labels)
    for row, (points, known) in enumerate(zip(inputs.astype(np.float64), labels, strict=True)):
        apart = np.square(points[:, None] - points[None]).sum(-1)
        apart[np.triu_indices(len(points))] = np.inf
        predicted[row, 1:] = known[apart[1:].argmin(1)]
    return predicted


def centroid_in_context(inputs: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The same, with the class whose earlier inputs have the nearest mean (of equals the smallest)."""
    predicted = np.zeros_like(labels)
    for row, (points, known) in enumerate(zip(inputs.astype(np.float64), labels, strict=True)):
        one_hot = known[:, None] == np.arange(classes)
        counts = one_hot.cumsum(0)[:-1, :, None]  # up to t, for t + 1
        means = (one_hot[:, :, None] * points[:, None]).cumsum(0)[:-1] / np.maximum(counts, 1)
        apart = np.where(counts[..., 0] > 0, np.square(points[1:, None] - means).sum(-1), np.inf)
        predicted[row, 1:] = apart.argmin(1)
    return predicted


def trajectory_error(predicted: np.ndarray, states: np.ndarray) -> float:
    """Mean squared error of states [N, T, D] behind the first of each trajectory, which is given."""
    if predicted.shape != states.shape or states.ndim != 3 or states.shape[1] < 2:
        raise ValueError(f"{predicted.shape} predictions do not match {states.shape} states of two times or more")
    return float(np.square(predicted[:, 1:].astype(np.float64) - states[:, 1:]).mean())


def first_state(states: np.ndarray) -> np.ndarray:
    """The first of the states [N, T, D] at all times."""
    return np.broadcast_to(states[:, :1], states.shape)


def nearest_trajectory(
    train_states: np.ndarray, train_environments: np.ndarray, test_states: np.ndarray, test_environments: np.ndarray
) -> np.ndarray:
    """For each test trajectory [N, T, D] the training trajectory of the same environment [N] whose first state is
    nearest. Every environment has a training trajectory."""
    found = np.empty_like(test_states)
    for environment in np.unique(test_environments):
        known, mine = train_states[train_environments == environment], test_environments == environment
        if not len(known):
            raise ValueError(f"environment {environment} has no training trajectory")
        apart = np.square(test_states[mine, None, 0] - known[None, :, 0]).sum(-1)
        found[mine] = known[apart.argmin(1)]
    return found


def unigram_bits_per_byte(train: np.ndarray, test: np.ndarray, alphabet: int = 256) -> float:
    """-mean log2 p(b) with p(b) = (count(b) + 1) / (n + alphabet), Laplace's rule."""
    return float(-np.log2(_unigram(train, alphabet)[_symbols(test, alphabet)]).mean())


def bigram_bits_per_byte(train: np.ndarray, test: np.ndarray, alphabet: int = 256) -> float:
    """-mean log2 p(b | a) over the test bytes after the first.

        p(b | a) = (count(a b) + p(b)) / (count(a .) + 1)

    with the unigram p(b): additive smoothing by one imagined observation that is spread as the unigram says.
    """
    train, test = _symbols(train, alphabet), _symbols(test, alphabet)
    if len(test) < 2:
        raise ValueError("a bigram needs at least two test symbols")
    pairs = np.zeros((alphabet, alphabet))
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    conditional = (pairs + _unigram(train, alphabet)) / (pairs.sum(1, keepdims=True) + 1)
    return float(-np.log2(conditional[test[:-1], test[1:]]).mean())


def _unigram(train: np.ndarray, alphabet: int) -> np.ndarray:
    counts = np.bincount(_symbols(train, alphabet), minlength=alphabet)
    return (counts + 1) / (counts.sum() + alphabet)


def _symbols(values: np.ndarray, alphabet: int) -> np.ndarray:
    symbols = np.asarray(values).astype(np.int64).ravel()
    if not symbols.size or symbols.min() < 0 or symbols.max() >= alphabet:
        raise ValueError(f"symbols must be one or more integers in [0, {alphabet})")
    return symbols


def _flat(inputs: np.ndarray) -> np.ndarray:
    inputs = np.asarray(inputs)
    return inputs.reshape(len(inputs), -1)
