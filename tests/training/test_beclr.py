"""BECLR: the memory by hand, the loss by hand, whom gradients reach; and runs on single examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.data import load
from lissom.eval import task_name
from lissom.models.cnn import ConvNet
from lissom.models.variables import Parts, flatten, merge, split, stats_of
from lissom.training.building import as_learned, load_dataset
from lissom.training.config import load_recipe, overridden
from lissom.training.errors import UserError
from lissom.training.meta.contrastive import BECLR, alignment, uniformity
from lissom.training.meta.memory import ClusteredMemory, assigned, k_means, moved
from lissom.training.meta.views import erased, views, warped

KEY = jax.random.key(0)


def on_circle(*degrees):
    angles = np.radians(degrees)
    return jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], -1), jnp.float32)


def close(one, other, **tolerance):
    np.testing.assert_allclose(one, other, **{"rtol": 1e-5, "atol": 1e-6} | tolerance)


# ---- views ----------------------------------------------------------------------------------------------------------


def test_views():
    """Strength 0 leaves the image; the same key gives the same view, and neither two keys nor two places of a batch."""
    image = jax.random.uniform(KEY, (9, 8, 2))
    images = jnp.stack([image] * 3)
    np.testing.assert_array_equal(views(images, KEY, 0.0), images)
    one, again, other = (views(images, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert abs(one - other).max() > 0.1 and abs(one[0] - one[1]).max() > 0.1
    mild = views(images, jax.random.key(1), 0.05)
    assert 0 < abs(mild - images).mean() < abs(one - images).mean() / 3


def test_an_image_is_moved_by_hand():
    """Down by 1 and left by half a place, which is the mean of two; zeros come in. A quarter turn; a rectangle."""
    image = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0]])[..., None]
    found = warped(image, jnp.eye(2), jnp.array([1.0, -0.5]))[..., 0]
    close(found, [[0, 0, 0], [1.5, 3, 2], [12, 24, 16]])
    turned = warped(image, jnp.array([[0.0, 1.0], [-1.0, 0.0]]), jnp.zeros(2))[..., 0]
    close(turned, np.rot90(image[..., 0]), atol=1e-4)
    found = erased(image, jnp.array([0.5, 0.0]), jnp.array([1.0, 2.0]))[..., 0]
    close(found, [[1, 2, 4], [0, 0, 32], [64, 128, 256]])


# ---- the memory -----------------------------------------------------------------------------------------------------


def test_first_in_first_out():
    """Of five places, three rows a time: the pointer wraps, and what is oldest goes."""
    memory = ClusteredMemory(5, 1, clusters=0)
    row = lambda *numbers: jnp.array(numbers, jnp.float32)[:, None]
    memory.update(row(1, 2, 3), KEY)
    assert (int(memory.next[...]), int(memory.filled[...])) == (3, 3)
    memory.update(row(4, 5, 6), KEY)
    assert memory.rows[...][:, 0].tolist() == [6, 2, 3, 4, 5]
    assert (int(memory.next[...]), int(memory.filled[...])) == (1, 5)
    memory.update(row(7, 8, 9), KEY)
    assert memory.rows[...][:, 0].tolist() == [6, 7, 8, 9, 5] and int(memory.next[...]) == 4


def test_prototypes_move_to_the_means_of_their_rows():
    """0.9 (1, 0) + 0.1 (0, 2) = (0.9, 0.2), (0, 2) the mean of (0, 1) and (0, 3); no row has label 1; 0.9 (2, 2) + 0.1
    (4, 0)."""
    prototypes = jnp.array([[1.0, 0.0], [5.0, 5.0], [2.0, 2.0]])
    rows, labels = jnp.array([[0.0, 1.0], [4.0, 0.0], [0.0, 3.0]]), jnp.array([0, 2, 0])
    close(moved(prototypes, rows, labels, 0.9), [[0.9, 0.2], [5, 5], [2.2, 1.8]])


def test_rows_are_spread_evenly_over_the_prototypes():
    """All six lie nearest to the first prototype; those that are least so go to the second. The prototypes' lengths
    are nothing to it."""
    rows, prototypes = on_circle(40, 5, 30, 10, 20, 0), on_circle(0, 90) * jnp.array([[3.0], [0.1]])
    assert (rows @ on_circle(0, 90).T).argmax(-1).tolist() == [0] * 6
    assert assigned(rows, prototypes, 0.01).tolist() == [1, 0, 1, 0, 1, 0]
    near = on_circle(2, 88, 3, 87)
    assert assigned(near, on_circle(0, 90), 0.05).tolist() == [0, 1, 0, 1]


def test_neighbours_are_of_the_partition():
    """Rows at -10, 40, 44 degrees have label 0 and those at 46, 50, 90 label 1, prototypes at 20 and 70. A query at 44
    takes the two of its own partition, not 46, which is as near as 42 were. Where the partition has no more than are
    asked for, all rows are searched."""
    memory = ClusteredMemory(6, 2, clusters=2)
    memory.rows[...], memory.labels[...] = on_circle(-10, 40, 44, 46, 50, 90), jnp.array([0, 0, 0, 1, 1, 1])
    memory.prototypes[...], memory.filled[...] = on_circle(20, 70), jnp.array(6)
    close(memory.nearest(on_circle(44.5, 47), 2), jnp.stack([on_circle(44, 40), on_circle(46, 50)]))
    close(memory.nearest(on_circle(44.5), 3), on_circle(44, 46, 40)[None])
    # No partitions yet: places that were never filled, which would be nearer, are not found.
    memory.filled[...] = jnp.array(3)
    close(memory.nearest(on_circle(60), 2), on_circle(44, 40)[None])


def test_life_of_a_memory():
    """Two rows a time into four places: the second pair fills it, and k-means finds both heaps; the third is spread
    evenly, one to each, although both rows lie in one heap, and the prototypes follow by a tenth."""
    memory = ClusteredMemory(4, 2, clusters=2)
    memory.update(on_circle(0, 90), KEY)
    assert not memory.prototypes[...].any()
    memory.update(on_circle(4, 94), KEY)
    labels, centres = np.asarray(memory.labels[...]), np.asarray(memory.prototypes[...])
    assert labels[0] == labels[2] != labels[1] == labels[3]
    close(centres[labels[0]], on_circle(0, 4).mean(0))
    close(centres[labels[1]], on_circle(90, 94).mean(0))
    memory.update(on_circle(0, 30), KEY)
    assert memory.labels[...].tolist() == [labels[0], labels[1], labels[0], labels[1]]
    close(memory.prototypes[...][labels[0]], 0.9 * centres[labels[0]] + 0.1 * on_circle(0, 4).mean(0))
    close(memory.prototypes[...][labels[1]], 0.9 * centres[labels[1]] + 0.1 * on_circle(30, 94).mean(0))


def test_k_means_finds_heaps_and_bears_doubles():
    heaps = jnp.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    rows = jnp.repeat(heaps, 4, 0) + 0.1 * jax.random.normal(KEY, (12, 2))
    centres, labels = k_means(rows, 3, KEY)
    assert len({*labels.tolist()}) == 3 and all(len({*labels[i : i + 4].tolist()}) == 1 for i in (0, 4, 8))
    close(centres[labels[::4]], rows.reshape(3, 4, 2).mean(1))
    centres, labels = k_means(jnp.ones((5, 2)), 3, KEY)
    close(centres, jnp.ones((3, 2)))


# ---- the loss -------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand():
    """Two images. View 1 of the predictions lies at 0 and 90 degrees, view 2 at 60 and 90; of the targets at 60 and 0,
    and 0 and 90: p_1 . t_2 = 1, 1 and p_2 . t_1 = 1, 0, of which the mean is 3/4.

    Uniformity of projections at 0, 90 (view 1) and 0, 180 (view 2), T = 1: row 1 of view 1 meets 90 and 180: cosines 0,
    -1; row 2 meets 0, 0: 0, 0; of view 2 row 1 meets 90, 180: 0, -1; row 2 (180) meets 0, 0: -1, -1. The mean of the
    rows' means is ((1 + 1/e) / 2 + 1 + (1 + 1/e) / 2 + 1/e) / 4 = (1 + 1/e) / 2.
    """
    p, t = (jnp.stack([on_circle(*one), on_circle(*two)]) for one, two in (((0, 90), (60, 90)), ((60, 0), (0, 90))))
    close(alignment(p, t, jnp.ones(2)), -3 / 4)
    z = jnp.stack([on_circle(0, 90), on_circle(0, 180)])
    close(uniformity(z, jnp.ones(2), 1.0), np.log((1 + np.exp(-1)) / 2))
    # Halved cosines where T = 2.
    close(uniformity(z, jnp.ones(2), 2.0), np.log((1 + np.exp(-0.5)) / 2))


def test_rows_without_weight_are_not_there():
    keys = jax.random.split(KEY, 3)
    p, t, z = (jax.random.normal(key, (2, 5, 3)) for key in keys)
    weights = jnp.array([1.0, 1, 1, 0, 0])
    close(alignment(p, t, weights), alignment(p[:, :3], t[:, :3], jnp.ones(3)))
    close(uniformity(z, weights, 2.0), uniformity(z[:, :3], jnp.ones(3), 2.0))


def cnn(seed=1):
    return ConvNet(input_shape=(6, 6, 1), classes=3, channels=(4, 4), kernel=3, batch_norm=True, rngs=nnx.Rngs(seed))


def learner(**settings):
    small = {"memory": 24, "clusters": 3, "neighbours": 2, "warm_up": 0, "width": 16}
    objective = BECLR(**small | settings)
    return objective, split(objective.build(objective.structure(cnn()), nnx.Rngs(2)))


def batch_of(images=6):
    inputs = jax.random.uniform(jax.random.key(3), (images, 6, 6, 1))
    return {"inputs": inputs, "labels": jnp.arange(images), "mask": jnp.ones(images)}


def steps(objective, parts, count, batch=None):
    """[(gradients, stats, metrics)] of as many steps in which no parameter moves."""
    found, stats, graph = [], parts.stats, parts.graph
    gradients = jax.jit(lambda stats, *given: objective.gradients(graph, parts.params, stats, parts.frozen, *given))
    for step in range(count):
        found.append(gradients(stats, batch or batch_of(), jax.random.fold_in(KEY, step), jnp.int32(step)))
        stats = found[-1][1]
    return found


def test_the_batch_grows():
    """k neighbours of each row, row by row; they are what the memory says; and only the rows have gradients."""
    objective, parts = learner()
    rows = jax.random.normal(KEY, (8, 16))
    rows = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)

    @jax.jit
    def grown(rows):
        memory = merge(parts).targets
        found = objective.enhanced(memory, rows, KEY)
        slopes = jnp.stack([jnp.square(part).sum() for part in (found[:, :4], found[:, 4:])])
        return slopes, (found, memory.nearest(rows[4:5], 2)[0])

    found, near = grown(rows)[1]
    assert found.shape == (2, 4 * 3, 16)
    close(found[:, :4].reshape(8, 16), rows)
    close(found[1, 4:6], near)
    close(found[1, 4], rows[4])  # a row that has entered is its own nearest
    own, theirs = jax.jit(jax.jacrev(lambda scale: grown(scale * rows)[0]))(1.0)
    assert theirs == 0 and own > 1


def test_neighbours_change_the_loss_from_the_warm_up_on():
    """Before it, and where none are asked for, the loss is the plain Siamese one."""
    plain, late, early = (steps(*learner(**settings), 4) for settings in ({"neighbours": 0}, {"warm_up": 3}, {}))
    for step in range(4):
        losses = [float(found[step][2]["loss"]) for found in (plain, late, early)]
        assert abs(losses[2] - losses[0]) > 1e-4
        if step < 3:
            close(losses[1], losses[0])
            one, other = (flatten(found[step][0]) for found in (plain, late))
            for name in one:
                close(one[name], other[name], rtol=1e-3)
        else:
            assert abs(losses[1] - losses[0]) > 1e-4
    assert "targets" not in plain[0][1] and late[0][1]["targets"]["filled"] == 12


def test_partitions_change_what_is_found():
    """The memory is full in the second step; from the third on partitions are searched, or all of it."""
    cut, whole = (steps(*learner(clusters=clusters), 4) for clusters in (3, 0))
    losses = np.array([[float(found[step][2]["loss"]) for step in range(4)] for found in (cut, whole)])
    close(losses[0, 0], losses[1, 0])
    assert abs(losses[0, 2:] - losses[1, 2:]).max() > 1e-6
    assert set(cut[1][1]["targets"]["labels"].tolist()) == {0, 1, 2} and "labels" not in whole[1][1]["targets"]


def test_the_teacher_follows():
    """By hand: it becomes the student at first, then 0.9 teacher + 0.1 student, once in a step however often the step
    is asked. Its parameters have no gradient, and its BatchNorm has the statistics of what it saw."""
    objective, parts = learner(momentum=0.9)
    other = learner(momentum=0.9)[0].structure(cnn(seed=7))
    kernel = lambda network: network.convs[0].kernel
    first, second = (np.asarray(kernel(network)[...]) for network in (merge(parts).network, other))

    @jax.jit
    def taught(student, stats, step):
        module = merge(Parts(parts.graph, parts.params, stats, parts.frozen))
        kernel(module.network)[...] = student
        objective.loss(module, batch_of(), KEY, step)
        apart = abs(module.teacher.network.norms[0].mean[...] - module.network.norms[0].mean[...]).max()
        return kernel(module.teacher.network)[...], stats_of(module), apart

    stats = jax.tree.map(jnp.zeros_like, parts.stats) | {"followed": parts.stats["followed"]}
    found, stats, _ = taught(first, stats, jnp.int32(0))
    close(found, first)
    for _ in range(2):
        found, stats, apart = taught(second, stats, jnp.int32(1))
        close(found, 0.9 * first + 0.1 * second)
    assert apart > 1e-4
    gradients, stats, _ = steps(objective, parts, 1)[0]
    assert not any("teacher" in name for name in flatten(gradients)) and "teacher" in stats
    assert {name.split("/")[0] for name in flatten(gradients)} == {"network", "projector", "predictor"}


def test_no_gradient_goes_through_the_teacher():
    """The slope of the loss in the student is as if the teacher's answer were a number: at the first step teacher and
    student are one, and the gradient of a target that moved with the student would be another."""
    objective, parts = learner(neighbours=0, uniformity=0.0, strength=0.0)
    batch, key = batch_of(), KEY  # which draws nothing: neither views nor dropout have any strength
    found = steps(objective, parts, 1)[0][0]
    seen = jnp.concatenate([batch["inputs"]] * 2)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    fixed = jax.jit(lambda: unit(merge(parts).student(seen, key)[0]))()

    def loss(params):
        p = unit(merge(Parts(parts.graph, params, parts.stats, parts.frozen)).student(seen, key)[1])
        return -(p * fixed).sum(-1).mean()  # both views are the image

    expected = flatten(jax.jit(jax.grad(loss))(parts.params))
    for name, value in flatten(found).items():
        close(value, expected[name], rtol=1e-3, atol=1e-5)
    assert max(float(abs(value).max()) for value in expected.values()) > 1e-3


def test_no_label_is_read():
    objective, parts = learner()
    poisoned = {**batch_of(), "labels": jnp.full(6, -(2**31))}
    one, other = (steps(objective, parts, 3, batch)[-1] for batch in (batch_of(), poisoned))
    jax.tree.map(np.testing.assert_array_equal, one[0], other[0])
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_run(tiny_run):
    """Three steps in which every branch is taken; what stands around the network is not exported."""
    from lissom.eval import evaluate

    result, workdir = tiny_run("fewshot/glyphs", objective="beclr")
    assert result["step"] == 3 and result["traces"] == {"train": 1}
    row = evaluate([workdir])[0]
    values = {m.name: m.value for m in row.measurements}
    assert {"accuracy", "transported_accuracy", "adaptation_p50"} <= set(values)
    kernels, norms = 3 * 3 * 4 + 3 * 3 * 4 * 4, 2 * 4 * 2
    assert values["parameters"] == kernels + norms
    assert "trained on single images, their labels unread" in row.notes


def test_training_is_single_and_the_test_is_episodes():
    config = overridden(load_recipe("configs/fewshot/glyphs.py:tiny"), [("objective", "beclr")])
    single, episodes = load_dataset(config), load_dataset(overridden(config, [("objective", "maml")]))
    assert set(single.train[0]) == {"inputs", "labels"} and len(single.train) == single.info["train_examples"] == 240
    assert set(episodes.train[0]) == set(episodes.test[0]) == set(single.test[0])
    np.testing.assert_array_equal(single.test[3]["inputs"], episodes.test[3]["inputs"])
    assert task_name(config) == task_name(load_recipe("configs/fewshot/glyphs.py:tiny"))  # one table for both
    digits = load("digits")
    assert as_learned(config, digits) is digits


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"memory": 0}, "objective.memory=0 must be at least 1"),
        ({"neighbours": -1}, "objective.neighbours=-1 must be at least 0"),
        ({"momentum": 1.5}, r"objective.momentum=1.5 must lie in \[0, 1\]"),
        ({"strength": -0.1}, r"objective.strength=-0.1 must lie in \[0, 1\]"),
        ({"temperature": 0.0}, "objective.temperature=0.0 must be above 0"),
        ({"epsilon": 0.0}, "objective.epsilon=0.0 must be above 0"),
        ({"clusters": 30}, "objective.clusters=30 must be at most the 24 rows of objective.memory"),
        ({"statistics": "none"}, "objective.statistics='none' must be one of"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        learner(**settings)


def test_batches_that_do_not_fit():
    for settings, images, said in (
        (
            {"memory": 10},
            6,
            "objective.memory=10 must be at least the 12 rows of a batch, which are two views an",
        ),
        ({"neighbours": 5, "clusters": 0}, 2, "objective.neighbours=5 must be at most the 4 rows of a batch"),
        ({}, 1, "objective 'beclr' tells images apart: a batch, or micro-batch, must have at least 2"),
    ):
        objective, parts = learner(**settings)
        with pytest.raises(UserError, match=said):
            objective.loss(merge(parts), batch_of(images), KEY, jnp.int32(0))
    with pytest.raises(
        UserError, match=r"makes views of images \[H, W, C\], and the inputs of this data are \[40, 1\]"
    ):
        BECLR().prepare({"input_shape": (40, 1)})


def test_a_stage_learns_from_what_the_run_has_loaded(tiny_run):
    stages = (
        {"name": "first", "duration": 0.5},
        {"name": "second", "duration": 0.5, "overrides": {"objective": "protonet"}, "optimizer": "reset"},
    )
    said = "stage 'second': objective 'protonet' learns from episodes, and the run's 'beclr' from single examples"
    with pytest.raises(UserError, match=said):
        tiny_run("fewshot/glyphs", **{"objective": "beclr", "stages": stages, "train.steps": 4})


def test_stats_are_arrays_of_fixed_shapes():
    """One program for all steps: what a step hands on has the shapes and types that it was given."""
    objective, parts = learner()
    kinds = lambda tree: {name: (leaf.shape, leaf.dtype) for name, leaf in flatten(tree).items()}
    after = jax.eval_shape(lambda: objective.gradients(*parts, batch_of(), KEY, jnp.int32(0))[1])
    assert kinds(after) == kinds(parts.stats)
