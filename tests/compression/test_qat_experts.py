"""Few bits in experts and depthwise convolutions: experts against dense layers of each alone, convolutions against
operands that were rounded before, and what is exported against what was trained."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.compression.quantization.allocation.candidates import Mixed, Option
from lissom.compression.quantization.quantizers import Fake
from lissom.compression.quantization.rules import layer_rule
from lissom.compression.quantization.stored import Packed, Stored
from lissom.compression.quantization.transforms import KINDS, Binarize, PackedLayers, Qat, Quantize, kernel_of
from lissom.compression.transforms import build_transforms, layer_paths
from lissom.evaluation.measuring import imitates
from lissom.models.biformer import BiFormer
from lissom.models.bounds import UnsupportedForm
from lissom.models.language import LanguageModel
from lissom.models.linear import DepthwiseConv
from lissom.models.mixture_of_fields import MixtureOfFields
from lissom.models.moe.experts import Experts
from lissom.models.moe.forms import activated
from lissom.models.moe.routing import Choices, Everyone, Picks, Slots
from lissom.models.products import Dense, Depthwise, Stacked, noted
from lissom.models.variables import Param, flatten, merge, split
from lissom.training.errors import UserError

WIDTH, HIDDEN, EXPERTS = 16, 24, 3
X = jax.random.normal(jax.random.key(0), (2, 6, WIDTH))
NAMED = jax.random.randint(jax.random.key(1), (2, 6, 2), 0, EXPERTS + 1)  # some name no expert
SHARES = jax.random.uniform(jax.random.key(2), (2, 6, 2))
WEIGHTS = (jax.nn.one_hot(NAMED, EXPERTS) * SHARES[..., None]).sum(2)
# Sequences in the order of their places, as many slots as tokens, each of one token.
PLACES = jnp.arange(12).reshape(2, 6).T
ONE_EACH = jnp.broadcast_to(jnp.eye(2)[:, None], (6, 2, EXPERTS, 2))
ROUTINGS = {
    "choices": Choices(NAMED, SHARES),
    "everyone": Everyone(WEIGHTS),
    "picks": Picks(jnp.tile(jnp.arange(12), (EXPERTS, 1)), WEIGHTS.reshape(12, EXPERTS).T),
    "slots": Slots(PLACES, ONE_EACH, ONE_EACH * WEIGHTS.reshape(12, EXPERTS)[PLACES][..., None]),
}
RULES = {
    "int8": {"weights": "int8", "activations": "int8"},
    "int4, a scale a row": {"weights": "int4", "activations": {"format": "int8", "per": "row"}},
    "int4 in groups, turned": {
        "weights": {"format": "int4", "per": 8},
        "activations": {"format": "int8", "per": 8},
        "rotation": 8,
    },
    "learned": {
        "weights": {"format": "int2", "range": "learned"},
        "activations": {"format": "int4", "range": "learned"},
    },
    "weights alone": {"weights": "int4"},
    "weights alone, in groups": {"weights": {"format": "int2", "per": 8, "scale_format": "ue5m3"}},
}


class Mixture(nnx.Module):
    """inputs [B, T, M] -> [B, T, M] of experts whose routing is known."""

    def __init__(self, form, gated=True):
        self.experts = Experts(WIDTH, HIDDEN, experts=EXPERTS, gated=gated, dtype=jnp.float32, rngs=nnx.Rngs(0))
        self.form = form

    def __call__(self, inputs):
        return self.experts(inputs, ROUTINGS[self.form], None)[0], {}


class Picture(nnx.Module):
    """inputs [B, rows, columns, C] -> those of a depthwise convolution, outside of whose grid lies 0, or `border`."""

    def __init__(self, border=None):
        self.near, self.border = DepthwiseConv(4, 3, rngs=nnx.Rngs(0)), border

    def __call__(self, inputs):
        return self.near(inputs, None if self.border is None else jnp.full(4, self.border)), {}


PICTURE = jax.random.normal(jax.random.key(3), (2, 5, 6, 4))


def trained(network, rule, x):
    transform = Qat(rules=((".*", rule),), batches=1)
    return transform.values(transform.structure(network), None, [{"inputs": np.asarray(x)}])


def packed(network):
    return PackedLayers().structure(merge(split(network)))


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def dense(x, layer, number):
    """The product of expert `number` as that of a dense layer of its own."""
    kernel = layer.kernel[...][number]
    alone = Fake(layer.quantizer.rule, kernel, Dense())
    alone.range = layer.quantizer.range
    return alone(Dense(), x, Param(kernel))


@pytest.mark.parametrize(
    ("form", "rule"),
    [*itertools.product(["choices"], RULES), *itertools.product(list(ROUTINGS)[1:], ["int8", "learned"])],
)
def test_experts_are_dense_layers_of_few_bits(form, rule):
    """Each as it would be alone; what is exported is that too."""
    network = trained(Mixture(form), RULES[rule], X)
    inner, down = network.experts.inner, network.experts.down
    alone = lambda e: dense(activated(dense(X, inner, e)), down, e)
    right = sum(WEIGHTS[..., e, None] * alone(e) for e in range(EXPERTS))
    got = network(X)[0]
    close(got, right)
    assert float(jnp.abs(got - Mixture(form)(X)[0]).max()) > 1e-3 * float(jnp.abs(right).max()), "nothing was rounded"
    exported = packed(network)
    close(exported(X)[0], right)
    # Weights alone are decoded and multiplied, as they are to be; activations are rounded and multiplied as floats.
    assert imitates(network) and imitates(exported) == ("weights alone" not in rule)


@pytest.mark.parametrize("weights", ["int8", "int4", "int2", {"format": "int4", "per": 8}, "nf4"])
def test_the_kernel_of_an_expert_is_rounded_alone(weights):
    kernels = Mixture("choices").experts.inner.kernel
    rule = layer_rule({"weights": weights})
    stack = Fake(rule, kernels[...], Stacked())
    rounded, (stored, _) = stack.kernel(Stacked(), kernels), stack.stored(kernels[...], Stacked())
    for number, kernel in enumerate(kernels[...]):
        np.testing.assert_array_equal(rounded[number], Fake(rule, kernel, Dense()).kernel(Dense(), Param(kernel)))
    close(stored[...], rounded, 1e-7)


@pytest.mark.parametrize(("weights", "bits", "groups"), [("int4", 4, 1), ({"format": "int2", "per": 8}, 2, 2)])
def test_bytes_of_packed_experts(weights, bits, groups):
    """Two codes a byte, or four, and a float32 scale a channel, or a group, of each expert."""
    inner = packed(trained(Mixture("choices"), {"weights": weights}, X)).experts.inner
    channels = EXPERTS * 2 * HIDDEN
    assert inner.kernel.codes[...].dtype == jnp.uint8 and inner.kernel.codes[...].nbytes == channels * WIDTH * bits // 8
    assert inner.kernel.scale[...].nbytes == channels * groups * 4
    assert inner.kernel.further_scalars == channels * (WIDTH - WIDTH * bits // 8 - groups)


@pytest.mark.parametrize("border", [None, 0.7])
@pytest.mark.parametrize("rule", ["int8", "int4, a scale a row", "learned", "weights alone"])
def test_a_depthwise_convolution_of_rounded_operands(rule, border):
    """That of the float layer, of a picture and a kernel that were rounded before; a border is rounded with the
    picture."""
    network = trained(Picture(border), RULES[rule], PICTURE)
    fake, kernel = network.near.quantizer, network.near.kernel[...]
    outside = 0.0 if border is None else border
    padded = jnp.pad(PICTURE, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=outside)
    operands = fake.activations(padded, (1, 2)), fake.weights(kernel, (0, 1))
    windows = jnp.stack([operands[0][:, u : u + 5, v : v + 6] for u in range(3) for v in range(3)])
    right = jnp.einsum("kbijc,kc->bijc", windows, operands[1].reshape(9, 4))
    close(network(PICTURE)[0], right)
    assert float(jnp.abs(right - Picture(border)(PICTURE)[0]).max()) > 1e-3, "nothing was rounded"
    exported = packed(network)
    close(exported(PICTURE)[0], right)
    assert imitates(exported) == (rule != "weights alone")
    # Nine codes a channel, of which the last byte is not full.
    bits = fake.rule.weights.scheme.numbers.bits
    assert exported.near.kernel.codes.shape == (4, -(-9 * bits // 8))


def test_a_scale_a_row_is_one_of_a_channel_of_an_example():
    """Neither another example nor another channel changes it."""
    network = trained(Picture(), RULES["int4, a scale a row"], PICTURE)
    other = PICTURE.at[1].multiply(50.0).at[0, :, :, 3].multiply(50.0)
    np.testing.assert_array_equal(network(PICTURE)[0][0, ..., :3], network(other)[0][0, ..., :3])


@pytest.mark.parametrize("kind", ["experts", "depthwise"])
def test_gradients_go_straight_through(kind):
    """Those of the float network whose kernels are the rounded ones."""
    make, x = (lambda: Mixture("choices"), X) if kind == "experts" else (Picture, PICTURE)
    network = trained(make(), {"weights": "int4"}, x)
    plain = make()
    for path, layer in layer_paths(network, KINDS).items():
        layer_paths(plain, KINDS)[path].kernel[...] = layer.quantizer.kernel(kernel_of(layer)[1], layer.kernel)

    def gradients(module):
        parts = split(module)
        return jax.grad(lambda params, x: jnp.sin(merge(parts._replace(params=params))(x)[0]).sum(), (0, 1))(
            parts.params, x
        )

    found, right = gradients(network), gradients(plain)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))
    jax.tree.map(close, found, right)


def language(**moe):
    kinds = {"ffn": "moe", "ffn_kwargs": {"moe": {"experts": EXPERTS, "k": 2, "expansion": 1.5, **moe}}}
    return LanguageModel(vocab_size=16, width=16, depth=1, heads=2, **kinds, rngs=nnx.Rngs(0))


def pyramid():
    settings = {"widths": (8, 8), "depths": (1, 1), "heads": (2, 2), "stem": 1, "mixer": "attention"}
    return BiFormer(input_shape=(8, 8, 1), classes=3, **settings, rngs=nnx.Rngs(0))


NETWORKS = {"language": language, "pyramid": pyramid}


@functools.cache
def inputs(name):
    if name == "language":
        return jax.random.randint(jax.random.key(4), (2, 8), 0, 16)
    return jax.random.normal(jax.random.key(4), (2, 8, 8, 1))


def output(module, x):
    parts = split(module)
    return jax.jit(lambda *state: merge(type(parts)(parts.graph, *state))(x)[0])(*parts[1:])


@pytest.mark.parametrize(("name", "rule"), [*itertools.product(NETWORKS, ["int8", "weights alone"])])
def test_a_rule_for_all_leaves_no_kernel_out(name, rule):
    """Every matrix of the network and every kernel of its convolutions, experts' too, is rounded, then stored."""
    network = trained(NETWORKS[name](), RULES[rule], inputs(name))
    exported = packed(network)
    paths = layer_paths(exported, KINDS)
    assert {"language": "blocks/0/ffn/experts/down", "pyramid": "stages/0/0/positions"}[name] in paths
    for path, layer in paths.items():
        assert isinstance(layer_paths(network, KINDS)[path].quantizer, Fake), path
        assert isinstance(getattr(layer, kernel_of(layer)[0]), Packed) and isinstance(layer.quantizer, Stored), path
    assert not [path for path, leaf in flatten(split(exported).params).items() if leaf.ndim > 1]
    want, got = output(network, inputs(name)), output(exported, inputs(name))
    close(got, want, 1e-4 * float(jnp.abs(want).max()))


