"""The TPU kernels of spiking neurons, interpreted against the reference. No TPU is needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.ops import testing
from lissom.ops.interpreting import interpreting
from lissom.ops.spiking import OP, pallas_tpu, spike_scan
from tests.ops.neurons import whole

LIF = {"decay": 0.9}
COLUMNS = np.linspace(0.5, 0.95, 128).astype(np.float32)
EACH = np.linspace(0.1, 0.9, 11 * 128, dtype=np.float32).reshape(11, 128)

# (time, neurons), settings, dtype
CASES = {
    "lif": ((5, 2, 128), LIF, np.float32),
    "bfloat16": ((5, 2, 128), {**LIF, "reset": "soft"}, jnp.bfloat16),
    "axes_of_64": ((3, 2, 3, 64), {**LIF, "attached": True, "surrogate": "triangle"}, np.float32),
    "adaptive": ((4, 3, 128), {**LIF, "adaptation_decay": 0.9, "adaptation_step": 0.3}, np.float32),
    "synaptic": ((4, 384), {**LIF, "current_decay": 0.7, "reset": "none"}, np.float32),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name):
    shape, settings, dtype = CASES[name]
    (current,) = testing.normal(0, shape, dtype=dtype)
    call = lambda i, current: tuple(jax.tree.leaves(spike_scan(current, **settings, implementation=i)))
    with interpreting():
        testing.check_case(OP, call, {"current": 0.5 + current}, "pallas_tpu", dtype)


@pytest.mark.parametrize(
    "decay",
    [
        0.8,
        COLUMNS,
        np.full((3, 1), 0.7, np.float32),
        np.linspace(0.1, 0.9, 11 * 128, dtype=np.float32).reshape(11, 128),
    ],
    ids=["scalar", "columns", "rows", "each"],
)
def test_gradients_of_numbers_and_of_the_state(decay, monkeypatch):
    """Several blocks of rows, of which the last is not full."""
    monkeypatch.setattr(pallas_tpu, "BLOCK", 8 * 128 * 4)
    rows = 11 if decay is COLUMNS or np.ndim(decay) == 0 or np.shape(decay)[0] == 11 else 3
    current = 0.5 + jax.random.normal(jax.random.key(0), (4, rows, 128))
    rates, settings = {"decay": decay, "threshold": 0.9}, {"attached": True, "surrogate": "sigmoid"}
    expected = whole("reference", rates, settings, current)
    with interpreting():
        found = whole("pallas_tpu", rates, settings, current)
    np.testing.assert_array_equal(found[0][0], expected[0][0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-5), found, expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((4, 100), jnp.float32, "100 neurons are not a multiple of 128"),
        ((4000, 128), jnp.float32, "4000 steps do not fit into VMEM; 473 is the most"),
        ((4, 128), jnp.float16, "current is float16"),
    ],
)
def test_refusals(shape, dtype, reason):
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(lambda x: spike_scan(x, implementation="pallas_tpu"), jax.ShapeDtypeStruct(shape, dtype))
