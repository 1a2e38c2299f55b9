"""The comparison of mixtures with and without contexts: what it writes, and what it says of wrong flags."""

import subprocess
import sys

import pytest

from lissom.evaluation.rows import read_rows
from lissom.training.errors import UserError
from scripts import contextual_mixture


def test_tiny(tmp_path):
    contextual_mixture.run([60], restarts=2, seeds=1, overlap=0.3, noise=0.1, tiny=True, out=tmp_path)
    rows = {row.identity.variant: row for row in read_rows(tmp_path / "rows.jsonl")}
    assert list(rows) == list(contextual_mixture.METHODS)
    assert rows["known regimes"].identity.role == "ceiling"
    of = lambda name, metric: [m.value for m in rows[name].measurements if m.name == metric]
    assert of("ridge", "adjusted_rand") == []
    assert of("contextual mixture", "rmse")[0] < 0.8 * of("ridge", "rmse")[0]
    by_inputs, by_both = of("contextual mixture", "adjusted_rand")
    assert by_both > by_inputs > 0.5
    assert "given inputs and targets" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sizes": []}, "--sizes= must hold one number or more"),
        ({"sizes": [5]}, "--sizes=5 must hold one number or more, each at least 6"),
        ({"restarts": 0}, "--restarts=0 must be at least 1"),
        ({"seeds": 0}, "--seeds=0 must be at least 1"),
        ({"margin": 0.7}, "margin=0.7 in 0..0.5"),
        ({"overlap": 0.0}, "overlap=0.0 over 0"),
    ],
)
def test_wrong_flags_give_a_sentence(settings, words):
    with pytest.raises(UserError, match=words):
        contextual_mixture.run(**{"sizes": [60], "tiny": True, **settings})


def test_the_command_line(tmp_path):
    command = [sys.executable, "scripts/contextual_mixture.py", "--tiny", f"--out={tmp_path}"]
    done = subprocess.run([*command, "--config.seed=1"], capture_output=True, text=True)
    assert done.returncode == 2 and "takes no recipe" in done.stderr
    done = subprocess.run([*command, "--sizes=a"], capture_output=True, text=True)
    assert done.returncode == 2 and "must be whole numbers" in done.stderr
    flags = ["--sizes=30", "--restarts=1", "--seeds=1"]
    subprocess.run([*command, *flags], capture_output=True, text=True, check=True)
    assert len(read_rows(tmp_path / "rows.jsonl")) == len(contextual_mixture.METHODS)
