"""The grouped matmul, compiled by the real TPU compiler for machines that are described and not there. libtpu is the
extra `tpu`; the second command of .ci/run has the environment that this takes."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from lissom.ops import testing
from lissom.ops.grouped_matmul import grouped_matmul
from lissom.ops.grouped_matmul.cases import REAL, Case
from tests.ops.test_tpu_compile_decode import MACHINES, devices

pytestmark = pytest.mark.tpu_compile

V5E, V5P = MACHINES
BF16, F32 = jnp.bfloat16, np.float32
SMALL = {"odd": Case(1000, 300, 200, 5, "random", "no size is a multiple of 128")}


def with_gradient(x, w, sizes, dy, activation):
    f = lambda x, w: grouped_matmul(x, w, sizes, activation=activation, implementation="pallas_tpu")
    y, pull = jax.vjp(f, x, w)
    return y, pull(dy)


def compiled(name, dtype, machine, activation=None):
    case = (REAL | SMALL)[name]
    one = SingleDeviceSharding(devices(machine)[0])
    shapes = ((case.m, case.k), (case.g, case.k, case.n), (case.g,), (case.m, case.n))
    types = (dtype, dtype, np.int32, dtype)
    args = [jax.ShapeDtypeStruct(shape, kind, sharding=one) for shape, kind in zip(shapes, types)]
    return args, jax.jit(lambda *args: with_gradient(*args, activation)).lower(*args).compile()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", ["qwen3_up", "qwen3_down", "mixtral_up"])
def test_forward_and_backward_compile_and_copy_nothing(name, machine):
    args, made = compiled(name, BF16, machine)
    program = made.as_text()
    assert testing.show_lowered(program, "tpu", "compiles") == {("grouped_matmul", "pallas_tpu")}
    assert program.count('custom_call_target="tpu_custom_call"') == 3
    assert "grouped_matmul_rows" in program and "grouped_matmul_sums" in program
    memory = made.memory_analysis()
    assert memory.temp_size_in_bytes < memory.output_size_in_bytes / 100
    # Each array in v5e's VMEM is no temporary to the analysis, so the text is asked too.
    sizes = {",".join(map(str, shape)) for a in args if a.dtype == BF16 for shape in (a.shape, a.shape[::-1])}
    moved = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (?:copy|transpose|fusion)\(", program)
    assert not sizes & set(moved)
    tables = max((math.prod(int(n) for n in shape.split(",") if n) for shape in moved), default=0)
    assert tables < args[0].size / 16


@pytest.mark.parametrize(
    ("name", "dtype", "activation", "machine"),
    [
        ("odd", BF16, None, V5E),
        ("odd", F32, "gelu", V5P),
        ("cpu_decode", BF16, "silu", V5E),
        ("cpu_random", F32, "relu", V5E),
        ("qwen3_up", F32, None, V5P),
    ],
)
def test_other_sizes_and_types_compile(name, dtype, activation, machine):
    _, made = compiled(name, dtype, machine, activation)
    assert testing.show_lowered(made.as_text(), "tpu", "compiles") == {("grouped_matmul", "pallas_tpu")}


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_an_activation_compiles_into_the_kernel(activation):
    case = REAL["qwen3_up"]
    one = SingleDeviceSharding(devices(V5E)[0])
    shapes = (((case.m, case.k), BF16), ((case.g, case.k, case.n), BF16), ((case.g,), np.int32))
    args = [jax.ShapeDtypeStruct(*of, sharding=one) for of in shapes]
    f = lambda *args: grouped_matmul(*args, activation=activation, implementation="pallas_tpu")
    made = jax.jit(f).lower(*args).compile()
    assert testing.show_lowered(made.as_text(), "tpu", "compiles") == {("grouped_matmul", "pallas_tpu")}
    memory = made.memory_analysis()
    assert memory.temp_size_in_bytes < memory.output_size_in_bytes / 100
