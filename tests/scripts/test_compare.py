"""compare.py: grid, matching, tuning, shards, resuming; the table says what the runs recorded."""

import itertools
import json
import pathlib
import re
import shutil
import sys
import threading
import time

import pytest

from lissom.training.config import load_recipe, overridden
from lissom.training.errors import UserError
from lissom.training.flags import shard_of
from lissom.training.variants import grid
from tests.scripts.lines import command_line

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent / "scripts"))
import compare as script

RECIPE = "configs/vision/mnist1d_transformer.py:tiny"


def config(**changes):
    return overridden(load_recipe(RECIPE), {"mesh.data": 1, **changes}.items())


def test_baselines_of_a_recipe_are_added_once():
    """Behind the variants, and not where one of them sets the same."""
    texts = ("plain: objective=supervised", "wide: objective=supervised model.width=64")
    added = script.with_baselines(["objective=maml,anil"], ["mine: objective=reptile"], texts)
    assert [variant.label for variant in added] == ["objective=maml", "objective=anil", "mine", "plain", "wide"]
    assert added[-1].overrides == (("objective", "supervised"), ("model.width", "64"))
    there = script.with_baselines(["objective=maml,supervised"], [], texts)
    assert [variant.label for variant in there] == ["objective=maml", "objective=supervised", "wide"]
    assert script.with_baselines([], [], ()) == grid([])


def test_baselines_stand_at_every_point_of_the_axes_that_they_do_not_set():
    found = script.with_baselines(["objective=maml,anil", "data.shots=1,5"], [], ("plain: objective=supervised",))
    assert [variant.label for variant in found[4:]] == ["plain shots=1", "plain shots=5"]
    assert found[-1].overrides == (("data.shots", "5"), ("objective", "supervised"))
    one = script.with_baselines(["objective=maml,anil", "data.shots=5"], [], ("plain: objective=supervised",))
    assert (one[-1].label, len(one)) == ("plain", 3) and ("data.shots", "5") in one[-1].overrides


def test_grid():
    variants = grid(["model.mixer=attention,none", "model.channels=(1,2),(3,4)"])
    assert [v.label for v in variants] == [
        "mixer=attention channels=(1,2)",
        "mixer=attention channels=(3,4)",
        "mixer=none channels=(1,2)",
        "mixer=none channels=(3,4)",
    ]
    assert variants[1].overrides == (("model.mixer", "attention"), ("model.channels", "(3,4)"))
    with pytest.raises(UserError, match="field=value"):
        grid(["model.mixer"])


def test_modes_are_of_the_recipe_that_is_known():
    variants = grid(["mode=tiny,other"])
    asked = []

    def of_mode(mode):
        asked.append(mode)
        return config(**{"model.depth": 2 if mode == "tiny" else 4})

    found = script.configs_of(config(), variants, None, (), (), of_mode)
    assert asked == ["tiny", "other"] and [c.model.depth for c in found.values()] == [2, 4]
    with pytest.raises(UserError, match="the mode of a recipe is varied where the recipe is known"):
        script.configs_of(config(), variants, None, (), ())


def test_variants_beside_the_grid():
    wide = "wide: model.mixer=none model.mixer_kwargs.none={'a': 1}  model.width=128"
    variants = grid(["model.mixer=attention,none"], [wide])
    assert [v.label for v in variants] == ["mixer=attention", "mixer=none", "wide"]
    assert variants[2].overrides == (
        ("model.mixer", "none"),
        ("model.mixer_kwargs.none", "{'a': 1}"),
        ("model.width", "128"),
    )
    assert [v.label for v in grid([], [wide])] == ["recipe", "wide"]
    for wrong in ("wide", "wide:", "wide: ", ": a=1", "wide: model.width", "wide: model.width="):
        with pytest.raises(UserError, match="must be 'name: field=value"):
            grid([], [wrong])
    with pytest.raises(UserError, match="there is a variant 'wide' already"):
        grid([], [wide, wide])
    # What a variant sets itself is not tuned for it; what all of them set is not tuned at all.
    tune = ["model.width=1,2", "model.depth=1,2"]
    script.check_axes(variants, 1, None, tune)
    assert [script.tuned_axes(variant, tune) for variant in variants] == [tune, tune, tune[1:]]
    with pytest.raises(UserError, match=r"does not go with --vary=model\.width"):
        script.check_axes(variants[2:], 1, None, tune)
    with pytest.raises(UserError, match=r"does not go with --match=params"):
        script.check_axes(variants, 1, "params", tune)


