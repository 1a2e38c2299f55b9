"""Training by class: what is evaluated when, what rows say of it, that a resumed run is the one that never stopped."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.models import tallies
from lissom.training.errors import UserError
from lissom.training.objectives.classification import Classification
from tests.training.test_loop import arrays

STREAM = "vision/digits_stream"
# Two tasks of five classes, four steps each.
SHORT = {"data.classes_per_task": 5, "data.task_steps": 4, "train.epochs": 1}


class Fixed:
    """A network that says what it is given."""

    def __call__(self, inputs, **kwargs):
        return inputs, {"losses": {"own": jnp.float32(0.25)}, "metrics": {}}


def test_the_loss_of_a_score_by_hand():
    batch = {"inputs": jnp.array([[1.0, 5.0, 0.0], [2.0, 3.0, -4.0]]), "labels": jnp.array([0, 2])}
    loss, metrics = Classification(loss="target_score").loss(Fixed(), batch, None, 0)
    assert float(loss) == pytest.approx(-(1 - 4) / 2 + 0.25)
    assert float(metrics["accuracy"]) == 0
    gradient = jax.grad(lambda x: Classification(loss="target_score").loss(Fixed(), {**batch, "inputs": x}, None, 0)[0])
    np.testing.assert_allclose(gradient(batch["inputs"]), [[-0.5, 0, 0], [0, 0, -0.5]])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"loss": "hinge"}, "loss='hinge' must be one of cross_entropy, target_score"),
        ({"loss": "target_score", "label_smoothing": 0.1}, "label_smoothing=0.1 is for loss='cross_entropy'"),
    ],
)
def test_bad_settings_of_the_objective(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Classification(**settings)


def test_accuracy_of_each_class_over_batches():
    totals = {}
    judge = Classification(class_accuracy=True).judge
    for labels, said, mask in (([0, 0, 2], [0, 1, 2], [1, 1, 1]), ([0, 2, 2], [0, 0, 2], [1, 1, 0])):
        logits = jax.nn.one_hot(jnp.array(said), 4)
        tallies.add(
            totals, judge(Fixed(), {"inputs": logits, "labels": jnp.array(labels), "mask": jnp.array(mask)}, None)
        )
    found = {name: mean for name, (mean, _) in tallies.means(totals).items()}
    # Class 0: 2 of 3; class 2: 1 of 2, its last example only fills up; of classes 1 and 3 there are none.
    told = {name: value for name, value in found.items() if name.startswith(tallies.CLASS_ACCURACY)}
    assert told == pytest.approx({"class_accuracy/0": 2 / 3, "class_accuracy/2": 1 / 2})
    assert found["accuracy"] == pytest.approx(3 / 5)


def test_a_run_is_evaluated_behind_each_task_and_its_row_tells_what_was_forgotten(tiny_run):
    from lissom.eval import evaluate

    result, workdir = tiny_run(STREAM, **SHORT)
    assert result["step"] == 8
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    tests = [entry for entry in entries if entry["kind"] == "test"]
    assert [entry["step"] for entry in tests] == [4, 8]
    [row] = evaluate([workdir], floors=False)
    values = {m.name: m.value for m in row.measurements}
    from lissom.training.building import class_stream, load_dataset
    from lissom.training.runs import read_config

    config = read_config(workdir)
    first = class_stream(config, load_dataset(config)).tasks[0]
    means = [np.mean([entry[f"class_accuracy/{c}"] for c in first]) for entry in tests]
    assert values["forgetting"] == pytest.approx(means[0] - means[1])
    assert values["accuracy"] == pytest.approx(result["accuracy"], rel=1e-5)


def test_no_forgetting_where_there_is_none_to_tell(tiny_run):
    from lissom.eval import evaluate

    uncounted = {"objective_kwargs.classification.class_accuracy": False}
    shuffled = {"data.order": "shuffled", "data.classes_per_task": 1, "data.task_steps": 0, "train.steps": 3}
    for name, settings in (("uncounted", {**SHORT, **uncounted}), ("shuffled", shuffled)):
        _, workdir = tiny_run(STREAM, name, **settings)
        [row] = evaluate([workdir], floors=False)
        assert "forgetting" not in {m.name for m in row.measurements}


def test_a_resumed_run_is_the_one_that_never_stopped(tiny_run, monkeypatch):
    from lissom.data import pipelines

    settings = {**SHORT, "data.replay": 0.5, "data.replay_size": 2, "checkpoint.every": 3}
    _, whole = tiny_run(STREAM, "whole", **settings)
    plain = pipelines._train_map

    def broken(*args):  # the power fails behind the step that is saved first
        batches = plain(*args)
        return batches.map_with_index(lambda index, batch: batch if index < 5 else 1 / 0)

    monkeypatch.setattr(pipelines, "_train_map", broken)
    with pytest.raises(ZeroDivisionError):
        tiny_run(STREAM, "parts", **settings)
    monkeypatch.undo()
    result, parts = tiny_run(STREAM, "parts", **settings)
    assert result["start"] == 3 and result["step"] == 8
    expected = arrays(whole, 8)
    for name, value in arrays(parts, 8).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_a_run_may_not_be_longer_than_its_stream(tiny_run):
    with pytest.raises(UserError, match="asks for 9 steps, and the stream by class has 8"):
        tiny_run(STREAM, **{**SHORT, "train.steps": 9})
