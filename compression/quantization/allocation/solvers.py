"""The choice of bits: of each layer one of its options, so that what they lose together is least within a budget.

    minimize sum_i loss[i, choice_i]    with    sum_i size[i, choice_i] <= budget

`loss` and `size` [layers, options] are numbers of any unit; sizes must be whole (bits, bytes). Losses are taken to add
up, which is what all of these methods assume of their sensitivities.

    pareto      every choice that no other beats in both, layer after layer (HAWQ-V2, Dong et al. 2019,
                arXiv:1911.03852; ZeroQ, Cai et al. 2020, arXiv:2001.00281, as dynamic programming): exact, and gives
                all budgets at once
    integer     an integer program (MixDQ, Zhao et al. 2024, arXiv:2405.17873), by scipy's `milp`
    decoupled   two metrics, each with sensitivities of its own (MixDQ): layers belong to the metric that they matter
                more to, an integer program for each group, and the division of the budget that does best of those tried
    bisection   no budget but a bound on the accuracy: layers in the order of what they mind, and the most of them at
                the fewer bits that keep it (Schaefer et al. 2023, arXiv:2306.04879)
    uniform     the same option for all; random    options drawn until the budget is full: what the others are compared
                to
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp


def pareto(loss: np.ndarray, size: np.ndarray) -> list[tuple[int, float, tuple[int, ...]]]:
    """(size, loss, choice) of every choice that none beats, by increasing size and decreasing loss."""
    loss, size = _checked(loss, size)
    front: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for losses, sizes in zip(loss, size, strict=True):
        grown = [
            (at + int(s), lost + float(one), (*chosen, number))
            for at, lost, chosen in front
            for number, (one, s) in enumerate(zip(losses, sizes, strict=True))
        ]
        front = []
        for entry in sorted(grown, key=lambda entry: entry[:2]):
            if not front or entry[1] < front[-1][1]:
                front.append(entry)
    return front


def within(front: Sequence[tuple[int, float, tuple[int, ...]]], budget: float) -> tuple[int, ...]:
    """The best choice of a front that fits; ValueError where none does."""
    fits = [entry for entry in front if entry[0] <= budget]
    if not fits:
        raise ValueError(f"a budget of {budget} is below the smallest choice, {front[0][0]}")
    return fits[-1][2]


def integer(loss: np.ndarray, size: np.ndarray, budget: float) -> tuple[int, ...]:
    """The choice of an integer program with a variable of 0 or 1 for each layer's each option. ValueError where nothing
    fits."""
    loss, size = _checked(loss, size)
    layers, options = loss.shape
    if size.min(1).sum() > budget:
        raise ValueError(f"a budget of {budget} is below the smallest choice, {size.min(1).sum()}")
    one_each = np.kron(np.eye(layers), np.ones(options))
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(size.reshape(1, -1), -np.inf, budget)]
    # Losses of very different layers are scaled, so that the solver's tolerance is of their size.
    scale = np.abs(loss).max() or 1.0
    found = milp(
        loss.ravel() / scale, constraints=constraints, integrality=1, bounds=Bounds(0, 1), options={"mip_rel_gap": 0}
    )
    if not found.success:
        raise ValueError(f"the integer program has no solution: {found.message}")
    return tuple(int(number) for number in found.x.reshape(layers, options).argmax(1))


def decoupled(
    losses: np.ndarray, size: np.ndarray, budget: float, value: Callable[[tuple[int, ...]], float], divisions: int = 11
) -> tuple[int, ...]:
    """losses [2, layers, options], one table a metric. Of the bytes above the smallest choice the first group gets a
    share of 0 ... 1, and the second what the first one leaves; `value` of a whole choice is what is to be least. Which
    metric a layer matters more to: at its worst option, as a share of what all layers lose of that metric."""
    tables = [_checked(loss, size)[0] for loss in losses]
    size = np.asarray(size)
    if len(tables) != 2:
        raise ValueError(f"losses are of two metrics, not of {len(tables)}")
    worst = np.stack([table.max(1) / (table.max(1).sum() or 1.0) for table in tables])
    groups = [np.flatnonzero(worst.argmax(0) == metric) for metric in (0, 1)]
    least = size.min(1)
    if least.sum() > budget:
        raise ValueError(f"a budget of {budget} is below the smallest choice, {least.sum()}")
    found: dict[tuple[int, ...], float] = {}
    for share in np.linspace(0, 1, divisions):
        choice, left = np.zeros(len(size), int), budget - least.sum()
        for table, group, part in zip(tables, groups, (share, 1.0), strict=True):
            if len(group):
                room = least[group].sum() + part * left
                choice[group] = integer(table[group], size[group], room)
                left -= size[group, choice[group]].sum() - least[group].sum()
        if (whole := tuple(int(option) for option in choice)) not in found:
            found[whole] = value(whole)
    return min(found, key=found.get)


def bisection(
    order: Sequence[int], accuracy: Callable[[tuple[int, ...]], float], bound: float
) -> tuple[tuple[int, ...], int]:
    """(choice, evaluations): option 1 (fewer bits) for as many of the layers, in their order, as keep the accuracy at
    `bound`, and option 0 for the rest. Accuracy is taken to fall as more of them have few bits; where it does not, the
    choice still keeps the bound, and need not be the largest. ValueError where all at option 0 are below it."""
    choice = lambda few: tuple(int(layer in set(order[:few])) for layer in range(len(order)))
    low, high, asked = 0, len(order), 0
    if sorted(order) != list(range(len(order))):
        raise ValueError(f"order {list(order)} must name each of {len(order)} layers once")
    if (whole := accuracy(choice(0))) < bound:
        raise ValueError(f"without fewer bits the accuracy is {whole:g}, below the bound {bound:g}")
    while low < high:
        middle, asked = (low + high + 1) // 2, asked + 1
        low, high = (middle, high) if accuracy(choice(middle)) >= bound else (low, middle - 1)
    return choice(low), asked + 1


def uniform(size: np.ndarray, budget: float) -> tuple[int, ...]:
    """The largest option that all layers can have; ValueError where none fits."""
    size = np.asarray(size)
    totals = size.sum(0)
    fits = [number for number in range(size.shape[1]) if totals[number] <= budget]
    if not fits:
        raise ValueError(f"a budget of {budget} is below the smallest uniform choice, {totals.min()}")
    return (max(fits, key=lambda number: totals[number]),) * len(size)


def random(size: np.ndarray, budget: float, rng: np.random.Generator) -> tuple[int, ...]:
    """Layers in a random order, each with a random one of the options that leave room for the smallest of the rest; and
    then, drawn again and again, a larger option for a layer, until none fits."""
    size = np.asarray(size)
    smallest = size.min(1)
    if smallest.sum() > budget:
        raise ValueError(f"a budget of {budget} is below the smallest choice, {smallest.sum()}")
    choice, left = [0] * len(size), budget - smallest.sum()
    for layer in rng.permutation(len(size)):
        fits = np.flatnonzero(size[layer] - smallest[layer] <= left)
        choice[layer] = int(rng.choice(fits))
        left -= size[layer, choice[layer]] - smallest[layer]
    while larger := [
        (layer, option)
        for layer, option in np.ndindex(*size.shape)
        if 0 < size[layer, option] - size[layer, choice[layer]] <= left
    ]:
        layer, option = larger[rng.integers(len(larger))]
        left -= size[layer, option] - size[layer, choice[layer]]
        choice[layer] = int(option)
    return tuple(choice)


def _checked(loss: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    loss, size = np.asarray(loss, np.float64), np.asarray(size)
    if loss.ndim != 2 or loss.shape != size.shape or 0 in loss.shape:
        raise ValueError(f"loss {loss.shape} and size {size.shape} must both be [layers, options]")
    if not np.isfinite(loss).all():
        raise ValueError("losses must be finite numbers")
    if (size != np.round(size)).any() or (size < 0).any():
        raise ValueError("sizes must be whole numbers, 0 or more")
    return loss, size.astype(np.int64)
