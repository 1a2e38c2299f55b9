"""The table of meta-gradients: ways that must agree, and what is asked wrongly."""

import os

import pytest

from lissom.evaluation.rows import read_rows
from scripts import meta_steps
from tests.scripts.lines import command_line


def run(*arguments):
    with command_line(meta_steps):
        meta_steps.main(["meta_steps.py", *arguments])


def test_command_line_in_tiny(tmp_path, monkeypatch):
    monkeypatch.delenv("LISSOM_REFERENCE_PYTHON", raising=False)
    run("--tiny", "--tasks=2", "--repeats=2", f"--out={tmp_path / 'out'}")
    rows = read_rows(tmp_path / "out" / "rows.jsonl")
    ways = {(row.identity.task, row.identity.variant) for row in rows}
    for network in ("mlp", "conv4"):
        for order in ("second order", "first order"):
            assert {(f"meta-gradient, {network}, {order}", way) for way in ("vmapped", "a loop over tasks")} <= ways
    assert all({m.name: m.value for m in row.measurements}["step_p50"] > 0 for row in rows)


@pytest.mark.skipif(not os.environ.get("LISSOM_REFERENCE_PYTHON"), reason="no interpreter with torch is named")
def test_torch_agrees(capsys):
    run("--tiny", "--tasks=2", "--repeats=2")
    told = capsys.readouterr().out
    assert "torch.func" in told and "torch, a loop over tasks" in told


def test_gradients_that_differ_are_an_error():
    import numpy as np

    from lissom.training.errors import UserError

    one = {"w": np.array([1.0, 2.0])}
    meta_steps.agree(one, {"w": np.array([1.0, 2.001])}, "a friend")
    with pytest.raises(UserError, match="of a friend are not ours"):
        meta_steps.agree(one, {"w": np.array([1.0, 2.5])}, "a friend")


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--tasks=0", "--tasks=0 must be at least 1"),
        ("--repeats=1", "--repeats=1 must be at least 2"),
        ("--config=configs/fewshot/glyphs.py", "meta_steps.py takes no --config"),
    ],
)
def test_mistakes_are_one_sentence(flag, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(flag)
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err
