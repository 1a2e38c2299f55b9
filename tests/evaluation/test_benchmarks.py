"""The benchmark harness: a red gate gives no number, what ran is what was asked for, and the attention entry's counts
and oracle are right."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.evaluation.benchmarks import ENTRIES, attention, harness, report, results
from lissom.evaluation.benchmarks.problem import InProcess, InWorker, Oracle, Problem
from lissom.evaluation.benchmarks.results import Result
from lissom.evaluation.ceilings import Ceilings, Work
from lissom.evaluation.latency import summarize_samples
from lissom.evaluation.rows import Provenance
from lissom.ops.attention import Causal, Full, Segments, Window
from lissom.ops.attention.cases import TINY, Case

CEILINGS = Ceilings(bandwidth=1e9, matmul={"float32": 1e9}, exp=1e9, fma=1e9, dispatch=1e-6)
WORK = Work(flops=1e6, bytes=8.0, exps=0.0, dtype="float32")


def doubling(name: str):
    """An "implementation" of x -> 2 x that announces itself as dispatch does; some are not what they seem."""

    def run(x):
        with jax.named_scope(f"lissom.doubling.{'right' if name == 'liar' else name or 'right'}"):
            return (2 * x + (0.1 if name == "wrong" else 0),)

    if name == "refusing":
        raise NotImplementedError("refusing: not today")
    return run


def problem(*implementations: str, **changes) -> Problem:
    return dataclasses.replace(
        Problem(
            op="doubling",
            name="small",
            setting={"size": 8},
            make_inputs=lambda key: (jax.random.normal(key, (8,)),),
            ours=doubling,
            implementations=implementations,
            references={"sum": InProcess(lambda x: (x + x,))},
            work=WORK,
            oracle=Oracle(lambda inputs, dtype: [2 * inputs[0].astype(dtype)], lambda out: [np.asarray(out[0])]),
        ),
        **changes,
    )


def run(*problems: Problem, **options) -> list:
    done = [r for family in harness.run(problems, worker=None, repeats=2, **options) for r in family]
    return results.rows_of(done, CEILINGS, Provenance())


def test_a_right_candidate_gets_its_numbers():
    (row,) = run(problem("right"))
    median = report.value_of(row, "latency_p50")
    assert median > 0 and not results.is_red(row)
    # 1e6 operations at 1e9 a second are 1 ms
    assert report.value_of(row, "limit") == pytest.approx(1e-3)
    assert report.value_of(row, "efficiency") == pytest.approx(1e-3 / median)
    theirs = report.value_of(row, "latency_p50", reference="sum")
    assert report.value_of(row, "speedup", reference="sum") == pytest.approx(theirs / median)
    assert row.identity.overrides["default"] is True


@pytest.mark.parametrize(
    ("name", "words"),
    [("wrong", "wrong result 0: error 0.1"), ("liar", "asked for liar, the program runs doubling.right")],
)
def test_a_red_gate_gives_no_number(name, words, capsys):
    red, green = run(problem(name, "right"))
    assert results.is_red(red) and words in red.notes[0] and words in capsys.readouterr().err
    for metric in ("latency_p50", "latency_p90", "efficiency", "flop_rate", "speedup"):
        assert report.value_of(red, metric) is None
        assert report.value_of(red, metric, reference="sum") is None
    assert not results.is_red(green) and report.value_of(green, "latency_p50") > 0
    line = next(line for line in report.table([red, green]).splitlines() if f"| {name}" in line)
    assert "RED" in line and line.count("–") >= 5


def test_a_program_without_our_op_is_refused():
    (row,) = run(problem("right", ours=lambda name: lambda x: (2 * x,)))
    assert "the program runs nothing of ours" in row.notes[0]


def test_who_refuses_has_no_row():
    assert [row.identity.variant for row in run(problem("refusing", "right"))] == ["right"]
    assert run(problem("right"), implementations=["refusing"]) == []


def test_a_wrong_reference_is_left_out(capsys):
    references = {"off": InProcess(lambda x: (x + 1,)), "other": InProcess(lambda x: (x + 1,), same=False)}
    references |= {"fails": InProcess(lambda x: x @ jnp.ones(3)), "torch": InWorker("torch_softmax")}
    (row,) = run(problem("right", references=references))
    assert report.references(row) == ["other"]  # it is said to be another problem, and no worker runs
    said = capsys.readouterr().err
    assert "off is left out" in said and "no fails" in said


def test_inputs_are_rotated_over_more_than_the_caches():
    from lissom.evaluation.benchmarks.candidates import input_sets

    sets = input_sets(problem("right", make_inputs=lambda key: (jax.random.normal(key, (5 << 20,)),)))  # 20 MB each
    assert len(sets) == 4 and not np.array_equal(sets[0][0], sets[1][0])


# ---- results -----------------------------------------------------------------------------------------------------


def result(problem: Problem, seconds: float, **changes) -> Result:
    return Result(problem, "right", summarize_samples([seconds] * 3), **changes)


def test_growth_is_from_the_next_smaller_of_the_family():
    family = [problem("right", name=str(size), family="f", size=size) for size in (1, 2, 4)]
    rows = results.rows_of([result(p, t) for p, t in zip(family, (1.0, 4.0, 8.0))], CEILINGS, Provenance())
    # 1 -> 4 s when the size doubles is exponent 2, 4 -> 8 s is exponent 1
    assert [report.value_of(row, "growth_exponent") for row in rows] == [None, 2.0, 1.0]


def test_merged_replaces_by_problem_and_implementation():
    first, second = (problem("right", name=name) for name in ("first", "second"))
    old = results.rows_of([result(first, 1.0), result(second, 1.0)], CEILINGS, Provenance())
    new = results.rows_of([result(first, 3.0)], CEILINGS, Provenance())
    rows = results.merged(old, new, ["doubling second", "doubling first"])
    assert [report.value_of(row, "latency_p50") for row in rows] == [1.0, 3.0]


def test_goals_are_judged_on_the_default():
    goal = report.Goal("doubling", "small", "cpu", "efficiency", "half of the limit", at_least=0.5)
    rows = [
        *results.rows_of([result(problem(), 0.001, default=True)], CEILINGS, Provenance()),  # at the limit of 1 ms
        *results.rows_of([result(problem(), 0.004, default=True)], CEILINGS, Provenance()),  # a quarter
        *results.rows_of([Result(problem(), "right", default=True)], CEILINGS, Provenance()),
        *results.rows_of([result(problem(), 0.001)], CEILINGS, Provenance()),
    ]
    assert [goal.concerns(row) for row in rows] == [True, True, True, False]
    assert [goal.judge(row)[0] for row in rows[:3]] == ["met", "missed", "unknown"]
    text = report.table(rows[:1], [goal])
    assert "- met: half of the limit: 1.00 (>= 0.5)." in text
    with pytest.raises(ValueError, match="one of at_least and at_most"):
        report.Goal("doubling", "small", "cpu", "efficiency", "none")


def test_every_goal_is_of_a_problem_that_exists():
    import importlib

    for goal in report.goals():
        entry = importlib.import_module(ENTRIES[goal.op])
        found = {p.name: p for p in entry.problems(goal.platform)}
        assert goal.problem in found, goal
        assert goal.reference in (None, *found[goal.problem].references), goal


# ---- the entry of attention --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [Full(), Causal(), Causal(3), Window(5, 0), Window(2, 4), Causal() & Window(9, None)])
@pytest.mark.parametrize("lengths", [(7, 13), (1100, 1100)])
def test_seen_pairs(mask, lengths):
    count = int(np.asarray(jnp.broadcast_to(mask.dense(*lengths), (1, 1, *lengths))).sum())
    assert attention.seen_pairs(mask, *lengths, batch=3, heads=2) == 6 * count


def test_seen_pairs_of_a_mask_with_entries():
    ids = jnp.array([[0, 0, 1], [0, 1, 1]])
    # causal within segments: lengths 2 and 1, 1 and 2: 3 + 1 pairs in each of two entries, two heads
    assert attention.seen_pairs(Segments(ids) & Causal(), 3, 3, batch=2, heads=2) == 16


def test_work_of_causal_attention():
    spec = attention.Spec("x", Case(2, 4, 4, 6, 3, 5, 7, Causal(), ""), backward=True)
    forward = attention.work(dataclasses.replace(spec, backward=False))
    pairs = 2 * 6 * (1 + 2 + 3 + 4)
    q, k, v, out = 2 * 4 * 6 * 5, 2 * 4 * 3 * 5, 2 * 4 * 3 * 7, 2 * 4 * 6 * 7
    assert forward == Work(2 * (5 + 7) * pairs, 4 * (q + k + v + out), pairs, "float32")
    # backward: the scores, d weights, dq, dk and dv are products of 5, 7, 5, 5 and 7
    both = Work(2 * (5 + 7 + 5 + 7 + 5 + 5 + 7) * pairs, 4 * 2 * (q + k + v + out), 2 * pairs, "float32")
    assert attention.work(spec) == both


@pytest.mark.parametrize("case", ["causal_odd", "window_odd", "two_head_sizes"])
@pytest.mark.parametrize("whole", [True, False])
def test_the_oracle_is_the_reference(case, whole, monkeypatch):
    """In chunks and by heads: the same as autodiff of the reference over everything."""
    spec = attention.Spec("x", TINY[case], backward=True)
    monkeypatch.setattr(attention, "ORACLE_ROWS", 4)
    if not whole:
        monkeypatch.setattr(attention, "CHECKED_SCORES", 0)
    oracle = attention.oracle(spec)
    assert (oracle.note is None) == whole
    made = attention.problem(spec)
    inputs = tuple(np.asarray(x) for x in made.make_inputs(jax.random.key(1)))
    with jax.enable_x64(True):
        found = oracle.compute(inputs, np.float64)
        expected = oracle.part(made.ours("reference")(*(jnp.asarray(x, np.float64) for x in inputs)))
    assert len(found) == 4
    for ours, reference in zip(found, expected):
        np.testing.assert_allclose(ours, reference, rtol=1e-12, atol=1e-12)


def test_every_problem_is_built():
    for platform in ("cpu", "gpu"):
        for spec in attention.CPU if platform == "cpu" else attention.ACCELERATOR:
            assert spec.references or spec.family, f"{spec.name}: nothing to compare with"
    names = [p.name for p in attention.problems("cpu")]
    assert len(set(names)) == len(names)
    causal = next(p for p in attention.problems("cpu") if p.name == "causal_4k")
    pairs = 4096 * 4097 // 2
    assert causal.work == Work(8 * 4 * 64 * pairs, 4 * 4 * 4096 * 8 * 64, 8 * pairs, "float32")
    assert math.isclose(causal.work.flops / 1e9, 17.18, rel_tol=1e-2)
