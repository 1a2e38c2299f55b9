"""softmax, compiled by the real TPU compiler for machines that are described and not there. libtpu is the extra `tpu`;
the second command of .ci/run has the environment that this takes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from lissom.ops import dispatch, testing
from lissom.ops.softmax import softmax
from lissom.ops.softmax.cases import REAL
from tests.ops.test_tpu_compile_decode import MACHINES, devices

pytestmark = pytest.mark.tpu_compile

# name: shape, axis
CASES = {name: (case.shape, -1) for name, case in REAL.items()} | {
    "sublanes": ((64, 200, 256), -2),
    "long_sublanes": ((50257, 256), 0),
    "llama3_vocabulary": ((64, 128256), -1),
    "vector": ((1000,), 0),
}
# The compiler lays parameters of such shapes with other axes last, and brings them into order first.
COPIED = {"vit_b16", "vector"}


def with_gradient(x, dy, axis):
    y, pull = jax.vjp(lambda x: softmax(x, axis, implementation="pallas_tpu"), x)
    return y, pull(dy)[0]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_compile_and_copy_nothing(name, dtype, machine):
    shape, axis = CASES[name]
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(devices(machine)[0]))
    compiled = jax.jit(lambda x, dy: with_gradient(x, dy, axis)).lower(x, x).compile()
    program = compiled.as_text()
    assert testing.show_lowered(program, "tpu", "compiles") == {("softmax", "pallas_tpu")}
    assert "softmax_forward" in program and "softmax_backward" in program
    # Each array in v5e's VMEM is no temporary to the analysis, so the text is asked too.
    sizes = {",".join(map(str, s)) for s in (shape, shape[::-1], (1, *shape))}
    copies = [line for line in program.splitlines() if " copy(" in line and any(f"[{s}]" in line for s in sizes)]
    if name not in COPIED:
        assert not copies
        assert compiled.memory_analysis().temp_size_in_bytes < math.prod(shape) * np.dtype(dtype).itemsize / 4


@pytest.mark.parametrize("machine", MACHINES)
def test_compiles_over_four_chips_and_under_vmap(machine):
    mesh = Mesh(np.array(devices(machine)), ("data",))
    x = jax.ShapeDtypeStruct((8, 512, 1024), np.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    with dispatch.partition(mesh, batch="data"):
        run = jax.vmap(lambda x, dy: with_gradient(x, dy, -1), in_axes=1)
        program = jax.jit(run).lower(x, x).compile().as_text()
    assert testing.show_lowered(program, "tpu", "compiles") == {("softmax", "pallas_tpu")}
    assert "all-gather" not in program
