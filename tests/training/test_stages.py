"""Stages, starting points and distillation: all in the one loop."""

import itertools
import pathlib
import shutil

import jax
import numpy as np
import pytest

from lissom.models.registry import UnknownName
from lissom.training.errors import UserError
from tests.training.test_loop import arrays, same

RECIPE = "vision/mnist1d_cnn"
NOOP = ({"name": "a", "duration": 2}, {"name": "b", "duration": 2, "overrides": {}})


def test_a_stage_that_changes_nothing_changes_nothing(tiny_run):
    _, plain = tiny_run(RECIPE, "plain", **{"train.steps": 4})
    result, staged = tiny_run(RECIPE, "staged", **{"train.steps": 4, "stages": NOOP})
    assert result["traces"] == {"a": 1, "b": 1}
    assert same(arrays(plain, 4), arrays(staged, 4)) == []


def test_a_stage_changes_the_config(tiny_run):
    stages = (
        {"name": "a", "duration": 2},
        {"name": "still", "duration": 2, "overrides": {"optim.learning_rate": 0.0}},
    )
    _, run = tiny_run(RECIPE, **{"train.steps": 4, "stages": stages, "checkpoint.keep": 5})
    two, four = arrays(run, 2), arrays(run, 4)
    assert [name for name in same(two, four) if name.startswith("params")] == []
    assert int(four["step"]) == 4


RATES = {
    # Linear over 4 steps without warm-up: 4/4, 3/4, 2/4, 1/4 of the rate; over a stage of two: 2/2, 1/2.
    ("keep", "run"): [1.0, 0.75, 0.5, 0.25],
    ("reset", "run"): [1.0, 0.75, 0.5, 0.25],
    ("keep", "stage"): [1.0, 0.75, 1.0, 0.5],
    ("reset", "stage"): [1.0, 0.75, 1.0, 0.5],
}


@pytest.mark.parametrize("optimizer,schedule", RATES)
def test_schedules_of_stages(optimizer, schedule, tiny_run):
    """The sign of Lion's first step moves a parameter by the learning rate: rates are read off the parameters."""
    stages = (
        {"name": "a", "duration": 2},
        {"name": "b", "duration": 2, "optimizer": optimizer, "schedule": schedule},
    )
    settings = {
        "train.steps": 4,
        "stages": stages,
        "checkpoint.every": 1,
        "checkpoint.keep": 9,
        "optim.name": "lion",
        "optim.schedule": "linear",
        "optim.warmup": 0.0,
        "optim.weight_decay": 0.0,
        "optim.learning_rate": 1e-2,
    }
    _, run = tiny_run(RECIPE, **settings)
    steps = [arrays(run, step)["params.head.bias"] for step in range(1, 5)]
    moved = [np.abs(b - a).max() / 1e-2 for a, b in itertools.pairwise(steps)]
    np.testing.assert_allclose(moved, RATES[optimizer, schedule][1:], rtol=1e-4)


HALF = {"name": "a", "duration": 0.5}


