"""Rows of trained spiking networks that stop early."""

import shutil

import numpy as np
import pytest

from lissom.evaluation.rows import read_rows
from lissom.training.errors import UserError
from scripts import early_exit

SMALL = {"budgets": (1.5, 2.0, 9.0), "batch": 48, "repeats": 2}


def told(rows):
    """{policy: {(metric, conditions): value}} of rows of one run."""
    return {
        row.identity.variant.partition(": ")[2]: {
            (m.name, *(f"{key}={value}" for key, value in m.conditions.items())): m.value for m in row.measurements
        }
        for row in rows
    }


def test_rows_of_two_seeds(tiny_run, tmp_path, capsys):
    snn = [tiny_run("vision/digits_snn", f"snn_seed{seed}", seed=seed)[1] for seed in (0, 1)]
    twin = tiny_run("vision/digits_snn", "twin", **{"model.neuron": "relu", "model.time_steps": 1})[1]
    rows = early_exit.run([*snn, twin], **SMALL, tolerance=1.0, out=tmp_path / "out")
    with pytest.raises(UserError, match="would be one line of the table"):
        early_exit.run([snn[0], shutil.copytree(snn[0], tmp_path / "other" / snn[0].name)], **SMALL)
    assert "twin: it takes one step" in capsys.readouterr().err
    kept = read_rows(tmp_path / "out" / "rows.jsonl")
    assert [row.identity for row in kept] == [row.identity for row in rows] and {row.identity.seed for row in rows} == {
        0,
        1,
    }
    assert (tmp_path / "out" / "early_exit.png").stat().st_size > 1000
    assert "snn: oracle (ceiling)" in (tmp_path / "out" / "table.md").read_text()
    for seed in (0, 1):
        found = told([row for row in rows if row.identity.seed == seed])
        fixed = [found[f"fixed, {t} steps"] for t in (1, 2, 3, 4)]
        assert next(iter(found)) == "fixed, 4 steps" and [line["mean_steps",] for line in fixed] == [1, 2, 3, 4]
        assert "dynamic, within 9 steps" not in found
        for name in ("within 1.5 steps", "within 2 steps", "chosen"):
            dynamic, chance = found[f"dynamic, {name}"], found[f"random, {name}"]
            assert dynamic["mean_steps",] == chance["mean_steps",] <= 4
            accuracies = [line["accuracy",] for line in fixed]
            assert min(accuracies) <= chance["accuracy",] <= max(accuracies)
            assert dynamic["accuracy",] <= found["oracle"]["accuracy",]
        chosen = found["dynamic, chosen"]
        assert chosen["agreement",] >= 0.98 and chosen["temperature",] > 0 and 0 <= chosen["threshold",] <= 1
        assert {("calibration_error", "fitted=False"), ("calibration_error", "fitted=True")} < set(chosen)
        for policy in ("dynamic, chosen", "dynamic, threshold 1"):
            ratio = found["fixed, 4 steps"]["latency_p50", "batch=48"] / found[policy]["latency_p50", "batch=48"]
            assert found[policy]["speedup", "batch=48", "reference=whole run"] == pytest.approx(ratio)
        assert ("speedup", "batch=48", "reference=threshold 1") in chosen


