"""Quantization-aware training and what it exports: rules, ranges, and that the packed network is the trained one."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lissom.compression.artefacts import check_transforms, export, reload
from lissom.compression.quantization.formats import FORMATS
from lissom.compression.quantization.quantizers import Fake
from lissom.compression.quantization.ranges import Frozen, Range
from lissom.compression.quantization.rules import layer_rule
from lissom.compression.quantization.stored import Packed, Stored
from lissom.compression.quantization.transforms import KINDS, PackedLayers, Qat, Quantize, kernel_of
from lissom.compression.transforms import build_transforms, layer_paths, structured
from lissom.evaluation.measuring import imitates
from lissom.evaluation.memory import artefact_bytes
from lissom.models.cnn import ConvNet
from lissom.models.language import LanguageModel
from lissom.models.linear import Conv, Embedding, Linear
from lissom.models.products import Convolution, Dense, Logits, noted, placed
from lissom.models.resnet import ResNet
from lissom.models.variables import flatten, merge, split, stats_of
from lissom.train import train
from lissom.training.building import build_network, load_dataset
from lissom.training.config import load_recipe, overridden
from lissom.training.errors import UserError
from tests.cases import some
from tests.ops.traced import operations

FP4 = {"format": "fp4_e2m1", "per": 8, "scale_format": "ue4m3", "tensor_scale": True}
RULES = {
    "int8": {"weights": "int8", "activations": "int8"},
    "int8, a scale a row": {"weights": "int8", "activations": {"format": "int8", "per": "row"}},
    "int8, unsigned": {"weights": "int8", "activations": "uint8"},
    "int4": {"weights": "int4", "activations": "int4"},
    "int4 in groups": {"weights": {"format": "int4", "per": 8}, "activations": "int8"},
    "int2, a scale a tensor": {"weights": {"format": "int2", "per": "tensor"}, "activations": "int8"},
    "weights alone": {"weights": {"format": "int4", "per": 8, "scale_format": "ue5m3"}},
    "nf4": {"weights": "nf4"},
    "learned": {
        "weights": {"format": "int4", "range": "learned"},
        "activations": {"format": "int4", "range": "learned"},
    },
    "clipped": {"weights": "int4", "activations": {"format": "uint4", "range": "clipped"}},
    "fp8": {"weights": "fp8_e4m3", "activations": "fp8_e4m3"},
    "fp4": {"weights": FP4, "activations": FP4},
    "fp4, three products": {
        "weights": FP4,
        "activations": FP4,
        "gradients": {**FP4, "stochastic": True},
        "rotation": 8,
    },
    "int4, three products": {
        "weights": "int4",
        "activations": {"format": "int4", "per": "row"},
        "gradients": {"format": "int8", "stochastic": True},
    },
}


def cnn():
    return ConvNet(input_shape=(20, 1), classes=10, channels=(8, 16), rngs=nnx.Rngs(0))


def resnet():
    return ResNet(input_shape=(6, 6, 1), classes=10, widths=(8, 16), blocks=(1, 1), rngs=nnx.Rngs(0))


def language():
    ffn = {"ffn": "swiglu", "ffn_kwargs": {"swiglu": {"expansion": 3.0}}}
    return LanguageModel(vocab_size=16, width=16, depth=1, heads=2, **ffn, rngs=nnx.Rngs(0))


NETWORKS = {"cnn": cnn, "resnet": resnet, "language": language}


@functools.cache
def inputs(name, seed=0):
    key = jax.random.key(seed)
    if name == "language":
        return jax.random.randint(key, (4, 12), 0, 16)
    return jax.random.normal(key, (4, 20, 1) if name == "cnn" else (4, 6, 6, 1))


def output(module, x):
    """As one program: op by op it takes ten times as long to compile."""
    parts = split(module)
    return jax.jit(lambda *state: merge(type(parts)(parts.graph, *state))(x)[0])(*parts[1:])


def quantized(name, rule, first=True):
    """A network whose layers but the first, which has one channel, are rounded; with ranges of its own inputs."""
    rules = ((r"^(convs/0|stem)$", {"weights": "int8", "activations": "int8"}), (".*", rule))
    if name == "language" or not first:
        rules = rules[1:]
    transform = Qat(rules=rules, batches=2)
    module = transform.structure(NETWORKS[name]())
    return transform.values(module, None, [{"inputs": np.asarray(inputs(name, seed))} for seed in (0, 1)])


SOME = ("int8", "int8, a scale a row", "int4 in groups", "weights alone", "learned", "fp4, three products")
LATER = [*itertools.product(["resnet"], SOME[1:4]), ("resnet", SOME[5]), ("language", "int8"), ("language", "learned")]
PACKED = [*(("cnn", rule) for rule in RULES), *itertools.product(("resnet", "language"), SOME)]


@pytest.mark.parametrize(("name", "rule"), some(PACKED, [case for case in PACKED if case not in LATER]))
def test_packed_is_what_was_trained(name, rule):
    """To rounding; and what a rule matched holds no float kernel any more."""
    trained = quantized(name, RULES[rule])
    plain = output(NETWORKS[name](), inputs(name))
    want = output(trained, inputs(name))
    packed = PackedLayers().structure(merge(split(trained)))
    got = output(packed, inputs(name))
    scale = float(jnp.abs(want).max())
    assert float(jnp.abs(want - plain).max()) > 1e-3 * scale, "nothing was rounded"
    # A sum in another order may move an activation over the middle between two numbers: that example (and of a text all
    # that follows) differs then, by a step and not by another function.
    close = jnp.abs(got - want).max(-1) < 1e-4 * scale
    may_move = (name, rule) == ("language", "fp4, three products")
    assert close.mean() >= (0.75 if may_move else 1.0), "answers differ by more than rounding"
    assert float(jnp.abs(got - want).mean()) < (0.01 if may_move else 1e-6) * scale
    for path, layer in layer_paths(packed, KINDS).items():
        kernel = getattr(layer, kernel_of(layer)[0])
        assert isinstance(kernel, Packed) and isinstance(layer.quantizer, Stored), path
        number = RULES[rule]["weights"]
        bits = FORMATS[number if isinstance(number, str) else number["format"]].bits
        if path not in ("convs/0", "stem"):
            assert kernel.codes[...].dtype == jnp.uint8
            assert kernel.codes[...].size == kernel.codes.shape[0] * -(-kernel.length * bits // 8), path
    assert imitates(trained) and imitates(packed) == ("fp" in rule) and not imitates(NETWORKS[name]())
    simulated = {layer.quantizer.simulated for layer in layer_paths(packed, KINDS).values()}
    assert simulated == ({True} if "fp" in rule and name == "language" else {"fp" in rule, False})


@pytest.mark.parametrize("rule", ["int8", "int4 in groups", "fp4, three products", "learned"])
def test_one_example_does_not_change_another(rule):
    """Not in a network that is stored, and not while it is trained."""
    for module in (quantized("cnn", RULES[rule]), PackedLayers().structure(quantized("cnn", RULES[rule]))):
        x = inputs("cnn")
        other = x.at[1].multiply(100.0)
        np.testing.assert_allclose(output(module, x)[0], output(module, other)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["int8, a scale a row", "fp4", "fp4, three products"])
def test_a_later_token_does_not_change_an_earlier_one(rule):
    module, x = quantized("language", RULES[rule]), inputs("language")
    before, behind = (output(module, tokens) for tokens in (x, x.at[:, 8:].set(3)))
    np.testing.assert_allclose(before[:, :8], behind[:, :8], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_it_learns(rule):
    """Gradients reach every parameter, learned scales too, and a step along them lowers the loss."""
    trained = quantized("cnn", RULES[rule])
    parts, x = split(trained), 2 * inputs("cnn")  # beyond the range that was calibrated, whose limit is learned
    labels = jnp.arange(len(x))

    @jax.jit
    def loss(params):
        y = merge(parts._replace(params=params))(x)[0]
        return optax.softmax_cross_entropy_with_integer_labels(y, labels).mean()

    gradient = jax.jit(jax.grad(loss))(parts.params)
    for name, leaf in flatten(gradient).items():
        assert jnp.abs(leaf).max() > 0, name
    steps = [loss(jax.tree.map(lambda p, g, s=s: p - s * g, parts.params, gradient)) for s in (0.0, 3e-2, 1e-1, 3e-1)]
    assert min(steps[1:]) < steps[0]


@pytest.mark.parametrize(
    ("shape", "kernel", "stride"),
    [
        ((3, 9, 2), (5,), 2),
        ((3, 8, 2), (4,), 1),
        ((2, 7, 6, 3), (3, 3), 2),
        ((2, 5, 5, 3), (1, 1), 2),
        ((2, 4, 3), (5,), 3),
    ],
)
def test_a_convolution_is_a_product_of_its_windows(shape, kernel, stride):
    layer = Conv(shape[-1], 4, kernel, stride=stride, rngs=nnx.Rngs(0))
    x, product = jax.random.normal(jax.random.key(1), shape), Convolution(stride)
    w = layer.kernel[...]
    y = product.result(product.rows(x, w) @ product.matrix(w), x, w)
    np.testing.assert_allclose(y, layer(x), rtol=1e-5, atol=1e-5)
    assert len(product.rows(x, w)) == len(x) * product.places(x)
    np.testing.assert_array_equal(product.kernel(product.matrix(w), w.shape), w)
    lit = product.result(product.rows(x, w, outside=-2) @ product.matrix(w), x, w)
    np.testing.assert_allclose(lit, product(x, w, outside=-2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["int8", "int8, unsigned", "int8, a scale a row"])
def test_windows_of_integers_are_gathered_as_bytes(rule):
    """Nothing as large as the windows of a stored convolution is float32, which would take longer than its product."""
    packed = PackedLayers().structure(quantized("resnet", RULES[rule]))
    conv = layer_paths(packed, (Conv,))["blocks/1/conv2"]
    x = jnp.ones((16, 6, 6, 16))
    windows = 16 * 6 * 6 * conv.kernel.length
    made = operations(jax.make_jaxpr(conv)(x).jaxpr)
    large = [v.aval for equation in made for v in equation.outvars if v.aval.size >= windows]
    assert large and {str(aval.dtype) for aval in large} == {"int8"}


def test_products_are_noted():
    """With their sizes, also where they are only traced."""
    network = language()
    with noted() as calls:
        jax.eval_shape(network, inputs("language"))
    tokens = 4 * 12
    sizes = [(call.rows, call.length, call.outputs) for call in calls]
    assert sizes[0] == (tokens, 16, 16) and sizes[-1] == (tokens, 16, 16) and (tokens, 32, 16) in sizes
    assert len(sizes) == 4 + 3 + 1


EXACT = {
    "int8": {"weights": "int8", "activations": {"format": "int8", "exact_first": 1}},
    "two tokens, by rows": {"weights": "int4", "activations": {"format": "int8", "per": "row", "exact_first": 2}},
    "fp8": {"weights": "fp8_e4m3", "activations": {"format": "fp8_e4m3", "exact_first": 1}},
    "turned": {"weights": "int8", "activations": {"format": "int8", "exact_first": 1}, "rotation": 8},
}


@pytest.mark.parametrize("rule", EXACT)
def test_first_tokens_stay_exact(rule):
    """Of one layer: their products are those of the unrounded activations, others are rounded, in a range that has not
    seen them; the stored network does the same, and a token that is continued is not the first."""
    settings = layer_rule(EXACT[rule])
    count = settings.activations.exact_first
    kernel = jax.random.normal(jax.random.key(0), (8, 6))
    x = jax.random.normal(jax.random.key(1), (2, 5, 8)).at[:, :count].mul(1000)
    layer = Linear(8, 6, axes=(None, None), bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = kernel
    fake = Fake(settings, kernel, Dense())
    layer.quantizer = nnx.data(fake)
    if fake.range is not None:
        fake.range.observing = True
        layer(x)
        fake.range.observing = False
        fake.range.settle()
        assert float(fake.range.seen[...]) < 50  # of the later tokens
    y, weights = layer(x), jnp.asarray(fake.stored(kernel, Dense())[0][...])
    np.testing.assert_allclose(y[:, :count], x[:, :count] @ weights, rtol=1e-3, atol=1e-2)
    later = x[:, count:] @ weights
    assert 1e-4 < float(jnp.abs(y[:, count:] - later).max()) < 0.5
    packed, stored = fake.stored(kernel, Dense())
    np.testing.assert_allclose(stored(Dense(), x, packed), y, rtol=1e-4, atol=1e-4)
    for places in (jnp.array([[4], [4]]), jnp.array([[0], [4]])):
        token = x[:, count : count + 1]
        with placed(places):
            trained, exported = layer(token), jax.jit(lambda x: stored(Dense(), x, packed))(token)
        np.testing.assert_allclose(exported, trained, rtol=1e-4, atol=1e-4)
        exact = np.abs(trained - token @ weights).max((1, 2)) < 1e-4
        assert exact.tolist() == [bool(place < count) for place in places[:, 0]]


def test_decoding_goes_on_behind_the_exact_tokens():
    rule = {"weights": "int8", "activations": {"format": "int8", "exact_first": 1}}
    module = structured(quantized("language", rule), [("packed", PackedLayers())])
    tokens = inputs("language")
    whole = module(tokens)[0]
    cache, found = module.init_cache(4, 12), []
    for part in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]):
        logits, cache = module.extend(part, cache)
        found.append(logits)
    np.testing.assert_allclose(jnp.concatenate(found, 1), whole, rtol=2e-4, atol=2e-4)


def test_embedding_rows_are_those_of_the_rounded_table():
    for rule in ("int4", "weights alone", "fp4", "int2, a scale a tensor", "learned"):
        network = quantized("language", RULES[rule])
        table, fake = network.embed.table, network.embed.quantizer
        whole = jnp.asarray(fake.weights(table[...], (1,)))
        np.testing.assert_allclose(fake.rows_of(table, jnp.arange(16)), whole, rtol=1e-6, atol=1e-7)
        packed = PackedLayers().structure(network)
        np.testing.assert_allclose(packed.embed.table[...], whole, rtol=1e-6, atol=1e-7)
        rows = packed.embed.quantizer.rows_of(packed.embed.table, jnp.asarray([[3, 1]]))
        np.testing.assert_allclose(rows[0], whole[jnp.asarray([3, 1])], rtol=1e-6, atol=1e-7)


def test_a_frozen_range_is_the_mean_of_the_warm_up():
    """Unrounded until then, and fixed afterwards."""
    rule = layer_rule({"weights": "int8", "activations": {"format": "int8", "warm_up": 2, "clip": 0.5}})
    frozen = Frozen(rule.activations)
    x = jnp.asarray([[1.0, -2.0, 0.3]])
    np.testing.assert_array_equal(frozen.rounded(x), x)
    np.testing.assert_array_equal(frozen.rounded(2 * x), 2 * x)
    assert frozen.seen[...] == 3.0 and frozen.calls[...] == 2
    np.testing.assert_allclose(frozen.scale, 0.5 * 3.0 / 127)
    np.testing.assert_allclose(frozen.rounded(10 * x), [[1.5, -1.5, 1.5]], rtol=1e-6)
    assert frozen.seen[...] == 3.0 and frozen.calls[...] == 2


def test_calibration_measures_what_layers_see():
    network = quantized("cnn", RULES["int8"])
    x0, x1 = inputs("cnn"), inputs("cnn", 1)
    first = network.convs[0].quantizer.range
    np.testing.assert_allclose(first.seen[...], (jnp.abs(x0).max() + jnp.abs(x1).max()) / 2, rtol=1e-6)
    hidden = [jax.nn.relu(cnn().convs[0](x)).max() for x in (x0, x1)]
    np.testing.assert_allclose(network.convs[1].quantizer.range.seen[...], sum(hidden) / 2, rtol=1e-5)
    assert not any(node.observing for _, node in nnx.iter_graph(network) if isinstance(node, Range))
    with pytest.raises(ValueError, match="there are none"):
        Qat(rules=((".*", RULES["int8"]),)).values(network, None, [])


def test_a_frozen_network_stays_as_it_is():
    network = quantized("cnn", RULES["int8"])
    before = stats_of(network)
    network(3 * inputs("cnn"))
    jax.tree.map(np.testing.assert_array_equal, before, stats_of(network))


def test_rounding_after_training_is_qat_without_training():
    """`quantize` of a float network gives what `qat` and `packed` do."""
    data = [{"inputs": np.asarray(inputs("cnn", seed))} for seed in (0, 1)]
    transform = Quantize(rules=((".*", RULES["int8"]),), batches=2)
    source = cnn()
    rounded = transform.values(transform.structure(cnn()), source, data)
    want = PackedLayers().structure(quantized("cnn", RULES["int8"]))
    np.testing.assert_allclose(output(rounded, inputs("cnn")), output(want, inputs("cnn")), rtol=1e-5, atol=1e-6)


def test_exported_and_reloaded(tiny_run):
    _, run = tiny_run("vision/digits_qat")
    trained, directory = reload(export(run, run / "trained")), export(run, run / "packed", [{"name": "packed"}])
    packed = reload(directory)
    x = jax.random.uniform(jax.random.key(0), (8, 8, 8, 1))
    want, got = (output(merge(parts), x) for parts in (trained, packed))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    kernels = [name for name in flatten(packed.params) if name.endswith("kernel")]
    assert not kernels
    # A byte a weight, and float32 scales; no kernel beside it.
    codes = {name: leaf for name, leaf in flatten(packed.frozen).items() if name.endswith("codes")}
    floats = {name: leaf for name, leaf in flatten(trained.params).items() if name.endswith("kernel")}
    assert sum(leaf.size for leaf in codes.values()) == sum(leaf.size for leaf in floats.values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weigths": "int8"}, "no 'weigths'.*did you mean 'weights'"),
        ({"activations": "int8"}, "needs 'weights'"),
        ({"weights": "int3"}, "weights: format='int3' must be one of int8"),
        ({"weights": "uint4"}, "uint4 has nothing below 0"),
        ({"weights": {"format": "int4", "pre": 4}}, "no 'pre'"),
        ({"weights": {"format": "int4", "per": "row"}}, "per='row' must be"),
        ({"weights": {"format": "int4", "warm_up": 3}}, "weights have no 'warm_up'"),
        ({"weights": "int4", "activations": {"format": "int8", "per": "channel"}}, "per='channel' is for weights"),
        ({"weights": "int4", "activations": {"format": "int8", "range": "dynamic", "per": "tensor"}}, "would depend"),
        ({"weights": "int4", "activations": {"format": "int8", "range": "frozen", "per": 8}}, "goes with per='row'"),
        ({"weights": "int4", "activations": {"format": "int8", "range": "frosen"}}, "did you mean 'frozen'"),
        ({"weights": "int4", "activations": {"format": "int4", "range": "clipped"}}, "an unsigned format, not int4"),
        ({"weights": {"format": "int4", "stochastic": True}}, "stochastic=True is for gradients"),
        ({"weights": {"format": "int4", "range": "learned", "per": 8}}, "a tensor or a channel"),
        ({"weights": {"format": "int4", "range": "learned", "clip": 0.5}}, "goes without clip"),
        ({"weights": "int4", "rotation": 8}, "it needs 'activations'"),
        ({"weights": "int4", "activations": "uint8", "rotation": 8}, "activations need a signed format"),
        ({"weights": "int4", "activations": {"format": "int8", "scale_format": "e8m0"}}, "one float32 scale"),
        ({"weights": "int4", "activations": {"format": "int8", "initial": 2.0}}, "initial=2.0 is of range='clipped'"),
        (
            {"weights": "int4", "gradients": {"format": "int8", "through_scale": True}},
            "gradients have no 'through_scale'",
        ),
        ({"weights": "int4", "skip": False}, "skip=True stands alone"),
        ({"weights": "int4", "activations": "int8", "gradients": "int8"}, "activations 'dynamic'"),
        ({"weights": "int4", "activations": {"format": "int8", "warm_up": -1}}, "at least 0"),
        ({"weights": "int8", "activations": {"format": "int8", "exact_first": -1}}, "exact_first=-1 must be a whole"),
        (
            {
                "weights": "int8",
                "activations": {"format": "int8", "per": "row", "exact_first": 1},
                "gradients": {"format": "int8"},
            },
            "exact_first goes without them",
        ),
    ],
)
def test_wrong_rules_are_one_sentence(settings, words):
    ((_, transform),) = build_transforms([{"name": "qat", "rules": ((".*", settings),)}])
    with pytest.raises(UserError, match=words) as error:
        transform.structure(cnn())
    assert "rules[0]" in str(error.value)


def test_other_mistakes_are_one_sentence():
    ((_, transform),) = build_transforms(
        [{"name": "qat", "rules": ((".*", {"weights": "int8", "activations": EXACT["int8"]["activations"]}),)}]
    )
    with pytest.raises(UserError, match=r"exact_first is for the network 'language', and not for a ConvNet"):
        transform.structure(cnn())
    assert transform.structure(language()).blocks is not None
    with pytest.raises(ValueError, match=r"exact_first is of tokens \[B, T, \.\.\.\]: of dense layers"):
        Fake(layer_rule(EXACT["int8"]), jnp.ones((3, 2, 4)), Convolution(1))
    with pytest.raises(ValueError, match="goes with a range of magnitudes, frozen or dynamic, not 'learned'"):
        layer_rule({"weights": "int8", "activations": {"format": "int8", "range": "learned", "exact_first": 1}})
    with pytest.raises(UserError, match="'conw/' matches no layer"):
        Qat(rules=(("conw/", RULES["int8"]), (".*", RULES["int8"]))).structure(cnn())
    with pytest.raises(UserError, match=r"convs/0: groups of 8 do not divide axis 1 of \[5, 1, 8\]"):
        Qat(rules=((".*", RULES["fp4"]),)).structure(cnn())
    with pytest.raises(UserError, match="convs/0 is quantized already"):
        Qat(rules=((".*", RULES["int8"]),)).structure(quantized("cnn", RULES["int8"]))
    with pytest.raises(UserError, match="never measured"):
        PackedLayers().structure(Qat(rules=((".*", RULES["int8"]),)).structure(cnn()))
    with pytest.raises(ValueError, match="there is no such layer"):
        PackedLayers().structure(cnn())
    with pytest.raises(UserError, match="use the transform 'qat'"):
        Quantize(rules=((".*", RULES["learned"]),)).structure(cnn())
    for name, rules in (("qat", ()), ("binarize", ()), ("qat", ((".*", {"skip": True}),))):
        with pytest.raises(UserError, match="rules name nothing to change"):
            build_transforms([{"name": name, "rules": rules}])
    with pytest.raises(UserError, match=r"'\(' is no pattern of paths"):
        Qat(rules=(("(", RULES["int8"]),)).structure(cnn())
    with pytest.raises(UserError, match=r"convs/0: rotation=8 does not divide axis 1 of \[5, 1, 8\]"):
        Qat(rules=((".*", {**RULES["int8"], "rotation": 8}),)).structure(cnn())
    later = build_transforms([{"name": "qat", "rules": ((".*", RULES["int8"]),)}, {"name": "int8_weights"}])
    with pytest.raises(UserError, match=r"'int8_weights' changes kernels.*it must come before"):
        structured(cnn(), later)


def test_layers_that_are_skipped_stay_as_they_are():
    network = Qat(rules=(("head", {"skip": True}), ("convs/1", {"weights": "int4"}))).structure(cnn())
    assert isinstance(network.convs[1].quantizer, Fake)
    assert network.head.quantizer is None and network.convs[0].quantizer is None


@pytest.mark.parametrize("kind", [Linear, Embedding])
def test_products_of_other_layers(kind):
    """Kernels of several axes, and tables, as matrices and back."""
    product, w = (
        (Dense(), jax.random.normal(jax.random.key(0), (6, 2, 4)))
        if kind is Linear
        else (Logits(), jax.random.normal(jax.random.key(0), (8, 6)))
    )
    x = jax.random.normal(jax.random.key(1), (3, 5, 6))
    y = product.result(product.rows(x, w) @ product.matrix(w), x, w)
    np.testing.assert_allclose(y, product(x, w), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(product.kernel(product.matrix(w), w.shape), w)


def test_saturated_and_silent_layers():
    """All zeros, and numbers far beyond a frozen range, give what the range allows and no NaN."""
    for rule, x in itertools.product(("int8", "fp4", "clipped", "learned"), (0.0, 1e6)):
        network = quantized("cnn", RULES[rule])
        for module in (network, PackedLayers().structure(merge(split(network)))):
            assert jnp.isfinite(output(module, jnp.full((2, 20, 1), x))).all(), rule


def test_the_directory_has_the_bits_that_were_promised(tiny_run):
    """Container included: of int4 weights at most 0.16 of float32."""
    _, run = tiny_run("vision/digits_vit", **{"model.width": 192, "model.depth": 3})
    plain = artefact_bytes(export(run, run / "trained"))
    entry = {"name": "quantize", "rules": ((".*", {"weights": "int4"}),)}
    assert artefact_bytes(export(run, run / "int4", [entry])) <= 0.16 * plain


def test_a_stage_goes_on_with_few_bits(tmp_path):
    """A float stage, then one that adds `qat`: ranges are measured on training batches, and the result is stored."""
    config = load_recipe("configs/vision/mnist1d_qat.py:tiny")
    transforms = config.transforms
    stages = (
        {"name": "float", "duration": 0.5},
        {"name": "qat", "duration": 0.5, "overrides": {"transforms": transforms}},
    )
    run = tmp_path / "run"
    overrides = {"mesh.data": 1, "train.steps": 4, "transforms": (), "stages": stages}
    train(overridden(config, overrides.items()), run)
    packed = merge(reload(export(run, run / "packed", [{"name": "packed"}])))
    for path, layer in layer_paths(packed, (Conv, Linear)).items():
        assert isinstance(layer.quantizer, Stored) and float(layer.quantizer.scale[...]) > 0, path


def test_a_warm_up_that_is_not_over_is_told():
    """What was trained unrounded is not stored rounded."""
    rule = {"weights": "int8", "activations": {"format": "int8", "warm_up": 3}}
    network = Qat(rules=((".*", rule),)).structure(cnn())
    for _ in range(2):
        network(inputs("cnn"))
    with pytest.raises(UserError, match="not to the end of its warm_up"):
        PackedLayers().structure(merge(split(network)))
    network(inputs("cnn"))
    PackedLayers().structure(network)


def test_ranges_are_those_of_turned_numbers():
    """Which may be larger than any before, by the root of the block: a constant has all of it in one number."""
    layer = nnx.Dict(layer=Linear(16, 4, axes=("embed", "mlp"), rngs=nnx.Rngs(0)))
    x = 1 + 0.1 * jax.random.normal(jax.random.key(0), (64, 16))
    want = layer["layer"](x)
    network = Qat(rules=((".*", {**RULES["int8"], "rotation": 16}),)).structure(layer)
    fake = network["layer"].quantizer
    fake.range.observing = True
    network["layer"](x)
    fake.range.observing = False
    fake.range.settle()
    assert float(fake.range.seen[...]) > 3.5
    np.testing.assert_allclose(network["layer"](x), want, atol=0.03 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("name", ["qat", "binarize"])
def test_what_is_stored_is_what_was_trained_in_bfloat16(name):
    layer = nnx.Dict(layer=Linear(64, 16, axes=("embed", "mlp"), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    rule = {"operator": "irnet"} if name == "binarize" else {"weights": "int8"}
    ((_, transform),) = build_transforms([{"name": name, "rules": ((".*", rule),)}])
    network = transform.structure(layer)
    x = jax.random.normal(jax.random.key(1), (8, 64))
    want = network["layer"](x).astype(jnp.float32)
    got = PackedLayers().structure(network)["layer"](x).astype(jnp.float32)
    np.testing.assert_allclose(got, want, atol=2**-7 * float(jnp.abs(want).max()))


def test_a_table_that_is_only_looked_up_is_stored():
    """It has no activations, and a rule for all layers gives it a range nevertheless."""
    network = LanguageModel(vocab_size=16, width=16, depth=1, heads=2, tied=False, rngs=nnx.Rngs(0))
    data = [{"inputs": np.asarray(inputs("language"))}]
    transform = Qat(rules=((".*", RULES["int8"]),))
    trained = transform.values(transform.structure(network), None, data)
    want = output(trained, inputs("language"))
    got = output(PackedLayers().structure(trained), inputs("language"))
    assert float(jnp.abs(got - want).mean()) < 0.02 * float(jnp.abs(want).max())


def test_what_is_no_number_stays_none():
    """Of its own example alone; and no range is measured of it."""
    trained = quantized("cnn", RULES["int8"])
    x = inputs("cnn").at[1, 3].set(jnp.nan)
    for module in (trained, PackedLayers().structure(merge(split(trained)))):
        y = output(module, x)
        assert jnp.isnan(y[1]).all() and jnp.isfinite(y[0]).all()
    frozen = Frozen(layer_rule({"weights": "int8", "activations": {"format": "int8", "warm_up": 1}}).activations)
    frozen.rounded(x)
    assert frozen.calls[...] == 0 and frozen.seen[...] == 0


def test_few_bits_are_counted_by_hand():
    """One example of a convolution and a head, and a batch that is trained."""
    network = quantized("cnn", RULES["int4"])
    with noted() as calls:
        jax.eval_shape(network, inputs("cnn")[:1])
    # 10 places x 5 x 1 x 8 of 8 bits, 5 x 5 x 8 x 16 and 80 x 10 of 4.
    assert [call.multiply_adds for call in calls] == [400, 3200, 800]
    assert [call.quantizer.bits for call in calls] == [8, 4, 4]
    # Of each number its magnitude, the largest so far, a quotient and the rounding.
    assert calls[2].quantizer.rounding_operations(calls[2]) == 4 * 80 + 4 * 800


def test_a_warm_up_longer_than_the_run_is_said_before_it():
    """And not when it is over and nothing can be stored."""
    config = overridden(load_recipe("configs/vision/digits_qat.py:int4"), [("train.steps", 5), ("train.epochs", 1)])
    dataset = load_dataset(config)
    facts = {**dataset.info, "kind": dataset.kind}
    with pytest.raises(UserError, match=r"warm_up=60, longer than the run's 59 steps"):
        check_transforms(config, {**facts, "steps": 59})
    check_transforms(config, {**facts, "steps": 60})
    check_transforms(overridden(config, [("optim.accumulate", 2)]), {**facts, "steps": 30})
    check_transforms(overridden(config, [("init_from", ("runs/other",))]), {**facts, "steps": 5})
    check_transforms(overridden(config, [("evaluation.transforms", ())]), {**facts, "steps": 5})


def test_a_recipe_for_pictures_does_not_clip_other_data():
    """The stem of digits_resnet.py sees numbers below 0 of MNIST-1D, which unsigned activations would lose."""
    config = load_recipe("configs/vision/digits_resnet.py:int8")
    dataset = load_dataset(overridden(config, [("data.name", "mnist1d")]))
    assert dataset.train[0]["inputs"].min() < 0
    facts = {**dataset.info, "kind": dataset.kind}
    network = structured(build_network(config, facts, nnx.Rngs(0)), build_transforms(config.transforms))
    assert network.stem.quantizer.range.format.signed and not network.blocks[0].conv1.quantizer.range.format.signed
