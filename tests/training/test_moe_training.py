"""A mixture of experts in the training step: the balancing loss over devices and micro-batches is that of one batch."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from lissom.models.variables import StepSum, flatten, path_name
from lissom.training import sharding
from lissom.training.building import assemble, fresh_state
from lissom.training.config import load_recipe, overridden
from lissom.training.step import make_step

TOKENS = np.random.default_rng(0).integers(0, 64, (16, 8)).astype(np.int32)
BATCH = {
    "inputs": TOKENS,
    "labels": TOKENS[:, ::-1].copy(),
    "weights": np.ones((16, 8), np.float32),
    "mask": np.ones(16, np.float32),
}


@functools.cache
def one_step(gate: str, settings: tuple, devices: int, accumulate: int, expert: int = 1):
    """({name: parameter after a step of gradient descent}, metrics, {name: statistic})."""
    moe = {"gate": gate, "gate_kwargs": {gate: dict(settings)}, "experts": 4, "k": 1}
    given = [
        ("optim.name", "sgd"),
        ("optim.learning_rate", 1.0),
        ("optim.accumulate", accumulate),
        ("mesh.data", devices // expert),
        ("mesh.expert", expert),
    ]
    given += [("model.ffn", "moe"), ("model.ffn_kwargs", {"moe": moe}), ("model.depth", 1)]
    config = overridden(load_recipe("configs/language/recall_lm.py:tiny"), given)
    mesh = sharding.make_mesh(config.mesh)
    assembly = assemble(config, {"vocab_size": 64}, 3, mesh)
    state = fresh_state(assembly, jax.random.key(0))
    frozen = state.pop("frozen")
    batch = sharding.put_batch(BATCH, sharding.batch_shardings(mesh, BATCH))
    with sharding.on_mesh(mesh):
        state, metrics = jax.jit(make_step(assembly, accumulate))(state, frozen, batch, jax.random.key(1))
    host = lambda tree: {name: np.asarray(leaf) for name, leaf in flatten(tree).items()}
    return host(state["params"]), {name: float(value) for name, value in metrics.items()}, host(state["stats"])


def test_balance_over_ranks_and_micro_batches_is_that_of_the_batch():
    whole = one_step("top_k", (("balance", 1.0),), 1, 1)
    for devices, accumulate, expert in ((1, 4, 1), (8, 2, 4)):
        parts = one_step("top_k", (("balance", 1.0),), devices, accumulate, expert)
        assert parts[1]["balance"] == pytest.approx(whole[1]["balance"], abs=1e-5)
        for name, value in whole[0].items():
            np.testing.assert_allclose(parts[0][name], value, atol=2e-5, err_msg=f"{devices} {accumulate} {name}")
        assert all(not value.any() for name, value in parts[2].items() if name.endswith("seen"))


def test_balance_within_sequences_is_another_loss():
    """A sequence has few tokens, so that its own shares are less even than those of the batch."""
    whole = one_step("top_k", (("balance", 1.0),), 1, 1)
    within = one_step("top_k", (("balance", 1.0), ("balance_sequences", 1)), 1, 1)
    assert within[1]["balance"] > whole[1]["balance"] + 0.01


def test_the_bias_moves_once_a_micro_batch():
    once = one_step("sigmoid_bias", (("rate", 0.125),), 1, 1)[2]
    often = one_step("sigmoid_bias", (("rate", 0.125),), 1, 4)[2]
    name = next(name for name in once if name.endswith("bias"))
    assert set(np.abs(once[name])) <= {0.0, 0.125} and np.abs(once[name]).any()
    assert np.abs(often[name]).max() <= 4 * 0.125 and not np.array_equal(once[name], often[name])


def test_a_sum_of_the_step_is_found_by_its_kind():
    from lissom.models.moe.layer import MoE

    moe = MoE(8, experts=2, rngs=nnx.Rngs(0))
    assert [path_name(path) for path, _ in nnx.to_flat_state(nnx.state(moe, StepSum))] == ["gate/seen"]
