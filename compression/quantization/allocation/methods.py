"""Ways to choose the bits of each layer within a budget, by name.

    uniform      the largest option that all layers can have
    random       drawn until the budget is full
    hessian      HAWQ-V2: curvature of weights and activations, and the front of all choices
    divergence   KL of each layer rounded alone, on training examples, and the front
    distilled    ZeroQ: the same on examples made of BatchNorm's statistics. What ranges of activations are measured on
                 is another question, which `Mixed` was told
    inter_layer  the curvature augmented by what pairs of layers lose together, and an integer program
    decoupled    MixDQ (Zhao et al. 2024, arXiv:2405.17873): two metrics, here KL on the examples of two kinds, each
                 with a table, a group of layers and an integer program of its own. The paper's metrics are of pictures
                 and its groups of kinds of layers; ours are of what the tables say

`allocate` says besides what the choice took: seconds, and passes over the examples (a product with the Hessian is one;
steps of distillation are none).
`lowest` is the other question: the fewest bits that keep an accuracy, by bisection over the layers in the order of a
method's sensitivities.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lissom.compression.quantization.allocation import sensitivities, solvers
from lissom.compression.quantization.allocation.candidates import Mixed
from lissom.compression.quantization.distillation import distilled
from lissom.models.registry import nearest
from lissom.models.variables import merge

SENSITIVITIES = ("hessian", "divergence", "distilled", "inter_layer")
METHODS = ("uniform", "random", *SENSITIVITIES, "decoupled")


@dataclass(frozen=True)
class Problem:
    """mixed: the network; judge: (network, batch, key) -> {name: (sum, count)}, in which "accuracy" is what bisection
    keeps; batches: of training examples, which sensitivities are taken of; input_statistics: mean and standard
    deviation of inputs, as distillation aims at; calibration_seconds: in which ranges were
    measured, and what they were measured on made; kinds: batches of two kinds of examples, for "decoupled"."""

    mixed: Mixed
    judge: Callable
    batches: Sequence[Mapping[str, Any]]
    seed: int = 0
    samples: int = 16
    input_statistics: tuple[float, float] = (0.0, 1.0)
    calibration_seconds: float = 0.0
    kinds: Sequence[Sequence[Mapping[str, Any]]] = ()

    def loss(self, network: Any, batch: Mapping[str, Any]) -> jax.Array:
        total, count = self.judge(network, batch, jax.random.key(0))["loss"]
        return total / count

    def value(self, name: str) -> Callable[[np.ndarray], float]:
        """choice -> the mean of what the judge calls `name` over the batches; a pass each."""
        mixed, state = self.mixed, self.mixed.parts[1:]

        @jax.jit
        def judged(choice, state, batch):
            return self.judge(mixed.at(choice, state), batch, jax.random.key(0))[name]

        def mean(choice: np.ndarray) -> float:
            mixed.passes += 1
            found = [judged(jnp.asarray(choice), state, dict(batch)) for batch in self.batches]
            return float(sum(total for total, _ in found) / sum(count for _, count in found))

        return mean


@dataclass(frozen=True)
class Allocation:
    """An option of each layer, and what it took."""

    choice: tuple[int, ...]
    seconds: float
    passes: int


class Sensitivity:
    """The tables of a problem, each found when it is first asked for, with the seconds and passes that it took."""

    def __init__(self, problem: Problem):
        self.problem, self._known = problem, {}

    def __call__(self, method: str) -> tuple[np.ndarray, float, int]:
        """(table [layers, options], seconds, passes); of "decoupled" a table of each kind of examples."""
        if method not in self._known:
            mixed, start = self.problem.mixed, time.perf_counter()
            before, seconds, passes = mixed.passes, 0.0, 0
            if method == "inter_layer":
                # What it takes of the Hessian is part of its price, whoever asked for that first.
                table, seconds, passes = self("hessian")
                before, start = mixed.passes, time.perf_counter()
                few = int(mixed.sizes.sum(0).argmin())
                alone, together = sensitivities.interactions(mixed, self.problem.value("loss"), few)
                table = sensitivities.augmented(table, alone, together)
            else:
                table = self._table(method)
            self._known[method] = table, seconds + time.perf_counter() - start, passes + mixed.passes - before
        return self._known[method]

    def _table(self, method: str) -> np.ndarray:
        problem, key = self.problem, jax.random.key(self.problem.seed)
        if method == "hessian":
            return sensitivities.curvature(problem.mixed, problem.loss, problem.batches, key, problem.samples)
        if method == "divergence":
            return sensitivities.divergence(problem.mixed, problem.batches)
        if method == "decoupled":
            if len(problem.kinds) != 2:
                raise ValueError(f"'decoupled' takes examples of two kinds, and there are {len(problem.kinds)}")
            return np.stack([sensitivities.divergence(problem.mixed, batches) for batches in problem.kinds])
        shape = problem.batches[0]["inputs"].shape[1:]
        inputs, _ = distilled(merge(problem.mixed.source), shape, key, input_statistics=problem.input_statistics)
        return sensitivities.divergence(problem.mixed, [{"inputs": inputs}])


def allocate(method: str, sensitivity: Sensitivity, budget: float) -> Allocation:
    """Within `budget` bytes of the layers' codes, scales and ranges. ValueError where nothing fits."""
    _check(method, METHODS)
    problem, sizes = sensitivity.problem, sensitivity.problem.mixed.sizes
    start = time.perf_counter()
    if method == "uniform":
        return Allocation(solvers.uniform(sizes, budget), time.perf_counter() - start, 0)
    if method == "random":
        choice = solvers.random(sizes, budget, np.random.default_rng(problem.seed))
        return Allocation(choice, time.perf_counter() - start, 0)
    if method == "decoupled":
        return _decoupled(sensitivity, budget)
    table, seconds, passes = sensitivity(method)
    start = time.perf_counter()
    if method == "inter_layer":
        choice = solvers.integer(table, sizes, budget)
    else:
        choice = solvers.within(solvers.pareto(table, sizes), budget)
    return Allocation(choice, seconds + time.perf_counter() - start, passes)


