"""Synthetic process data of known regimes: a target that is linear in the inputs, by another rule in each regime.

The process goes through the regimes one after the other; an operator knows about when each of them ran, as a trapezoid
over time: possibility 1 where it surely did, falling to 0 over the margins in which it may have.
"""

from typing import NamedTuple

import numpy as np

from lissom.data.errors import require


class Regimes(NamedTuple):
    """Samples in the order of time.

    inputs [N, D], targets [N], regime int [N]: which rule made the target; possibilities [N, E] in 0..1: the operator's
    contexts, 1 for a regime that fully may have run at that time, 0 for one that can't have; noise: the standard
    deviation of the target about its rule.
    """

    inputs: np.ndarray
    targets: np.ndarray
    regime: np.ndarray
    possibilities: np.ndarray
    noise: float


def trapezoid(at: np.ndarray, support: tuple[float, float], core: tuple[float, float]) -> np.ndarray:
    """Possibility of each `at`: 1 from core[0] to core[1], falling along lines to 0 at support[0] and support[1]."""
    (low, high), (start, stop) = support, core
    require(low <= start <= stop <= high, f"a trapezoid needs support {support} around its core {core}")
    rise = np.where(at < start, (at - low) / max(start - low, 1e-12), 1.0)
    fall = np.where(at > stop, (high - at) / max(high - stop, 1e-12), 1.0)
    return np.clip(np.minimum(rise, fall), 0.0, 1.0)


def regimes(
    *,
    size: int = 600,
    dims: int = 3,
    count: int = 3,
    overlap: float = 0.5,
    margin: float = 0.1,
    noise: float = 1.0,
    seed: int = 0,
    draw: int = 0,
) -> Regimes:
    """`count` regimes of about as many samples each.

    Inputs of regime e are normal about a centre of its own, of which neighbours are 1 / overlap standard deviations
    apart, so that inputs tell the regime, but not surely; its target is linear in them with normal
    coefficients and intercept. `margin`: how much longer than a regime its context begins before and ends behind it,
    and how far inside its core lies, as a share of the regime's time. `noise` is that of the target. `seed` draws
    centres and rules, `draw` the samples: another draw of the same seed is a test set.
    """
    require(size >= 2 * count >= 4, f"regimes needs count={count} of at least 2, and size={size} of twice as many")
    require(dims >= 1 and noise >= 0, f"regimes needs dims={dims} of at least 1 and noise={noise} of at least 0")
    require(overlap > 0 and 0 <= margin < 0.5, f"regimes needs overlap={overlap} over 0, margin={margin} in 0..0.5")
    rules = np.random.default_rng([seed, 0x72756C65])
    direction = rules.standard_normal(dims)
    direction /= np.linalg.norm(direction)
    order = rules.permutation(count)  # along the line of centres neighbours need not follow in time
    centres = order[:, None] * direction / overlap
    coefficients, intercepts = rules.standard_normal((count, dims)), 2 * rules.standard_normal(count)
    rng = np.random.default_rng([seed, draw, 0x64726177])
    time = np.arange(size)
    edges = np.linspace(0, size, count + 1)
    regime = np.minimum(np.searchsorted(edges, time, side="right") - 1, count - 1)
    inputs = centres[regime] + rng.standard_normal((size, dims))
    # The rule is about the regime's own centre: else one line through all centres would already tell much.
    means = np.sum((inputs - centres[regime]) * coefficients[regime], -1) + intercepts[regime]
    targets = means + noise * rng.standard_normal(size)
    reach = margin * size / count
    spans = [(edges[e], edges[e + 1]) for e in range(count)]
    contexts = [trapezoid(time, (a - reach, b + reach), (a + reach, b - reach)) for a, b in spans]
    return Regimes(inputs, targets, regime, np.stack(contexts, -1), noise)
