"""What needs no meta-learning at all: the floors that tables of episodes have, each with its interval over episodes."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression

from lissom.models import transductive
from lissom.models.tallies import interval, moments

FITTED = 400  # training episodes that a floor may learn from
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the kernel, in standard deviations of the inputs
RIDGES = (1e-4, 1e-2, 1.0)


def rows(
    train: Sequence[dict], test: Sequence[dict], oracle: Callable[[Sequence[dict]], list[np.ndarray]] | None = None
) -> list[tuple[str, str, dict[str, float]]]:
    """[(name, role, {metric: value})] of the trivial methods on test episodes; of role "ceiling" what the `oracle`
    says: the test source -> predicted labels or targets of each episode."""
    known = [train[i] for i in range(min(FITTED, len(train)))]
    asked = [test[i] for i in range(len(test))]
    of_classes = np.issubdtype(asked[0]["labels"].dtype, np.integer)
    found = classified(known, asked) if of_classes else regressed(known, asked)
    kinds = dict.fromkeys(found, "floor")
    if oracle is not None:
        name = "all examples of the classes, nearest neighbour" if of_classes else "least squares of the true family"
        found[name], kinds[name] = oracle(test), "ceiling"
    score = (lambda said, true: np.mean(said == true)) if of_classes else lambda said, true: np.mean((said - true) ** 2)
    metric = "accuracy" if of_classes else "mse"
    told = []
    for name, answers in found.items():
        values = np.array([score(said, episode["labels"]) for said, episode in zip(answers, asked, strict=True)])
        spread = interval(f"{metric}_interval", moments(values))
        told.append((name, kinds[name], {metric: float(values.mean()), **spread}))
    return told


def classified(known: Sequence[Mapping], asked: Sequence[Mapping]) -> dict[str, list[np.ndarray]]:
    """Labels by the inputs: nearest class mean, k-means from it on, logistic regression of the support (L2 weight 1),
    and the nearest class mean where inputs are divided by how they differ within training classes (linear
    discriminant analysis, all directions kept)."""
    ways = int(max(episode["support_labels"].max() for episode in asked)) + 1
    plain = lambda episode: (_flat(episode["support_inputs"]), _flat(episode["inputs"]))
    whitening = within_class_whitening(known)

    def whitened(episode):
        support, queries = plain(episode)
        return support @ whitening, queries @ whitening

    def answers(features, method):
        one = jax.jit(lambda support, labels, queries: method(support, labels, queries, ways).argmax(-1))
        pairs = (features(episode) for episode in asked)
        return [np.asarray(one(s, e["support_labels"], q)) for e, (s, q) in zip(asked, pairs, strict=True)]

    return {
        "nearest centroid on inputs": answers(plain, transductive.nearest_prototype),
        "k-means on inputs": answers(plain, transductive.k_means),
        "logistic regression on inputs": [logistic_regression(episode) for episode in asked],
        "nearest centroid, linear discriminants": answers(whitened, transductive.nearest_prototype),
    }


def logistic_regression(episode: Mapping) -> np.ndarray:
    """The labels of the queries by a regression on the support alone."""
    model = LogisticRegression(max_iter=1000).fit(_flat(episode["support_inputs"]), episode["support_labels"])
    return model.predict(_flat(episode["inputs"]))


def within_class_whitening(known: Sequence[Mapping]) -> np.ndarray:
    """[D, D]: the inverse root of the covariance of inputs less their class's mean (Ledoit and Wolf's estimate), over
    the examples of training episodes."""
    apart = []
    for episode in known:
        x = np.concatenate([_flat(episode["support_inputs"]), _flat(episode["inputs"])])
        labels = np.concatenate([episode["support_labels"], episode["labels"]])
        for label in np.unique(labels):
            own = x[labels == label]
            if len(own) > 1:
                apart.append((own - own.mean(0)) * np.sqrt(len(own) / (len(own) - 1)))
    covariance, _ = ledoit_wolf(np.concatenate(apart), assume_centered=True)
    values, vectors = np.linalg.eigh(covariance)
    return (vectors / np.sqrt(np.maximum(values, 1e-12))) @ vectors.T


def regressed(known: Sequence[Mapping], asked: Sequence[Mapping]) -> dict[str, list[np.ndarray]]:
    """Targets by the support alone: its mean, its nearest example, and kernel ridge regression whose width and ridge
    are those that are best on training episodes."""
    settings = [(scale, ridge) for scale in SCALES for ridge in RIDGES]
    spread = np.concatenate([episode["inputs"] for episode in known]).std()
    error = lambda s: np.mean([np.square(kernel_ridge(e, s[0] * spread, s[1]) - e["labels"]).mean() for e in known])
    scale, ridge = min(settings, key=error)
    return {
        "mean of the support": [np.broadcast_to(e["support_labels"].mean(0), e["labels"].shape) for e in asked],
        "nearest of the support": [e["support_labels"][_apart(e).argmin(1)] for e in asked],
        "kernel ridge regression": [kernel_ridge(e, scale * spread, ridge) for e in asked],
    }


def kernel_ridge(episode: Mapping, scale: float, ridge: float) -> np.ndarray:
    """K(queries, support) (K + ridge I)^-1 (y - mean y) + mean y with the Gaussian kernel of that width."""
    x, y = episode["support_inputs"].astype(np.float64), episode["support_labels"].astype(np.float64)
    kernel = lambda apart: np.exp(-apart / (2 * scale**2))
    own = np.square(x[:, None] - x[None]).sum(-1)
    weights = np.linalg.solve(kernel(own) + ridge * np.eye(len(x)), y - y.mean(0))
    return kernel(_apart(episode)) @ weights + y.mean(0)


def _apart(episode: Mapping) -> np.ndarray:
    """Squared distances of queries and support [Q, S]."""
    return np.square(episode["inputs"][:, None] - episode["support_inputs"][None]).sum(-1)


def _flat(inputs: np.ndarray) -> np.ndarray:
    return inputs.reshape(len(inputs), -1)
