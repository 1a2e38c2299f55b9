"""Meta-gradients against finite differences, closed forms and each other; episodes apart from each other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lissom.models.norms import BatchNorm
from lissom.models.variables import Parts, merge, split
from lissom.training import OBJECTIVES
from lissom.training.errors import UserError
from lissom.training.meta.episodic import judged
from lissom.training.meta.gradient_based import ANIL, MAML, FirstOrderMAML, MetaSGD
from lissom.training.meta.inner import REMAT, adapted
from lissom.training.meta.networks import TaskNetwork, task_loss
from lissom.training.meta.prototypes import PrototypicalNetworks
from lissom.training.meta.reptile import Reptile
from lissom.training.meta.supervised import Supervised
from tests.meta import KEY, Line, classes, close, cnn, flat, gradient, perceptron, regression, smooth

# ---- MAML -----------------------------------------------------------------------------------------------------------


def quadratic_by_hand(w, batch, rate, steps):
    """(d L_query(phi) / d w, the same without d phi / d w) of w x, mean over tasks: with h = 2 mean x^2 and phi = w -
    rate (h w - 2 mean x y) each step, d phi / d w = (1 - rate h)^steps."""
    found = []
    for x, y, z, t in zip(*(np.asarray(batch[n]) for n in ("support_inputs", "support_labels", "inputs", "labels"))):
        h, c, phi = 2 * (x * x).mean(), 2 * (x * y).mean(), w
        for _ in range(steps):
            phi -= rate * (h * phi - c)
        outer = 2 * (z * (z * phi - t)).mean()
        found.append((outer * (1 - rate * h) ** steps, outer))
    return np.mean(found, 0)


@pytest.mark.parametrize("steps", [1, 4])
def test_meta_gradient_of_a_quadratic_by_hand(steps):
    batch = regression()
    second, first = quadratic_by_hand(0.5, batch, 0.2, steps)
    assert abs(second / first - 1) > 0.3
    _, (found, _, metrics) = gradient(MAML(inner_rate=0.2, inner_steps=steps), Line(), batch)
    np.testing.assert_allclose(found["w"], [second], rtol=1e-5)
    _, (found, _, _) = gradient(FirstOrderMAML(inner_rate=0.2, inner_steps=steps), Line(), batch)
    np.testing.assert_allclose(found["w"], [first], rtol=1e-5)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize(
    "settings",
    [
        {"inner_steps": 3},
        {"inner_steps": 3, "inner": "adamw", "inner_kwargs": {"adamw": {"eps": 0.1}}},
        {"inner_steps": 2, "inner_kwargs": {"sgd": {"momentum": 0.9}}},
        {"inner_steps": 2, "parameters": "^head/"},
    ],
)
def test_meta_gradient_is_the_slope_of_the_meta_loss(settings):
    """Central differences along random directions; a smooth network, since relu's slope jumps."""
    objective, batch, module = MAML(inner_rate=0.1, **settings), regression(), smooth()
    parts = split(module)
    loss = jax.jit(lambda p: objective.loss(merge(Parts(parts.graph, p, {}, {})), batch, KEY, 0)[0])
    found = jax.grad(loss)(parts.params)
    for seed in range(3):
        along = jax.tree.map(lambda leaf, s=seed: jax.random.normal(jax.random.key(s), leaf.shape), parts.params)
        step = lambda size, along=along: loss(jax.tree.map(lambda p, d: p + size * d, parts.params, along))
        slope = (step(3e-3) - step(-3e-3)) / 6e-3
        np.testing.assert_allclose(flat(found) @ flat(along), slope, rtol=5e-3, atol=1e-3)


def test_first_order_is_second_order_where_the_support_has_no_curvature():
    """The loss of a linear function of the parameters: |w x - y| is not, so the network gives its own loss. Inputs of 0
    have the Hessian 0 in w, and the gradient 0; the same holds of a bias whose loss is linear: a target that is far."""
    batch = regression()
    batch["support_inputs"] = jnp.zeros_like(batch["support_inputs"])
    one, other = (gradient(kind(inner_steps=3), Line(), batch)[1][0] for kind in (MAML, FirstOrderMAML))
    close(one, other)
    assert abs(one["w"][0]) > 1e-3
    # A loss that is linear in the parameters, its gradient not 0.
    shift = lambda order: jax.grad(
        lambda p: jnp.square(
            adapted(lambda q, _: (3 * q).sum(), p, optax.sgd(0.1), 4, KEY, second_order=order) - 2.0
        ).sum()
    )(jnp.array([1.0, 5.0]))
    np.testing.assert_allclose(shift(True), 2 * (jnp.array([1.0, 5.0]) - 4 * 0.3 - 2), rtol=1e-6)
    np.testing.assert_array_equal(shift(True), shift(False))
    curved = lambda order: gradient(MAML(inner_steps=3, second_order=order), perceptron(), regression())[1][0]
    assert np.abs(flat(curved(True)) - flat(curved(False))).max() > 1e-3


