"""scripts/hypernetworks.py: what is tuned and trained, and what is read of it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from lissom.evaluation.rows import read_rows
from lissom.training.errors import UserError
from scripts import hypernetworks
from tests.scripts.lines import command_line

GRID = "objective_kwargs.conditional_noise.grid"
ASKED = hypernetworks.Asked(
    ("default", "both"), {"sgd": 0.01}, (1.0,), 8, 4, 1, 3, True, (("mesh.data", "1"), (GRID, "(0.5,)"))
)


def test_every_network_of_each_optimizer():
    asked = ASKED._replace(rates={"adamw": 1e-3, "sgd": 1e-2}, pairs=((GRID, "(0.25, 1.0)"),))
    found = hypernetworks.networks(asked)
    assert [network.name for network in found[:5]] == [
        "adamw_default",
        "adamw_both",
        "adamw_no_condition",
        "adamw_at_0.25",
        "adamw_at_1",
    ]
    assert len(found) == 10
    default, both, floor, low, _ = (network.config for network in found[5:])
    assert (default.model.code, default.model.residual) == ("raw", False)
    assert (both.model.code, both.model.residual) == ("cosine", True)
    assert floor.model.name == low.model.name == "cnn"
    assert floor.objective_kwargs.conditional_noise.get("condition") is None
    assert low.objective_kwargs.conditional_noise.condition == 0.25
    assert {network.config.optim.clip_norm for network in found} == {0.0}


def test_relative_variance_by_hand():
    """Gradients (2, 0), (4, 0), (3, 3): mean (3, 1), variances 1 and 3, and of the mean a third of 4 too much:
    4 / (10 - 4 / 3)."""
    gradients = np.array([[2.0, 0], [4, 0], [3, 3]])
    squares = [float(square) for square in (gradients**2).sum(1)]
    found = hypernetworks.relative_variance(float((gradients.sum(0) ** 2).sum()), squares)
    assert found == pytest.approx(4 / (10 - 4 / 3))
    assert hypernetworks.relative_variance(0.0, [1.0, 1.0]) is None  # opposite gradients: a mean of 0
    assert hypernetworks.relative_variance(4.0, [1.0, 1.0]) == 0.0


def test_the_variance_of_a_gradient_that_is_known(monkeypatch):
    """g_n = (n + 1, 2), n = 0, 1, 2: mean (2, 2), variances (1, 0)."""
    from lissom import data

    class Known:
        def gradients(self, graph, params, stats, frozen, batch, key, step):
            return {"w": jnp.stack([batch["n"] + 1.0, jnp.array(2.0)])}, {}, {}

    class Assembly:
        objective, graph = Known(), None

    monkeypatch.setattr(data, "train_batches", lambda *_, **__: iter([{"n": n} for n in range(10)]))
    config = hypernetworks.networks(ASKED)[0].config
    found = hypernetworks.gradient_variance(Assembly(), {"w": jnp.zeros(2)}, {}, {}, config, None, 3)
    assert found == pytest.approx(1 / (8 - 1 / 3), rel=1e-6)


def test_runs_are_trained_once_and_reported(tmp_path, capsys):
    workdir, out = tmp_path / "runs", tmp_path / "out"
    with pytest.raises(UserError, match=r"--merge: the run .* is not finished"):
        hypernetworks.run(ASKED, workdir, None, merge=True)
    for index in range(2):
        assert hypernetworks.run(ASKED, workdir, None, (index, 2)) == []
    capsys.readouterr()
    hypernetworks.run(ASKED, workdir, out, merge=True)
    assert "parameters" not in capsys.readouterr().err  # nothing was trained again
    rows = read_rows(out / "rows.jsonl")
    assert [(row.identity.variant, row.identity.role) for row in rows] == [
        ("default", "variant"),
        ("both", "variant"),
        ("no condition", "floor"),
        ("a network a condition", "ceiling"),
    ]
    values = [{(m.name, *m.conditions.values()): m.value for m in row.measurements} for row in rows]
    for found, run in zip(values, ("sgd_default", "sgd_both", "sgd_no_condition", "sgd_at_0.5"), strict=True):
        tests = hypernetworks.tests_of(workdir / f"{run}_seed0_0.01")
        assert [entry["step"] for entry in tests] == [2, 4, 6, 8]
        assert found["loss", "mean"] == found["loss", 0.5] == tests[-1]["loss"]
    for number, run in enumerate(("sgd_default", "sgd_both", "sgd_no_condition")):
        tests = hypernetworks.tests_of(workdir / f"{run}_seed0_0.01")
        reached = [entry["step"] for entry in tests if entry["loss"] <= values[2]["loss", "mean"]]
        assert values[number]["steps_to_loss", "no condition"] == (reached[0] if reached else None)
    assert values[2]["steps_to_loss", "no condition"] is not None
    for found in values[:2]:  # of three batches the mean may be told from 0, or not
        first, last = (found["gradient_variance", at] for at in ("first", "last"))
        assert first is None or (first > 0 and first != last)
    with pytest.raises(UserError, match="holds a run of another config"):
        hypernetworks.run(ASKED._replace(rates={"sgd": 0.01}, steps=6), workdir, None, merge=True)


def test_what_diverged_is_worst_and_is_not_trained_again(tmp_path, monkeypatch):
    """Rates by which the loss is known: 0.1 and below diverge, the loss of others is three times the rate."""
    from lissom import sweeps, train

    trained = []

    def training(config, run):
        rate = config.optim.learning_rate
        trained.append(rate)
        run.mkdir(parents=True)
        (run / "config.json").write_text(config.to_json_best_effort())
        if rate <= 0.1:
            raise UserError("the loss is nan at step 3")
        (run / "facts.json").write_text(json.dumps({"steps": 2}))
        (run / "metrics.jsonl").write_text(json.dumps({"kind": "test", "step": 2, "loss": 3 * rate}) + "\n")
        return {"loss": 3 * rate}

    monkeypatch.setattr(train, "train", training)
    monkeypatch.setattr(sweeps, "finished", lambda run: (run / "metrics.jsonl").is_file())
    network = hypernetworks.networks(ASKED)[0]
    asked = ASKED._replace(rates={"sgd": 0.3}, factors=(1 / 3, 1.0, 3.0))
    for _ in range(2):
        config, note = hypernetworks.tuned(network, asked, tmp_path, False)
        assert config.optim.learning_rate == 0.3 and note is None
    assert trained == [0.1, 0.3, 0.9]
    assert (tmp_path / "sgd_default_seed0_0.3").is_dir()  # a whole run of seed 0, of those that are shown
    assert json.loads((tmp_path / "sgd_default_seed0_0.3" / "config.json").read_text())["train"] == {"steps": 8}
    _, note = hypernetworks.tuned(network, asked._replace(factors=(1 / 3, 1.0)), tmp_path, False)
    assert "0.3 is the largest tried" in note
    with pytest.raises(UserError, match=r"default, sgd diverged at every rate: 0\.1, 0\.03"):
        hypernetworks.tuned(network, asked._replace(factors=(1 / 3, 0.1)), tmp_path, False)
    config, note = hypernetworks.tuned(network, asked._replace(factors=(2.0,)), tmp_path, False)
    assert config.optim.learning_rate == 0.6 and note is None and 0.6 not in trained


def test_the_first_parameters_are_those_that_training_began_with(tmp_path):
    """A run at rate 0 ends with them: both variances are of one gradient."""
    from lissom.train import train
    from lissom.training.config import overridden

    config = overridden(hypernetworks.networks(ASKED)[1].config, [("optim.learning_rate", 0.0), ("train.steps", 2)])
    train(config, tmp_path / "run")
    found = hypernetworks.gradient_variances(config, tmp_path / "run", 3)
    assert found["first"] is not None and found["first"] == pytest.approx(found["last"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--variants=mip"], "--variants: 'mip' must be one of default, scaled, code, residual, both"),
        (["--variants="], "--variants= must be one name or more"),
        (["--optimizers=adamw,adamw"], "--optimizers=adamw,adamw must be one name or more, none twice"),
        (["--optimizers=lion"], "--optimizers: 'lion' needs a rate, --rates=lion:NUMBER"),
        (["--rates=adamw"], "--rates are optimizer:number"),
        (["--factors=1/0"], "--factors numbers or fractions"),
        (["--factors=0"], "--rates and --factors must be above 0"),
        (["--seeds=0"], "--seeds=0 must be at least 1"),
        (["--batches=1"], "--batches=1 must be at least 2"),
        (["--shard=2/2"], "0 <= i < n"),
        (["--config.model.hidden=4"], "--config.model.hidden is what the script sets, or is not of all"),
        (["--config.seed=4"], "--config.seed is what the script sets"),
        (["--config=configs/vision/mnist1d_cnn.py"], "the recipe is configs/vision/mnist1d_hypernetwork.py"),
        (["--config.optim.warmupp=1"], "warmupp"),
        (["--merge", "--workdir=nowhere", "--tiny"], "is not finished"),
    ],
)
def test_wrong_flags_are_one_sentence(words, told, capsys):
    with pytest.raises(SystemExit) as end, command_line(hypernetworks):
        hypernetworks.main(["hypernetworks.py", *words])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and told in said
