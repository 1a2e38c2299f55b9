"""Tallies: arrays that a layer counts instead of averaging. They stand among a layer's metrics, are summed over a test
set, and what they say is read off the sums.

    domain_use   float32 [D, E] of a layer: choices of expert e by the tokens of domain d
    family_use   float32 [F, E]: trajectories of family f that are brought to expert e
    class_hits   float32 [C, 2] of an objective: examples of class c that are predicted, and all of them
    layer_activity   float32 [L, 4] of a spiking network, of each layer: spikes, spikes that there could have been,
                 synaptic operations (of each spike that comes in the outputs that it goes to), and the examples
    episode_accuracy, episode_mse   float32 [3] of an objective: the sum of the episodes' values, of their squares, and
                 the episodes

Only a network that is judged (not one in training) counts.
"""

import functools
from collections.abc import Mapping

import jax
import numpy as np

Totals = dict[str, tuple[float | np.ndarray, float]]


def domain_information(use: np.ndarray) -> dict[str, float]:
    """use [layers, D, E] -> mean over layers of I(domain; expert) in bits, every domain weighing the same: between 0,
    all domains use the experts alike, and the smaller of log2 D and log2 E."""
    seen = use.sum(-1, keepdims=True)
    seen_by_any = (seen > 0).all(axis=(0, 2))
    given = use[:, seen_by_any] / seen[:, seen_by_any]  # p(e | d)
    if not given.size:
        return {}
    mean = np.broadcast_to(given.mean(1, keepdims=True), given.shape)
    terms = np.zeros_like(given)
    used = given > 0
    terms[used] = given[used] * np.log2(given[used] / mean[used])
    return {"domain_information": float(terms.sum(-1).mean())}


def purity(use: np.ndarray) -> dict[str, float]:
    """use [F, E] -> sum over e of max over f, of the sum of all: the share of trajectories whose family is the most
    frequent one of their expert. 1: no expert has two families; with one expert the share of the largest family."""
    return {"purity": float(use.max(0).sum() / use.sum())} if use.any() else {}


CLASS_ACCURACY = "class_accuracy/"  # and the number of the class


def class_accuracy(hits: np.ndarray) -> dict[str, float]:
    """hits [C, 2] -> the accuracy on each class of which there are examples."""
    return {f"{CLASS_ACCURACY}{c}": float(hit / seen) for c, (hit, seen) in enumerate(hits) if seen}


FIRING_RATE = "firing_rate/"  # and the number of the layer


def firing(activity: np.ndarray) -> dict[str, float]:
    """activity [L, 4] -> spikes a neuron and step, of all neurons and of each layer that has some, and the synaptic
    operations of an example."""
    spikes, places, operations, examples = activity.T
    if not places.any():
        return {}
    rates = {f"{FIRING_RATE}{n}": float(s / p) for n, (s, p) in enumerate(zip(spikes, places, strict=True)) if p}
    found = {"firing_rate": spikes.sum() / places.sum(), "synaptic_operations": (operations / examples).sum()}
    return {name: float(value) for name, value in found.items()} | rates


EPISODES = 600  # an interval over fewer test episodes is none


def moments(values: np.ndarray) -> np.ndarray:
    """Of the values of all episodes what `interval` is told."""
    return np.array([values.sum(), np.square(values).sum(), len(values)])


def interval(name: str, moments: np.ndarray) -> dict[str, float]:
    """`moments` [3] -> 1.96 standard errors of the mean over episodes: half the width of its 95 % interval."""
    total, squares, count = moments
    if count < EPISODES:
        return {}
    variance = max(squares / count - (total / count) ** 2, 0.0) * count / (count - 1)
    return {name: float(1.96 * np.sqrt(variance / count))}


TALLIES = {
    "episode_accuracy": functools.partial(interval, "accuracy_interval"),
    "episode_mse": functools.partial(interval, "mse_interval"),
    "domain_use": domain_information,
    "family_use": purity,
    "class_hits": class_accuracy,
    "layer_activity": firing,
}


def add(totals: Totals, sums: Mapping[str, tuple]) -> None:
    """Adds the sums and counts of one batch."""
    for name, (value, count) in jax.device_get(dict(sums)).items():
        value, count = np.asarray(value, np.float64), float(count)
        earlier, times = totals.get(name, (np.zeros_like(value), 0.0))
        totals[name] = earlier + value, times + count


def means(totals: Totals) -> dict[str, tuple[float, float]]:
    """{name: (mean, count)}; in place of tallies what is read off them; without what was counted nowhere."""
    found = {}
    for name, (value, count) in totals.items():
        if count and name in TALLIES:
            found |= {metric: (value, count) for metric, value in TALLIES[name](value).items()}
        elif count:
            found[name] = float(value) / count, count
    return found
