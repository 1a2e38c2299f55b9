"""Settings that no network can have are one sentence from the constructor, which names the setting."""

import inspect
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from lissom.compression import TRANSFORMS
from lissom.models import FFNS, MODELS, NORMS, SIZES
from lissom.models.mixers import MIXERS
from lissom.models.registry import WrongType, check_types, construct, resolve, settings_of
from lissom.training import OBJECTIVES, OPTIMIZERS

FACTS = {"input_shape": (40, 1), "classes": 10, "vocab_size": 11, "features": 7, "environments": 3, "interval": 0.1}


def build(name, **settings):
    """The tiny network of that name with settings on top, for signals of 40 samples (images of 8 x 8 pixels)."""
    network = resolve(MODELS, name, "model")
    facts = FACTS | ({"input_shape": (8, 8, 1)} if name in ("vit", "biformer", "spikeformer") else {})
    taken = settings_of(network)
    facts = {key: value for key, value in facts.items() if key in taken}
    return network(**SIZES[name]["tiny"] | settings, **facts, rngs=nnx.Rngs(0))


EVERY_TRANSFORMER = [
    ({"width": 0}, "model.width=0 must be at least 1"),
    ({"width": -16}, "model.width=-16 must be at least 1"),
    ({"heads": 0}, "model.heads=0 must be at least 1"),
    ({"heads": 0, "mixer": "none"}, "model.heads=0 must be at least 1"),
    ({"depth": 0}, "depth=0 must be a positive multiple"),
    ({"mixer": ()}, "model.mixer=() must name at least one mixer"),
    ({"dropout": -0.1}, "model.dropout=-0.1 must be at least 0 and below 1"),
    ({"dropout": 1.0}, "model.dropout=1.0 must be at least 0 and below 1"),
    ({"mixer_kwargs": {"attention": {"dropout": 1.5}}}, "mixer.dropout=1.5 must be at least 0 and below 1"),
    ({"mixer_kwargs": {"attention": {"kv_heads": 0}}}, "mixer.kv_heads=0 must be at least 1"),
    ({"mixer_kwargs": {"attention": {"kv_heads": -2}}}, "mixer.kv_heads=-2 must be at least 1"),
    ({"mixer_kwargs": {"attention": {"head_dim": 0}}}, "mixer.head_dim=0 must be at least 1"),
    (
        {"mixer_kwargs": {"attention": {"head_dim": 8, "rope_factors": (1.0,)}}},
        "mixer.rope_factors=(1.0,) must be 4 positive numbers",
    ),
    (
        {"mixer_kwargs": {"attention": {"head_dim": 8, "rope_factors": (1.0, 1.0, 1.0, 0.0)}}},
        "0.0) must be 4 positive numbers",
    ),
    (
        {"mixer_kwargs": {"attention": {"rope_factors": (1.0,), "rope_theta": 0.0}}},
        "mixer.rope_factors=(1.0,) must be 0 positive numbers, one a rotary pair",
    ),
    ({"mixer": "window", "mixer_kwargs": {"window": {"window": 0}}}, "mixer.window=0 must be at least 1"),
    ({"ffn": "mlp", "ffn_kwargs": {"mlp": {"dropout": -1.0}}}, "ffn.dropout=-1.0 must be at least 0 and below 1"),
    ({"ffn": "swiglu", "ffn_kwargs": {"swiglu": {"expansion": 0.0}}}, "ffn.expansion=0.0"),
]
PATCH = [({"patch": patch}, f"model.patch={patch} must be at least 1") for patch in (0, -4)]
OUT_OF_BOUNDS = [
    (name, *case) for name in ("vit", "sequence_transformer", "language", "in_context") for case in EVERY_TRANSFORMER
]
OUT_OF_BOUNDS += [(name, *case) for name in ("vit", "sequence_transformer") for case in PATCH]
OUT_OF_BOUNDS += [
    ("cnn", {"channels": ()}, "model.channels=() must hold one number or more, each at least 1"),
    ("cnn", {"channels": (4, 0)}, "model.channels=(4, 0) must hold one number or more, each at least 1"),
    ("cnn", {"kernel": 0}, "model.kernel=0 must be at least 1"),
    ("cnn", {"stride": 0}, "model.stride=0 must be at least 1"),
    ("cnn", {"dropout": 1.0}, "model.dropout=1.0 must be at least 0 and below 1"),
    ("resnet", {"widths": (), "blocks": ()}, "model.widths=() must hold one number or more, each at least 1"),
    ("mixture_of_fields", {"width": 0}, "model.width=0 must be at least 1"),
    ("mixture_of_fields", {"depth": 0}, "model.depth=0 must be at least 1"),
    ("mixture_of_fields", {"experts": 0}, "model.experts=0 must be at least 1"),
    ("mixture_of_fields", {"experts": 4}, "model.experts=4 must be at most the number of environments, 3"),
    ("mixture_of_fields", {"context_size": 0}, "model.context_size=0 must be at least 1"),
    ("mixture_of_fields", {"substeps": 0}, "model.substeps=0 must be at least 1"),
    ("mixture_of_fields", {"gate_kwargs": {"mixer": {"every": 0}}}, "gate.every=0 must be at least 1"),
    ("mixture_of_fields", {"gate_kwargs": {"mixer": {"iterations": 0}}}, "gate.iterations=0 must be at least 1"),
    (
        "mixture_of_fields",
        {"gate": "softmax", "gate_kwargs": {"softmax": {"balance": -1.0}}},
        "gate.balance=-1.0 must be at least 0",
    ),
    ("in_context", {"learned_positions": -1}, "model.learned_positions=-1 must be 0 or the greatest length"),
    (
        "in_context",
        {"mixer": "lstm", "mixer_kwargs": {"lstm": {"hidden": 0}}},
        "mixer.hidden=0 must be at least 1 (set in mixer_kwargs.lstm)",
    ),
    ("hypernetwork", {"hidden": ()}, "model.hidden=() must hold one number or more, each at least 1"),
    ("hypernetwork", {"conditions": 0}, "model.conditions=0 must be at least 1"),
    ("hypernetwork", {"code": "cosin"}, "model.code='cosin' must be one of raw, cosine; did you mean 'cosine'?"),
    ("hypernetwork", {"head_init": "zero"}, "model.head_init='zero' must be one of fan_out, main"),
    ("hypernetwork", {"predicted": "gone"}, "model.predicted='gone' must match a parameter, of convs/0/bias"),
    ("hypernetwork", {"predicted": "("}, "model.predicted='(' must be a pattern"),
    ("hypernetwork", {"network": "resnet"}, "model.network='resnet' must carry no statistics"),
    ("hypernetwork", {"network": "hypernetwork"}, "model.network='hypernetwork' must be a network without conditions"),
    ("hypernetwork", {"network": "cn"}, "unknown network 'cn'"),
    (
        "hypernetwork",
        {"network_size": "huge"},
        "model.network_size='huge' must be one of tiny, mnist1d, conv4, of 'cnn'",
    ),
    ("hypernetwork", {"network_size": None}, "must be made of input_shape, classes and settings: it needs channels"),
    ("hypernetwork", {"network": "language"}, "must be made of input_shape, classes and settings: it needs vocab_size"),
    (
        "hypernetwork",
        {"network": "sequence_transformer", "network_kwargs": {"sequence_transformer": {"stack": "scan"}}},
        "model.network_kwargs.sequence_transformer.stack='scan' must be 'loop'",
    ),
    (
        "hypernetwork",
        {"network_kwargs": {"cnn": {"kernel": 0}}},
        "model.kernel=0 must be at least 1 (of the main network: model.network_kwargs.cnn)",
    ),
    ("hypernetwork", {"network_kwargs": {"cnn": {"widht": 3}}}, "network 'cnn' has no setting 'widht'"),
    ("resnet", {"blocks": (1, 0)}, "model.blocks=(1, 0) must hold one number or more, each at least 1"),
]


