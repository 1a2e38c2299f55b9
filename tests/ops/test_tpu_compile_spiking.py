"""Spiking neurons, compiled by the real TPU compiler for machines that are described and not there. libtpu is the extra
`tpu`; the second command of .ci/run has the environment that this takes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from lissom.ops import testing
from lissom.ops.spiking import spike_scan
from lissom.ops.spiking.cases import REAL
from tests.ops.test_tpu_compile_decode import MACHINES, devices

pytestmark = pytest.mark.tpu_compile

# What the compiler has to bring into another order first: channels of 64 do not fill a register.
COPIED = {"conv"}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", ["gpu", "gpu_soft", "conv", "adaptive", "synaptic"])
def test_forward_and_backward_compile_and_copy_nothing(name, machine):
    case, one = REAL[name], SingleDeviceSharding(devices(machine)[0])
    dtype = np.float32 if name == "adaptive" else jnp.bfloat16
    current = jax.ShapeDtypeStruct((case.t, *case.neurons), dtype, sharding=one)
    rate = jax.ShapeDtypeStruct(case.neurons[-1:], np.float32, sharding=one)

    def with_gradients(current, threshold, cotangent):
        run = lambda current, threshold: spike_scan(
            current, threshold=threshold, **case.settings, implementation="pallas_tpu"
        )[0]
        spikes, pull = jax.vjp(run, current, threshold)
        return spikes, pull(cotangent)

    compiled = jax.jit(with_gradients).lower(current, rate, current).compile()
    program = compiled.as_text()
    assert testing.show_lowered(program, "tpu", "compiles") == {("spiking", "pallas_tpu")}
    assert "spiking_forward" in program and "spiking_backward" in program
    if name not in COPIED:
        # States and numbers of neurons, but nothing over time.
        whole = math.prod(current.shape) * np.dtype(dtype).itemsize
        assert compiled.memory_analysis().temp_size_in_bytes < whole / 2
