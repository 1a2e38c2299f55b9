"""Tuning of block sizes: what it writes, and that it judges what runs."""

import pytest

from lissom.ops import block_sizes
from lissom.training.errors import UserError
from scripts import tune_ops

ENTRY = {
    "kernel": "attention.xla",
    "chip": "cpu",
    "dtype": "float32",
    "head_dim": 8,
    "v_dim": 8,
    "mask": "Causal",
    "q_len": 13,
    "kv_len": 13,
}


def test_what_is_written_is_read_back(tmp_path):
    entries = [{**ENTRY, "sizes": {"rows": 64, "forward": [2, 128, 3]}, "gain": 1.25, "date": "2026-11-21"}]
    path = tmp_path / "table.toml"
    path.write_text(tune_ops.rendered(entries))
    assert list(block_sizes.read(path)) == entries
    path.write_text(tune_ops.rendered([]))
    assert block_sizes.read(path) == ()


def test_a_new_measurement_replaces_or_removes_the_old():
    old = [{**ENTRY, "sizes": {"rows": 1}}, {**ENTRY, "q_len": 99, "sizes": {"rows": 2}}]
    assert tune_ops.merged(old, [{**ENTRY, "sizes": {"rows": 3}}])[0]["sizes"] == {"rows": 3}
    assert [entry["q_len"] for entry in tune_ops.merged(old, [ENTRY])] == [99]


def test_tiny(monkeypatch, tmp_path):
    before = block_sizes.TABLE.read_text()
    found = tune_ops.tune("attention", "xla", cases=["causal_odd", "blocks"], repeats=4, tiny=True)
    assert [entry["mask"] for entry in found] == ["Causal", "BlockSparse"]
    assert block_sizes.TABLE.read_text() == before


def test_the_faster_sizes_win_and_wrong_ones_are_out(monkeypatch):
    """Times are made up: a candidate of 64 rows is twice as fast, and one is wrong."""

    class Made:
        def __init__(self, seconds):
            self.sample = lambda number: seconds

    def made(problem, implementation):
        key = {**ENTRY, "q_len": 1, "kv_len": 1}
        sizes = block_sizes.tuned(key)
        if sizes == {"rows": 512}:
            raise AssertionError("it is wrong")
        return Made(0.5e-3 if sizes == {"rows": 64} else 1e-3)

    monkeypatch.setattr("lissom.evaluation.benchmarks.candidates.one_of_ours", made)
    problem = type("Problem", (), {"name": "made up"})()
    best = tune_ops._best(problem, "xla", "attention.xla", [{"rows": 32}, {"rows": 64}, {"rows": 512}], 4, 0.05)
    assert best["sizes"] == {"rows": 64} and best["gain"] == pytest.approx(2)
    assert tune_ops._best(problem, "xla", "attention.xla", [{"rows": 32}], 4, 0.05) == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"op": "conv"}, "--op=conv: there is no such op"),
        ({"implementation": "fast"}, "attention has no such implementation"),
        ({"implementation": "reference"}, "it has no block sizes to tune"),
        ({"cases": ["nothing"]}, "--cases=nothing: there is no such problem"),
        ({"repeats": 2}, "--repeats=2 must be at least 4"),
    ],
)
def test_wrong_flags_give_a_sentence(arguments, words):
    given = {"op": "attention", "implementation": "xla", **arguments}
    with pytest.raises(UserError, match=words):
        tune_ops.tune(given.pop("op"), given.pop("implementation"), tiny=True, **given)
