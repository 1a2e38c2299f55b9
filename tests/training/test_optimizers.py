"""The optimizer chain against values computed by hand."""

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from lissom.training.optimizers import build_optimizer, learning_rate

PLAIN = {
    "name": "sgd",
    "optim_kwargs": {"sgd": {"momentum": 0.0}},
    "learning_rate": 0.5,
    "schedule": "constant",
    "warmup": 0.0,
    "final_fraction": 0.0,
    "weight_decay": 0.0,
    "decay": "kernel$",
    "clip_norm": 0.0,
}


def optim(**changes):
    return ml_collections.ConfigDict({**PLAIN, **changes})


@pytest.mark.parametrize(
    "schedule,want",
    [
        # 10 steps, 2 of them warm-up: 1/2, 1, then the shape over the last 8; step 6 is half-way.
        ("constant", {0: 0.5, 1: 1.0, 6: 1.0}),
        ("linear", {0: 0.5, 1: 1.0, 6: 0.5, 10: 0.0}),
        ("cosine", {0: 0.5, 4: 0.5 * (1 + np.cos(np.pi / 4)), 6: 0.5, 10: 0.0}),
    ],
)
def test_schedules(schedule, want):
    rate = learning_rate(optim(schedule=schedule, warmup=0.2, learning_rate=1.0), 10)
    for step, value in want.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6)


def test_final_fraction():
    rate = learning_rate(optim(schedule="linear", final_fraction=0.2, learning_rate=2.0), 10)
    assert float(rate(10)) == pytest.approx(0.4)
    assert float(rate(5)) == pytest.approx(2.0 * (0.2 + 0.8 * 0.5))


def step(settings, params, gradient):
    tx = build_optimizer(settings, 10)
    updates, _ = tx.update(gradient, tx.init(params), params)
    return updates


def test_decay_is_decoupled_and_by_path():
    """update = -lr (g + decay p) on kernels, -lr g elsewhere: -0.5 (1 + 0.1 x 4) = -0.7 and -0.5."""
    params = {"kernel": jnp.array([4.0]), "bias": jnp.array([4.0])}
    updates = step(optim(weight_decay=0.1), params, {"kernel": jnp.array([1.0]), "bias": jnp.array([1.0])})
    np.testing.assert_allclose([updates["kernel"][0], updates["bias"][0]], [-0.7, -0.5], rtol=1e-6)


def test_clipping_is_by_the_global_norm():
    """(3, 4) has norm 5: clipped to 1 it is (0.6, 0.8), times -0.5."""
    params = {"a": {"kernel": jnp.zeros(1)}, "b": {"kernel": jnp.zeros(1)}}
    updates = step(optim(clip_norm=1.0), params, {"a": {"kernel": jnp.array([3.0])}, "b": {"kernel": jnp.array([4.0])}})
    np.testing.assert_allclose([updates["a"]["kernel"][0], updates["b"]["kernel"][0]], [-0.3, -0.4], rtol=1e-6)


def test_first_step_of_adam_and_lion_is_the_sign():
    params = {"kernel": jnp.zeros(2)}
    for name in ("adamw", "lion"):
        updates = step(optim(name=name, optim_kwargs={}), params, {"kernel": jnp.array([3.0, -0.01])})
        np.testing.assert_allclose(updates["kernel"], [-0.5, 0.5], rtol=1e-4)
