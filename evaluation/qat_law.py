"""How long to train in float before training with few bits: what Dremov et al. 2025, arXiv:2509.22935, found as laws,
fitted to runs.

With N parameters of B bits and D tokens, of which the share f is of quantization-aware training,

    S = 8 D / (N B)                    tokens per parameter byte; S_qat and S_fp of the tokens of each kind
    f* = exp(-a / ln S)                the share of least loss; the paper's a is 6.73

    L = E + A N^-alpha + C D^-beta                                  (Chinchilla)
        + theta 2^(-kappa B)                                        what few bits cost, however long
        + phi 2^(-chi B) N^-psi S_qat^-omega                        what too little training with them does
        + lambda 2^(-mu B) N^-nu S_fp^-xi S_qat^-rho                and what it has to undo

in nats a token. Coefficients are above 0, exponents of either sign. Fitted by least squares of log L with Huber's loss,
from drawn beginnings. `Point`s without a float stage (f = 1) have no S_fp and are left out of the law.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares, minimize_scalar

PAPER_A = 6.73
NAMES = (
    *("log E", "log A", "alpha", "log C", "beta", "log theta", "kappa"),
    *("log phi", "chi", "psi", "omega", "log lambda", "mu", "nu", "xi", "rho"),
)


@dataclass(frozen=True)
class Point:
    """One run: `share` of its `tokens` were trained with `bits`."""

    parameters: int
    bits: int
    tokens: int
    share: float
    loss: float

    @property
    def per_byte(self) -> float:
        return 8 * self.tokens / (self.parameters * self.bits)

    @property
    def cell(self) -> tuple[int, int, int]:
        """What it has in common with runs of other shares."""
        return self.parameters, self.bits, self.tokens


def best_shares(points: Sequence[Point]) -> dict[tuple[int, int, int], float]:
    """{cell: share of least loss}, between the tried ones by a parabola in f through the best and its neighbours; where
    the best is the least or the largest that was tried, that one. Cells of fewer than three shares have none."""
    found = {}
    for cell in dict.fromkeys(point.cell for point in points):
        here = sorted((point.share, point.loss) for point in points if point.cell == cell)
        if len(here) < 3:
            continue
        f, loss = np.array(here).T
        at = int(loss.argmin())
        if 0 < at < len(f) - 1:
            a, b, _ = np.polyfit(f[at - 1 : at + 2], loss[at - 1 : at + 2], 2)
            found[cell] = float(np.clip(-b / (2 * a), f[at - 1], f[at + 1]))
        else:
            found[cell] = float(f[at])
    return found


def differences(points: Sequence[Point], others: Sequence[Point]) -> dict[tuple[int, float], list[float]]:
    """{(bits, share): loss of a point less that of the other of its cell and share, a number a cell that both have}."""
    known, found = {(point.cell, point.share): point.loss for point in others}, {}
    for point in points:
        if (point.cell, point.share) in known:
            off = point.loss - known[point.cell, point.share]
            found.setdefault((point.bits, point.share), []).append(off)
    return dict(sorted(found.items()))


def best_differences(points: Sequence[Point], others: Sequence[Point]) -> list[float]:
    """Of each cell that both have, the least loss of the points less that of the others, over shares below 1."""
    least = lambda found, cell: min((p.loss for p in found if p.cell == cell and p.share < 1), default=math.nan)
    both = [least(points, cell) - least(others, cell) for cell in dict.fromkeys(point.cell for point in points)]
    return [off for off in both if not math.isnan(off)]


def share_law(per_byte: float, a: float) -> float:
    """f* of S tokens per parameter byte; ValueError for S of 1 or less, of which the law says nothing."""
    if per_byte <= 1:
        raise ValueError(f"S={per_byte:g} tokens per parameter byte must be above 1")
    return math.exp(-a / math.log(per_byte))


def fit_share(per_byte: Sequence[float], shares: Sequence[float]) -> tuple[float, float]:
    """(a, root mean square error of f) of least squares. ValueError without a pair."""
    if not len(per_byte):
        raise ValueError("there are no best shares to fit: a cell needs three of them")
    off = lambda a: [share_law(s, a) - f for s, f in zip(per_byte, shares, strict=True)]
    found = minimize_scalar(lambda a: float(np.square(off(a)).sum()), bounds=(0.0, 50.0), method="bounded")
    return float(found.x), float(np.sqrt(np.square(off(found.x)).mean()))


@dataclass(frozen=True)
class Law:
    """Parameters in the order of NAMES; `whole`: with the terms of quantization, or only Chinchilla's and that of few
    bits (what it is compared to)."""

    values: tuple[float, ...]
    whole: bool = True

    def loss(self, points: Sequence[Point]) -> np.ndarray:
        return _loss(np.asarray(self.values), _columns(points), self.whole)

    def best_share(self, parameters: int, bits: int, tokens: int) -> float:
        """The share of least loss in (0, 1)."""
        loss = lambda f: float(self.loss([Point(parameters, bits, tokens, f, 1.0)])[0])
        grid = np.linspace(0.01, 0.99, 99)
        return float(grid[int(np.argmin([loss(f) for f in grid]))])


def fit_law(points: Sequence[Point], *, whole: bool = True, starts: int = 24, seed: int = 0) -> Law:
    """The best of `starts` beginnings. ValueError with fewer points than parameters."""
    points = [point for point in points if point.share < 1]
    count = len(NAMES) if whole else 7
    if len(points) <= count:
        raise ValueError(f"{len(points)} runs with both stages are too few for a law of {count} parameters")
    columns, target = _columns(points), np.log([point.loss for point in points])
    rng, best = np.random.default_rng(seed), None
    least = min(point.loss for point in points)
    for _ in range(starts):
        start = np.concatenate(
            [
                [math.log(least * rng.uniform(0.3, 1.0)), rng.uniform(0, 5), rng.uniform(0.1, 0.8), rng.uniform(0, 5)],
                [rng.uniform(0.1, 0.8), rng.uniform(-3, 1), rng.uniform(0.2, 1.5)],
                [rng.uniform(-2, 2), rng.uniform(0, 1), rng.uniform(-0.3, 0.3), rng.uniform(0.1, 0.8)],
                [rng.uniform(-4, 1), rng.uniform(0, 1), *rng.uniform(-0.3, 0.3, 2), rng.uniform(0.1, 0.8)],
            ]
        )[:count]
        off = lambda values: np.log(np.maximum(_loss(values, columns, whole), 1e-9)) - target
        found = least_squares(off, start, loss="huber", f_scale=3e-3, bounds=(-15, 15), max_nfev=400)
        if best is None or found.cost < best.cost:
            best = found
    return Law(tuple(float(value) for value in best.x), whole)


def relative_error(law: Law, points: Sequence[Point]) -> float:
    """Mean of |predicted - loss| / loss."""
    points = [point for point in points if point.share < 1]
    loss = np.array([point.loss for point in points])
    return float(np.mean(np.abs(law.loss(points) - loss) / loss))


def _columns(points: Sequence[Point]) -> np.ndarray:
    """[5, points]: N, B, D, S_fp, S_qat."""
    rows = [(p.parameters, p.bits, p.tokens, p.per_byte * (1 - p.share), p.per_byte * p.share) for p in points]
    return np.array(rows, float).T


def _loss(values: np.ndarray, columns: np.ndarray, whole: bool) -> np.ndarray:
    n, bits, tokens, s_fp, s_qat = columns
    e, a, alpha, c, beta, theta, kappa, *rest = values
    # Logarithms are cut off: a beginning far off must not overflow.
    power = lambda log: np.exp(np.clip(log, -60, 60))
    ln, two = np.log, math.log(2)
    loss = power(e) + power(a - alpha * ln(n)) + power(c - beta * ln(tokens)) + power(theta - kappa * bits * two)
    if whole:
        phi, chi, psi, omega, lam, mu, nu, xi, rho = rest
        loss = loss + power(phi - chi * bits * two - psi * ln(n) - omega * ln(s_qat))
        loss = loss + power(lam - mu * bits * two - nu * ln(n) - xi * ln(s_fp) - rho * ln(s_qat))
    return loss