@pytest.mark.parametrize("steps", [1, 5, 9])
@pytest.mark.parametrize("remat", REMAT)
def test_what_is_computed_again_is_the_same(remat, steps):
    plain, other = (
        gradient(MAML(inner_steps=steps, remat=way), perceptron(), regression())[1][0] for way in ("none", remat)
    )
    close(plain, other, rtol=1e-4, atol=1e-5)


def test_memory_by_remat():
    """Bytes that the compiled meta-gradient needs beside arguments and results, of 4 and 64 inner steps on many
    examples: without remat they grow with steps x activations, by steps with steps x parameters, by segments with their
    root."""
    batch = regression(tasks=1, shots=2000, queries=10)

    def temporaries(remat, steps, kind=MAML):
        objective, parts = kind(inner_steps=steps, remat=remat), split(perceptron(hidden=(16, 16)))
        step = jax.jit(
            lambda params: objective.gradients(parts.graph, params, {}, {}, batch, KEY, jnp.zeros((), int))[0]
        )
        return step.lower(parts.params).compile().memory_analysis().temp_size_in_bytes

    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(split(perceptron(hidden=(16, 16))).params))
    growth = {remat: temporaries(remat, 64) - temporaries(remat, 4) for remat in REMAT}
    first = temporaries("none", 64, FirstOrderMAML) - temporaries("none", 4, FirstOrderMAML)
    assert first < 2 * size  # keys of the steps, and no more of each
    assert growth["none"] > 60 * 10 * size
    assert growth["step"] < 60 * 2 * size
    assert growth["tree"] < 2 * 8 * 2 * size < growth["step"]


def test_tasks_do_not_see_each_other():
    """The meta-gradient of a batch is the mean of those of its tasks."""
    batch, objective = regression(4), MAML(inner_steps=2)
    whole = gradient(objective, perceptron(), batch)[1][0]
    single = [
        gradient(objective, perceptron(), {name: leaf[i : i + 1] for name, leaf in batch.items()})[1][0]
        for i in range(4)
    ]
    close(whole, jax.tree.map(lambda *leaves: sum(leaves) / 4, *single), atol=1e-5)


def test_convolutions_of_many_tasks_are_convolutions():
    """The products of matrices, that a network a task is computed by, against lax's convolution, task by task."""
    objective, batch = MAML(inner_steps=2, inner_rate=0.05), classes()
    module = objective.structure(cnn())
    said = objective.answers(
        module, batch["inputs"], support_inputs=batch["support_inputs"], support_labels=batch["support_labels"]
    )
    network, params, stats = TaskNetwork.of(module, "support")
    for i in range(2):
        found = objective.adapt(network, params, stats, batch["support_inputs"][i], batch["support_labels"][i], KEY)
        close(said[i], objective.answer(network, found, batch["inputs"][i], KEY)[0], rtol=1e-3, atol=1e-4)


# ---- its kin ---------------------------------------------------------------------------------------------------------


def test_anil_adapts_the_head_alone():
    objective, batch = ANIL(inner_steps=3), regression()
    network, params, stats = TaskNetwork.of(perceptron(), "support")
    found, _ = objective.adapt(network, params, stats, batch["support_inputs"][0], batch["support_labels"][0], KEY)
    close(found["layers"], params["layers"], rtol=0, atol=0)
    assert np.abs(found["head"]["kernel"] - params["head"]["kernel"]).max() > 1e-3
    # The layers are learned by the meta-gradient all the same.
    assert np.abs(flat(gradient(objective, perceptron(), batch)[1][0]["layers"])).max() > 1e-4
    with pytest.raises(ValueError, match=r"objective.parameters='\^head/' matches none of w"):
        ANIL().structure(Line())