@pytest.mark.parametrize("name,settings,sentence", OUT_OF_BOUNDS, ids=str)
def test_out_of_bounds(name, settings, sentence):
    with pytest.raises(ValueError) as error:
        build(name, **settings)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name,settings,place",
    [
        ("vit", {"mixer": "window", "mixer_kwargs": {"window": {"window": 0}}}, "mixer_kwargs.window"),
        ("spiking", {"neuron_kwargs": {"lif": {"decay": 2.0}}}, "neuron_kwargs.lif"),
        ("spiking", {"encoding": "rate", "encoding_kwargs": {"rate": {"gain": 0.0}}}, "encoding_kwargs.rate"),
        (
            "vit",
            {"ffn": "moe", "ffn_kwargs": {"moe": {"gate": "top_k", "gate_kwargs": {"top_k": {"jitter": 1.0}}}}},
            "gate_kwargs.top_k",
        ),
    ],
)
def test_what_is_out_of_bounds_is_told_where_it_was_set(name, settings, place):
    with pytest.raises(ValueError, match=rf" \(set in {place}\)$"):
        build(name, **settings)


def test_a_place_is_told_of_what_a_config_has_alone():
    """Members of a mixed selector stand in a list, not in a field of their own."""
    members = {"assignment": (("a_shape", {"sink": 1, "window": -1}),) * 4}
    kwargs = {"block_sparse": {"selector": "per_head", "selector_kwargs": {"per_head": members}}}
    with pytest.raises(ValueError, match="window=-1") as error:
        build("language", mixer="block_sparse", mixer_kwargs=kwargs)
    assert "set in selector_kwargs.a_shape" not in str(error.value)