@pytest.mark.parametrize("text", ["3", "4/4", "a/2", "1/"])
def test_bad_shard(text):
    with pytest.raises(UserError, match="0 <= i < n"):
        shard_of(text)


@pytest.mark.parametrize("what", ["params", "flops", "bytes"])
def test_match_is_within_one_percent(what):
    facts = {"input_shape": (40, 1), "classes": 10, "kind": "signal"}
    target = script.size_of(config(**{"model.width": 64}), facts, what)
    solved = script.matched(config(**{"model.mixer": "none", "model.width": 64}), facts, what, target)
    assert abs(script.size_of(solved, facts, what) / target - 1) <= 0.01


def test_compare(tmp_path):
    variants, plain = grid(["model.mixer=attention,none"]), config(**{"evaluation.transforms": ()})
    # Two shards do half of the runs each; the join trains nothing and finds all, exported by a shard or not.
    assert len(script.compare(plain, variants, tmp_path, seeds=2, shard=(0, 2))) == 2
    with pytest.raises(UserError, match="is not finished"):
        script.compare(plain, variants, tmp_path, seeds=2, merge=True)
    assert script.compare(plain, variants, tmp_path, seeds=2, shard=(1, 2), measure=False) == []
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}
    assert len(written) == 4
    rows = script.compare(plain, variants, tmp_path, seeds=2, merge=True)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    found = {(r.identity.variant, r.identity.seed) for r in rows}
    assert found == {(v.label, seed) for v in variants for seed in range(2)}
    with pytest.raises(UserError, match="another config"):
        script.compare(config(**{"optim.learning_rate": 0.5}), variants, tmp_path, seeds=2)
    for row in rows:
        lines = (tmp_path / f"{row.identity.variant}_seed{row.identity.seed}" / "metrics.jsonl").read_text()
        recorded = [json.loads(line) for line in lines.splitlines()]
        accuracy = next(line["accuracy"] for line in recorded if line["kind"] == "test")
        assert next(m.value for m in row.measurements if m.name == "accuracy") == pytest.approx(accuracy)


def test_tune_flags_the_edge_and_remembers(tmp_path, capsys):
    axis = "optim.learning_rate=1e-6,1e-2"
    best, note = script.tuned(config(), tmp_path, axis, "plain")
    assert best.optim.learning_rate in (1e-6, 1e-2)
    assert "AT THE EDGE" in capsys.readouterr().err
    assert "of the values tried (1e-6, 1e-2), so that one beyond may be better" in note
    record = json.loads((tmp_path / "tuned" / "plain.json").read_text())
    assert set(record) == {"optim.learning_rate=1e-6", "optim.learning_rate=1e-2"}
    record["optim.learning_rate=1e-6"]["cost"], record["optim.learning_rate=1e-2"]["cost"] = 0.1, 0.2
    (tmp_path / "tuned" / "plain.json").write_text(json.dumps(record))
    assert script.tuned(config(), tmp_path, axis, "plain")[0].optim.learning_rate == 1e-6
    assert [path.name for path in (tmp_path / "tuned").glob("*.partial")] == []
    watched = config(**{"log.every": 7, "evaluation.baselines": ("wide: model.width=64",)})
    assert script.tuned(watched, tmp_path, axis, "plain")[0].optim.learning_rate == 1e-6
    # What was tuned for other flags is not this variant's choice.
    with pytest.raises(UserError, match="another config"):
        script.tuned(config(**{"optim.warmup": 0.5}), tmp_path, axis, "plain")
    shutil.rmtree(tmp_path / "tuned" / "plain_optim.learning_rate=1e-2")  # the record alone knows
    with pytest.raises(UserError, match="another config"):
        script.tuned(config(**{"optim.warmup": 0.5}), tmp_path, axis, "plain")
    (tmp_path / "tuned" / "plain.json").write_text('{"optim.lea')
    with pytest.raises(UserError, match=r"plain\.json can't be read"):
        script.tuned(config(), tmp_path, axis, "plain")


