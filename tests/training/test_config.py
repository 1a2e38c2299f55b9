"""Reading values, overrides, durations, and the round trip of a config through a run's file."""

import pytest

from lissom.training.config import (
    check,
    default_workdir,
    differences,
    from_json,
    load_recipe,
    overridden,
    recipes,
    to_json,
    total_steps,
)
from lissom.training.errors import UserError

RECIPE = "configs/vision/digits_vit.py"


def config(**changes):
    return overridden(load_recipe(RECIPE), changes.items())


@pytest.mark.parametrize(
    "key,text,value",
    [
        ("optim.learning_rate", "3e-4", 3e-4),
        ("seed", "7", 7),
        ("seed", "1e3", 1000),
        ("evaluation.floor", "false", False),
        ("model.mixer", "window", "window"),
        ("data.augment", "shift,noise", ("shift", "noise")),
        ("data.augment", "", ()),
        ("evaluation.latency_batches", "1,8", (1, 8)),
        ("evaluation.latency_batches", "(4,)", (4,)),
        ("model.stack", "scan", "scan"),
        ("model.width", "96", 96),
        ("model.mixer_kwargs.window.window", "3", 3),
        ("model.ffn_kwargs.mlp.expansion", "2.5", 2.5),
    ],
)
def test_values(key, text, value):
    changed = config(**{key: text})
    for part in key.split("."):
        changed = changed[part]
    assert changed == value and type(changed) is type(value)


@pytest.mark.parametrize(
    "key,text,words",
    [
        ("seed", "1.5", "whole number"),
        ("optim.learning_rate", "fast", "a number"),
        ("evaluation.floor", "maybe", "true or false"),
        ("modell.mixer", "none", "modell.*did you mean 'model'"),
        ("seed.x", "1", "is a value"),
        ("train.stepps", "1", "stepps"),
    ],
)
def test_bad_values(key, text, words):
    with pytest.raises(UserError, match=words):
        config(**{key: text})


def test_one_duration():
    assert dict(config(**{"train.steps": "5"}).train) == {"steps": 5}
    sized = {"data.batch_size": "128"}
    assert total_steps(config(**{**sized, "train.epochs": "2"}), examples=129) == 3  # 258 examples in batches of 128
    assert total_steps(config(**{**sized, "train.examples": "128"}), examples=7) == 1
    both = config()
    with both.unlocked():
        both.train.steps = 3
    with pytest.raises(UserError, match="exactly one of"):
        check(both)


def test_round_trip():
    one = config(**{"data.augment": "shift"})
    again = from_json(to_json(one))
    assert differences(one.to_dict(), again.to_dict()) == []
    assert differences(one.to_dict(), config().to_dict()) == ["data.augment: ('shift',) -> ('noise',)"]


def test_recipes_and_workdirs():
    assert set(recipes()) >= {
        f"configs/{name}.py"
        for name in (
            "vision/digits_vit",
            "vision/digits_resnet",
            "vision/mnist1d_transformer",
            "vision/mnist1d_cnn",
            "language/stdlib_lm",
            "language/recall_lm",
        )
    }
    assert all(recipes().values())
    assert str(default_workdir(RECIPE)) == "runs/digits_vit"
    assert str(default_workdir(RECIPE + ":tiny")) == "runs/digits_vit_tiny"
