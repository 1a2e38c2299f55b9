"""The grid of in-context learners, and what is read of its runs."""

import pytest

from lissom.data.errors import DataError
from lissom.evaluation.rows import Identity, Row, measure, read_rows
from lissom.training.errors import UserError
from lissom.training.variants import Variant
from scripts import in_context_phases as script
from tests.scripts.lines import command_line

TINY = {
    "mesh.data": "1",
    "model.size": "tiny",
    "train.steps": "2",
    "data.batch_size": "8",
    "data.kwargs.in_context.length": "6",
    "data.kwargs.in_context.test_size": "40",
    "evaluation.batch_size": "40",
    "evaluation.latency_batches": "(1,)",
    "evaluation.latency_repeats": "3",
}
LSTM, ATTENTION = (Variant(name, (("model.mixer", name),)) for name in ("lstm", "attention"))
WINDOW = Variant("window 3", (("model.mixer", "window"), ("model.mixer_kwargs.window.window", "3")))
ASKED = script.Asked((LSTM,), (8, 16), (1, 64), (1e-3,), 1, tuple(TINY.items()))


def test_the_grid_is_what_was_asked():
    learners = script.grid(ASKED._replace(seeds=2))
    assert [learner.label for learner in learners] == ["lstm, width 8", "lstm, width 16"]
    runs = learners[1].runs
    names = ["lstm_16_1_seed0", "lstm_16_64_seed0", "lstm_16_1_seed1", "lstm_16_64_seed1"]
    assert [run.name for run in runs] == names
    assert runs[-1].seed == runs[-1].config.seed == 1
    config = runs[1].config
    assert (config.model.mixer, config.model.width, config.data.kwargs.in_context.tasks) == ("lstm", 16, 64)
    with pytest.raises(UserError, match="must be a multiple of heads=2"):
        script.grid(ASKED._replace(mixers=(ATTENTION,), widths=(9,)))
    with pytest.raises(UserError, match="has features 13; the network is for 21"):
        script.grid(ASKED._replace(pairs=(*ASKED.pairs, ("evaluation.data", "({'dims': 8},)"))))
    with pytest.raises(DataError, match="no setting 'tasted'"):
        script.grid(ASKED._replace(pairs=(*ASKED.pairs, ("evaluation.data", "({'tasted': 'seen'},)"))))


def test_settings_in_the_place_of_a_mixer():
    """They are of the run, in its name and in its label, and go with every width."""
    _, _, narrow, wide = script.grid(ASKED._replace(mixers=(LSTM, WINDOW)))
    assert (narrow.label, wide.label) == ("window 3, width 8", "window 3, width 16")
    assert [run.name for run in wide.runs] == ["window_3_16_1_seed0", "window_3_16_64_seed0"]
    for run in (*wide.runs, *wide.trials.values()):
        config = run.config if run in wide.runs else run
        assert config.model.mixer_kwargs.window.window == 3 and config.model.width == 16


def test_runs_are_trained_once_and_reported(tmp_path, capsys):
    asked = ASKED._replace(tasks=(64,), mixers=(LSTM, WINDOW), widths=(8,))
    learners = script.grid(asked)
    with pytest.raises(UserError, match=r"--merge: the run .* is not finished"):
        script.measured(learners, tmp_path / "runs")
    script.trained(learners[::2], tmp_path / "runs")
    script.trained(learners[1::2], tmp_path / "runs")
    capsys.readouterr()
    script.trained(learners, tmp_path / "runs")
    assert "seed0" not in capsys.readouterr().err  # nothing was trained again
    other = script.grid(asked._replace(pairs=(*asked.pairs, ("optim.clip_norm", "2.0"))))
    for again in (script.trained, script.measured):
        with pytest.raises(UserError, match=r"holds a run of another config .*clip_norm"):
            again(other, tmp_path / "runs")
    script.report(learners, tmp_path / "runs", tmp_path / "out")
    rows = read_rows(tmp_path / "out" / "rows.jsonl")
    assert [row.identity.variant for row in rows[:2]] == ["lstm, width 8", "window 3, width 8"]
    assert [row.identity.overrides["optim.learning_rate"] for row in rows[:2]] == [1e-3, 1e-3]  # the recipe's, said
    assert script.tests_of(rows) == ["unseen", "seen", "other, other_base=digits"]
    # Of two layers h and c, or two keys and values; and three lengths.
    assert [script.value(row, "cache_bytes") for row in rows[:2]] == [4 * (2 * 2 * n * 8 + 3) for n in (1, 2)]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| window 3 | 8 | 268 | 64 |" in text and "nearest centroid in context" in text
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["parameters.png", "state.png"]
    assert (tmp_path / "out" / "state.png").stat().st_size > 1000
    several = [run for tasks in (1, 64) for run in script.grid(asked._replace(tasks=(tasks,)))[0].runs]
    script.plots(several, [rows[0], rows[0], *rows[2:]], tmp_path / "alone")
    assert [path.name for path in (tmp_path / "alone").glob("*.png")] == ["phases.png"]