@pytest.mark.parametrize("name", MODELS)
def test_the_least_that_is_allowed(name):
    least = {"width": 1, "heads": 1, "depth": 1, "patch": 1, "dropout": 0.0, "channels": (1,), "kernel": 1, "stride": 1}
    if name == "block_transformer":  # two decoders of one layer
        least |= {"depth": 2, "block_length": 1, "prefix": 1}
    if name == "biformer":  # a number for each stage
        least |= {"heads": (1,), "depths": (1,), "stem": 1}
    if name == "keyed_experts":  # one number has no contrast
        least |= {"kernel": 2, "experts": 1, "k": 1, "filters": 1, "pool": 1}
    least |= {"widths": (1,), "blocks": (1,), "mixer_kwargs": {"attention": {"rope_theta": 0.0}}}
    if name == "spiking":
        least |= {"strides": (1,), "hidden": (1,), "time_steps": 1}
    if name == "spikeformer":
        least |= {"depths": (1,), "strides": (1,), "convolutional": 0, "separable": 1, "expansion": 1, "time_steps": 1}
    taken = settings_of(resolve(MODELS, name, "model"))
    build(name, **{key: value for key, value in least.items() if key in taken})


def annotated(
    *,
    whole: int = 1,
    number: float = 1.0,
    switch: bool = False,
    text: str = "",
    wholes: Sequence[int] = (),
    names: str | Sequence[str] = "",
    pair: tuple[str, int] = ("", 0),
    rules: Sequence[tuple[str, Mapping]] = (),
    table: Mapping | None = None,
    maybe: int | None = None,
    other: jnp.dtype = jnp.float32,
    as_text: "int" = 1,
    plain=1,
):
    """A plug-in with every kind of annotation that is read, and some that are not."""


@pytest.mark.parametrize(
    "settings,sentence",
    [
        ({"whole": "four"}, "thing 'a': whole='four' must be a whole number"),
        ({"whole": 2.5}, "thing 'a': whole=2.5 must be a whole number"),
        ({"whole": True}, "thing 'a': whole=True must be a whole number"),
        ({"whole": None}, "thing 'a': whole=None must be a whole number"),
        ({"number": "x"}, "thing 'a': number='x' must be a number"),
        ({"number": False}, "thing 'a': number=False must be a number"),
        ({"switch": 1}, "thing 'a': switch=1 must be True or False"),
        ({"text": 3}, "thing 'a': text=3 must be a text"),
        ({"wholes": 3}, "thing 'a': wholes=3 must be a list, each entry a whole number"),
        ({"wholes": (1, 2.5)}, "thing 'a': wholes=(1, 2.5) must be a list, each entry a whole number"),
        ({"wholes": "12"}, "thing 'a': wholes='12' must be a list, each entry a whole number"),
        ({"names": ("a", 1)}, "thing 'a': names=('a', 1) must be a text or a list, each entry a text"),
        ({"pair": "a"}, "thing 'a': pair='a' must be a list"),
        ({"table": (1,)}, "thing 'a': table=(1,) must be a mapping or None"),
        ({"maybe": 0.5}, "thing 'a': maybe=0.5 must be a whole number or None"),
    ],
    ids=str,
)
def test_wrong_types(settings, sentence):
    with pytest.raises(WrongType) as error:
        check_types(annotated, settings, "thing 'a'")
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "settings",
    [
        {"whole": np.int64(3), "number": 3, "switch": True, "text": "x"},
        {"number": np.float32(0.5), "wholes": [1, 2], "names": ("a", "b"), "pair": ("a", 1), "maybe": 3},
        {"rules": [("head", {"skip": True})], "table": ml_collections.ConfigDict({"a": 1}), "maybe": None},
        {"other": "bfloat16", "as_text": "not read", "plain": object(), "not_there": 1},
    ],
)
def test_right_types(settings):
    check_types(annotated, settings, "thing 'a'")


def test_construct_checks_types_also_of_names_that_were_not_chosen():
    for kwargs in ({"mlp": {"expansion": "large"}}, {"swiglu": {"expansion": "large"}}):
        with pytest.raises(WrongType, match="expansion='large' must be a number"):
            construct(FFNS, "mlp", kwargs, "ffn", width=8, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("settings", [{"heads": "four"}, {"width": 2.5}, {"remat": "yes"}, {"mixer": 3}], ids=str)
def test_a_network_is_checked_through_its_parent(settings):
    (name,) = settings
    with pytest.raises(WrongType, match=f"model 'language': {name}="):
        check_types(resolve(MODELS, "language", "model"), settings, "model 'language'")


TABLES = (MODELS, MIXERS, FFNS, NORMS, OBJECTIVES, OPTIMIZERS, TRANSFORMS)


@pytest.mark.parametrize("table,name", [(table, name) for table in TABLES for name in table])
def test_defaults_and_sizes_fit_their_annotations(table, name):
    target = resolve(table, name, "thing")
    taken = settings_of(target)
    defaults = {key: p.default for key, p in taken.items() if p.default is not inspect.Parameter.empty}
    check_types(target, defaults, name)
    unannotated = [key for key, p in taken.items() if p.annotation is inspect.Parameter.empty]
    assert unannotated == []
    for size in SIZES.get(name, {}).values() if table is MODELS else ():
        check_types(target, size, name)
        assert set(size) <= set(taken)
