"""The grid of quantization-aware training, and what is read of its runs."""

import pytest

from lissom.evaluation.rows import read_rows
from lissom.training.errors import UserError
from scripts import qat_law
from tests.scripts.lines import command_line

ASKED = qat_law.Asked((16,), ("int4",), (10.0,), (0.25, 0.5, 0.75, 1.0), (16,), 1, 200)


def test_the_grid_is_what_was_asked():
    runs = qat_law.grid(ASKED)
    assert [(run.share, run.cooldown) for run in runs[:3]] == [(0.25, "separate"), (0.25, "fused"), (0.5, "separate")]
    assert len(runs) == 7  # without a float stage nothing is fused
    run = runs[0]
    # 8 D / (N B), to a step.
    assert abs(8 * run.tokens / (run.parameters * 4) - 10.0) < 8 * 512 / (run.parameters * 4)
    assert [stage["name"] for stage in run.config.stages] == ["float", "cooldown", "qat"]
    assert [stage["name"] for stage in runs[1].config.stages] == ["float", "qat"]
    durations = [stage["duration"] for stage in run.config.stages]
    assert sum(durations) == pytest.approx(1) and durations[-1] == 0.25
    told = []
    more = qat_law.grid(ASKED._replace(per_byte=(0.1, 10.0)), say=told.append)
    assert len(more) == 7 and len(told) == 1 and "int4, 0.1 tokens per byte take 1 steps" in told[0]
    with pytest.raises(UserError, match="no cell of the grid"):
        qat_law.grid(ASKED._replace(per_byte=(0.1,)))


def test_runs_are_trained_once_and_reported(tmp_path, capsys):
    small = (
        ("mesh.data", "1"),
        ("data.batch_size", "2"),
        ("data.kwargs.stdlib_text.length", "32"),
        ("data.kwargs.stdlib_text.test_size", "400"),
        ("evaluation.batch_size", "200"),
    )
    asked = ASKED._replace(per_byte=(0.8,), shares=(0.25, 0.5, 0.75), fused=(), pairs=small)
    runs = qat_law.grid(asked)
    assert len(runs) == 3
    with pytest.raises(UserError, match=r"--merge: the run .* is not finished"):
        qat_law.rows_of(runs, tmp_path / "runs")
    qat_law.trained(runs, tmp_path / "runs")
    capsys.readouterr()
    qat_law.trained(runs, tmp_path / "runs")
    assert "parameters" not in capsys.readouterr().err  # nothing was trained again
    other = qat_law.grid(asked._replace(pairs=(*small, ("optim.learning_rate", "0.5"))))
    for again in (qat_law.trained, qat_law.rows_of):
        with pytest.raises(UserError, match=r"holds a run of another config .*learning_rate"):
            again(other, tmp_path / "runs")
    qat_law.report(runs, tmp_path / "runs", tmp_path / "out")
    *rows, laws = read_rows(tmp_path / "out" / "rows.jsonl")
    assert [row.identity.variant[-10:] for row in rows] == ["share 0.25", " share 0.5", "share 0.75"]
    losses = {row.measurements[0].value for row in rows}
    assert len(losses) == 3 and all(1 < loss < 6 for loss in losses)
    assert laws.measurements == ()  # of less than a token per byte the law says nothing
    text = (tmp_path / "out" / "table.md").read_text()
    assert "No loss law: 0 runs with both stages are too few" in text and "best share" in text
    assert (tmp_path / "out" / "shares.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--bits=int3"], "--bits: 'int3' must be one of int2, int4, int8"),
        (["--shares=0.5,2"], "--shares are at most 1"),
        (["--widths=wide"], "--widths=wide must be numbers"),
        (["--per_byte=0"], "--per_byte must be numbers above 0"),
        (["--seeds=0"], "--seeds=0 must be at least 1"),
        (["--fused=64"], "--fused=64 is none of the --widths"),
        (["--config.model.width=64"], "--config.model.width is what the grid sets"),
        (["--config.train.steps=7"], "--config.train.steps is what the grid sets"),
        (["--shard=2/2"], "0 <= i < n"),
        (["--config=configs/language/stdlib_lm.py"], "the recipe is configs/language/qat_schedule.py"),
        (["--config.model.mixerr=none", "--per_byte=10"], "mixerr"),
        (["--merge", "--widths=16", "--per_byte=10", "--workdir=nowhere"], "is not finished"),
    ],
)
def test_wrong_flags_are_one_sentence(words, told, capsys):
    with pytest.raises(SystemExit) as end, command_line(qat_law):
        qat_law.main(["qat_law.py", *words])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and told in said