@pytest.mark.parametrize(
    ("recipe", "result", "cost"),
    [
        ("fewshot/glyphs", {"loss": 2.0, "accuracy": 0.75}, 0.25),
        ("fewshot/sinusoid", {"loss": 2.0, "mse": 2.0}, 2.0),
        ("vision/mnist1d_transformer", {"loss": 2.0, "accuracy": 0.75}, 2.0),
        ("fewshot/glyphs", {"loss": float("nan"), "accuracy": 0.75}, None),
    ],
)
def test_what_a_setting_is_chosen_by(recipe, result, cost, tmp_path, monkeypatch):
    """Episodes of classes by their accuracy, all else by the loss."""
    import lissom.train

    monkeypatch.setattr(lissom.train, "train", lambda config, run: result)
    assert script._trained(load_recipe(f"configs/{recipe}.py:tiny"), tmp_path) == cost


def fake_losses(monkeypatch, losses, trained=None):
    """Trials that take no time: the loss of a trial by its learning rate."""

    def one(settings, run):
        if trained is not None:
            trained.append(run.name)
        return losses[settings.optim.learning_rate]

    monkeypatch.setattr(script, "_trained", one)


@pytest.mark.parametrize(
    "losses, best, edge",
    [
        ({3e-3: 2.0, 1e-3: 1.0, 1e-2: 3.0}, 1e-3, "smallest"),
        ({3e-3: 2.0, 1e-3: 3.0, 1e-2: 1.0}, 1e-2, "largest"),
        ({3e-3: 1.0, 1e-3: 2.0, 1e-2: None}, 3e-3, None),  # the first of the list, and not at an edge
    ],
)
def test_the_edge_of_a_grid_is_that_of_its_numbers(tmp_path, monkeypatch, losses, best, edge):
    fake_losses(monkeypatch, losses)
    chosen, note = script.tuned(config(), tmp_path, "optim.learning_rate=3e-3,1e-3,1e-2", "plain")
    assert chosen.optim.learning_rate == best
    assert (f"is the {edge} of the values tried (3e-3, 1e-3, 1e-2)" in note) if edge else note is None
    assert script.at_edge("adamw", ["adamw", "lion"]) is None


def test_a_shard_waits_for_the_one_that_tunes(tmp_path, monkeypatch, capsys):
    """The second shard comes while the first trains its first trial; it must train none itself."""
    began, go_on, trained, found = threading.Event(), threading.Event(), [], []

    def one(settings, run):
        trained.append((threading.current_thread().name, settings.optim.learning_rate))
        began.set()
        assert go_on.wait(20)
        return settings.optim.learning_rate

    monkeypatch.setattr(script, "_trained", one)
    tune = lambda: found.append(
        script.tuned(config(), tmp_path, "optim.learning_rate=1e-3,3e-3,1e-2", "plain", shared=True)
    )
    shards = [threading.Thread(target=tune, name=name) for name in ("first", "second")]
    shards[0].start()
    assert began.wait(20)
    shards[1].start()
    deadline = time.monotonic() + 20
    while "waiting for the shard that tunes it" not in capsys.readouterr().err:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    go_on.set()
    for shard in shards:
        shard.join()
    assert trained == [("first", 1e-3), ("first", 3e-3), ("first", 1e-2)]
    assert [settings.optim.learning_rate for settings, _ in found] == [1e-3, 1e-3]


@pytest.mark.parametrize("jobs, count", [(6, 4), (6, 1), (2, 5), (7, 3)])
def test_every_run_belongs_to_one_shard(jobs, count):
    shares = [script.share(range(jobs), (index, count)) for index in range(count)]
    assert sorted(itertools.chain(*shares)) == list(range(jobs))


def test_a_shard_without_a_run_ends_at_once(tmp_path, capsys):
    variants = grid(["model.mixer=attention,none"])
    assert script.compare(config(), variants, tmp_path / "work", seeds=2, shard=(4, 5)) == []
    assert capsys.readouterr().err == "--shard=4/5 has nothing to do: there are 4 runs\n"
    assert not (tmp_path / "work").exists()