def test_meta_sgd_by_hand():
    """One step with the rate alpha: d phi / d w = 1 - alpha h, d phi / d alpha = -(h w - c)."""
    batch, objective = regression(), MetaSGD(inner_rate=0.2)
    parts, (found, _, _) = gradient(objective, Line(), batch)
    alpha = float(parts.params["inner_rates"]["w.rate"][0])
    assert 0.1 <= alpha <= 0.3
    expected = []
    for x, y, z, t in zip(*(np.asarray(batch[n]) for n in ("support_inputs", "support_labels", "inputs", "labels"))):
        h, c = 2 * (x * x).mean(), 2 * (x * y).mean()
        phi = 0.5 - alpha * (h * 0.5 - c)
        outer = 2 * (z * (z * phi - t)).mean()
        expected.append((outer * (1 - alpha * h), -outer * (h * 0.5 - c)))
    np.testing.assert_allclose([found["w"][0], found["inner_rates"]["w.rate"][0]], np.mean(expected, 0), rtol=1e-5)


def test_meta_sgd_keeps_its_rates_with_the_network():
    module = MetaSGD(inner_rate=0.2).structure(perceptron())
    rates = split(module).params["inner_rates"]
    assert sorted(rates) == ["head.bias.rate", "head.kernel.rate", "layers.0.bias.rate", "layers.0.kernel.rate"]
    assert all((leaf >= 0.1).all() and (leaf <= 0.3).all() for leaf in rates.values())
    head = MetaSGD(inner_rate=0.2, parameters="^head/").structure(perceptron())
    assert sorted(split(head).params["inner_rates"]) == ["head.bias.rate", "head.kernel.rate"]


def test_reptile_of_one_step_is_the_gradient_of_the_task():
    batch = regression()
    objective = Reptile(inner_steps=1, inner_batch=0, inner_rate=0.1)
    parts, (found, _, _) = gradient(objective, perceptron(), batch)
    joined = lambda name: jnp.concatenate([batch[f"support_{name}"], batch[name]], 1)

    def loss(params):
        network = merge(type(parts)(parts.graph, params, {}, {}))
        each = jax.vmap(lambda x, y: task_loss(network(x)[0], y))
        return each(joined("inputs"), joined("labels")).mean()

    close(found, jax.grad(loss)(parts.params), rtol=1e-3, atol=1e-5)


def test_reptile_of_two_steps_by_hand():
    batch = regression()
    _, (found, _, _) = gradient(Reptile(inner_steps=2, inner_batch=0, inner_rate=0.2), Line(), batch)
    moved = []
    for i in range(3):
        x, y = (np.concatenate([batch[f"support_{name}"][i], batch[name][i]]) for name in ("inputs", "labels"))
        h, c, phi = 2 * (x * x).mean(), 2 * (x * y).mean(), 0.5
        for _ in range(2):
            phi -= 0.2 * (h * phi - c)
        moved.append(phi)
    np.testing.assert_allclose(found["w"], [(0.5 - np.mean(moved)) / (0.2 * 2)], rtol=1e-5)


# ---- prototypes, and learning classes ------------------------------------------------------------------------------


def test_prototypical_networks_by_hand():
    """An embedding that is the input: the scores are minus squared distances to the means."""
    objective, batch = PrototypicalNetworks(), classes()
    module = objective.structure(cnn())
    said = objective.answers(
        module, batch["inputs"], support_inputs=batch["support_inputs"], support_labels=batch["support_labels"]
    )
    for i in range(2):
        support, queries = module.features(batch["support_inputs"][i]), module.features(batch["inputs"][i])
        means = np.stack([np.asarray(support)[np.asarray(batch["support_labels"][i]) == n].mean(0) for n in range(3)])
        close(said[i], -np.square(np.asarray(queries)[:, None] - means[None]).sum(-1), rtol=1e-3, atol=1e-4)
    assert "head" not in split(module).params


def test_prototypes_of_targets_are_a_kernel_regression():
    objective, batch = PrototypicalNetworks(), regression()
    module = objective.structure(perceptron())
    said = objective.answers(
        module, batch["inputs"], support_inputs=batch["support_inputs"], support_labels=batch["support_labels"]
    )
    support, queries = (np.asarray(module.features(batch[name][0])) for name in ("support_inputs", "inputs"))
    weights = np.exp(-np.square(queries[:, None] - support[None]).sum(-1))
    close(said[0], weights @ np.asarray(batch["support_labels"][0]) / weights.sum(1, keepdims=True), rtol=1e-4)


