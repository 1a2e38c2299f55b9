"""No field of a config is decoration: it is read, and under model, objective and optim it changes the program."""

import jax
import ml_collections
import pytest

from lissom.models import SIZES
from lissom.training.config import load_recipe, overridden

CHANGED = {
    "size": None,  # another one of the model's
    "dtype": "bfloat16",
    "mixer": "none",
    "ffn": "none",
    "norm": "none",
    "dropout": 0.1,
    "stack": "scan",
    "remat": True,
    "tied": False,
    "causal": True,
    "positions": False,
    "patch": 2,
    "width": 32,
    "depth": 4,
    "heads": 4,
    "channels": (5, 5),
    "kernel": 5,
    "learning_rate": 0.123,
    "schedule": "linear",
    "warmup": 0.9,
    "final_fraction": 0.5,
    "weight_decay": 0.7,
    "decay": "bias$",
    "clip_norm": 0.0,
    "accumulate": 2,
}
# Tables of settings: what stands in them is tested with the name that they belong to.
TABLES = ("mixer_kwargs", "ffn_kwargs", "norm_kwargs", "optim_kwargs", "name")
SETTINGS = {
    "vision/mnist1d_transformer": {
        "model.mixer_kwargs.attention.rope_theta": 500.0,
        "model.mixer_kwargs.attention.kv_heads": 1,
        "model.mixer_kwargs.attention.qk_norm": True,
        "model.mixer_kwargs.attention.bias": True,
        "model.mixer_kwargs.attention.dropout": 0.1,
        "model.mixer_kwargs.attention.implementation": "reference",
        "model.mixer_kwargs.attention.head_dim": 4,
        "model.ffn_kwargs.mlp.expansion": 2.0,
        "model.ffn_kwargs.mlp.dropout": 0.1,
        "model.norm_kwargs.layernorm.epsilon": 0.1,
        "optim.optim_kwargs.adamw.b1": 0.5,
        "optim.optim_kwargs.adamw.b2": 0.5,
        "optim.optim_kwargs.adamw.eps": 0.5,
        "objective_kwargs.classification.label_smoothing": 0.3,
    },
    "language/recall_lm": {"objective_kwargs.language_modelling.z_loss": 0.1},
    "vision/digits_resnet": {},
    "vision/mnist1d_cnn": {},
    "vision/digits_vit": {},
}


def program(config) -> str:
    """The jaxpr of one training step and the shapes it starts from."""
    from lissom.training import sharding
    from lissom.training.building import assemble
    from lissom.training.step import make_step

    facts = {"input_shape": (8, 8, 1), "classes": 10, "vocab_size": 64}
    batch = {"inputs": (16, 8, 8, 1), "labels": (16,), "mask": (16,)}
    if config.data.name == "mnist1d":
        facts["input_shape"], batch["inputs"] = (40, 1), (16, 40, 1)
    if config.objective == "language_modelling":
        batch = dict.fromkeys(("inputs", "labels", "weights"), (16, 32)) | {"mask": (16,)}
    whole = ("labels", "inputs") if config.objective == "language_modelling" else ("labels",)
    shapes = {
        name: jax.ShapeDtypeStruct(shape, "int32" if name in whole else "float32") for name, shape in batch.items()
    }
    assembly = assemble(config, facts, 10, sharding.make_mesh({"data": 1}))
    state = dict(assembly.shapes)
    frozen = state.pop("frozen")
    step = make_step(assembly, config.optim.accumulate)
    return str(jax.make_jaxpr(step)(state, frozen, shapes, jax.random.key(0)))


@pytest.mark.parametrize("recipe", SETTINGS)
def test_field_changes_the_program(recipe):
    config = load_recipe(f"configs/{recipe}.py:tiny")
    base, same = program(config), []
    changes = dict(SETTINGS[recipe])
    for group in ("model", "optim"):
        changes |= {f"{group}.{key}": CHANGED[key] for key in config[group] if key not in TABLES}
    for key, value in changes.items():
        if key == "model.size":
            value = next(size for size in SIZES[config.model.name] if size != config.model.size)
        if program(overridden(config, [(key, value)])) == base:
            same.append(key)
    assert same == [], "these fields change nothing"


def test_every_other_field_is_read(tiny_run, monkeypatch):
    """Each leaf is told by the fields of its group and its own name, since configs are copied on the way."""
    seen = set()
    for method in ("__getitem__", "__getattr__", "get"):
        plain = getattr(ml_collections.ConfigDict, method)

        def read(self, key, *args, plain=plain):
            seen.add((frozenset(self.keys()), key))
            return plain(self, key, *args)

        monkeypatch.setattr(ml_collections.ConfigDict, method, read)
    config = load_recipe("configs/vision/digits_resnet.py:tiny")
    groups = {frozenset(config.keys()): ""}
    groups |= {
        frozenset(config[name].keys()): f"{name}."
        for name in ("data", "train", "mesh", "checkpoint", "log", "evaluation", "optim")
    }
    seen.clear()
    from lissom.eval import evaluate

    _, workdir = tiny_run("vision/digits_resnet")
    evaluate([workdir])
    unread = [f"{prefix}{key}" for group, prefix in groups.items() for key in group if (group, key) not in seen]
    # The mesh is handed to make_mesh as a mapping, one axis at a time.
    assert unread == []
