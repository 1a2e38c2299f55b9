"""The measurement of set encoders: what it writes, and what it says of wrong flags."""

import subprocess
import sys

import pytest

from lissom.evaluation.rows import read_rows
from lissom.training.errors import UserError
from scripts import set_memory


def test_tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(set_memory, "VARIANTS", {name: set_memory.VARIANTS[name] for name in ("umbc", "deep_sets")})
    set_memory.run([16, 64], chunk=8, draws=40, seeds=1, tiny=True, out=tmp_path)
    umbc, deep_sets, gradient = read_rows(tmp_path / "rows.jsonl")
    assert "train peak memory, batch 8, elements 64" in (tmp_path / "table.md").read_text()
    held = {
        row.identity.variant: [m.value for m in row.measurements if m.name == "train_temporaries"]
        for row in (umbc, deep_sets)
    }
    assert held["deep_sets"][1] > 2 * held["deep_sets"][0] and held["umbc"][1] < 1.5 * held["umbc"][0]
    assert gradient.identity.seed == 0
    by = lambda name, kind, **conditions: {
        m.conditions["share"]: m.value
        for m in gradient.measurements
        if (m.name, m.kind) == (name, kind) and conditions.items() <= m.conditions.items()
    }
    found, expected = (by("gradient_bias", kind, scaled=True) for kind in ("measured", "modelled"))
    assert sorted(found) == [0.25, 0.5]
    # Without a bias the distance of the mean is that of a mean of 40: its square is on average the expected one's.
    assert all(found[share] < 2 * expected[share] for share in found)
    # Without the factor what is missing is 1 - share.
    unscaled = by("gradient_bias", "measured", scaled=False)
    assert unscaled[0.25] == pytest.approx(0.75, abs=0.25) and unscaled[0.5] == pytest.approx(0.5, abs=0.25)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sizes": []}, "--sizes= must hold one number or more"),
        ({"chunk": 0}, "--chunk=0 must be at least 1"),
        ({"draws": 1}, "--draws=1 must be at least 2"),
        ({"seeds": 0}, "--seeds=0 must be at least 1"),
        ({"chunk": 17}, "--chunk=17 must be at most 16"),
    ],
)
def test_wrong_flags_give_a_sentence(settings, words):
    with pytest.raises(UserError, match=words):
        set_memory.run(**{"sizes": [16], "tiny": True, **settings})


def test_the_command_line(tmp_path):
    command = [sys.executable, "scripts/set_memory.py", "--tiny", f"--out={tmp_path}"]
    done = subprocess.run([*command, "--config.seed=1"], capture_output=True, text=True)
    assert done.returncode == 2 and "takes no recipe" in done.stderr
    subprocess.run([*command, "--sizes=16,32", "--draws=4", "--seeds=1"], capture_output=True, text=True, check=True)
    assert len(read_rows(tmp_path / "rows.jsonl")) == len(set_memory.VARIANTS) + 1