def test_the_rows_of_a_variant_tuned_at_the_edge_say_so(tmp_path, monkeypatch):
    import lissom.eval

    asked, trained = {}, []
    monkeypatch.setattr(lissom.eval, "evaluate", lambda runs, **more: asked.update(more) or runs)
    fake_losses(monkeypatch, {1e-3: 3.0, 3e-3: 2.0, 1e-2: 1.0}, trained)
    axis = "optim.learning_rate=1e-3,3e-3,1e-2"
    runs = script.compare(config(), grid(["model.mixer=attention,none"]), tmp_path, seeds=2, tune=[axis])
    labels = ["mixer=attention", "mixer=none"]
    assert [run.name for run in runs] == [f"{label}_seed{seed}" for seed in (0, 1) for label in labels]
    note = "optim.learning_rate=1e-2 is the largest of the values tried (1e-3, 3e-3, 1e-2), so that one beyond may be "
    assert asked["notes"] == {str(run): [note + "better"] for run in runs}
    assert asked["named"] == ["optim.learning_rate"]
    # Every variant once, when its first run's turn comes; and every run once.
    trials = [
        f"{label} optim.learning_rate={rate}".replace(" ", "_") for label in labels for rate in axis[20:].split(",")
    ]
    assert trained == [*trials[:3], runs[0].name, *trials[3:], *(run.name for run in runs[1:])]


def test_a_variant_with_a_rate_of_its_own_is_not_tuned(tmp_path, monkeypatch):
    import lissom.eval

    trained = []
    monkeypatch.setattr(lissom.eval, "evaluate", lambda runs, **more: runs)
    fake_losses(monkeypatch, {1e-3: 3.0, 3e-3: 2.0, 5e-3: 1.0}, trained)
    variants = grid([], ["own: optim.learning_rate=5e-3"])
    runs = script.compare(config(), variants, tmp_path, seeds=1, tune=["optim.learning_rate=1e-3,3e-3"])
    assert [run.name for run in runs] == ["recipe_seed0", "own_seed0"]
    tried = [f"recipe_optim.learning_rate={rate}" for rate in ("1e-3", "3e-3")]
    assert trained == [*tried, "recipe_seed0", "own_seed0"]


def test_shards_write_apart_and_a_join_where_it_is_told(tmp_path, monkeypatch):
    from lissom.evaluation.rows import Identity, Provenance, Row, measure, read_rows

    row = lambda seed: Row(Identity("r", "t", seed), Provenance(), (measure("accuracy", 0.5),))
    monkeypatch.setattr(script, "compare", lambda *_, shard, merge, **more: [row(99 if merge else shard[0])])
    for words in ("--shard=0/2", "--shard=1/2", "--shard=1/2 --merge", f"--shard=1/2 --out={tmp_path}/out"):
        with command_line(script):
            script.main(["compare.py", f"--config={RECIPE}", f"--workdir={tmp_path}/work", *words.split()])
    found = {path.parent.relative_to(tmp_path): read_rows(path) for path in tmp_path.rglob("rows.jsonl")}
    expected = {"work/shards/0_of_2": 0, "work/shards/1_of_2": 1, "work": 99, "out/shards/1_of_2": 1}
    assert found == {pathlib.Path(place): [row(seed)] for place, seed in expected.items()}


