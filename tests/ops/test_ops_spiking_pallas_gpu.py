"""The Hopper kernels of spiking neurons, interpreted against the reference, and lowered for CUDA. No GPU is needed, and
none is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.ops import testing
from lissom.ops.interpreting import interpreting
from lissom.ops.spiking import OP, spike_scan
from lissom.ops.spiking.surrogates import SURROGATES
from tests.ops.neurons import whole

LIF = {"decay": 0.9}
BOTH = {**LIF, "current_decay": 0.8, "adaptation_decay": 0.9, "adaptation_step": 0.1}


@pytest.fixture
def no_races(capfd):
    """The interpreter reports a race on stdout and goes on."""
    yield
    assert "RACE" not in capfd.readouterr().out


# (time, neurons), settings, dtype
CASES = {
    "lif": ((5, 2, 128), LIF, np.float32),
    "bfloat16": ((4, 1024), {**LIF, "reset": "soft"}, jnp.bfloat16),
    "adaptive": ((3, 3, 128), {**LIF, "adaptation_decay": 0.9, "adaptation_step": 0.3}, np.float32),
    "synaptic": ((3, 384), {**LIF, "current_decay": 0.7, "reset": "none"}, jnp.float16),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name, no_races):
    shape, settings, dtype = CASES[name]
    (current,) = testing.normal(0, shape, dtype=dtype)
    call = lambda i, current: tuple(jax.tree.leaves(spike_scan(current, **settings, implementation=i)))
    with interpreting():
        testing.check_case(OP, call, {"current": 0.5 + current}, "pallas_gpu", dtype)


def test_gradients_of_numbers_and_of_the_state(no_races):
    current = 0.5 + jax.random.normal(jax.random.key(0), (4, 2, 128))
    rates, settings = {"decay": np.linspace(0.5, 0.95, 128), "threshold": 0.9}, {"attached": True}
    expected = whole("reference", rates, {**settings, "surrogate": "triangle"}, current)
    with interpreting():
        found = whole("pallas_gpu", rates, {**settings, "surrogate": "triangle"}, current)
    np.testing.assert_array_equal(found[0][0], expected[0][0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-5), found, expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((4, 100), jnp.float32, "100 neurons are not a multiple of 128"),
        ((500, 128), jnp.float32, "the states of 500 steps do not fit into shared memory; 446 is the most"),
        ((2**9, 2**22), jnp.bfloat16, "2147483648 elements need offsets"),
        ((4, 128), jnp.float64, "current is float64"),
    ],
)
def test_refusals(shape, dtype, reason):
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(lambda x: spike_scan(x, implementation="pallas_gpu"), jax.ShapeDtypeStruct(shape, dtype))


def lowered(f, *arguments):
    """The program for a machine with an H200, where there is none."""
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    auto = (jax.sharding.AxisType.Auto,)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), auto, abstract_device=h200)):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)


def with_gradient(settings):
    run = lambda x: spike_scan(x, **settings, implementation="pallas_gpu")[0]

    def both(x, dy):
        spikes, pull = jax.vjp(run, x)
        return spikes, pull(dy)

    return both


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "settings", [LIF, {**LIF, "current_decay": 0.8, "adaptation_decay": 0.9, "adaptation_step": 0.1}]
)
def test_lowers_for_an_h200(settings, dtype):
    x = jax.ShapeDtypeStruct((32, 2**20), dtype)
    program = lowered(with_gradient(settings), x, x)
    assert testing.show_lowered(program, "cuda") == {("spiking", "pallas_gpu")}
    assert "lissom_spiking_forward" in program and "lissom_spiking_backward" in program


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_surrogate_lowers(surrogate):
    x = jax.ShapeDtypeStruct((4, 1024), jnp.bfloat16)
    assert "lissom_spiking_backward" in lowered(with_gradient({"surrogate": surrogate, "reset": "soft"}), x, x)
