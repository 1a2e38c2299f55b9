"""The objective of in-context learners on logits that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.models.ffn import NO_AUX
from lissom.training.objectives.in_context import InContext

LOG3 = np.log(3)


class Said:
    """A network that says class 1 with odds 3 : 1 : 1 wherever inputs are 1, and nothing where they are 0."""

    def __call__(self, inputs, *, train=False, key=None):
        return inputs[..., :1] * jnp.array([0.0, LOG3, 0.0]), NO_AUX


BATCH = {
    "inputs": jnp.array([[[0.0], [1], [1], [1]], [[1], [1], [0], [0]], [[1], [1], [1], [1]]]),
    "labels": jnp.array([[0, 1, 1, 1], [1, 0, 2, 0], [1, 1, 1, 1]]),
    "mask": jnp.array([1.0, 1, 0]),
}


def test_judged_by_hand():
    """Cross-entropies: nothing said log 3; class 1 said, and right, -log(3/5); and wrong, -log(1/5). Of equal scores
    the first class is meant. The third sequence only fills up."""
    sums = InContext().judge(Said(), BATCH, jax.random.key(0))
    found = {name: float(total / count) for name, (total, count) in sums.items()}
    right, wrong = -np.log(3 / 5), -np.log(1 / 5)
    losses = [(LOG3 + 3 * right) / 4, (right + wrong + 2 * LOG3) / 4]
    # Sequence 1: all four right. Sequence 2: 1 right, 0 wrong, 2 wrong (0 is meant), 0 right.
    assert found == pytest.approx(
        {"loss": np.mean(losses), "accuracy": (1 + 2 / 4) / 2, "first_accuracy": 1.0, "last_accuracy": 1.0}
    )
    assert all(count == 2 for _, count in sums.values())
    worse = BATCH | {"labels": BATCH["labels"].at[0, 0].set(2).at[1, -1].set(1)}
    sums = InContext().judge(Said(), worse, jax.random.key(0))
    assert [float(sums[name][0]) for name in ("first_accuracy", "last_accuracy")] == [1.0, 1.0]


def test_the_loss_is_that_of_every_position():
    few = {name: array[:2] for name, array in BATCH.items()}
    loss, metrics = InContext().loss(Said(), few, jax.random.key(0), 0)
    sums = InContext().judge(Said(), few, jax.random.key(0))
    assert float(loss) == pytest.approx(float(sums["loss"][0]) / 2)
    assert float(metrics["accuracy"]) == 0.75 and float(metrics["last_accuracy"]) == 1.0


def test_a_layer_may_add_a_loss():
    class Weighing(Said):
        def __call__(self, inputs, **given):
            return super().__call__(inputs)[0], {"losses": {"balance": jnp.array([0.5, 0.25])}, "metrics": {}}

    plain, more = (InContext().loss(net(), BATCH, jax.random.key(0), 0)[0] for net in (Said, Weighing))
    assert float(more - plain) == pytest.approx(0.75)
