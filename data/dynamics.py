"""`dynamics`: trajectories of families of dynamical systems, several environments a family.

A family is an ordinary differential equation dx/dt = f(x, p) in the plane; an environment is one draw of its parameters
p; a trajectory begins at a drawn state. This is the data of hierarchical reconstruction: what the environments of a
family share, and that there are families at all, must be found (Nzoyem et al. 2025, arXiv:2502.05335, whose benchmark
takes ten equations of ODEBench; these six and the ranges of their parameters are chosen here).

States are standardised by constants of their family, so that no family is told by its place or its size and an error of
1 is as bad as saying the family's mean.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lissom.data.content import Content
from lissom.data.errors import nearest, require

FINE = 0.01  # the longest step of the integration
ENVIRONMENT = 2  # of a random stream, beside the splits 0 and 1


class Family(NamedTuple):
    """dx/dt = field(x [..., 2], p [k, ...]) [..., 2] in the system's own units of space and time.

    `parameters` are (least, largest) of each of the k parameters, `start` of both coordinates of a first state; `mean`
    and `deviation` are those of the states of 24,576 trajectories of 2,048 environments, 32 states 0.2 apart.
    """

    field: Callable[[np.ndarray, np.ndarray], np.ndarray]
    parameters: tuple[tuple[float, float], ...]
    start: tuple[float, float]
    mean: tuple[float, float]
    deviation: tuple[float, float]


def oscillator(state: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Damped spring: x' = v, v' = -p0 x - p1 v."""
    x, v = state[..., 0], state[..., 1]
    return np.stack([v, -p[0] * x - p[1] * v], -1)


def van_der_pol(state: np.ndarray, p: np.ndarray) -> np.ndarray:
    """x' = v, v' = p0 (1 - x^2) v - x."""
    x, v = state[..., 0], state[..., 1]
    return np.stack([v, p[0] * (1 - x * x) * v - x], -1)


