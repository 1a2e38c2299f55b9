"""Tuning of block sizes: what it writes, and that it judges what runs."""

import functools
import subprocess
import sys

import pytest

from lissom.ops import block_sizes
from lissom.training.errors import UserError
from scripts import tune_ops
from tests.cases import slow

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


@pytest.mark.parametrize(("case", "mask"), [("blocks", "BlockSparse"), slow("causal_odd", "Causal")])
def test_tiny(case, mask):
    before = block_sizes.TABLE.read_text()
    found = tune_ops.tune("attention", "xla", cases=[case], repeats=4, tiny=True)
    assert [entry["mask"] for entry in found] == [mask]
    assert block_sizes.TABLE.read_text() == before


def test_the_faster_sizes_win_and_wrong_ones_are_out(monkeypatch):
    """Times are made up: 64 rows are twice as fast, 512 are wrong, 8 are fastest and wrong in one problem."""

    class Made:
        def __init__(self, seconds):
            self.sample = lambda number: seconds

    def made(problem, implementation):
        key = {**ENTRY, "q_len": 1, "kv_len": 1}
        rows = (block_sizes.tuned(key) or {"rows": 0})["rows"]
        if rows == 512 or (rows == 8 and problem.name == "second"):
            raise AssertionError("it is wrong")
        return Made({0: 1e-3, 32: 1e-3, 64: 0.5e-3, 8: 0.1e-3}[rows])

    monkeypatch.setattr("lissom.evaluation.benchmarks.candidates.one_of_ours", made)
    problem = lambda name: type("Problem", (), {"name": name})()
    problems, choices = [problem("first"), problem("second")], [{"rows": n} for n in (32, 64, 512, 8)]
    best = tune_ops._best(problems, "xla", "attention.xla", choices, 4, 0.05)
    assert best["sizes"] == {"rows": 64} and best["gain"] == pytest.approx(2)
    assert tune_ops._best(problems, "xla", "attention.xla", [{"rows": 32}], 4, 0.05) == {}


def test_problems_of_one_entry_are_judged_together(monkeypatch):
    """Half the time in one problem and four times in the other is a loss; 0.5 and 1.1 a gain of sqrt(1 / 0.55)."""
    times = {("first", 32): 0.5, ("second", 32): 4, ("first", 64): 0.5, ("second", 64): 1.1}

    def made(problem, implementation):
        sizes = block_sizes.tuned({**ENTRY, "q_len": 1, "kv_len": 1}) or {"rows": 0}
        return type("Made", (), {"sample": lambda self, number: times.get((problem.name, sizes["rows"]), 1.0)})()

    monkeypatch.setattr("lissom.evaluation.benchmarks.candidates.one_of_ours", made)
    problems = [type("Problem", (), {"name": name})() for name in ("first", "second")]
    best = functools.partial(tune_ops._best, problems, "xla", "attention.xla")
    assert best([{"rows": 32}], 4, 0.05) == {}
    both = best([{"rows": 32}, {"rows": 64}], 4, 0.05)
    assert both["sizes"] == {"rows": 64} and both["gain"] == pytest.approx((1 / 0.55) ** 0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"op": "conv"}, "--op=conv: there is no such op"),
        ({"implementation": "fast"}, "attention has no such implementation"),
        ({"implementation": "reference"}, "it has no block sizes to tune"),
        ({"cases": ["nothing"]}, "--cases=nothing: there is no such problem"),
        ({"repeats": 2}, "--repeats=2 must be at least 4"),
        ({"margin": -1.0}, "--margin=-1.0 must be at least 0"),
        ({"margin": float("nan")}, "--margin=nan must be at least 0"),
        ({"implementation": "pallas_tpu"}, "--implementation=pallas_tpu: it does not run on this machine's cpu"),
    ],
)
def test_wrong_flags_give_a_sentence(arguments, words):
    given = {"op": "attention", "implementation": "xla", **arguments}
    with pytest.raises(UserError, match=words):
        tune_ops.tune(given.pop("op"), given.pop("implementation"), tiny=True, **given)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            [],
            "--op is missing; the ops are attention, binary_matmul, decode_attention, grouped_matmul, "
            "quantized_matmul, softmax",
        ),
        (["--op=softmax"], "--implementation is missing; softmax has reference, three_pass"),
        (["--op=attention", "--implementation=xla", "--tiny", "--repeats=0"], "--repeats=0 must be at least 4"),
    ],
)
def test_the_command_line_says_what_there_is(words, said):
    done = subprocess.run([sys.executable, tune_ops.__file__, *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
