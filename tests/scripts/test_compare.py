"""compare.py: grid, matching, tuning, shards, resuming; the table says what the runs recorded."""

import json
import pathlib
import sys

import pytest

from lissom.training.config import load_recipe, overridden
from lissom.training.errors import UserError

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent / "scripts"))
import compare as script

RECIPE = "configs/vision/mnist1d_transformer.py:tiny"


def config(**changes):
    return overridden(load_recipe(RECIPE), {"mesh.data": 1, **changes}.items())


def test_grid():
    variants = script.grid(["model.mixer=attention,none", "model.channels=(1,2),(3,4)"])
    assert [v.label for v in variants] == [
        "mixer=attention channels=(1,2)",
        "mixer=attention channels=(3,4)",
        "mixer=none channels=(1,2)",
        "mixer=none channels=(3,4)",
    ]
    assert variants[1].overrides == (("model.mixer", "attention"), ("model.channels", "(3,4)"))
    with pytest.raises(UserError, match="field=value"):
        script.grid(["model.mixer"])


@pytest.mark.parametrize("text", ["3", "4/4", "a/2", "1/"])
def test_bad_shard(text):
    with pytest.raises(UserError, match="0 <= i < n"):
        script.shard_of(text)


@pytest.mark.parametrize("what", ["params", "flops", "bytes"])
def test_match_is_within_one_percent(what):
    facts = {"input_shape": (40, 1), "classes": 10, "kind": "signal"}
    target = script.size_of(config(**{"model.width": 64}), facts, what)
    solved = script.matched(config(**{"model.mixer": "none", "model.width": 64}), facts, what, target)
    assert abs(script.size_of(solved, facts, what) / target - 1) <= 0.01


def test_compare(tmp_path):
    variants = script.grid(["model.mixer=attention,none"])
    # Two shards do half of the runs each; the join trains nothing and finds all.
    script.compare(config(), variants, tmp_path, seeds=2, shard=(0, 2))
    with pytest.raises(UserError, match="is not finished"):
        script.compare(config(), variants, tmp_path, seeds=2, merge=True)
    script.compare(config(), variants, tmp_path, seeds=2, shard=(1, 2))
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}
    assert len(written) == 4
    rows = script.compare(config(), variants, tmp_path, seeds=2, merge=True)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    found = {(r.identity.variant, r.identity.seed) for r in rows}
    assert found == {(v.label, seed) for v in variants for seed in range(2)}
    with pytest.raises(UserError, match="another config"):
        script.compare(config(**{"optim.learning_rate": 0.5}), variants, tmp_path, seeds=2)
    for row in rows:
        if row.identity.transform is None:
            lines = (tmp_path / f"{row.identity.variant}_seed{row.identity.seed}" / "metrics.jsonl").read_text()
            recorded = [json.loads(line) for line in lines.splitlines()]
            accuracy = next(line["accuracy"] for line in recorded if line["kind"] == "test")
            assert next(m.value for m in row.measurements if m.name == "accuracy") == pytest.approx(accuracy)


def test_tune_flags_the_edge_and_remembers(tmp_path, capsys):
    axis = "optim.learning_rate=1e-6,1e-2"
    best = script.tuned(config(), tmp_path, axis, "plain")
    assert best.optim.learning_rate in (1e-6, 1e-2)
    assert "AT THE EDGE" in capsys.readouterr().err
    record = json.loads((tmp_path / "tuned" / "plain.json").read_text())
    assert set(record) == {"optim.learning_rate=1e-6", "optim.learning_rate=1e-2"}
    (tmp_path / "tuned" / "plain.json").write_text(
        json.dumps({"optim.learning_rate=1e-6": 0.1, "optim.learning_rate=1e-2": 0.2})
    )
    assert script.tuned(config(), tmp_path, axis, "plain").optim.learning_rate == 1e-6