def test_supervised_learns_the_numbers_of_the_classes():
    """Labels of an episode become those of its classes: cross-entropy of all examples of all tasks."""
    objective, batch = Supervised(), classes()
    objective.prepare({"train_classes": 7})
    module = objective.build(objective.structure(cnn()), nnx.Rngs(3))
    loss, _ = objective.loss(module, batch, KEY, 0)
    x = jnp.concatenate([batch[name].reshape(-1, 6, 6, 1) for name in ("support_inputs", "inputs")])
    labels = jnp.concatenate([(batch[name] + 1).reshape(-1) for name in ("support_labels", "labels")])
    fresh = objective.build(objective.structure(cnn()), nnx.Rngs(3))
    logits = fresh.classes(fresh.network.features(x, train=True))
    np.testing.assert_allclose(loss, task_loss(logits, labels), rtol=1e-4)
    assert logits.shape[-1] == 7
    single = Supervised(single=True)
    alone, _ = single.loss(
        objective.build(objective.structure(cnn()), nnx.Rngs(3)), {"inputs": x, "labels": labels}, KEY, 0
    )
    np.testing.assert_allclose(alone, loss, rtol=1e-6)
    with pytest.raises(ValueError, match="the tasks of this data share none: set"):
        Supervised().prepare({"outputs": 1})


# ---- BatchNorm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", ["support", "queries"])
def test_the_gradient_goes_through_the_statistics(statistics):
    """Central differences of the meta-loss of a smooth network with BatchNorm: queries are normalised by numbers that
    depend on the parameters, the support's too."""
    objective, batch, module = MAML(inner_steps=1, statistics=statistics), classes(), cnn()
    module.activation = jnp.tanh
    parts = split(module)
    loss = jax.jit(lambda p: objective.loss(merge(Parts(parts.graph, p, parts.stats, {})), batch, KEY, 0)[0])
    found = jax.grad(loss)(parts.params)
    for seed in range(3):
        along = jax.tree.map(lambda leaf, s=seed: jax.random.normal(jax.random.key(s), leaf.shape), parts.params)
        step = lambda size, along=along: loss(jax.tree.map(lambda p, d: p + size * d, parts.params, along))
        slope = (step(2e-3) - step(-2e-3)) / 4e-3
        np.testing.assert_allclose(flat(found) @ flat(along), slope, rtol=1e-2, atol=2e-3)


def answers_of(statistics, batch, module):
    objective = FirstOrderMAML(inner_steps=2, inner_rate=0.1, statistics=statistics)
    given = {name: batch[name] for name in ("support_inputs", "support_labels")}
    return objective.answers(module, batch["inputs"], **given)


def test_statistics_of_a_task():
    """By the support, a query's answer is its own; by the queries it depends on the others; tasks are apart in both; by
    running averages it depends on these."""
    batch, module = classes(), cnn()
    other = {**batch, "inputs": batch["inputs"].at[:, 0].add(5.0)}
    apart = lambda kind: np.abs(answers_of(kind, batch, module) - answers_of(kind, other, module))[:, 1:].max()
    assert apart("support") == 0 and apart("running") == 0 and apart("queries") > 1e-3
    elsewhere = {name: leaf.at[1].add(1.0) if leaf.dtype == jnp.float32 else leaf for name, leaf in batch.items()}
    for kind in ("support", "queries"):
        close(answers_of(kind, batch, module)[0], answers_of(kind, elsewhere, module)[0], rtol=1e-3, atol=1e-4)
    moved = cnn()
    moved.norms[0].mean[...] += 1.0
    change = lambda kind: np.abs(answers_of(kind, batch, module) - answers_of(kind, batch, moved)).max()
    assert change("support") == 0 and change("queries") == 0 and change("running") > 1e-3