RATES = "optim.learning_rate=1e-3,1e-2"
WRONG = [
    ("--vary=model.mixerr=none ", "mixerr.*did you mean 'mixer'"),
    ("--vary=model.mixer=attention,attentoin", "unknown mixer 'attentoin'"),
    ("--vary=train.steps=3,three", "train.steps='three' is not a whole number"),
    ("--vary=optim.learning_rate=1e-3,fast", "learning_rate='fast' is not a number"),
    ("--vary=model.heads=2,3", "heads=3"),
    ("--vary=data.name=mnist1d,mnist99", "mnist99"),
    ("--vary=optim.accumulate=1,3", "multiple of config.optim.accumulate=3"),
    ("--vary=optim.optim_kwargs.adamw.b3=0.5", "has no setting 'b3'"),
    ("--vary=model.mixer=none,,window", "must be field=value,value"),
    ("--vary=model.mixer", "must be field=value,value"),
    ("--vary=model.mixer=none,none", "names one variant twice"),
    ("--vary=model.mixer=none --vary=model.mixer=window", "varies one field twice"),
    ("--vary=model.channels=(1;2),(1:2)", "would lie in one directory"),
    ("--vary=seed=1,2", "--vary=seed does not go with --seeds"),
    ("--seeds=0", "--seeds=0 must be at least 1"),
    ("--seeds=many", "--seeds=many"),
    ("--shard=2/2", "0 <= i < n"),
    ("--match=params --config.model.name=cnn --config.model.mixer=none", "model 'cnn' does not have"),
    ("--match=params --vary=model.width=32,64", "--vary=model.width does not go with --match=params"),
    (f"--tune={RATES} --vary={RATES}", "--tune=optim.learning_rate does not go with --vary=optim.learning_rate"),
    ("--tune=optim.learning_rate=1e-3", "two values at least"),
    ("--tune=optim.learning_rate=1e-3,1e-3", "none twice"),
    ("--tune=optim.learning_rat=1e-3,1e-2", "did you mean 'learning_rate'"),
    ("--tune=optim.learning_rate=1e-3,fast", "learning_rate='fast' is not a number"),
    ("--cost=latencyy", "--cost: no metric is called 'latencyy'; the nearest is"),
    ("--merge --nomeasure", "--merge measures what the shards have trained"),
    ("--out=file", "--out=file must be a directory"),
    ("--out=file/deep", "--out=file/deep must be a directory"),
    ("--workdir=file", "--workdir=file must be a directory"),
    ("--out=/proc/new", "--out=/proc/new can't be written"),
]


@pytest.mark.parametrize("words, sentence", WRONG)
def test_what_is_wrong_is_said_before_anything_is_trained(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(script, "_trained", lambda *_: pytest.fail("something was trained"))
    with pytest.raises(SystemExit) as end, command_line(script):
        script.main(["compare.py", f"--config={RECIPE}", "--config.mesh.data=1", *words.split()])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(f"error: .*{sentence}", said), said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_halves():
    """Steps stay whole, shares of the data may be halved, and stages in steps become shares."""
    halved = lambda **changes: dict(script._halved(config(**changes)))
    assert halved(**{"train.steps": 7}) == {"train.steps": 3}
    assert halved(**{"train.epochs": 1.0}) == {"train.epochs": 0.5}
    assert halved(**{"train.epochs": 3}) == {"train.epochs": 1.5}
    stages = ({"name": "a", "duration": 3}, {"name": "b", "duration": 1})
    assert [s["duration"] for s in halved(**{"train.steps": 4, "stages": stages})["stages"]] == [0.75, 0.25]


def test_tuning_does_not_go_with_classes_one_after_the_other():
    """Half of such a run is a run on half of the classes."""
    config = load_recipe("configs/vision/digits_stream.py:tiny")
    with pytest.raises(UserError, match="half of the classes"):
        script.configs_of(config, grid([], []), None, ["optim.learning_rate=1e-3,1e-2"], set())
    configs = script.configs_of(config, grid([], ["joint: data.order=shuffled"]), None, [], {"recipe", "joint"})
    assert {label: found.data.order for label, found in configs.items()} == {"recipe": "by_class", "joint": "shuffled"}
    too_long = overridden(config, [("train.epochs", 1.1)])
    with pytest.raises(UserError, match="the stream by class has"):
        script.configs_of(too_long, grid([], []), None, [], {"recipe"})


def test_episodes_and_single_examples_stand_in_one_comparison(monkeypatch):
    """Of one dataset and two objectives: each is tried out on as many training examples as it has."""
    tried = {}
    monkeypatch.setattr(script, "try_out", lambda config, facts, examples: tried.update({config.objective: examples}))
    episodes = load_recipe("configs/fewshot/glyphs.py:tiny")
    variants = grid(["objective=protonet,beclr"])
    script.configs_of(episodes, variants, None, (), [variant.label for variant in variants])
    assert tried == {"protonet": 1_000_000, "beclr": 240}