@pytest.mark.parametrize(
    "stages,words",
    [
        (({"name": "a", "duration": 2},), "durations must fill the run"),
        (({"name": "a", "duration": 0.5}, {"name": "b", "duration": 0.4}), "add up to 0.9"),
        ((HALF, {"name": "b", "duration": 0.5, "overrides": {"model.channels": (5, 5)}}), "no counterpart"),
        ((HALF, {"name": "b", "duration": 0.5, "overrides": {"optim.name": "sgd"}}), "optimizer='reset'"),
        ((HALF, {"name": "a", "duration": 0.5}), "not all different"),
        (({"name": "a", "lenght": 4},), "lenght"),
        (({"name": "a"},), "no duration"),
        (("a", "b"), "'a', which is not a table"),
        ((HALF, {"duration": 0.5, "optimizer": "rest"}), "one of keep, reset"),
        ((HALF, {"duration": 0.5, "schedule": "epoch"}), "one of run, stage"),
        ((HALF, {"duration": "half"}), "is not a number"),
        ((HALF, {"duration": 1.5}), "fraction"),
        ((HALF, {"duration": 0.5, "overrides": {"data.name": "digits"}}), "a stage may change"),
        ((HALF, {"duration": 0.5, "overrides": {"seed": 1}}), "a stage may change"),
        ((HALF, {"duration": 0.5, "overrides": {"model.widht": 1}}), r"stages\[1\].*widht"),
        ((HALF, {"duration": 0.5, "overrides": {"data.batch_size": 15, "optim.accumulate": 2}}), "multiple of"),
        ((HALF, {"duration": 0.5, "converter": "nowhere.at_all:f"}), "no module"),
        ((HALF, {"duration": 0.5, "converter": "os:getcwd"}), "no function"),
    ],
)
def test_bad_stages(stages, words, tiny_run, tmp_path):
    with pytest.raises((UserError, UnknownName), match=words):
        tiny_run(RECIPE, **{"train.steps": 4, "stages": stages})
    assert not (tmp_path / "run").exists()


def test_a_stage_that_adds_transforms_fills_them(tiny_run):
    """What the network has become after two steps is what the transform is applied to; no step changes it then."""
    stages = (
        HALF,
        {
            "name": "b",
            "duration": 0.5,
            "optimizer": "reset",
            "overrides": {"transforms": ({"name": "int8_weights"},), "optim.learning_rate": 0.0},
        },
    )
    _, run = tiny_run(RECIPE, **{"train.steps": 4, "stages": stages, "checkpoint.every": 2, "checkpoint.keep": 5})
    two, four = arrays(run, 2), arrays(run, 4)
    quantized = [name for name in four if name.startswith("frozen") and name.endswith("integers")]
    for name in quantized:
        layer = name.removesuffix("integers")
        kernel, scale = two[layer.replace("frozen", "params").removesuffix(".")], four[f"{layer}scale"]
        assert np.abs(kernel - four[name] * scale).max() <= 0.51 * scale.max()
    assert quantized


def test_a_stage_that_adds_transforms_to_another_network_is_an_error(tiny_run):
    """Half of a network must not be drawn anew without a word."""
    added = {"transforms": ({"name": "int8_weights"},), "model.channels": (4, 8)}
    stages = (HALF, {"name": "b", "duration": 0.5, "optimizer": "reset", "overrides": added})
    with pytest.raises(UserError, match="change the model in a stage of its own"):
        tiny_run(RECIPE, **{"train.steps": 4, "stages": stages})
    scanned = {"transforms": ({"name": "int8_weights"},), "model.stack": "loop"}
    stages = (HALF, {"name": "b", "duration": 0.5, "optimizer": "reset", "overrides": scanned})
    with pytest.raises(UserError, match=r"set config.model.stack to 'loop' in both"):
        tiny_run("vision/mnist1d_transformer", **{"train.steps": 4, "stages": stages, "model.stack": "scan"})


def test_what_the_network_froze_stays(tiny_run):
    frozen = {"transforms": ({"name": "int8_weights"},)}
    smooth = {"objective_kwargs": {"classification": {"label_smoothing": 0.1}}}
    stages = ({"name": "a", "duration": 2}, {"name": "b", "duration": 2, "overrides": smooth})
    _, run = tiny_run(RECIPE, **frozen, **{"train.steps": 4, "stages": stages, "checkpoint.keep": 5})
    two, four = arrays(run, 2), arrays(run, 4)
    names = [name for name in two if name.startswith("frozen")]
    assert names and [name for name in same(two, four) if name in names] == []
    _, other = tiny_run(RECIPE, "other", **frozen, seed=1, init_from=(str(run),))
    assert [name for name in names if not np.array_equal(four[name], arrays(other, 3)[name])] == []


