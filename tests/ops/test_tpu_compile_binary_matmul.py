"""binary_matmul, compiled by the real TPU compiler for machines that are described and not there. libtpu is the extra
`tpu`; the second command of .ci/run has the environment that this takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from lissom.ops import dispatch, testing
from lissom.ops.binary_matmul import binary_matmul
from lissom.ops.binary_matmul.cases import REAL
from tests.ops.test_tpu_compile_decode import MACHINES, devices

pytestmark = pytest.mark.tpu_compile

# m, k, n
CASES = {name: (case.m, case.k, case.n) for name, case in REAL.items()} | {
    "overhanging": (1000, 5000, 700),
    "one_word": (40, 20, 30),
}


def bits(rows: int, length: int, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, -(-length // 32)), jnp.uint32, sharding=sharding)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", CASES)
def test_compiles(name, machine):
    m, k, n = CASES[name]
    here = SingleDeviceSharding(devices(machine)[0])
    run = jax.jit(lambda x, w: binary_matmul(x, w, length=k, implementation="pallas_tpu"))
    compiled = run.lower(bits(m, k, here), bits(n, k, here)).compile()
    assert testing.show_lowered(compiled.as_text(), "tpu", "compiles") == {("binary_matmul", "pallas_tpu")}


@pytest.mark.parametrize("machine", MACHINES)
def test_compiles_over_four_chips_and_under_vmap(machine):
    mesh = Mesh(np.array(devices(machine)), ("data",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    x = jax.ShapeDtypeStruct((8, 5, 64, 32), jnp.uint32, sharding=split)
    with dispatch.partition(mesh, batch="data"):
        run = lambda x, w: binary_matmul(x, w, length=1024, implementation="pallas_tpu")
        program = jax.jit(jax.vmap(run, in_axes=(1, None))).lower(x, bits(96, 1024, whole)).compile().as_text()
    assert testing.show_lowered(program, "tpu", "compiles") == {("binary_matmul", "pallas_tpu")}
    assert "all-gather" not in program
