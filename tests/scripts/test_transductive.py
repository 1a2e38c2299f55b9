"""scripts/transductive.py: the columns of the evaluator, method by method, and settings chosen on other episodes."""

import shutil

import jax
import numpy as np
import pytest

from lissom.eval import evaluate
from lissom.evaluation.rows import read_rows
from lissom.models.transductive import Clustering
from scripts import transductive
from scripts.transductive import Features
from tests.scripts.lines import command_line


def test_columns_are_those_of_the_evaluator(tiny_run, tmp_path, capsys):
    """Of class means, k-means, the default Laplacian and transport, on the run's own episodes and on others."""
    others = ({"support_candidates": 3}, {"query_concentration": 1.0})
    overrides = {
        "objective": "protonet",
        "evaluation.data": others,
        "data.kwargs.episodes.source_kwargs.test_size": 240,
    }
    runs = [tiny_run("fewshot/glyphs", f"protonet_seed{seed}", seed=seed, **overrides)[1] for seed in (0, 1)]
    out = tmp_path / "out"
    asked = ["", f"--runs={tmp_path}/protonet_*", "--candidates=3", "--concentration=1", "--choose=5", f"--out={out}"]
    with command_line(transductive):
        transductive.main(asked)
    rows = read_rows(out / "rows.jsonl")
    assert [(row.identity.variant, row.identity.seed) for row in rows] == [
        (method, seed)
        for seed in (0, 1)
        for method in (
            "k-means",
            "class means",
            "soft k-means",
            "Laplacian",
            "Laplacian, defaults",
            "optimal transport, one pass",
            "optimal transport",
            "optimal transport with slack",
        )
    ]
    (task,) = {row.identity.task for row in rows}
    assert task.startswith("features of protonet, episodes(queries=2, ")
    chosen = [note for row in rows for note in row.notes]
    assert len(chosen) == 4 and all("chosen on training classes" in note for note in chosen)
    columns = {
        "class means": "prototype_accuracy",
        "k-means": "kmeans_accuracy",
        "Laplacian, defaults": "laplacian_accuracy",
        "optimal transport": "transported_accuracy",
    }
    for seed, run in enumerate(runs):
        (told,) = evaluate([run], floors=False)
        for row in rows:
            name = columns.get(row.identity.variant)
            if row.identity.seed == seed and name:
                ours = [m.value for m in row.measurements if m.name == "accuracy"]
                assert ours == pytest.approx([m.value for m in told.measurements if m.name == name], abs=1e-6)
    means = {row.identity.seed: row for row in rows if row.identity.variant == "class means"}
    for row in rows:
        of = lambda name, row: np.array([m.value for m in row.measurements if m.name == name])
        gains = of("accuracy", row) - of("accuracy", means[row.identity.seed])
        np.testing.assert_allclose(of("accuracy_gain", row), gains, atol=1e-9)
    assert "uneven queries" in capsys.readouterr().out


def test_what_is_chosen_is_best_there():
    """No settings of the grid, each judged alone, are better on those episodes, and some are worse: two classes on the
    line, whose queries lie to the right of their supports."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(2, dtype=np.int32), (30, 1))
    asked = np.repeat(labels, 8, 1)
    point = lambda at, spread: np.stack([at, rng.normal(0, spread, at.shape)], -1).astype(np.float32)
    batch = Features(
        point(labels - 0.5, 0.1), labels, point(asked - 0.5 + rng.normal(0.3, 0.4, asked.shape), 0.1), asked
    )
    settings = transductive.chosen([batch], 2, (0.0, 0.5), (3, 5))
    values = {}
    for sharpness in transductive.SHARPNESS:
        for strength in (0.0, 0.5):
            for near in (3, 5):
                of = Clustering(sharpness, strength, near)
                method = lambda *given, of=of: transductive_scores(*given, of)
                values[of] = float(transductive.of_episodes(transductive.right(method, 2), [batch]).mean())
    best = max(values.values())
    assert values[settings] == pytest.approx(best, abs=1e-6)
    assert min(values.values()) < best


def transductive_scores(support, labels, queries, ways, settings):
    from lissom.models.transductive import laplacian

    return laplacian(support, labels, queries, ways, settings)[0]


def test_every_episode_is_judged():
    """Of batches of two sizes."""
    nothing = np.zeros((1, 1, 1), np.float32), np.zeros((1, 1), np.int32), np.zeros((1, 4, 1), np.float32)
    one = lambda right: Features(*nothing, np.array([right], np.int32))
    says_first = lambda support, labels, queries, ways: jax.nn.one_hot(np.zeros(4, int), ways)
    batches = [one([0, 0, 0, 1]), jax.tree.map(lambda a: np.concatenate([a, a]), one([0, 1, 1, 1]))]
    of_episodes = transductive.of_episodes(transductive.right(says_first, 2), batches)
    np.testing.assert_allclose(of_episodes, [0.75, 0.25, 0.25])


def test_two_runs_of_one_name_and_seed_are_refused(tiny_run, tmp_path, capsys):
    """One line of two networks would be an average of nothing."""
    _, run = tiny_run("fewshot/glyphs", "a/plain_seed0", objective="protonet")
    shutil.copytree(run, tmp_path / "b" / "plain_seed0")
    with command_line(transductive), pytest.raises(SystemExit):
        transductive.main(["", f"--runs={tmp_path}/a,{tmp_path}/b"])
    assert "would be one line" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([], "--runs=PATTERN is missing"),
        (["--runs={runs}", "--choose=0"], "--choose=0 must be at least 1"),
        (["--runs={runs}", "--concentration=0"], "must be above 0"),
        (["--runs={runs}"], "this is about 'episodes', which have classes"),
        (["--config=configs/fewshot/glyphs.py"], "--config is no flag of transductive.py"),
    ],
)
def test_bad_input_is_one_sentence(asked, said, tiny_run, capsys):
    _, run = tiny_run("fewshot/sinusoid")
    with command_line(transductive), pytest.raises(SystemExit):
        transductive.main(["", *(text.format(runs=run) for text in asked)])
    assert said in capsys.readouterr().err