def test_the_teacher_of_each_stage(tiny_run):
    """Overrides are of the base: a stage without them goes back to the base's teacher."""
    teachers = [str(tiny_run("vision/digits_resnet", f"teacher{seed}", seed=seed)[1]) for seed in range(2)]
    taught = [{"distillation": {"teacher": teacher}} for teacher in teachers]
    stages = (
        {"name": "a", "duration": 1},
        {"name": "b", "duration": 1, "overrides": {"objective_kwargs": taught[1]}},
        {"name": "c", "duration": 1},
    )
    settings = {"objective": "distillation", "objective_kwargs": taught[0], "stages": stages, "checkpoint.keep": 5}
    _, run = tiny_run("vision/digits_vit", **settings)
    for step, teacher in ((1, 0), (2, 1), (3, 0)):
        expected, found = arrays(pathlib.Path(teachers[teacher]), 3), arrays(run, step)
        name = next(name for name in expected if name.startswith("params"))
        np.testing.assert_array_equal(found[name.replace("params", "frozen.teacher", 1)], expected[name])


def test_from_classification_to_distillation(tiny_run):
    """The network moves beside its teacher."""
    _, teacher = tiny_run("vision/digits_resnet", "teacher")
    over = {
        "objective": "distillation",
        "objective_kwargs": {"distillation": {"teacher": str(teacher)}},
        "optim.learning_rate": 0.0,
    }
    stages = (
        {"name": "alone", "duration": 2},
        {"name": "taught", "duration": 2, "overrides": over, "optimizer": "reset"},
    )
    _, run = tiny_run("vision/digits_vit", **{"train.steps": 4, "stages": stages, "checkpoint.keep": 5})
    two, four = arrays(run, 2), arrays(run, 4)
    for name, value in two.items():
        if name.startswith("params"):
            np.testing.assert_array_equal(four[name.replace("params", "params.student", 1)], value)


def test_a_teacher_of_other_data(tiny_run):
    _, teacher = tiny_run("vision/mnist1d_cnn", "teacher")
    settings = {"objective": "distillation", "objective_kwargs": {"distillation": {"teacher": str(teacher)}}}
    with pytest.raises(UserError, match="was trained on data with kind signal, this is image"):
        tiny_run("vision/digits_vit", "student", **settings)


def test_a_stage_may_scan(tiny_run):
    """From a loop to a scan at the boundary: the same layers, the same run."""
    recipe = "vision/mnist1d_transformer"
    stages = ({"name": "loop", "duration": 2}, {"name": "scan", "duration": 2, "overrides": {"model.stack": "scan"}})
    _, plain = tiny_run(recipe, "plain", **{"train.steps": 4, "model.stack": "loop"})
    _, staged = tiny_run(recipe, "staged", **{"train.steps": 4, "model.stack": "loop", "stages": stages})
    one, other = arrays(plain, 4), arrays(staged, 4)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-5, err_msg=name)


def test_a_converter(tiny_run):
    stages = (
        {"name": "a", "duration": 2},
        {"name": "b", "duration": 2, "converter": "tests.training.test_stages:doubled"},
    )
    still = {"optim.learning_rate": 0.0, "optim.weight_decay": 0.0, "checkpoint.every": 2, "checkpoint.keep": 5}
    _, run = tiny_run(RECIPE, **{"train.steps": 4, "stages": stages, **still})
    two, four = arrays(run, 2), arrays(run, 4)
    for name in two:
        if name.startswith("params"):
            np.testing.assert_array_equal(four[name], 2 * two[name])


def doubled(old, fresh):
    return {**fresh, "params": jax.tree.map(lambda p: 2 * p, old["params"]), "step": old["step"]}


def test_init_from(tiny_run):
    _, one = tiny_run(RECIPE, "one", seed=1)
    _, two = tiny_run(RECIPE, "two", seed=2)
    still = {"optim.learning_rate": 0.0, "optim.weight_decay": 0.0, "train.steps": 1}
    _, both = tiny_run(RECIPE, "both", **still, init_from=(str(one), str(two)))
    a, b, mean = arrays(one, 3), arrays(two, 3), arrays(both, 1)
    for name in mean:
        if name.startswith("params"):
            np.testing.assert_allclose(mean[name], (a[name] + b[name]) / 2, rtol=1e-6, atol=1e-7)


