"""Noise as strong as a condition: what is drawn, what is judged, who is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.models.cnn import ConvNet
from lissom.models.hypernetworks.hypernetwork import Hypernetwork
from lissom.training.config import load_recipe, overridden
from lissom.training.errors import UserError
from lissom.training.objectives.base import cross_entropy
from lissom.training.objectives.conditional_noise import ConditionalNoise, noise_of

FACTS = {"input_shape": (40, 1), "classes": 10}


def plain():
    return ConvNet(**FACTS, channels=(4, 4), kernel=3, rngs=nnx.Rngs(0))


def hypernetwork():
    return Hypernetwork(**FACTS, hidden=(4, 8), network="cnn", network_size="tiny", rngs=nnx.Rngs(0))


def batch(rows=64, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    inputs = jax.random.normal(keys[0], (rows, 40, 1))
    return {"inputs": inputs, "labels": jax.random.randint(keys[1], (rows,), 0, 10), "mask": jnp.ones(rows)}


class Listening(nnx.Module):
    """Keeps what it is given; its logits are the first numbers of the inputs."""

    def __call__(self, inputs, condition=None, *, train=False, key=None):
        self.seen.append((np.asarray(inputs), None if condition is None else np.asarray(condition), train))
        aux = {"losses": {"balance": jnp.array(0.25)}, "metrics": {"density": jnp.array(0.5)}}
        return inputs[:, :10, 0], aux


class Unaware(Listening):
    def __call__(self, inputs, *, train=False, key=None):
        return super().__call__(inputs, train=train, key=key)


@pytest.fixture(params=[Listening, Unaware])
def heard(request, monkeypatch):
    seen = []
    monkeypatch.setattr(Listening, "seen", seen, raising=False)
    return request.param(), seen


def test_training_noise_is_as_strong_as_the_condition_of_the_group(heard):
    """40 x 400 numbers of each group: their deviation is largest x gamma to a percent or two."""
    network, seen = heard
    given = batch(1600)
    loss, metrics = ConditionalNoise(largest=3.0, groups=4).loss(network, given, jax.random.key(5), 0)
    noisy, condition, train = seen[0]
    assert train
    noise = noisy - np.asarray(given["inputs"])
    deviations = noise.reshape(4, -1).std(1)
    conditions = np.asarray(jax.random.uniform(jax.random.split(jax.random.key(5), 3)[0], (4, 1)))
    np.testing.assert_allclose(deviations, 3 * conditions[:, 0], rtol=0.03)
    assert np.ptp(conditions) > 0.3
    assert (condition is None) if isinstance(network, Unaware) else (condition == conditions).all()
    logits = jnp.asarray(noisy[:, :10, 0])
    assert loss == pytest.approx(float(cross_entropy(logits, given["labels"]).mean()) + 0.25, rel=1e-5)
    assert metrics["accuracy"] == (logits.argmax(-1) == given["labels"]).mean()
    # Another step, another key: other noise.
    ConditionalNoise(largest=3.0).loss(network, given, jax.random.key(6), 0)
    assert np.abs(seen[1][0] - noisy).max() > 0.1


def test_one_condition_for_all(heard):
    network, seen = heard
    given, objective = batch(1601), ConditionalNoise(largest=2.0, groups=4, condition=0.5)  # no groups to divide by
    objective.loss(network, given, jax.random.key(5), 0)
    assert (seen[0][0] - np.asarray(given["inputs"])).std() == pytest.approx(1.0, rel=0.02)
    sums = objective.judge(network, given, None)
    assert len(seen) == 2 and set(sums) == {"accuracy", "loss", "density", "accuracy_at/0.5", "loss_at/0.5"}
    assert sums["loss"] == sums["loss_at/0.5"]
    for _, condition, _ in seen:
        assert condition is None if isinstance(network, Unaware) else (condition.tolist() == [[0.5]])


def test_judged_at_every_condition_by_hand(heard):
    """Rows that only fill up count nothing; means over the grid; the same z at every condition."""
    network, seen = heard
    given = batch(8) | {"mask": jnp.array([1.0] * 6 + [0, 0])}
    sums = ConditionalNoise(largest=4.0, grid=(0.0, 0.5, 1.0)).judge(network, given, jax.random.key(1))
    z = np.asarray(noise_of(given["inputs"]))
    losses, hits = [], []
    for (noisy, condition, train), at in zip(seen, (0.0, 0.5, 1.0), strict=True):
        assert not train and (condition is None or condition.tolist() == [[at]])
        np.testing.assert_allclose(noisy, given["inputs"] + 4 * at * z, atol=1e-5)
        logits = jnp.asarray(noisy[:, :10, 0])
        losses.append(float(cross_entropy(logits, given["labels"])[:6].sum()))
        hits.append(int((logits.argmax(-1) == given["labels"])[:6].sum()))
        assert sums[f"loss_at/{at:g}"] == (pytest.approx(losses[-1], rel=1e-5), 6)
        assert sums[f"accuracy_at/{at:g}"] == (hits[-1], 6)
    assert sums["loss"] == (pytest.approx(np.mean(losses), rel=1e-5), 6)
    assert sums["accuracy"][0] == pytest.approx(np.mean(hits), rel=1e-5)
    assert sums["density"] == (pytest.approx(3.0), 6)  # 0.5 of six examples, not of three times six


def test_the_noise_of_an_example_is_its_own():
    """In batches of any size and order the same, normal, and of two examples that differ in one number another."""
    inputs = batch(500)["inputs"]
    z = noise_of(inputs)
    np.testing.assert_array_equal(noise_of(inputs[::-1][100:107]), z[::-1][100:107])
    assert abs(float(z.mean())) < 0.02 and float(z.std()) == pytest.approx(1, rel=0.02)
    other = noise_of(inputs[:1].at[0, 7, 0].add(1e-3))
    assert np.abs(np.corrcoef(np.ravel(other), np.ravel(z[0]))[0, 1]) < 0.6
    swapped = noise_of(inputs[:1, ::-1])
    assert np.abs(swapped - z[:1]).max() > 0.1


@pytest.mark.parametrize("make", [plain, hypernetwork])
def test_a_network_is_judged_alike_in_whole_and_in_parts(make):
    network, given, objective = make(), batch(), ConditionalNoise()
    whole = objective.judge(network, given, jax.random.key(0))
    parts = [
        objective.judge(network, {name: value[at : at + 16] for name, value in given.items()}, jax.random.key(9))
        for at in range(0, 64, 16)
    ]
    for name, (value, count) in whole.items():
        assert float(sum(part[name][0] for part in parts)) == pytest.approx(float(value), rel=1e-4) and count == 64
    assert bool(objective.notes(network)) == (make is hypernetwork)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"largest": 0.0}, "conditional_noise.largest=0.0 must be above 0"),
        ({"groups": 0}, "conditional_noise.groups=0 must be at least 1"),
        ({"grid": ()}, "conditional_noise.grid=() must hold one number or more, each in [0, 1]"),
        ({"grid": (0.5, 1.5)}, "conditional_noise.grid=(0.5, 1.5) must hold one number or more, each in [0, 1]"),
        ({"condition": 2.0}, "conditional_noise.condition=2.0 must lie in [0, 1]"),
    ],
)
def test_settings_out_of_bounds(settings, sentence):
    with pytest.raises(ValueError) as error:
        ConditionalNoise(**settings)
    assert sentence in str(error.value)


def test_groups_that_do_not_divide_are_one_sentence(tmp_path):
    from lissom.train import train

    config = load_recipe("configs/vision/mnist1d_hypernetwork.py:tiny")
    for changes, rows in (([], 16), ([("optim.accumulate", 4)], 4)):
        changes = [("mesh.data", 1), ("objective_kwargs.conditional_noise.groups", 5), *changes]
        with pytest.raises(UserError, match=rf"groups=5 must divide the {rows} examples of a batch") as error:
            train(overridden(config, changes), tmp_path / "run")
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["plain", "plain, one condition", "hypernetwork, one condition"])
def test_floor_and_ceiling_are_trained_and_measured(mode, tiny_run):
    """The grid changes what is judged, and a condition what is trained."""
    from lissom.eval import evaluate

    changes = {"data.kwargs.mnist1d.test_size": 100, "data.kwargs.mnist1d.train_size": 100}
    if mode.startswith("plain"):
        changes |= {"model.name": "cnn", "model.code": None, "model.residual": None, "model.predicted": None}
        changes |= {"model.network_kwargs": None, "model.head_init": None}
    at = "objective_kwargs.conditional_noise."
    changes |= {at + "condition": 0.25} if "one" in mode else {at + "grid": (0.25, 1.0)}
    result, workdir = tiny_run("vision/mnist1d_hypernetwork", **changes)
    points = {name for name in result if name.startswith("loss_at/")}
    assert points == ({"loss_at/0.25"} if "one" in mode else {"loss_at/0.25", "loss_at/1"})
    assert result["loss"] == pytest.approx(sum(result[name] for name in points) / len(points), rel=1e-4)
    (row,) = evaluate([workdir])
    assert {m.name: m.value for m in row.measurements}["loss"] == pytest.approx(result["loss"], rel=1e-4)
    assert bool(row.notes) == mode.startswith("hyper")
