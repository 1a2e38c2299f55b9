"""eval.py: what it takes and skips, what its report holds, and the floors and ceilings of a task."""

import json

import pytest

from lissom.eval import evaluate, find_runs, overrides_of, render, task_name, write


def values(row):
    return {m.name: m.value for m in row.measurements}


def test_finds_runs_at_any_depth_and_reports(tiny_run, tmp_path):
    _, one = tiny_run("vision/mnist1d_cnn", "deep/down/one")
    _, two = tiny_run("vision/mnist1d_cnn", "two", **{"model.kernel": 5, "evaluation.floor": True, "seed": 3})
    (tmp_path / "empty").mkdir()
    said = []
    assert find_runs([str(tmp_path / "*")], said.append) == [one, two]
    assert len(said) == 1 and "empty" in said[0]
    rows = evaluate([two, one], variants={str(one): "narrow", str(two): "wide"})
    assert [(r.identity.label, r.identity.transform, r.identity.role) for r in rows] == [
        ("wide", None, "variant"),
        ("wide", "int8_weights", "variant"),
        ("narrow", None, "variant"),
        ("narrow", "int8_weights", "variant"),
        ("1-nearest neighbour", None, "floor"),
        ("linear", None, "floor"),
    ]
    assert rows[0].identity.overrides["model.kernel"] == 5
    # MNIST-1D's paper puts the linear model at 32 % with 4,000 training examples.
    assert values(rows[5])["accuracy"] == pytest.approx(0.32, abs=0.04)
    kinds = {(m.name, m.kind) for m in rows[0].measurements}
    assert {("accuracy", "measured"), ("latency_p50", "measured"), ("peak_memory", "compiled")} <= kinds
    write(rows, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"rows.jsonl", "table.md", "table.csv", "pareto.png"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and lines[0]["provenance"]["hardware"]["cores"]
    text = render(rows)
    assert "wide + int8_weights" in text and "1-nearest neighbour (floor)" in text


def test_runs_of_one_label_are_told_apart(tiny_run):
    _, one = tiny_run("vision/mnist1d_cnn", "one")
    _, two = tiny_run("vision/mnist1d_cnn", "two")
    rows = evaluate([one, two], floors=False)
    assert len({(r.identity.label, r.identity.transform) for r in rows}) == 4
    render(rows)


def test_a_stopped_run_is_skipped(tiny_run):
    from lissom.training.errors import UserError

    _, run = tiny_run("vision/mnist1d_cnn")
    facts = json.loads((run / "facts.json").read_text())
    (run / "facts.json").write_text(json.dumps({**facts, "steps": 9}))
    said = []
    with pytest.raises(UserError, match="no directory with a finished run"):
        find_runs([str(run)], said.append)
    assert "stopped at step 3 of 9" in said[0]


def test_flops_of_a_cnn_by_hand(tiny_run):
    """tiny: 40 samples, two convolutions of kernel 3 and stride 2 to 4 channels, 10 classes. Multiply-adds: 20 x 4 x
    (3 x 1), 10 x 4 x (3 x 4), 40 x 10; 'SAME' padding of stride 2 on even lengths leaves one tap of each outside."""
    _, run = tiny_run("vision/mnist1d_cnn")
    row = evaluate([run], floors=False)[0]
    taps = (20 * 3 - 1) * 1 * 4 + (10 * 3 - 1) * 4 * 4 + 40 * 10
    assert values(row)["flops"] == 2 * taps
    parameters = (3 * 1 * 4 + 4) + (3 * 4 * 4 + 4) + (40 * 10 + 10)
    assert values(row)["parameters"] == parameters
    assert values(row)["parameter_bytes"] == 4 * parameters


def test_ceiling(tiny_run):
    settings = {
        "data.name": "cue_match",
        "evaluation.floor": True,
        "data.kwargs": {"cue_match": {"train_size": 200, "test_size": 100, "length": 32, "items": 4}},
    }
    _, run = tiny_run("vision/mnist1d_cnn", **settings)
    rows = evaluate([run])
    assert rows[-1].identity.role == "ceiling" and values(rows[-1])["accuracy"] == 1.0
    assert rows[0].identity.task == "cue_match(items=4, length=32, test_size=100, train_size=200)"


def test_names():
    from lissom.training.config import load_recipe, overridden

    config = overridden(load_recipe("configs/language/recall_lm.py"), [("model.width", "96"), ("seed", "4")])
    assert overrides_of(config) == {"model.width": 96}
    assert task_name(config) == "sequences(length=64, pairs=8, task=recall, vocab_size=64)"


def test_profile(tmp_path):
    from lissom.train import train
    from lissom.training.config import load_recipe, overridden

    config = overridden(load_recipe("configs/vision/mnist1d_cnn.py:tiny"), [("mesh.data", 1)])
    train(config, tmp_path / "run", profile=1)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