def test_the_rate_is_that_of_the_best_trial(tmp_path, monkeypatch):
    """A trial is the run of the most tasks and seed 0; here the loss is lowest at 1e-2, the largest."""
    tried = {}

    def trained(config, run, merge=False):
        assert run.name not in tried
        tried[run.name] = config
        return 1 / config.optim.learning_rate

    monkeypatch.setattr(script.sweeps, "trained", trained)
    learner = script.grid(ASKED._replace(rates=(1e-3, 1e-2), seeds=2))[1]
    runs, note = script.tuned(learner, tmp_path, False)
    assert list(tried) == ["lstm_16_64_seed0_0.001", "lstm_16_64_seed0_0.01"]
    places = ["lstm_16_1_seed0_0.01", "lstm_16_64_seed0_0.01", "lstm_16_1_seed1_0.01", "lstm_16_64_seed1_0.01"]
    assert [place.name for place in runs] == places
    assert [run.config.optim.learning_rate for run in runs.values()] == [1e-2] * 4
    assert runs[tmp_path / places[1]].config == tried[places[1]]
    assert note == "lstm, width 16: its learning rate 0.01 is the largest tried, so that one beyond may be better"
    one = script.grid(ASKED)[1]
    assert [place.name for place in script.tuned(one, tmp_path, False)[0]] == [
        "lstm_16_1_seed0_0.001",
        "lstm_16_64_seed0_0.001",
    ]


@pytest.mark.parametrize(
    ("seen", "unseen", "phase"),
    [
        ((0.9, 0.95), (0.2, 0.2), "memorised"),
        ((0.3, 0.9), (0.2, 0.25), "identified"),
        ((0.2, 0.8), (0.2, 0.7), "learned"),
        ((0.2, 0.28), (0.2, 0.22), "none"),
    ],
)
def test_phases_by_hand(seen, unseen, phase):
    assert script.phase({"unseen": unseen, "seen": seen, "other": (0.2, 0.2)}, 0.2) == phase


def test_accuracies_are_told_apart_by_their_test_sets():
    """The mean of two seeds, in percent, of each set."""
    runs = [run for run in script.grid(ASKED._replace(seeds=2))[0].runs if run.tasks == 64]
    rows = []
    for first, last in ((0.1, 0.5), (0.3, 0.9)):
        found = [measure("first_accuracy", first, examples=40), measure("last_accuracy", last, examples=40)]
        found += [measure("first_accuracy", 0.7, examples=40, tested="seen")]
        found += [measure("last_accuracy", 0.8, examples=40, tested="seen")]
        rows.append(Row(Identity("r", "t"), None, (*found, measure("cache_bytes", 140, "compiled", length=6))))
    table = script.phases(runs, rows).splitlines()
    assert table[0] == (
        "| mixer | width | state [B] | training tasks | unseen, first - last [%] | seen, first - last [%] | phase |"
    )
    assert table[2:] == ["| lstm | 8 | 140 | 64 | 20.0 - 70.0 | 70.0 - 80.0 | learned |"]
    drawn = script.curve("unseen", [(64, 0.5), (64, 0.9), (1, 0.2)])
    assert [point[:2] for point in drawn.points] == [(1, 20.0), (64, 70.0)]
    assert drawn.points[1][3] == pytest.approx(20 * 2**0.5)
    assert script.test_of({"examples": 40, "tested": "other", "other_base": "digits"}) == "other, other_base=digits"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tasks=1,0"], "--tasks=1,0 must be whole numbers above 0, none twice"),
        (["--widths=wide"], "--widths=wide must be whole numbers above 0, none twice"),
        (["--mixers=lstm,lstm"], "--mixers=lstm,lstm must name mixers, none twice"),
        (["--mixers=lstmm"], "did you mean 'lstm'"),
        (["--mixers="], "neither --mixers nor --also names a mixer"),
        (["--also=window"], "--also='window' must be 'name: field=value field=value'"),
        (["--also=lstm: model.mixer=window"], "--also='lstm' is called as one of --mixers is: give it another name"),
        (["--also=shallow: model.depth=1"], "--also='shallow' names no mixer: model.mixer=..."),
        (
            ["--also=w: model.mixer=window model.width=8"],
            "--also='w' sets model.width, which is what the grid sets: give",
        ),
        (["--also=w: model.mixer=window evaluation.data=()"], "--also='w' sets evaluation.data: it may set what the"),
        (["--also=w: model.mixer=window model.name=cnn"], "--also='w' sets model.name: it may set what the network is"),
        (["--also=a b: model.mixer=window", "--also=a_b: model.mixer=none"], "there is a variant 'a b' already"),
        (["--also=w: model.mixer=window model.mixer_kwargs.window.windows=3"], "did you mean 'window'"),
        (["--seeds=0"], "--seeds=0 must be at least 1"),
        (["--rates=1e-3,fast"], "--rates=1e-3,fast must be numbers above 0, none twice"),
        (["--config.optim.learning_rate=1"], "--config.optim.learning_rate is what the grid sets: give --rates"),
        (["--config.model.width=64"], "--config.model.width is what the grid sets: give --widths"),
        (["--config.data.kwargs.in_context.tested=seen"], "tested is the same in all of the grid"),
        (["--config=configs/language/stdlib_lm.py"], "the recipe is configs/fewshot/gpicl.py"),
        (["--shard=2/2"], "0 <= i < n"),
        (["--merge", "--workdir=nowhere"], "is not finished"),
    ],
)
def test_wrong_flags_are_one_sentence(words, told, capsys):
    with pytest.raises(SystemExit) as end, command_line(script):
        script.main(["in_context_phases.py", *words])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and told in said
