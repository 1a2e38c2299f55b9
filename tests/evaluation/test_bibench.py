"""BiBench's score, from rows with known numbers."""

import math

import pytest

from lissom.evaluation.bibench import scored
from lissom.evaluation.rows import Identity, Provenance, Row, measure

HERE, THERE = {"cpu": "Z80", "cores": 1}, {"cpu": "6502", "cores": 1}


def row(variant, seed, accuracy, corrupted=(), transform=None, hardware=HERE, bytes=800, seconds=None, kind="measured"):
    found = [
        measure("accuracy", accuracy, examples=50),
        *(measure("accuracy", a, examples=50, corruption="blur", severity=n + 1) for n, a in enumerate(corrupted)),
        measure("parameter_bytes", bytes, "compiled"),
        measure("artefact_bytes", bytes + 200),
        measure("latency_p50", bytes * 1e-6, kind, batch=1),
        *([measure("train_seconds", seconds)] if seconds else []),
    ]
    identity = Identity("configs/r.py:m", "digits", seed, variant=variant, transform=transform)
    return Row(identity, Provenance(hardware=hardware), tuple(found))


def comparison(ours=0.6, blurred=(0.3, 0.1), more=()):
    full = [row("float", seed, 0.8, (0.6, 0.2)[: len(blurred)], seconds=10) for seed in (0, 1)]
    binary = [row("bnn", 0, ours, blurred, seconds=15), row("bnn", 0, ours, blurred, "packed", bytes=100)]
    return [*binary, *full, *more]


def values(row):
    return {(m.name, m.conditions.get("of")): m.value for m in row.measurements}


def test_by_hand():
    """a = 0.6 / 0.8; r of 0.3 / 0.6 and 0.1 / 0.2 is a half; sqrt((9 / 16 + 1 / 4) / 2)."""
    (found,) = scored([comparison()])
    assert (found.identity.label, found.identity.task) == ("bnn", "digits, configs/r.py")
    assert values(found) == pytest.approx(
        {
            ("relative_accuracy", None): 0.75,
            ("relative_corruption_accuracy", None): 0.5,
            ("bibench_score", None): math.sqrt(13 / 32),
            ("compression_ratio", "parameter_bytes"): 8,
            ("compression_ratio", "artefact_bytes"): 1000 / 300,
            ("speedup", None): 8,
            ("relative_train_seconds", None): 1.5,
        }
    )
    # Of unequal ratios, 1 / 2 and 1, the root of the mean of squares.
    (found,) = scored([comparison(blurred=(0.3, 0.2))])
    assert values(found)["relative_corruption_accuracy", None] == pytest.approx(math.sqrt(5 / 8))


def test_without_corrupted_test_sets_the_score_is_of_accuracy_alone_and_says_so():
    (found,) = scored([comparison(blurred=())])
    (score,) = (m for m in found.measurements if m.name == "bibench_score")
    assert score.value == pytest.approx(0.75) and score.conditions == {"tracks": "accuracy"}


def test_over_comparisons_root_mean_squares():
    """Accuracies 3 / 4 and 1 / 4, corruption 1 / 2 and 1 / 2."""
    rows = scored([comparison(), comparison(ours=0.2)])
    # Of one task and recipe, as two widths are: numbered.
    apart = ["digits, configs/r.py #1", "digits, configs/r.py #2"]
    assert [r.identity.task for r in rows] == [*apart, "all 2 comparisons"]
    found = values(rows[2])
    assert found["relative_accuracy", None] == pytest.approx(math.sqrt(5 / 16))
    assert found["bibench_score", None] == pytest.approx(math.sqrt((5 / 16 + 1 / 4) / 2)) and len(found) == 3
    # Where one of them has no corrupted sets, the score over all is of accuracies.
    mixed = scored([comparison(), comparison(ours=0.2, blurred=())])[2]
    assert mixed.measurements[-1].conditions == {"tracks": "accuracy", "comparisons": 2}


def test_what_cannot_be_compared_is_left_out():
    other = [row("xnor", 0, 0.6, (0.3, 0.1), "packed", THERE), row("xnor", 7, 0.6, (0.3, 0.1), "packed")]
    imitated = row("fda", 1, 0.6, (0.3, 0.1), "packed", kind="simulated")
    found = {(r.identity.label, r.identity.seed): values(r) for r in scored([comparison(more=[*other, imitated])])}
    assert set(found) == {("bnn", 0), ("xnor", 0), ("fda", 1)}  # full precision has no seed 7
    for name in ("xnor", "fda"):
        assert not {("speedup", None), ("relative_train_seconds", None)} & set(found[name, int(name == "fda")])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reference": "floaty"}, "no variant 'floaty' to be relative to: there are bnn, float"),
        ({"stored": "quantize"}, "no variant with the transform 'quantize'"),
    ],
)
def test_mistakes_are_one_sentence(settings, words):
    with pytest.raises(ValueError, match=words):
        scored([comparison()], **settings)


def test_nothing_is_relative_to_none():
    with pytest.raises(ValueError, match="accuracy of the full-precision network is 0"):
        scored([[row("float", 0, 0.0), row("bnn", 0, 0.5, (), "packed")]])
    with pytest.raises(ValueError, match=r"accuracy corruption=blur severity=1 of .* is unknown"):
        scored([[row("float", 0, 0.8), row("bnn", 0, 0.5, (0.5,), "packed")]])
