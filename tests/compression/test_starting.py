"""Starting values: transforms that a run was not trained with, pretrained checkpoints."""

import functools

import jax
import numpy as np
import pytest

from lissom.compression.artefacts import export, reload
from lissom.compression.starting import _check_readings
from lissom.models.pretrained import load
from lissom.models.variables import flatten, split
from lissom.training.config import load_recipe
from lissom.training.errors import UserError
from tests.models import pretrained_files as files
from tests.training.test_loop import arrays

STILL = {"optim.learning_rate": 0.0, "optim.weight_decay": 0.0, "train.steps": 1}
TEXT = "language/recall_lm"
LATENT = ({"name": "grouped_to_latent"},)


def saved(kind: str, path: str) -> str:
    """The name of an array in a checkpoint."""
    return ".".join((kind, *path.split("/")))


def test_a_converted_network_starts_where_its_source_ended(tiny_run):
    mixer = {"model.mixer": "gqa", "model.stack": "loop"}
    source, one = tiny_run(TEXT, "one", **mixer)
    still, two = tiny_run(TEXT, "two", **mixer, **STILL, transforms=LATENT, init_from=(str(one),))
    assert any("k_up" in name for name in arrays(two, 1))
    assert still["loss"] == pytest.approx(source["loss"], rel=1e-5)
    # Tuned, it is a run like others: it can be the start of a further one, whose transforms it has.
    tuned, three = tiny_run(TEXT, "three", **mixer, transforms=LATENT, init_from=(str(one),))
    again, _ = tiny_run(TEXT, "four", **mixer, **STILL, transforms=LATENT, init_from=(str(three),))
    assert tuned["loss"] != pytest.approx(source["loss"], rel=1e-5)
    assert again["loss"] == pytest.approx(tuned["loss"], rel=1e-6)
    with pytest.raises(UserError, match=r"trained with the transforms grouped_to_latent, which are not the first of "):
        tiny_run(TEXT, "five", **mixer, init_from=(str(three),))
    with pytest.raises(UserError, match=r"changes layers one by one: set config.model.stack to 'loop'"):
        tiny_run(TEXT, "six", **mixer | {"model.stack": "scan"}, transforms=LATENT, init_from=(str(one),))


def test_frozen_values_are_those_of_the_export(tiny_run, tmp_path):
    int8 = ({"name": "int8_weights"},)
    _, one = tiny_run("vision/mnist1d_cnn", "one")
    _, two = tiny_run("vision/mnist1d_cnn", "two", **STILL, transforms=int8, init_from=(str(one),))
    have, want = arrays(two, 1), flatten(reload(export(one, tmp_path / "export", int8)).frozen)
    assert want
    for name, value in want.items():
        np.testing.assert_array_equal(have[saved("frozen", name)], value)


def test_a_soup_is_made_before_what_is_quantized(tiny_run):
    """Integers have no mean; and a run that is named twice counts twice."""
    cnn, int8 = "vision/mnist1d_cnn", ({"name": "int8_weights"},)
    runs = [str(tiny_run(cnn, f"run{seed}", seed=seed)[1]) for seed in range(2)]
    a, b = (arrays(tiny_run(cnn, f"same{i}", **STILL, init_from=(run,))[1], 1) for i, run in enumerate(runs))
    soup = (runs[0], runs[0], runs[1])
    plain = arrays(tiny_run(cnn, "plain", **STILL, init_from=soup)[1], 1)
    small = arrays(tiny_run(cnn, "small", **STILL, init_from=soup, transforms=int8)[1], 1)
    for name in (name for name in plain if name.startswith("params")):
        np.testing.assert_allclose(plain[name], (2 * a[name] + b[name]) / 3, rtol=1e-5, atol=1e-6)
    kernel = small["frozen.head.kernel.integers"] * small["frozen.head.kernel.scale"]
    np.testing.assert_allclose(
        kernel, plain["params.head.kernel"], atol=np.abs(plain["params.head.kernel"]).max() / 127
    )
    quantized = [
        str(tiny_run(cnn, f"q{i}", **STILL, init_from=(run,), transforms=int8)[1]) for i, run in enumerate(runs)
    ]
    with pytest.raises(UserError, match=r"have other frozen values in .*integers"):
        tiny_run(cnn, "never", init_from=tuple(quantized), transforms=int8)


