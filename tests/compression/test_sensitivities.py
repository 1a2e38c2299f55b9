"""Sensitivities of layers to rounding, and the choice of bits that they lead to."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.compression.quantization.allocation import methods, sensitivities
from lissom.compression.quantization.allocation.candidates import Mixed, Option, recorded
from lissom.compression.quantization.allocation.hessians import estimator, traces
from lissom.compression.quantization.distillation import distilled, examples
from lissom.compression.quantization.transforms import Quantize, quantizable
from lissom.compression.transforms import applied, build_transforms, structured
from lissom.models.cnn import ConvNet
from lissom.models.language import LanguageModel
from lissom.models.resnet import ResNet
from lissom.models.variables import merge, split
from lissom.training.errors import UserError
from lissom.training.objectives.base import cross_entropy

OPTIONS = (Option("int2", "int8"), Option("int4", "int8"), Option("int8", "int8"))


def cnn():
    return ConvNet(input_shape=(8, 1), classes=3, channels=(4, 4), kernel=3, rngs=nnx.Rngs(0))


def resnet():
    return ResNet(input_shape=(6, 6, 1), classes=3, widths=(4, 8), blocks=(1, 1), rngs=nnx.Rngs(0))


def language():
    return LanguageModel(vocab_size=16, width=8, depth=1, mixer="attention", heads=2, ffn="mlp", rngs=nnx.Rngs(0))


def batches(shape=(8, 1), count=2, size=6, classes=3):
    rng = np.random.default_rng(0)
    return [
        {
            "inputs": rng.normal(size=(size, *shape)).astype(np.float32),
            "labels": rng.integers(classes, size=size).astype(np.int32),
            "mask": np.ones(size, np.float32),
        }
        for _ in range(count)
    ]


def judge(network, batch, key):
    del key
    logits = network(batch["inputs"])[0]
    losses = cross_entropy(logits, batch["labels"])
    return {
        "loss": (losses.sum(), len(losses)),
        "accuracy": ((logits.argmax(-1) == batch["labels"]).sum(), len(losses)),
    }


@functools.cache
def problem(kind=cnn, options=OPTIONS):
    given = batches((6, 6, 1) if kind is resnet else (8, 1))
    return methods.Problem(Mixed(kind(), options, given), judge, given, samples=4, kinds=[given[:1], given[1:]])


def test_a_choice_is_the_network_that_is_stored():
    """Outputs, bytes, and signs of what layers see: of the packed network that `entry` names."""
    mixed = problem().mixed
    for choice in ([0, 1, 2], [2, 2, 2], [1, 0, 0]):
        entry = mixed.entry(choice, "mine")
        stored = applied(
            merge(mixed.source),
            [("quantize", Quantize(**{k: entry[k] for k in ("rules", "batches", "label")}))],
            mixed.batches,
        )
        batch = mixed.batches[0]
        np.testing.assert_allclose(mixed.run(np.asarray(choice), batch), stored(batch["inputs"])[0], atol=2e-5)
        held = sum(x.nbytes for x in jax.tree.leaves((split(stored).params, split(stored).frozen)))
        assert held == mixed.sizes[range(3), choice].sum() + mixed.fixed
    exact = merge(mixed.source)(mixed.batches[0]["inputs"])[0]
    np.testing.assert_allclose(mixed.run(mixed.choice(), mixed.batches[0]), exact, atol=1e-6)
    assert mixed.signed == (True, False, False)  # behind a relu nothing is below 0


def test_a_table_is_looked_up_as_it_is_chosen():
    network = language()
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    mixed = Mixed(network, OPTIONS, [{"inputs": tokens}])
    at = mixed.paths.index("embed")
    assert np.abs(mixed.run(mixed.single(at, 2), {"inputs": tokens}) - network(tokens)[0]).max() < 0.1
    assert np.abs(mixed.run(mixed.single(at, 0), {"inputs": tokens}) - network(tokens)[0]).max() > 0.01


def test_weights_curvature_is_that_of_the_whole_hessian():
    """Of each layer apart, within five standard errors of as many estimates."""
    found = problem(options=(Option("int2"), Option("int4")))
    mixed, batch, samples = found.mixed, found.batches[0], 200
    table = sensitivities.curvature(mixed, found.loss, [batch], jax.random.key(0), samples=samples)
    kernels = {path: layer.kernel[...] for path, layer in quantizable(merge(mixed.source)).items()}

    def loss(kernels):
        network = merge(mixed.source)
        for path, kernel in kernels.items():
            quantizable(network)[path].kernel[...] = kernel
        return found.loss(network, batch)

    estimate = estimator(loss)
    _, error = traces(estimate(key, kernels) for key in jax.random.split(jax.random.key(1), samples))
    rounding = sensitivities.weight_errors(mixed)
    for number, (path, kernel) in enumerate(kernels.items()):
        alone = lambda flat, path=path, kernel=kernel: loss({**kernels, path: flat.reshape(kernel.shape)})
        exact = jnp.trace(jax.hessian(alone)(kernel.ravel()))
        assert exact > 0
        off = np.abs(table[number] - exact / kernel.size * rounding[number])
        assert (off < 5 * error[path] / kernel.size * rounding[number]).all(), path
        assert error[path] < exact


def test_activations_curvature_is_the_mean_of_the_examples():
    """Of the last layer, logits = x W: with the Hessian of the softmax p, tr(W (diag p - p p^T) W^T) an example."""
    found = problem(options=(Option("int8", "int4"),))
    mixed, batch = found.mixed, found.batches[0]
    both = sensitivities.curvature(mixed, found.loss, [batch], jax.random.key(0), samples=400)
    alone = problem(options=(Option("int8"),))
    weights = sensitivities.curvature(alone.mixed, found.loss, [batch], jax.random.key(0), samples=400)
    network = merge(mixed.source)
    x = recorded(network, lambda _, x: x, {"inputs": batch["inputs"]})["head"]
    kernel = network.head.kernel[...]
    p = jax.nn.softmax(merge(mixed.source)(batch["inputs"])[0])
    trace = jnp.mean(jnp.sum(p * jnp.square(kernel).sum(0), -1) - jnp.square(p @ kernel.T).sum(-1))
    fake = quantizable(merge(mixed.parts))["head"].quantizer.fakes[0]
    error = jnp.square(fake.activations(x, (1,)) - x).sum() / len(x)
    np.testing.assert_allclose((both - weights)[-1, 0], trace / x.shape[1] * error, rtol=0.2)


def test_divergence_is_a_kl():
    found = problem()
    table = sensitivities.divergence(found.mixed, found.batches)
    assert table.shape == (3, 3) and (table >= 0).all() and (table[:, 0] > table[:, 2]).all()
    p = jax.nn.softmax(found.mixed.run(found.mixed.choice(), found.batches[0]))
    q = jax.nn.softmax(found.mixed.run(found.mixed.single(1, 0), found.batches[0]))
    one = sensitivities.divergence(found.mixed, found.batches[:1])
    np.testing.assert_allclose(one[1, 0], (p * jnp.log(p / q)).sum(-1).mean(), rtol=1e-3)


def test_rows_that_fill_a_batch_up_do_not_count():
    found = problem()
    (batch,) = batches(count=1)
    filled = {name: np.concatenate([value, value[:1]]) for name, value in batch.items()}
    filled["mask"][-1] = 0
    choice = found.mixed.single(1, 0)
    whole, same = (sensitivities.divergence_of(found.mixed, [some])(choice) for some in (batch, filled))
    assert same == pytest.approx(whole, rel=1e-5)
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 5), slice(5, 6))]
    assert sensitivities.divergence_of(found.mixed, parts)(choice) == pytest.approx(whole, rel=1e-5)


def test_interactions_are_what_pairs_lose_beyond_their_layers():
    mixed = problem().mixed
    own, pairs = np.array([0.1, 0.2, 0.3]), np.array([[0, 0.5, 0], [0.5, 0, -0.2], [0, -0.2, 0]])

    def value(choice):
        few = np.asarray(choice) == 0
        return 1 + own @ few + few @ pairs @ few / 2

    alone, together = sensitivities.interactions(mixed, value, 0)
    np.testing.assert_allclose(alone, own)
    np.testing.assert_allclose(together, pairs, atol=1e-12)
    table = np.ones((3, 2))
    np.testing.assert_array_equal(sensitivities.augmented(table, own, np.zeros((3, 3))), table)
    scaled = sensitivities.augmented(table, own, pairs)
    assert scaled[0, 0] == pytest.approx(1 + 0.25 / 0.2) and scaled[2, 0] == pytest.approx(1 - 0.1 / 0.3)


def experienced():
    """A network that has the running statistics of something."""
    network, rng = resnet(), np.random.default_rng(0)
    for _ in range(30):
        network(jnp.asarray(rng.normal(2, 3, (16, 6, 6, 1)), jnp.float32), train=True)
    return network


def test_distilled_examples_have_the_statistics_of_the_norms():
    inputs, (first, last) = distilled(
        experienced(), (6, 6, 1), jax.random.key(0), count=8, steps=200, input_statistics=(2.0, 3.0)
    )
    assert inputs.shape == (8, 6, 6, 1) and last < 0.3 * first
    assert abs(float(inputs.mean()) - 2) < 0.5 and abs(float(inputs.std()) - 3) < 1
    with pytest.raises(ValueError, match="this network has none"):
        distilled(cnn(), (8, 1), jax.random.key(0))


def test_examples_without_data_have_its_shape_and_nothing_else_of_it():
    network, given = experienced(), batches((6, 6, 1))
    assert list(examples("training", network, itertools.cycle(given), 3)) == [given[0], given[1], given[0]]
    shape = given[0]["inputs"].shape
    hidden = [{"inputs": np.full(shape, np.nan, np.float32)}]  # no number of the data is read
    for kind, near in (("noise", 0.2), ("distilled", 0.5)):
        made = examples(kind, network, hidden, 20, seed=3, input_statistics=(2.0, 3.0))
        assert len(made) == 20 and all(batch["inputs"].shape == shape for batch in made)
        whole = np.concatenate([batch["inputs"] for batch in made])
        assert abs(whole.mean() - 2) < near and abs(whole.std() - 3) < near
        assert (made[0]["inputs"] != made[1]["inputs"]).all()
    with pytest.raises(ValueError, match="this network takes int32"):
        examples("noise", network, [{"inputs": np.zeros((2, 3), np.int32)}], 1)
    with pytest.raises(ValueError, match="and there are none"):
        examples("noise", network, [], 1)


def test_ranges_of_made_examples_are_those_that_are_stored():
    network, given = resnet(), batches((6, 6, 1))
    made = {"examples": "distilled", "seed": 1, "input_statistics": (0.5, 2.0)}
    found = examples("distilled", network, given, 1, seed=1, input_statistics=(0.5, 2.0))
    mixed = Mixed(network, OPTIONS[-1:], found, made)
    entry = mixed.entry(np.zeros(len(mixed.paths), np.int32), "mine")
    stored = applied(merge(split(network)), build_transforms([entry]), given)
    seen = mixed.run(np.zeros(len(mixed.paths), np.int32), given[0])
    np.testing.assert_allclose(stored(given[0]["inputs"])[0], seen, rtol=1e-4, atol=1e-4)
    others = applied(merge(split(network)), build_transforms([entry | {"seed": 2}]), given)
    assert np.abs(others(given[0]["inputs"])[0] - seen).max() > 1e-4
    for settings, told in (
        ({"examples": "distiled"}, "'distiled' must be one of training, distilled, noise; did you mean 'distilled'"),
        ({"examples": "noise", "input_statistics": (0.0, 0.0)}, "a standard deviation above 0"),
        ({"examples": "noise", "input_statistics": (float("nan"), 1.0)}, "a standard deviation above 0"),
        ({"examples": "noise", "input_statistics": (0.0, "1")}, "a standard deviation above 0"),
        ({"seed": 1}, "not for those of training"),
    ):
        with pytest.raises(UserError, match=told):
            build_transforms([{"name": "quantize", "rules": entry["rules"], **settings}])
    unnormed = {"name": "quantize", "rules": ((".*", {"weights": "int8"}),), "examples": "distilled"}
    with pytest.raises(UserError, match=r"transform 'quantize': .* this network has none"):
        structured(cnn(), build_transforms([unnormed]))
    with pytest.raises(UserError, match="no rule has any"):
        structured(cnn(), build_transforms([unnormed | {"examples": "noise"}]))
    with pytest.raises(UserError, match="real numbers, not tokens"):
        structured(language(), build_transforms([unnormed | {"examples": "noise"}]))


@pytest.mark.parametrize("method", methods.METHODS)
def test_allocations_fit_and_count_what_they_took(method):
    found = problem(resnet)
    sensitivity = methods.Sensitivity(found)
    sizes = found.mixed.sizes
    last, spent = None, []
    for budget in (sizes.sum(0)[0], sizes.sum(0)[1] + 5, sizes.sum(0)[2]):
        allocation = methods.allocate(method, sensitivity, budget)
        assert sum(size[at] for size, at in zip(sizes, allocation.choice, strict=True)) <= budget
        last = allocation
        spent.append(found.mixed.passes)
    # The tables are found once, whatever the budgets, and are part of the price of each.
    of_tables = sensitivity(method)[2] if method in (*methods.SENSITIVITIES, "decoupled") else 0
    assert last.passes == of_tables + spent[-1] - spent[-2]
    if method != "random":
        assert last.choice == (2,) * len(sizes)  # there is room for all
    layers = len(sizes)
    passes = {"uniform": 0, "random": 0, "hessian": 9, "divergence": 3 * layers + 1, "distilled": 3 * layers + 1}
    passes["inter_layer"] = 9 + 1 + layers + layers * (layers - 1) // 2
    if method == "decoupled":  # the tables of both kinds, and one choice or more
        assert last.passes >= 2 * (3 * layers + 1) + 4
    else:
        assert last.passes == passes[method]
    with pytest.raises(ValueError, match="below the smallest"):
        methods.allocate(method, sensitivity, sizes.sum(0)[0] - 1)


def test_bisection_keeps_what_it_is_told_to_keep():
    found = problem(options=(Option("int8", "int8"), Option("int2", "int8")))
    sensitivity, value = methods.Sensitivity(found), found.value("accuracy")
    for method in ("random", "hessian", "inter_layer"):
        kept = methods.lowest(method, sensitivity, value(np.zeros(3, np.int32)))
        assert value(np.asarray(kept.choice)) >= value(np.zeros(3, np.int32))
        assert methods.lowest(method, sensitivity, 0.0).choice == (1, 1, 1)
    with pytest.raises(ValueError, match="below the bound"):
        methods.lowest("hessian", sensitivity, 1.1)
    with pytest.raises(ValueError, match="examples of two kinds, and there are 0"):
        methods.allocate("decoupled", methods.Sensitivity(dataclasses.replace(found, kinds=())), 10_000)
    with pytest.raises(ValueError, match="between two options, and there are 3"):
        methods.lowest("hessian", methods.Sensitivity(problem()), 0.5)
    with pytest.raises(ValueError, match=r"'hesian' must be one of .*hessian"):
        methods.allocate("hesian", sensitivity, 100)


def test_nothing_to_choose_is_a_sentence():
    for options, given in (((), batches()), (OPTIONS, [])):
        with pytest.raises(ValueError, match="needs layers, options and batches"):
            Mixed(cnn(), options, given)
    quantized = merge(problem().mixed.parts)
    with pytest.raises(ValueError, match="is quantized already"):
        Mixed(quantized, OPTIONS, batches())
