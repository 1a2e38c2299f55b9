"""No field of a config is decoration: it is read, and under model, objective and optim it changes the program."""

import hashlib

import jax
import ml_collections
import numpy as np
import pytest

from lissom.data import DATASETS
from lissom.data.loading import complete_settings
from lissom.models import SIZES
from lissom.training.config import load_recipe, overridden

CHANGED = {
    "size": None,  # another one of the model's
    "dtype": "bfloat16",
    "mixer": "none",
    "ffn": "none",
    "norm": "none",
    "dropout": 0.1,
    "activation": "hard_tanh",
    "stack": "scan",
    "remat": True,
    "tied": False,
    "learned_positions": 64,
    "embedding_multiplier": 2.0,
    "causal": True,
    "positions": False,
    "patch": 2,
    "width": 32,
    "depth": 4,
    "heads": 1,
    "element_depth": 3,
    "slot_depth": 3,
    "component_depth": 3,
    "encoder": "deep_sets",
    "least_variance": 0.1,
    "channels": (5, 5),
    "batch_norm": False,
    "kernel": 5,
    "experts": 2,
    "context_size": 5,
    "substeps": 2,
    "gate": "softmax",
    "hidden": (3,),
    "code": "raw",
    "residual": False,
    "predicted": "head",
    "head_init": "main",
    "network": "sequence_transformer",
    "network_size": "mnist1d",
    "learning_rate": 0.123,
    "schedule": "linear",
    "warmup": 0.9,
    "final_fraction": 0.5,
    "weight_decay": 0.7,
    "decay": "bias$",
    "clip_norm": 0.0,
    "accumulate": 2,
}
KEYED = {
    "experts": 5,
    "k": 1,
    "filters": 3,
    "kernel": 5,
    "pool": 4,
    "temperature": 0.5,
    "cutoff": 0.1,
    "bound": 1.0,
    "key_loss": 2.0,
    "key_rate": 0.5,
    "train_keys": False,
}
# Tables of settings: what stands in them is tested with the name that they belong to.
TABLES = (
    *("mixer_kwargs", "ffn_kwargs", "norm_kwargs", "encoder_kwargs", "gate_kwargs", "network_kwargs", "optim_kwargs"),
    "name",
)
SETTINGS = {
    "vision/mnist1d_transformer": {
        "model.mixer_kwargs.attention.rope_theta": 500.0,
        "model.mixer_kwargs.attention.kv_heads": 1,
        "model.mixer_kwargs.attention.qk_norm": True,
        "model.mixer_kwargs.attention.bias": True,
        "model.mixer_kwargs.attention.out_bias": True,
        "model.mixer_kwargs.attention.rope_factors": (2.0, 2.0, 2.0, 3.0),
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
    "sets/gaussian_mixtures": {
        "model.encoder_kwargs.umbc.slots": 5,
        "model.encoder_kwargs.umbc.sampled": True,
        "model.encoder_kwargs.umbc.weight": "sigmoid",
        "model.encoder_kwargs.umbc.residual": False,
        "model.encoder_kwargs.umbc.chunk": 4,
        "model.encoder_kwargs.umbc.gradient_chunks": 2,
        "objective_kwargs.mixture_likelihood.chunk": 4,
    },
    "fewshot/gpicl": {},
    "dynamics/mixer": {
        "model.gate_kwargs.mixer.every": 3,
        "model.gate_kwargs.mixer.iterations": 5,
    },
    "language/meta_tokens_lm": {
        "model.mixer_kwargs.meta_tokens.meta_attention": False,
        "model.mixer_kwargs.meta_tokens.kv_heads": 1,
        "model.mixer_kwargs.meta_tokens.bias": True,
    },
    "vision/digits_stream": {
        **{f"model.{name}": value for name, value in KEYED.items()},
        "objective_kwargs.classification.loss": "cross_entropy",
        "optim.optim_kwargs.lion.b1": 0.5,
        "optim.optim_kwargs.lion.b2": 0.5,
    },
    "vision/mnist1d_hypernetwork": {
        "model.network_kwargs.cnn.kernel": 5,
        "objective_kwargs.conditional_noise.largest": 1.0,
        "objective_kwargs.conditional_noise.groups": 2,
        "objective_kwargs.conditional_noise.condition": 0.5,
        "optim.optim_kwargs.adamw.b1": 0.5,
    },
    "vision/digits_resnet": {},
    "vision/mnist1d_cnn": {},
    "fewshot/glyphs": {
        "objective_kwargs.maml.inner_rate": 0.3,
        "objective_kwargs.maml.inner_steps": 3,
        "objective_kwargs.maml.inner": "adamw",
        "objective_kwargs.maml.inner_kwargs": {"sgd": {"momentum": 0.5}},
        "objective_kwargs.maml.second_order": False,
        "objective_kwargs.maml.parameters": "^head/",
        "objective_kwargs.maml.remat": "step",
        "objective_kwargs.maml.statistics": "queries",
    },
    "fewshot/sinusoid": {},
    "vision/digits_vit": {},
}

FEW = {"train_size": 20, "test_size": 10}
FEWER = {"train_size": 30, "test_size": 20, "seed": 5}
# Of every dataset, and of every choice that one has: cheap settings, and what each setting is changed to.
DATA = {
    "digits": ({}, {"config": "shifted", "noise_up_to": 0.3}),
    "mnist5k": ({}, {"noise_up_to": 0.3}),
    "mnist1d": (FEW, {**FEWER, "shuffle_sequence": True}),
    "glyphs": (
        {**FEW, "size": 16, "classes": 5, "scripts": ("latin", "greek")},
        {
            **FEWER,
            "size": 17,
            "classes": 4,
            "scripts": ("latin",),
            "test_scripts": ("greek",),
            "test_fonts": ("cmr10",),
            "jitter": 0.5,
        },
    ),
    "cue_match": (
        {**FEW, "length": 16, "classes": 2, "items": 4, "key_bits": 4},
        {**FEWER, "dims": 2, "length": 25, "classes": 4, "items": 2, "key_bits": 5, "gap": 2, "noise": 0.2},
    ),
    "gaussian_mixtures": (
        {**FEW, "size": 8},
        {
            **FEWER,
            "size": 9,
            "smallest": 2,
            "components": 3,
            "dims": 3,
            "reach": 2.0,
            "deviations": (0.1, 0.2),
            "concentration": 3.0,
        },
    ),
    "in_context": (
        {**FEW, "length": 6, "classes": 3, "dims": 4, "tested": "other"},
        {
            **FEWER,
            "base": "digits",
            "classes": 4,
            "dims": 5,
            "spread": 0.5,
            "length": 7,
            "tasks": 3,
            "tested": "seen",
            "other_base": "digits",
            "fixed_permutation": 0.5,
        },
    ),
    "dynamics": (
        {"train_size": 20, "test_size": 18, "environments": 1, "length": 4},
        {**FEWER, "families": ("selkov", "duffing"), "environments": 3, "length": 5, "interval": 0.3, "seed": 5},
    ),
    "episodes": (
        {"source": "digits", "held_out": 5, "ways": 4, "queries": 2, "train_size": 20, "test_size": 10},
        {
            "source": "mnist5k",
            "source_kwargs": {"config": "shifted"},
            "ways": 3,
            "shots": 2,
            "queries": 3,
            "support_candidates": 3,
            "query_concentration": 1.0,
            "held_out": 4,
            "train_size": 30,
            "test_size": 20,
            "seed": 5,
        },
    ),
    "regression_tasks": (
        {"families": ("oscillator",), "shots": 3, "queries": 2, **FEW},
        {
            "families": ("duffing",),
            "shots": 4,
            "queries": 3,
            "noise": 0.1,
            "interval": 0.3,
            **FEWER,
        },
    ),
    "linear_tasks": (
        {"dims": 3, "ways": 3, "shots": 2, "queries": 2, **FEW},
        {"dims": 4, "ways": 2, "shots": 3, "queries": 3, **FEWER},
    ),
    "moving_digits": (
        {**FEW, "size": 16, "steps": 4, "binning": "surface"},
        {
            **FEWER,
            "classes_of": "digit",
            "source": "mnist5k",
            "motion": "saccade",
            "size": 17,
            "steps": 5,
            "binning": "counts",
            "polarity": "merged",
            "tau": 2.0,
            "control": "shuffled",
            "threshold": 0.3,
            "noise": 0.2,
        },
    ),
    "pen_strokes": (
        {**FEW, "size": 16, "steps": 4, "binning": "surface"},
        {
            **FEWER,
            "glyphs": "abc",
            "fonts": ("scripts",),
            "size": 17,
            "steps": 5,
            "binning": "counts",
            "tau": 2.0,
            "control": "single",
            "jitter": 0.5,
            "noise": 0.2,
        },
    ),
    "sequences": ({**FEW, "length": 32, "pairs": 4}, {"task": "needle"}),
    "sequences copy": ({**FEW, "length": 16}, {**FEWER, "length": 18, "vocab_size": 8}),
    "sequences list_recall": (
        {**FEW, "length": 40},
        {**FEWER, "length": 42, "items": 3, "questions": 3, "names": 30, "vocab_size": 48, "hints": True},
    ),
    "sequences selective_copy": (
        {**FEW, "length": 20, "items": 4},
        {**FEWER, "length": 22, "items": 3, "vocab_size": 8},
    ),
    "sequences recall": (
        {**FEW, "length": 32, "pairs": 4},
        {**FEWER, "length": 34, "pairs": 3, "vocab_size": 32, "power": 2.0},
    ),
    "sequences needle": ({**FEW, "length": 16, "pairs": 2}, {**FEWER, "length": 18, "pairs": 3, "vocab_size": 32}),
    "sequences parity": ({**FEW, "length": 16}, {**FEWER, "length": 18}),
    "sequences modular_addition": ({"modulus": 7}, {"modulus": 5, "train_fraction": 0.5, "seed": 5}),
    "domain_text": (
        {**FEW, "length": 32},
        {
            **FEWER,
            "length": 40,
            "levels": 32,
            "domains": ("json", "brackets"),
            "tested": "json",
            "seed": 1,
        },
    ),
    "stdlib_text": ({"length": 4096, "test_size": 9}, {"length": 2048, "test_size": 5}),
}


def program(config, beginning: bool = False) -> str:
    """The jaxpr of one training step and the shapes it starts from; or that of the values it begins with."""
    from lissom.training import sharding
    from lissom.training.building import assemble
    from lissom.training.step import make_step

    facts = {"input_shape": (8, 8, 1), "classes": 10, "vocab_size": 64}
    batch = {"inputs": (16, 8, 8, 1), "labels": (16,), "mask": (16,)}
    if config.data.name == "mnist1d":
        facts["input_shape"], batch["inputs"] = (40, 1), (16, 40, 1)
    if config.objective == "language_modelling":
        batch = dict.fromkeys(("inputs", "labels", "weights"), (16, 32)) | {"mask": (16,)}
    if config.objective == "mixture_likelihood":
        facts |= {"input_shape": (24, 2), "classes": 4}
        batch = {"inputs": (16, 24, 2), "labels": (16, 24), "sizes": (16,), "mask": (16,)}
    if config.objective == "trajectories":
        facts |= {"input_shape": (6, 2), "environments": 12, "interval": 0.2}
        batch = {"inputs": (16, 6, 2), "environment": (16,), "mask": (16,)}
    if config.data.name == "episodes":
        facts |= {"input_shape": (16, 16, 1), "classes": 5, "train_classes": 8}
        batch = {"support_inputs": (4, 5, 16, 16, 1), "support_labels": (4, 5), "inputs": (4, 10, 16, 16, 1)}
        batch |= {"labels": (4, 10), "classes": (4, 5), "mask": (4,)}
    if config.objective == "beclr":
        batch = {"inputs": (8, 16, 16, 1), "labels": (8,), "mask": (8,)}
    if config.data.name == "regression_tasks":
        facts = {"input_shape": (1,), "outputs": 1}
        batch = {"support_inputs": (4, 3, 1), "support_labels": (4, 3, 1), "inputs": (4, 6, 1), "labels": (4, 6, 1)}
        batch |= {"mask": (4,)}
    if config.objective == "in_context":
        facts |= {"features": 21, "classes": 5}
        batch = {"inputs": (16, 12, 21), "labels": (16, 12), "mask": (16,)}
    if config.data.meta_tokens != "none":
        batch["meta"] = (16, 32)
    whole = ("labels", "inputs") if config.objective == "language_modelling" else ("labels", "sizes", "environment")
    whole = () if config.data.name == "regression_tasks" else (*whole, "support_labels", "classes")
    shapes = {
        name: jax.ShapeDtypeStruct(shape, "int32" if name in whole else "bool" if name == "meta" else "float32")
        for name, shape in batch.items()
    }
    assembly = assemble(config, facts, 10, sharding.make_mesh({"data": 1}))
    if beginning:
        return str(jax.make_jaxpr(assembly.make)(jax.random.key(0)))
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
            same.append((key, value))
    same = [key for key, value in same if program(overridden(config, [(key, value)]), True) == program(config, True)]
    assert same == [], "these fields change nothing"


def test_field_of_the_block_transformer_changes_the_program():
    of = [("model.name", "block_transformer"), ("model.depth", 4)]
    config = overridden(load_recipe("configs/language/recall_lm.py:tiny"), of)
    changes = {
        "block_length": 2,
        "prefix": 1,
        "block_depth": 1,
        "random_padding": False,
        "embedding_multiplier": 2.0,
        "tied": False,
        "stack": "scan",
    }
    base = program(config)
    same = [key for key, value in changes.items() if program(overridden(config, [(f"model.{key}", value)])) == base]
    assert same == [], "these fields change nothing"


def test_field_of_the_lstm_changes_the_program():
    config = overridden(load_recipe("configs/fewshot/gpicl.py:tiny"), [("model.mixer", "lstm")])
    changed = overridden(config, [("model.mixer_kwargs.lstm.hidden", 5)])
    assert program(changed) != program(config)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("memory", 25), ("clusters", 4), ("clusters", 0), ("neighbours", 3), ("neighbours", 0), ("warm_up", 3)),
        *(("momentum", 0.9), ("prototype_momentum", 0.5), ("epsilon", 0.1), ("uniformity", 0.2), ("temperature", 1.0)),
        *(("width", 12), ("strength", 0.5)),
    ],
)
def test_field_of_beclr_changes_the_program(setting, value):
    config = overridden(load_recipe("configs/fewshot/glyphs.py:tiny"), [("objective", "beclr")])
    assert program(overridden(config, [(f"objective_kwargs.beclr.{setting}", value)])) != program(config)


