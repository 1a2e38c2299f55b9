"""Every present and future recipe, by being in configs/: builds, one trace in three tiny steps, finite loss, a row."""

import math

import pytest

from lissom.training.config import CONFIGS, load_recipe, overridden, recipes

NAMES = sorted(name.removeprefix("configs/").removesuffix(".py") for name in recipes())


@pytest.mark.parametrize("recipe", NAMES)
def test_recipe(recipe, tiny_run):
    from lissom.eval import evaluate

    result, workdir = tiny_run(recipe)
    assert result["step"] == 3
    assert set(result["traces"].values()) == {1}
    assert math.isfinite(result["loss"])
    rows = evaluate([workdir])
    assert rows[0].identity.seed == 0
    # Reversed: test sets of other settings come behind the run's own.
    values = {m.name: m.value for m in reversed(rows[0].measurements)}
    # The table's numbers are what the run recorded.
    assert values["loss"] == pytest.approx(result["loss"], rel=1e-4)
    assert values["parameters"] > 0 and values["artefact_bytes"] > 4 * values["parameters"] * 0.9


@pytest.mark.parametrize("recipe", NAMES)
def test_docstring(recipe):
    text = (CONFIGS / f"{recipe}.py").read_text()
    for word in ("Paper:", "Command:", "Time:", "Result:", "Sweep:"):
        assert word in text, f"{recipe} does not say {word}"


def shape_of_logits(config, dataset):
    """Of two examples, at the recipe's own size, which no tiny run has: (shape, what it should be)."""
    import jax
    from flax import nnx

    from lissom.training.building import build_network

    facts = {**dataset.info, "kind": dataset.kind, "length": dataset.train[0]["inputs"].shape[0]}
    examples = jax.ShapeDtypeStruct((2, *facts["input_shape"]), "float32")
    logits = jax.eval_shape(lambda x: build_network(config, facts, nnx.Rngs(0))(x)[0], examples)
    return logits.shape, (2, facts["classes"])


def few_examples(config):
    from lissom.training.building import load_dataset

    sizes = [(f"data.kwargs.{config.data.name}.{size}", 100) for size in ("train_size", "test_size")]
    return load_dataset(overridden(config, sizes if config.data.name != "digits" else ()))


@pytest.mark.parametrize("recipe", ["vision/cue_match_vit", "vision/glyphs_biformer"])
def test_every_mixer_of_the_sweep_fits_the_images(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    config = load_recipe(f"configs/{recipe}.py")
    dataset = few_examples(config)
    sweep = (CONFIGS / f"{recipe}.py").read_text().partition("Sweep: model.mixer=")[2].split()[0]
    for mixer in sweep.split(","):
        shape, expected = shape_of_logits(overridden(config, [("model.mixer", mixer)]), dataset)
        assert shape == expected


@pytest.mark.parametrize(
    ("recipe", "chosen"),
    [
        ("vision/digits_snn", "staged"),
        ("vision/digits_snn", "single"),
        ("vision/digits_spikeformer", "vit"),
        ("events/moving_digits_csnn", "spikeformer"),
    ],
)
def test_every_mode_of_the_spiking_recipes_fits_its_data(recipe, chosen):
    config = load_recipe(f"configs/{recipe}.py:{chosen}")
    shape, expected = shape_of_logits(config, few_examples(config))
    assert shape == expected