def test_what_is_calibrated():
    """Scores that are means, of which the first are as large as the last: added up, the first say little."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    drawn = rng.normal(size=(8, 400, 3)) + np.eye(3)[labels]
    means = np.cumsum(drawn, 0) / np.arange(1, 9)[:, None, None]
    half = early_exit.Half(None, labels, means, means.argmax(-1) == labels)
    at = {
        kind: early_exit.policies(half, half, 0.0, (), kind, True)[1] for kind in ("accumulated", "shared", "per_step")
    }
    assert at["shared"].shape == () and at["accumulated"].shape == at["per_step"].shape == (8,)
    # A step adds to a class's log-likelihood its score, so that the sums are log-likelihoods: a temperature of 1.
    np.testing.assert_allclose(at["accumulated"] * np.arange(1, 9), np.full(8, 1.0), atol=0.1)
    np.testing.assert_allclose(at["per_step"] * np.arange(1, 9), np.full(8, 1.0), atol=0.25)
    # Scores that are sums already are taken as they are.
    assert early_exit.policies(half, half, 0.0, (), "accumulated", False)[1] == at["shared"]


def test_an_exported_conversion(tiny_run, capsys):
    from lissom.eval import evaluate

    settings = {"model.neuron": "relu", "model.time_steps": 1, "evaluation.latency_repeats": 2}
    _, path = tiny_run(
        "vision/digits_snn", **settings, **{"evaluation.transforms": ({"name": "to_spiking", "steps": 5},)}
    )
    with pytest.raises(UserError, match="none of 1 runs"):
        early_exit.run([path], **SMALL, transform="to_spiking")
    assert "holds no exported network" in capsys.readouterr().err
    evaluate([path])
    with pytest.raises(UserError, match="none of 1 runs"):
        early_exit.run([path], **SMALL, transform="to_spikes")
    assert "beside it are 'to_spiking'" in capsys.readouterr().err
    rows = early_exit.run([path], **SMALL, transform="to_spiking")
    assert "speedup (reference=whole run)" in capsys.readouterr().out
    assert {row.identity.transform for row in rows} == {"to_spiking"}
    assert next(iter(told(rows))) == "fixed, 5 steps"


def test_a_half_is_held_out_and_thresholds_come_from_it(tiny_run):
    """Labels of the judged half move accuracies alone; those of the other move what is chosen."""
    _, path = tiny_run("vision/digits_snn")
    examples = early_exit_examples(path)
    parts = early_exit_parts(path)
    rows, others = early_exit.split(examples, 0.5)
    assert not set(rows) & set(others) and len(rows) + len(others) == len(examples)
    known, judged = (early_exit.half(parts, examples, part, 64) for part in (rows, others))
    assert known.scores.shape == (4, len(rows), 10)
    sharp = known._replace(scores=known.scores + 3 * np.eye(10)[known.labels], right=np.ones_like(known.right))
    lines, temperature, threshold = early_exit.policies(sharp, judged, 0.5, (2.0,), "shared", True)
    wrong = judged._replace(right=~judged.right)
    other, same, also = early_exit.policies(sharp, wrong, 0.5, (2.0,), "shared", True)
    assert (temperature, threshold) == (same, also) and threshold == 0
    assert lines[0].measurements[0].value == pytest.approx(1 - other[0].measurements[0].value)
    _, each, _ = early_exit.policies(known, judged, 0.5, (2.0,), "per_step", True)
    assert each.shape == (4,)


def early_exit_examples(path):
    from lissom.training.building import load_dataset
    from lissom.training.runs import read_config

    return load_dataset(read_config(path)).test


def early_exit_parts(path):
    from lissom.training.runs import load_network

    return load_network(path)


def test_chunks_are_whole():
    assert [rows.tolist() for rows in early_exit.chunks(5, 3)] == [[0, 1, 2], [3, 4, 0]]
    assert [rows.tolist() for rows in early_exit.chunks(2, 3)] == [[0, 1, 0]]
    assert [rows.tolist() for rows in early_exit.chunks(3, 3, least=2)] == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"validation": 1.0}, "--validation=1.0 must be above 0 and below 1"),
        ({"tolerance": -1.0}, "--tolerance=-1.0 must be at least 0"),
        ({"budgets": ()}, "--budgets= must be at least 1"),
        ({"budgets": (0.5,)}, "--budgets=0.5 must be at least 1 step each"),
        ({"batch": 0}, "--batch=0 must be at least 1"),
        ({"repeats": 1}, "--repeats=1 must be at least 2"),
    ],
)
def test_wrong_flags_give_a_sentence(settings, words):
    with pytest.raises(UserError, match=words):
        early_exit.run([], **settings)