def test_rounded_without_training():
    """`quantize` of a float network gives what `qat` and `packed` do."""
    data = [{"inputs": np.asarray(X)}]
    transform = Quantize(rules=(("experts/down", RULES["int8"]),), batches=1)
    rounded = transform.values(transform.structure(Mixture("choices")), Mixture("choices"), data)
    qat = Qat(rules=(("experts/down", RULES["int8"]),), batches=1)
    want = packed(qat.values(qat.structure(Mixture("choices")), None, data))
    np.testing.assert_array_equal(rounded(X)[0], want(X)[0])
    assert rounded.experts.inner.quantizer is None and isinstance(rounded.experts.down.kernel, Packed)


def test_candidates_of_experts():
    """What is chosen of them is what `quantize` makes with the same rules."""
    data = [{"inputs": np.asarray(X)}]
    mixed = Mixed(Mixture("choices"), [Option("int4", "int8"), Option("int2")], data)
    assert mixed.paths == ("experts/down", "experts/inner")
    choice = mixed.choice({"experts/down": 1, "experts/inner": 0})
    ((_, transform),) = build_transforms([mixed.entry(choice, "mine")])
    rounded = transform.values(transform.structure(Mixture("choices")), Mixture("choices"), data)
    close(mixed.run(choice, data[0]), rounded(X)[0])
    close(mixed.run(mixed.choice(), data[0]), Mixture("choices")(X)[0])
    # Codes, a float32 scale a channel and that of the activations.
    assert mixed.sizes[0, 0] == EXPERTS * (HIDDEN * WIDTH // 2 + 4 * WIDTH) + 4
    assert mixed.sizes[1, 1] == EXPERTS * (WIDTH * 2 * HIDDEN // 4 + 4 * 2 * HIDDEN)


def test_layers_that_no_rule_matches_stay_as_they_are():
    networks = nnx.Dict(few=Mixture("choices"), experts=Mixture("choices"), depthwise=Picture())
    networks = Qat(rules=(("^few/experts/inner$", {"weights": "int4"}),)).structure(networks)
    found = {path for path, layer in layer_paths(networks, KINDS).items() if layer.quantizer is not None}
    assert found == {"few/experts/inner"}
    np.testing.assert_array_equal(networks["experts"](X)[0], Mixture("choices")(X)[0])
    np.testing.assert_array_equal(networks["depthwise"](PICTURE)[0], Picture()(PICTURE)[0])
    with pytest.raises(UserError, match="'experts/' matches no layer"):
        Binarize(rules=(("experts/", {"operator": "bnn"}),)).structure(Mixture("choices"))
    # An integration gathers its kernels once and multiplies with them many times.
    fields = MixtureOfFields(
        input_shape=(4, 2), environments=2, interval=0.1, width=4, gate="softmax", experts=2, rngs=nnx.Rngs(0)
    )
    with pytest.raises(UserError, match=r"'\^inner' matches no layer"):
        Qat(rules=(("^inner", {"weights": "int4"}),)).structure(fields)


def test_learned_scales_learn():
    """Gradients reach every one of them, and every expert's."""
    network = trained(Mixture("choices"), RULES["learned"], X)
    parts = split(network)
    gradient = jax.grad(lambda params: jnp.sin(merge(parts._replace(params=params))(2 * X)[0]).sum())(parts.params)
    found = flatten(gradient)
    assert found["experts/inner/quantizer/scale"].shape == (EXPERTS, 1, 2, HIDDEN)
    for name, leaf in found.items():
        assert (jnp.abs(leaf).reshape(len(leaf) if leaf.ndim else 1, -1).max(1) > 0).all(), name


def test_ranges_are_measured_where_experts_are():
    """Of `down` behind the activation of every row."""
    network = trained(Mixture("everyone"), RULES["int8"], X)
    kernels = Mixture("everyone").experts.kernels
    hidden = activated(jnp.einsum("btm,emhf->btehf", X, kernels.inner))
    close(network.experts.inner.quantizer.range.seen[...], jnp.abs(X).max())
    close(network.experts.down.quantizer.range.seen[...], jnp.abs(hidden).max())


def test_rows_that_are_routed_are_counted():
    """12 tokens with 2 choices each are 24 rows of 16 x 48 and of 24 x 16; all 3 kernels are rounded for them."""
    network = trained(Mixture("choices"), RULES["int4, a scale a row"], X)
    with noted() as calls:
        jax.eval_shape(network, X)
    assert [call.multiply_adds for call in calls] == [24 * 16 * 48, 24 * 24 * 16]
    assert [call.quantizer.bits for call in calls] == [8, 8]
    assert [call.quantizer.rounding_operations(call) for call in calls] == [
        4 * 24 * 16 + 4 * 3 * 16 * 48,
        4 * 24 * 24 + 4 * 3 * 24 * 16,
    ]
    for form, rows in (("everyone", 12 * 3), ("picks", 3 * 12), ("slots", 6 * 3 * 2)):
        with noted() as calls:
            jax.eval_shape(Mixture(form), X)
        assert [call.rows for call in calls] == [rows, rows] and calls[0].quantizer is None


def test_windows_of_depthwise_convolutions_are_counted():
    """2 pictures of 5 x 6 places with 9 x 4 numbers each."""
    network = trained(Picture(), RULES["int8"], PICTURE)
    with noted() as calls:
        jax.eval_shape(network, PICTURE)
    assert [call.multiply_adds for call in calls] == [2 * 30 * 9 * 4]
    assert calls[0].quantizer.rounding_operations(calls[0]) == 4 * 2 * 30 * 9 * 4 + 4 * 9 * 4


def test_experts_of_few_bits_on_a_mesh():
    """Weights are rounded in front of what devices send each other; of activations a device sees its own alone."""
    mesh = jax.make_mesh((1, 1, 2, 1), ("data", "fsdp", "tensor", "expert"), (jax.sharding.AxisType.Auto,) * 4)
    network = trained(Mixture("choices"), RULES["weights alone"], X)
    for module in (network, packed(network)):
        right = output(module, X)
        with jax.set_mesh(mesh):
            close(output(module, X), right)
    with jax.set_mesh(mesh), pytest.raises(UnsupportedForm, match="takes a rule of weights alone"):
        output(trained(Mixture("choices"), RULES["int4, a scale a row"], X), X)


GRADIENTS = {"weights": "int4", "activations": {"format": "int4", "per": "row"}, "gradients": "int8"}


@pytest.mark.parametrize(
    ("network", "settings", "words"),
    [
        (Mixture, GRADIENTS, "experts/down: experts and depthwise convolutions take .* not 'gradients'"),
        (Picture, GRADIENTS, "near: experts and depthwise convolutions take .* not 'gradients'"),
        (Picture, {"weights": "int4", "activations": {"format": "int8", "per": 3}}, "near: windows .* per='row'"),
        (Picture, {"weights": {"format": "int4", "per": 2}}, r"near: groups of 2 do not divide axis 1 of \[3, 3, 4\]"),
        (Picture, {**RULES["int8"], "rotation": 2}, r"near: rotation=2 does not divide axis 1 of \[3, 3, 4\]"),
        (
            Mixture,
            {"weights": {"format": "int4", "per": 5}},
            r"experts/down: groups of 5 do not divide axis 1 of \[3, 24, 16\]",
        ),
    ],
)
def test_rules_that_do_not_fit_are_one_sentence(network, settings, words):
    with pytest.raises(UserError, match=words):
        Qat(rules=((".*", settings),)).structure(network("choices") if network is Mixture else network())


@pytest.mark.parametrize("product", [Stacked(), Depthwise()])
def test_products_of_many_kernels(product):
    """Columns of the matrix are what single outputs are summed with; and back."""
    if isinstance(product, Stacked):
        x, w = jax.random.normal(jax.random.key(0), (3, 5, 6)), jax.random.normal(jax.random.key(1), (3, 6, 2, 4))
        y = product(x, w)
        close(y[2, 4, 1, 3], x[2, 4] @ product.matrix(w)[:, (2 * 2 + 1) * 4 + 3])
    else:
        x, w = PICTURE, jax.random.normal(jax.random.key(1), (3, 3, 4))
        y = product(x, w)
        close(y[1, 2, 3, 2], x[1, 2:5, 3:6, 2].reshape(-1) @ product.matrix(w)[:, 2])
    np.testing.assert_array_equal(product.kernel(product.matrix(w), w.shape), w)
