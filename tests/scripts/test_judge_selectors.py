"""The script that judges selectors, on a tiny random checkpoint."""

import subprocess
import sys

import jax
import pytest
from flax import nnx

from lissom.evaluation.rows import read_rows
from lissom.models.registry import construct
from lissom.models.selectors import SELECTORS
from lissom.training.errors import UserError
from scripts import judge_selectors
from tests.cases import slow
from tests.models import pretrained_files as files

pytest.importorskip("tokenizers")
SEARCHED = ("per_head", "streaming_pages")  # made of others
SMALL = {"length": 128, "count": 2, "densities": [0.4], "block": 16, "steps": 4, "repeats": 2}


def values(row) -> dict[str, float]:
    return {measurement.name: measurement.value for measurement in row.measurements}


FEW = ["oracle", "learned_gate", "page_bounds", "streaming_pages", "pooled"]


@pytest.mark.parametrize("names", [FEW, slow([*FEW, "per_head", "token_sparsity"])])
def test_rows_of_every_kind(names, tmp_path):
    files.write_byte_level(tmp_path / "checkpoint")
    plug_in = "lissom.models.selectors.pooled:Pooled"
    out = tmp_path / "out"
    names = [*names, plug_in]
    run = lambda lengths: judge_selectors.run(str(tmp_path / "checkpoint"), out, names=names, lengths=lengths, **SMALL)
    rows = run([])
    assert rows == read_rows(out / "rows.jsonl") and (out / "table.md").is_file()
    found = {(row.identity.label, row.identity.seed): values(row) for row in rows}
    assert set(found) == {(label, seed) for label in ("dense", *(f"{n} 0.4" for n in names)) for seed in (0, 1)}
    assert found[f"{plug_in} 0.4", 0] == found["pooled 0.4", 0] != found["oracle 0.4", 0]
    assert found["streaming_pages 0.4", 0]["loss"] != found["page_bounds 0.4", 0]["loss"]
    for (label, seed), numbers in found.items():
        if label == "dense":
            assert numbers["density"] == 1 and set(numbers) == {"loss", "density"}
        else:
            assert numbers["excess_loss"] == numbers["loss"] - found["dense", seed]["loss"]
            assert 0 < numbers["density"] < 1 and 0 < numbers["mass_recall"] < 1 and numbers["output_error"] > 0
    # What stands there is not judged again; latencies come behind.
    again = run([128])
    assert again[: len(rows)] == rows
    times = {row.identity.label: values(row) for row in again[len(rows) :]}
    assert set(times) == {"dense", *(f"{n} 0.4" for n in names)}
    assert all(0 < numbers["density"] <= 1 for numbers in times.values())
    assert times["dense"]["density"] == 1 > times["oracle 0.4"]["density"]
    with pytest.raises(UserError, match="has other times of 128 tokens"):
        judge_selectors.run(str(tmp_path / "checkpoint"), out, names=["oracle", "random"], lengths=[128], **SMALL)
    assert times["dense"]["speedup"] == 1 and all(numbers["latency_p50"] > 0 for numbers in times.values())


@pytest.mark.parametrize("name", [name for name in judge_selectors.JUDGED if name not in SEARCHED])
def test_settings_grow_denser(name):
    q, k = (jax.random.normal(jax.random.key(seed), (1, 256, 2, 8)) for seed in (0, 1))
    facts = {"heads": 2, "kv_heads": 2, "head_dim": 8, "block": 16}

    def density(strength):
        settings = judge_selectors.settings_of(name, strength, 256, 16, 2)
        selector = construct(SELECTORS, name, {name: settings}, "selector", **facts, rngs=nnx.Rngs(0))
        return float(selector(q, k)[1]["density"])

    sparse, some, dense = map(density, (0.05, 0.4, 0.95))
    assert sparse < some < dense and sparse < 0.35


def test_bad_flags():
    command = [sys.executable, "scripts/judge_selectors.py"]
    for flag, words in (
        ("--selectors=poled", "--selectors=poled: there are random"),
        ("--selectors=lissom.models.selectors.static:Strided", "has no setting 'density'"),
        ("--densities=2", "--densities=2 must be numbers above 0 and at most 1"),
        ("--latency=x", "--latency=x must be a whole number of at least 128"),
        ("--checkpoint=nowhere", "no checkpoint 'nowhere'"),
    ):
        done = subprocess.run([*command, flag, "--out=/tmp/nothing"], capture_output=True, text=True)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(UserError, match="there are random"):
        judge_selectors.settings_of("none", 0.1, 128, 16, 2)