def contents(config) -> str:
    """A digest of every example of the config's dataset and of what is known about them."""
    from lissom.data.dataset import gather
    from lissom.training.building import load_dataset

    dataset = load_dataset(config)
    digest = hashlib.sha256(repr(sorted(dataset.info.items())).encode())
    for source in (dataset.train, dataset.test):
        for name, array in sorted(gather(source, np.arange(len(source))).items()):
            digest.update(f"{name} {array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()


def test_every_dataset_is_listed():
    choices = {name: DATASETS[name].choice[1] for name in DATASETS if DATASETS[name].choice}
    assert set(DATA) == {*DATASETS, *(f"{name} {value}" for name, values in choices.items() for value in values)}


@pytest.mark.parametrize("case", DATA)
def test_setting_changes_the_data(case, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.getbasetemp() / "datasets"))
    name, _, chosen = case.partition(" ")
    cheap, changes = DATA[case]
    choice = DATASETS[name].choice
    cheap = {**cheap, **({choice[0]: chosen} if chosen else {})}
    # A choice is changed in the case without one, the settings of what is chosen in their own.
    settings = complete_settings(name, DATASETS[name], cheap)
    own = [key for key in settings if choice is None or (key != choice[0]) == bool(chosen)]
    assert sorted(changes) == sorted(own), "every setting needs a change"
    config = load_recipe("configs/vision/digits_vit.py:tiny")
    config = overridden(config, [("data.name", name), *((f"data.kwargs.{name}.{key}", v) for key, v in cheap.items())])
    base = contents(config) if changes else None
    same = [
        key for key, v in changes.items() if contents(overridden(config, [(f"data.kwargs.{name}.{key}", v)])) == base
    ]
    assert same == [], "these settings change nothing"


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
