"""Laws of quantization-aware training, fitted to what they made themselves."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from lissom.evaluation import qat_law
from lissom.evaluation.qat_law import Law, Point, best_shares, fit_law, fit_share, relative_error, share_law

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
MADE = Law((0.3, 2.5, 0.3, 3.0, 0.35, 0.5, 1.0, -0.5, 0.3, 0.0, 0.5, -3.0, 0.3, -0.05, -0.4, 0.3))


def grid(law=MADE, per_byte=(10, 30, 100, 300)):
    found = []
    for n, bits, s, share in itertools.product((7_000, 33_000), (2, 4), per_byte, SHARES):
        point = Point(n, bits, round(s * n * bits / 8), share, 1.0)
        found.append(dataclasses.replace(point, loss=float(law.loss([point])[0])))
    return found


def test_the_law_by_hand():
    point = Point(1000, 4, 50_000, 0.25, 1.0)
    assert point.per_byte == 100 and point.cell == (1000, 4, 50_000)
    law = Law(
        (
            math.log(1.5),
            math.log(2),
            0.5,
            math.log(3),
            0.25,
            math.log(4),
            0.5,
            *(math.log(5), 0.25, 0.1, 0.2),
            *(math.log(6), 0.5, 0.3, -0.1, 0.4),
        )
    )
    expected = 1.5 + 2 * 1000**-0.5 + 3 * 50_000**-0.25 + 4 * 2**-2.0 + 5 * 2**-1.0 * 1000**-0.1 * 25**-0.2
    expected += 6 * 2**-2.0 * 1000**-0.3 * 75**0.1 * 25**-0.4
    assert law.loss([point])[0] == pytest.approx(expected)


def test_a_fit_finds_the_law_that_made_the_points():
    points = grid()
    held_out = [point for point in points if point.per_byte > 200]
    known = [point for point in points if point.per_byte < 200]
    law = fit_law(known)
    assert relative_error(law, known) < 1e-3 and relative_error(law, held_out) < 5e-3
    plain = fit_law(known, whole=False)
    assert relative_error(plain, known) > 5 * relative_error(law, known)
    here = [point for point in points if point.cell == points[0].cell]
    assert abs(law.best_share(*points[0].cell) - MADE.best_share(*points[0].cell)) < 0.1, here


def test_best_shares_lie_between_those_that_were_tried():
    loss = lambda f: 2 + (f - 0.4) ** 2
    points = [Point(100, 4, 1000, f, loss(f)) for f in SHARES]
    points += [Point(100, 2, 1000, f, 2 - f) for f in SHARES] + [Point(7, 2, 5, 0.5, 1.0)]
    assert best_shares(points) == {(100, 4, 1000): pytest.approx(0.4), (100, 2, 1000): 0.9}


def test_the_share_law_is_fitted():
    s = np.array([10, 30, 100, 1000])
    a, error = fit_share(s, [share_law(value, 5.0) for value in s])
    assert a == pytest.approx(5.0, abs=1e-3) and error < 1e-4
    assert share_law(100, qat_law.PAPER_A) == pytest.approx(math.exp(-6.73 / math.log(100)))
    with pytest.raises(ValueError, match="must be above 1"):
        share_law(1.0, 5.0)
    with pytest.raises(ValueError, match="no best shares"):
        fit_share([], [])
    with pytest.raises(ValueError, match="1 runs with both stages are too few for a law of 16"):
        fit_law([Point(1, 2, 3, 0.5, 1.0), Point(1, 2, 3, 1.0, 1.0)])


def test_kinds_of_cooldown_are_compared_at_equal_tokens():
    line = lambda tokens, losses: [Point(1000, 4, tokens, share, loss) for share, loss in losses.items()]
    separate = [*line(100, {0.25: 2.0, 0.5: 1.5, 1.0: 1.0}), *line(200, {0.25: 1.2, 0.5: 1.4}), *line(300, {0.5: 9.0})]
    fused = [*line(100, {0.25: 1.75, 0.5: 1.75}), *line(200, {0.25: 1.0, 0.75: 0.5})]
    assert qat_law.differences(fused, separate) == {
        (4, 0.25): [pytest.approx(-0.25), pytest.approx(-0.2)],
        (4, 0.5): [pytest.approx(0.25)],
    }
    # Of 100 tokens 1.75 and 1.5, since a share of 1 has no cooldown of two kinds; of 200 tokens 0.5 and 1.2.
    assert qat_law.best_differences(fused, separate) == [pytest.approx(0.25), pytest.approx(-0.7)]
