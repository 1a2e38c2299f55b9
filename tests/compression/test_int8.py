"""Int8 weights: bound of the error by formula, real bytes on disk, rules, reload."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.compression.artefacts import export, reload
from lissom.compression.transforms import build_transforms
from lissom.compression.weight_only import Int8
from lissom.evaluation.memory import artefact_bytes
from lissom.models.registry import UnknownName
from lissom.models.variables import flatten, merge
from lissom.models.vit import VisionTransformer
from lissom.training.errors import UserError


def test_rounding_error_is_at_most_half_a_step():
    weight = jax.random.normal(jax.random.key(0), (30, 5)).at[:, 2].set(0.0)
    packed = Int8(weight, -1)
    step = np.abs(weight).max(0) / 127
    assert (np.abs(packed[...] - weight) <= step / 2 + 1e-7).all()
    np.testing.assert_array_equal(packed[...][:, 2], 0.0)
    # The largest weight of a channel is kept exactly: it is 127 steps.
    np.testing.assert_allclose(np.abs(packed[...]).max(0), np.abs(weight).max(0), rtol=1e-6)


def vit():
    return VisionTransformer(input_shape=(8, 8, 1), classes=10, width=16, depth=1, heads=2, patch=4, rngs=nnx.Rngs(0))


def test_rules():
    ((_, some),) = build_transforms([{"name": "int8_weights", "rules": ((r"mixer/", {}),)}])
    changed = some.structure(vit())
    assert isinstance(changed.blocks[0].mixer.q.kernel, Int8)
    assert not isinstance(changed.head.kernel, Int8)
    ((_, none),) = build_transforms([{"name": "int8_weights", "rules": ((r"mixxer/", {}),)}])
    with pytest.raises(UserError, match=r"mixxer/.*matches no layer"):
        none.structure(vit())
    with pytest.raises(UnknownName, match="did you mean 'int8_weights'"):
        build_transforms([{"name": "int8_weight"}])
    with pytest.raises(UnknownName, match="no setting 'rule'"):
        build_transforms([{"name": "int8_weights", "rule": ()}])


@pytest.mark.parametrize(
    "recipe,overrides",
    [
        ("vision/digits_vit", {"model.width": 64}),
        ("vision/digits_resnet", {}),
        ("language/recall_lm", {"model.stack": "scan"}),
    ],
)
def test_exported_and_reloaded(recipe, overrides, tiny_run):
    _, run = tiny_run(recipe, **overrides)
    plain = reload(export(run, run / "exports" / "trained"))
    directory = export(run, run / "exports" / "int8", [{"name": "int8_weights"}])
    packed = reload(directory)
    kinds = {leaf.dtype for name, leaf in flatten(packed.frozen).items() if name.endswith("integers")}
    assert kinds == {jnp.dtype(jnp.int8)}
    bytes_of = lambda parts: sum(leaf.nbytes for leaf in jax.tree.leaves(parts[1:]))
    assert bytes_of(packed) < 0.5 * bytes_of(plain)
    if overrides.get("model.width"):
        assert artefact_bytes(directory) < artefact_bytes(run / "exports" / "trained")
    facts = json.loads((run / "facts.json").read_text())
    inputs = (
        jax.random.randint(jax.random.key(0), (2, 8), 0, 9)
        if facts["kind"] == "tokens"
        else jax.random.normal(jax.random.key(0), (2, *facts["input_shape"]))
    )
    want, got = (merge(parts)(inputs)[0] for parts in (plain, packed))
    assert 0 < float(jnp.abs(want - got).max()) < 0.05 * float(jnp.abs(want).max()) + 1e-2


def test_a_damaged_artefact_is_an_error(tiny_run):
    _, run = tiny_run("vision/mnist1d_cnn")
    directory = export(run, run / "exports" / "trained")
    record = directory / "checkpoints" / "0" / "record" / "metadata"
    record.write_text(record.read_text()[:50])
    with pytest.raises(UserError, match="no whole checkpoint"):
        reload(directory)
    with pytest.raises(UserError, match="no exported network"):
        reload(run / "nothing")