def test_support_statistics_are_the_supports():
    network, params, stats = TaskNetwork.of(cnn(), "support")
    x = classes()["support_inputs"][0]
    _, found = network.support(params, stats, x, KEY)
    first = cnn().convs[0](x)
    np.testing.assert_allclose(found["norms"][0]["mean"], first.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["norms"][0]["var"], first.var((0, 1, 2)), rtol=1e-3)
    given, _ = network.support(params, stats, x, KEY)
    asked, _ = network.queries(params, found, x, KEY)
    np.testing.assert_allclose(asked, given, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("statistics", ["support", "queries", "running"])
def test_dropout_is_of_training_alone(statistics):
    network, params, stats = TaskNetwork.of(cnn(dropout=0.5), statistics)
    x = classes()["support_inputs"][0]

    def run(key, train):
        outputs, found = network.support(params, stats, x, jax.random.key(key), train)
        return outputs, network.queries(params, found, x, jax.random.key(key), train)[0]

    for one, other in zip(run(0, False), run(1, False), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(run(0, True), run(1, True), strict=True):
        assert np.abs(one - other).max() > 1e-3


def test_meta_gradient_through_adam_where_gradients_are_zero():
    """Dead units have a gradient of 0, at which a root has no slope."""
    network = perceptron()
    network.layers[0].bias[...] = jnp.full(8, -100.0).at[0].set(1.0)
    _, (found, _, _) = gradient(MAML(inner="adamw", inner_rate=0.01, inner_steps=2), network, regression())
    assert np.isfinite(flat(found)).all() and np.abs(flat(found)).max() > 1e-3


@pytest.mark.parametrize("name", ["maml", "protonet", "reptile"])
def test_running_averages_move_in_training_and_only_then(name):
    kind = {"maml": MAML, "protonet": PrototypicalNetworks, "reptile": Reptile}[name]
    moved = {}
    for statistics in ("support", "running"):
        parts, (_, stats, _) = gradient(kind(statistics=statistics), cnn(), classes())
        moved[statistics] = np.abs(flat(stats) - flat(parts.stats)).max()
    assert moved["support"] == 0 and moved["running"] > 1e-3


def test_rows_say_which_statistics():
    (said,) = MAML(statistics="queries").notes(cnn())
    assert said.startswith("BatchNorm normalises queries by their own") and said.endswith("(transductive)")
    assert MAML().notes(perceptron()) == ()
    assert any(isinstance(node, BatchNorm) for _, node in nnx.iter_graph(cnn()))


# ---- the evaluator ---------------------------------------------------------------------------------------------------


def test_judged_by_hand():
    """Accuracies 0.5, 1 and one that only fills up: the mean is 0.75; the tally says its interval."""
    from lissom.models.tallies import means

    sums = judged({"accuracy": jnp.array([0.5, 1.0, 0.0])}, jnp.array([1.0, 1.0, 0.0]))
    assert float(sums["accuracy"][0]) == 1.5 and float(sums["accuracy"][1]) == 2
    np.testing.assert_allclose(sums["episode_accuracy"][0], [1.5, 1.25, 2])
    told = lambda moments: means({"episode_accuracy": (np.array(moments), moments[2])})
    assert told([1.5, 1.25, 2.0]) == {}  # of two episodes nothing is claimed
    # 300 episodes of 0.5 and 300 of 1: deviation 0.25 sqrt(600 / 599), 1.96 of its standard errors.
    found = told([450.0, 300 * 0.25 + 300.0, 600.0])["accuracy_interval"][0]
    np.testing.assert_allclose(found, 1.96 * 0.25 * np.sqrt(600 / 599 / 600), rtol=1e-6)


@pytest.mark.parametrize(("batch", "module"), [(classes(), cnn()), (regression(), perceptron())])
def test_one_network_for_all_tasks_learns_their_own_targets(batch, module):
    """The gradient is that of the mean loss over all examples of all tasks, whatever task they are of."""
    _, (found, _, told) = gradient(Supervised(classes=False, statistics="support"), module, batch)
    both = lambda name: batch[name].reshape(-1, *batch[name].shape[2:])
    inputs = jnp.concatenate([both("support_inputs"), both("inputs")])
    targets = jnp.concatenate([both("support_labels"), both("labels")])
    outputs, _ = module(inputs, train=True, key=KEY)
    np.testing.assert_allclose(told["loss"], task_loss(outputs, targets), rtol=1e-5)
    labelled = jnp.issubdtype(targets.dtype, jnp.integer)
    value = (outputs.argmax(-1) == targets).mean() if labelled else jnp.square(outputs - targets).mean()
    np.testing.assert_allclose(told["accuracy" if labelled else "mse"], value, rtol=1e-5)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("name", ["maml", "anil", "meta_sgd", "imaml", "reptile", "protonet", "supervised"])
def test_judge_is_what_the_answers_are(name):
    from lissom.models.registry import construct

    objective, batch = construct(OBJECTIVES, name, {}, "objective"), classes()
    module = objective.structure(cnn())
    sums = objective.judge(module, batch | {"mask": jnp.array([1.0, 0.0])}, KEY)
    given = {name: batch[name] for name in ("support_inputs", "support_labels")}
    said = objective.answers(module, batch["inputs"], **given)[0].argmax(-1)
    np.testing.assert_allclose(sums["accuracy"][0], (said == batch["labels"][0]).mean(), rtol=1e-5)
    assert {"prototype_accuracy", "kmeans_accuracy", "laplacian_accuracy", "transported_accuracy"} <= sums.keys()


def test_a_transformer_is_adapted_and_has_no_features_of_an_example():
    """Its features are of tokens: no columns of them, and no prototypical network."""
    from lissom.models.sequence_classifier import SequenceTransformer

    network = SequenceTransformer(input_shape=(6, 6), classes=3, width=8, depth=1, heads=2, rngs=nnx.Rngs(0))
    batch = {name: leaf[..., 0] if leaf.ndim == 5 else leaf for name, leaf in classes().items()}
    sums = MAML(inner_steps=1).judge(network, batch, KEY)
    assert "accuracy" in sums and "prototype_accuracy" not in sums
    with pytest.raises(ValueError, match="SequenceTransformer has no features without a head"):
        PrototypicalNetworks().structure(network)


def test_a_task_has_fewer_examples_than_reptile_asks_for():
    with pytest.raises(UserError, match="inner_batch=10 is more than the 9 examples of a task"):
        gradient(Reptile(inner_batch=10), perceptron(), regression())


def test_adaptation_learns_the_support():
    """More inner steps leave a smaller loss on the support: the inner loop descends, whatever was meta-learned."""
    batch = classes()
    network, params, stats = TaskNetwork.of(cnn(), "support")
    given = batch["support_inputs"][0], batch["support_labels"][0]
    losses = []
    for steps in (1, 5, 20):
        found, _ = MAML(inner_rate=0.1, test_steps=steps).adapt(network, params, stats, *given, KEY)
        losses.append(float(task_loss(network.support(found, stats, given[0], KEY)[0], given[1])))
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("maml", {"inner_steps": 0}, "inner_steps=0 must be at least 1"),
        ("maml", {"test_steps": 0}, "test_steps=0 must be at least 1"),
        ("maml", {"inner_rate": 0.0}, "inner_rate=0.0 must be above 0"),
        ("maml", {"remat": "trees"}, "remat='trees' must be one of none, step, tree; did you mean 'tree'"),
        ("maml", {"statistics": "batch"}, "statistics='batch' must be one of support, queries, running"),
        ("maml", {"parameters": "("}, r"parameters='\(' is no pattern"),
        ("maml", {"inner": "sdg"}, "unknown optimizer 'sdg'"),
        ("fomaml", {"second_order": True}, "second_order=True is the objective 'maml'"),
        ("reptile", {"second_order": True}, "second_order=True means nothing to 'reptile'"),
        ("reptile", {"inner_batch": -1}, "inner_batch=-1 must be at least 1, or 0"),
        ("imaml", {"proximity": 0.0}, "proximity=0.0 must be above 0"),
        ("reptile", {"remat": "step"}, "remat='step': 'reptile' has no backward pass through its steps"),
        ("imaml", {"remat": "tree"}, "remat='tree': 'imaml' has no backward pass through its steps"),
        ("fomaml", {"remat": "step"}, "remat='step': 'fomaml' has no backward pass through its steps"),
        ("supervised", {"classes": False, "test_steps": 2}, "test_steps=2: 'supervised' has no inner loop in training"),
        ("supervised", {"classes": False, "remat": "tree"}, "remat='tree': 'supervised' has no inner loop in training"),
        ("supervised", {"inner_steps": 3}, "inner_steps=3 is of the fine-tuning, which classes=True has none of"),
        ("supervised", {"classes": False, "single": True}, "single=True is of classes"),
        ("imaml", {"damping": -1.0}, "damping=-1.0 must be at least 0"),
        ("imaml", {"solver_steps": 0}, "solver_steps=0 must be at least 1"),
        ("imaml", {"parameters": "head"}, "'imaml' adapts all parameters"),
        ("imaml", {"second_order": False}, "second_order=False means nothing to 'imaml', which"),
    ],
)
def test_bad_settings_are_one_sentence(name, settings, sentence):
    from lissom.models.registry import construct

    with pytest.raises(ValueError, match=sentence):
        construct(OBJECTIVES, name, {name: settings}, "objective")