def duffing(state: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Damped double well: x' = v, v' = p0 x - p1 x^3 - p2 v."""
    x, v = state[..., 0], state[..., 1]
    return np.stack([v, p[0] * x - p[1] * x * x * x - p[2] * v], -1)


def lotka_volterra(state: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Prey and predators: x' = p0 x - p1 x y, y' = p2 x y - p3 y."""
    x, y = state[..., 0], state[..., 1]
    return np.stack([p[0] * x - p[1] * x * y, p[2] * x * y - p[3] * y], -1)


def selkov(state: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Glycolysis: x' = -x + p0 y + x^2 y, y' = p1 - p0 y - x^2 y."""
    x, y = state[..., 0], state[..., 1]
    flow = p[0] * y + x * x * y
    return np.stack([flow - x, p[1] - flow], -1)


def brusselator(state: np.ndarray, p: np.ndarray) -> np.ndarray:
    """x' = p0 + x^2 y - (p1 + 1) x, y' = p1 x - x^2 y."""
    x, y = state[..., 0], state[..., 1]
    flow = x * x * y
    return np.stack([p[0] + flow - (p[1] + 1) * x, p[1] * x - flow], -1)


FAMILIES = {
    "oscillator": Family(oscillator, ((1.0, 3.0), (0.05, 0.4)), (-2.0, 2.0), (0.0, 0.0), (0.774, 1.052)),
    "van_der_pol": Family(van_der_pol, ((0.5, 2.0),), (-3.0, 3.0), (0.0, 0.0), (1.533, 1.388)),
    "duffing": Family(duffing, ((0.5, 1.5), (0.5, 1.5), (0.05, 0.3)), (-2.0, 2.0), (0.0, 0.0), (1.032, 0.882)),
    "lotka_volterra": Family(lotka_volterra, ((0.7, 1.3),) * 4, (0.5, 2.5), (0.926, 1.055), (0.638, 0.708)),
    "selkov": Family(selkov, ((0.06, 0.12), (0.3, 0.9)), (0.2, 2.0), (0.621, 1.128), (0.467, 0.56)),
    "brusselator": Family(brusselator, ((0.8, 1.2), (1.2, 2.6)), (0.5, 2.5), (0.994, 1.902), (0.477, 0.75)),
}


def dynamics(
    *,
    families: tuple = tuple(FAMILIES),
    environments: int = 8,
    length: int = 32,
    interval: float = 0.2,
    train_size: int = 384,
    test_size: int = 5040,
    seed: int = 0,
) -> Content:
    """Trajectories [length, 2] of standardised states at the times 0, interval, 2 interval, ...

    Of each of the `families`, names of `FAMILIES`, there are as many `environments`: number n of all N is of family
    n // environments, with parameters even in the family's ranges. Trajectory i of a split, train_size and test_size of
    them, is of environment i mod N, so that both splits have the same environments; its first state is even in the
    family's square. An environment depends on (seed, family, its place in it) alone, and a trajectory on its
    environment and on (seed, split, i).

    Integrated in float64 by the classical Runge-Kutta method in steps of at most 0.01.
    """
    require(len(families) >= 1, "dynamics: families must name at least one family")
    for at, name in enumerate(families):
        require(name in FAMILIES, f"dynamics has no family {name!r}{nearest(name, FAMILIES)}")
        require(name not in families[:at], f"dynamics: families names {name!r} twice")
    require(environments >= 1, f"dynamics: environments must be at least 1, got {environments}")
    require(length >= 2, f"dynamics: length must be at least 2, got {length}")
    require(0 < interval < np.inf, f"dynamics: interval must be above 0, got {interval}")
    total = len(families) * environments
    for name, size in (("train_size", train_size), ("test_size", test_size)):
        require(size >= total, f"dynamics: {name} must be at least {total}, one of each environment, got {size}")
    parameters = [environment(name, place, seed) for name in families for place in range(environments)]
    splits = [
        _split(families, parameters, split, size, length, interval, seed)
        for split, size in enumerate((train_size, test_size))
    ]
    systems = [
        [name, parameters[at * environments + place].tolist()]
        for at, name in enumerate(families)
        for place in range(environments)
    ]
    info = {"environments": total, "interval": float(interval), "systems": systems}
    return Content(kind="trajectory", train=splits[0], test=splits[1], info=info)


def environment(name: str, place: int, seed: int) -> np.ndarray:
    """The parameters [k] of environment `place` of a family."""
    rng = np.random.default_rng([seed, ENVIRONMENT, list(FAMILIES).index(name), place])
    least, largest = np.transpose(FAMILIES[name].parameters)
    return rng.uniform(least, largest)


def solve(inputs: np.ndarray, environments: np.ndarray, systems: Sequence, interval: float) -> np.ndarray:
    """The trajectories [N, T, 2] that the first of the states inputs [N, T, 2] begin, by the equations: what a perfect
    answer says. `systems` holds (family, parameters) of each environment, as `Dataset.info` does."""
    found = np.empty_like(inputs)
    for number, (name, p) in enumerate(systems):
        family, mine = FAMILIES[name], environments == number
        first = inputs[mine, 0].astype(np.float64) * family.deviation + family.mean
        field = lambda x, family=family, p=p: family.field(x, p)
        found[mine] = (integrated(field, first, inputs.shape[1], interval) - family.mean) / family.deviation
    return found


def integrated(field: Callable, state: np.ndarray, length: int, interval: float) -> np.ndarray:
    """States [B, length, D] of dx/dt = field(x) that begin with state [B, D]: the classical Runge-Kutta method of order
    4, in equal steps of at most FINE."""
    steps = int(np.ceil(interval / FINE - 1e-9))
    h, states = interval / steps, [state]
    for _ in range(length - 1):
        for _ in range(steps):
            a = field(state)
            b = field(state + h / 2 * a)
            c = field(state + h / 2 * b)
            d = field(state + h * c)
            state = state + h / 6 * (a + 2 * b + 2 * c + d)
        states.append(state)
    return np.stack(states, 1)


def _split(families, parameters, split: int, size: int, length: int, interval: float, seed: int):
    """The fields of a split; all trajectories of a family are integrated together."""
    each = len(parameters) // len(families)
    number = np.arange(size) % len(parameters)
    inputs = np.empty((size, length, 2), np.float32)
    starts = np.stack([np.random.default_rng([seed, split, i]).uniform(size=2) for i in range(size)])
    for at, name in enumerate(families):
        family, mine = FAMILIES[name], number // each == at
        least, largest = family.start
        p = np.stack([parameters[n] for n in number[mine]], -1)
        first = least + (largest - least) * starts[mine]
        states = integrated(lambda x, family=family, p=p: family.field(x, p), first, length, interval)
        inputs[mine] = (states - family.mean) / family.deviation
    return {
        "inputs": inputs,
        "environment": number.astype(np.int32),
        "families": (number[:, None] // each == np.arange(len(families))).astype(np.uint8),
    }
