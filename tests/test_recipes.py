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


@pytest.mark.parametrize("recipe", ["vision/cue_match_vit", "vision/glyphs_biformer"])
def test_every_mixer_of_the_sweep_fits_the_images(recipe, tmp_path, monkeypatch):
    """At the recipe's own size, which no tiny run has."""
    import jax
    from flax import nnx

    from lissom.training.building import build_network, load_dataset

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    config = load_recipe(f"configs/{recipe}.py")
    few = [(f"data.kwargs.{config.data.name}.{size}", 100) for size in ("train_size", "test_size")]
    dataset = load_dataset(overridden(config, few))
    facts = {**dataset.info, "kind": dataset.kind, "length": dataset.train[0]["inputs"].shape[0]}
    images = jax.ShapeDtypeStruct((2, *facts["input_shape"]), "float32")
    sweep = (CONFIGS / f"{recipe}.py").read_text().partition("Sweep: model.mixer=")[2].split()[0]
    for mixer in sweep.split(","):
        of = overridden(config, [("model.mixer", mixer)])
        logits = jax.eval_shape(lambda x, of=of: build_network(of, facts, nnx.Rngs(0))(x)[0], images)
        assert logits.shape == (2, facts["classes"])