def _decoupled(sensitivity: Sensitivity, budget: float) -> Allocation:
    tables, seconds, passes = sensitivity("decoupled")
    problem, mixed = sensitivity.problem, sensitivity.problem.mixed
    start, before = time.perf_counter(), mixed.passes
    # Of each metric what a choice loses, in units of what all layers lose of it alone at their worst.
    units = [table.max(1).sum() or 1.0 for table in tables]
    lost = [sensitivities.divergence_of(mixed, batches) for batches in problem.kinds]
    value = lambda choice: sum(of(np.asarray(choice, np.int32)) / unit for of, unit in zip(lost, units, strict=True))
    choice = solvers.decoupled(tables, mixed.sizes, budget, value)
    return Allocation(choice, seconds + time.perf_counter() - start, passes + mixed.passes - before)


def lowest(method: str, sensitivity: Sensitivity, least: float) -> Allocation:
    """The layers that mind least at the fewer bits of two options, as many as keep the quality on the examples of the
    problem at `least`. "random" goes through them in a drawn order. ValueError where the wider option does not keep
    it, or there are not two."""
    _check(method, ("random", *SENSITIVITIES))
    problem, mixed = sensitivity.problem, sensitivity.problem.mixed
    if len(mixed.options) != 2:
        raise ValueError(f"bisection chooses between two options, and there are {len(mixed.options)}")
    wide, few = (int(number) for number in np.argsort(-mixed.sizes.sum(0)))
    start, before, value = time.perf_counter(), mixed.passes, problem.value("accuracy")
    if method == "random":
        order, seconds, passes = np.random.default_rng(problem.seed).permutation(len(mixed.paths)), 0.0, 0
    else:
        table, seconds, passes = sensitivity(method)
        order, start, before = np.argsort(table[:, few] - table[:, wide]), time.perf_counter(), mixed.passes
    options = np.asarray([wide, few], np.int32)
    choice, _ = solvers.bisection([int(layer) for layer in order], lambda few: value(options[list(few)]), least)
    spent = seconds + time.perf_counter() - start
    return Allocation(tuple(int(options[few]) for few in choice), spent, passes + mixed.passes - before)


def _check(method: str, known: Sequence[str]) -> None:
    if method not in known:
        raise ValueError(f"method {method!r} must be one of {', '.join(known)}{nearest(method, known)}")