def test_half_a_network_is_refused(tiny_run):
    wide = {"model.mixer": "gqa"}
    _, one = tiny_run(TEXT, "one", **wide)
    with pytest.raises(UserError, match=r"has no head/kernel of the shape that this model needs"):
        tiny_run(TEXT, "two", **wide, **{"model.tied": False}, init_from=(str(one),))
    _, untied = tiny_run(TEXT, "untied", **wide, **{"model.tied": False})
    with pytest.raises(UserError, match=r"has head/kernel, for which this model has no place"):
        tiny_run(TEXT, "three", **wide, init_from=(str(untied),))
    with pytest.raises(UserError, match=r"has rope_theta 10000.0, and config.model.mixer_kwargs.gqa.rope_theta is 5"):
        tiny_run(TEXT, "four", **wide, **{"model.mixer_kwargs": {"gqa": {"rope_theta": 5.0}}}, init_from=(str(one),))


def pretrained(folder, **changes):
    folder.mkdir()
    config = files.config_of("tied") | {"vocab_size": 64, **changes}  # as many tokens as the recipe
    files.write_folder(folder, config, files.random_tensors(config))
    return {
        "model.width": 64, "model.depth": 2, "model.heads": 4, "model.embedding_multiplier": 1.0,
        "model.mixer_kwargs": {"attention": {"rope_theta": 300.0}},
        "model.ffn_kwargs": {"swiglu": {"expansion": 2.25}}, "model.norm_kwargs": {"rmsnorm": {"epsilon": 1e-5}},
        "init_from": (f"pretrained:{folder}",),
    }  # fmt: skip


@pytest.mark.parametrize("stack", ["loop", "scan"])
def test_a_pretrained_checkpoint(stack, tiny_run, tmp_path):
    settings = pretrained(tmp_path / "checkpoint")
    _, run = tiny_run(TEXT, **settings, **STILL, **{"model.stack": stack})
    have = arrays(run, 1)
    want = flatten(split(load(tmp_path / "checkpoint", stack="loop").model).params)
    assert {name for name in have if name.startswith("params")} == {saved("params", name) for name in want}
    for name, value in jax.device_get(want).items():
        np.testing.assert_array_equal(have[saved("params", name)], value)


def test_a_checkpoint_that_would_be_another_function(tiny_run, tmp_path):
    settings = pretrained(tmp_path / "checkpoint")
    for field, value, words in (
        (
            "model.mixer_kwargs",
            {},
            r"has rope_theta 300.0, and config.model.mixer_kwargs.attention.rope_theta is 10000",
        ),
        ("model.norm_kwargs", {}, r"has epsilon 1e-05, and config.model.norm_kwargs.rmsnorm.epsilon is 1e-06"),
        (
            "model.embedding_multiplier",
            None,
            r"has embedding_multiplier 1.0, and config.model.* is None",
        ),
        ("model.width", 32, r"config.init_from: pretrained:.* has no .* of the shape that this model needs"),
        ("init_from", ("pretrained:nowhere",), r"config.init_from: no checkpoint 'nowhere'"),
    ):
        with pytest.raises(UserError, match=words):
            tiny_run(TEXT, **settings | {field: value})


PLUGGED = "lissom.models.mixers.attention:Attention"


@pytest.mark.parametrize(
    "ours,theirs,words",
    [
        # The second layer of theirs is read otherwise than any of ours.
        (
            {"mixer": "attention"},
            {"mixer": ("attention", "gqa"), "mixer_kwargs": {"gqa": {"rope_theta": 7.0}}},
            "rope_theta 7.0, and config.model.mixer_kwargs.attention.rope_theta is 10000.0",
        ),
        ({"norm": None}, {"norm": "rmsnorm", "norm_kwargs": {"rmsnorm": {"epsilon": 1e-5}}}, "has epsilon 1e-05"),
        ({}, {"mixer": PLUGGED, "mixer_kwargs": {"Attention": {"rope_theta": 500.0}}}, "has rope_theta 500.0"),
        ({"mixer_kwargs.attention.rope_factors": [2.0]}, {"mixer_kwargs": {"attention": {"rope_factors": (2.0,)}}}, ""),
        ({"norm": None}, {"norm": "rmsnorm"}, ""),
    ],
    ids=["pattern", "default", "plug-in", "list", "same"],
)
def test_what_reads_values_otherwise(ours, theirs, words):
    config = load_recipe("configs/language/recall_lm.py")
    with config.unlocked():
        for field, value in ours.items():
            *path, last = field.split(".")
            functools.reduce(getattr, path, config.model)[last] = value
    theirs = {"mixer": "attention", **theirs}
    if not words:
        _check_readings(config, "there", theirs)
        return
    with pytest.raises(UserError) as error:
        _check_readings(config, "there", theirs)
    assert words in str(error.value)