def test_init_from_after_a_kill_before_the_first_checkpoint(tiny_run):
    _, one = tiny_run(RECIPE, "one")
    still = {"optim.learning_rate": 0.0, "optim.weight_decay": 0.0, "train.steps": 1, "init_from": (str(one),)}
    _, two = tiny_run(RECIPE, "two", **still)
    first = arrays(two, 1)
    shutil.rmtree(two / "checkpoints")
    tiny_run(RECIPE, "two", **still)
    assert same(first, arrays(two, 1)) == []


def test_init_from_a_loop_into_a_scan(tiny_run):
    recipe = "vision/mnist1d_transformer"
    _, one = tiny_run(recipe, "one", **{"model.stack": "loop"})
    still = {"optim.learning_rate": 0.0, "optim.weight_decay": 0.0, "train.steps": 1}
    _, two = tiny_run(recipe, "two", **still, **{"model.stack": "scan"}, init_from=(str(one),))
    a, b = ({n: v for n, v in found.items() if n.startswith("params")} for found in (arrays(one, 3), arrays(two, 1)))
    assert same(a, b) == []


def test_init_from_another_model(tiny_run, tmp_path):
    _, one = tiny_run("vision/mnist1d_cnn", "one")
    with pytest.raises(UserError, match=r"init_from: .* has no "):
        tiny_run("vision/mnist1d_cnn", "two", **{"model.channels": (5, 5)}, init_from=(str(one),))
    assert not (tmp_path / "two").exists()


def test_distillation_keeps_its_teacher(tiny_run):
    from lissom.eval import evaluate

    _, teacher = tiny_run("vision/digits_resnet", "teacher")
    settings = {"objective": "distillation", "objective_kwargs": {"distillation": {"teacher": str(teacher)}}}
    result, student = tiny_run("vision/digits_vit", "student", **settings)
    assert np.isfinite(result["loss"])
    saved, taught = arrays(teacher, 3), arrays(student, 3)
    inside = {name.removeprefix("frozen.teacher."): v for name, v in taught.items() if name.startswith("frozen")}
    for kind in ("params", "stats"):
        for name, value in saved.items():
            if name.startswith(kind):
                np.testing.assert_array_equal(inside[name.removeprefix(f"{kind}.")], value)
    # What is exported is the student alone, and it does not need its teacher any more.
    shutil.rmtree(teacher)
    rows = evaluate([student], floors=False)
    parameters = {m.name: m.value for m in rows[0].measurements}["parameters"]
    assert parameters == sum(v.size for n, v in taught.items() if n.startswith("params"))


def test_distillation_loss_by_hand():
    """Two classes, logits s = (0, 0) and t = (2 ln 3, 0), T = 2: softmax(t / 2) = (3/4, 1/4), so the divergence is
    3/4 ln(3/4 / 1/2) + 1/4 ln(1/4 / 1/2) = 3/4 ln 1.5 - 1/4 ln 2, times T^2 = 4; the hard loss is ln 2."""
    from lissom.training.objectives.distillation import Distillation

    objective = Distillation.__new__(Distillation)
    objective.temperature, objective.soft_weight, objective.label_smoothing = 2.0, 0.25, 0.0

    class Fixed:
        def student(self, inputs, train, key):
            return jax.numpy.zeros((1, 2)), {"losses": {}, "metrics": {}}

        def teacher(self, inputs):
            return jax.numpy.array([[2 * np.log(3.0), 0.0]]), {}

    batch = {"inputs": None, "labels": jax.numpy.array([0])}
    loss, _ = objective.loss(Fixed(), batch, None, 0)
    soft = 4 * (0.75 * np.log(1.5) - 0.25 * np.log(2))
    np.testing.assert_allclose(loss, 0.75 * np.log(2) + 0.25 * soft, rtol=1e-5)
