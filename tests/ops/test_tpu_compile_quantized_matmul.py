"""The product with few bits, compiled by the real TPU compiler for machines that are described and not there. libtpu is
the extra `tpu`; the second command of .ci/run has the environment that this takes."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from lissom.ops import testing
from lissom.ops.quantized_matmul import quantized_matmul
from lissom.ops.quantized_matmul.cases import REAL, Case, arrays
from tests.ops.test_tpu_compile_decode import MACHINES, devices

pytestmark = pytest.mark.tpu_compile

V5E, V5P = MACHINES

# Numbers of x in the type that TPUs compute with, and what REAL has not.
CASES = {
    **{name: REAL[name] for name in ("int8_8192", "gpu_gemv_int8", "gpu_gemv_int4", "gpu_m16_int4", "m512_int8")},
    "m512_int4": Case(512, 4096, 11008, "int4", "bfloat16", 128, "a prompt"),
    "int4_int8": Case(512, 4096, 11008, "int4", "int8", 128, "activations of 8 bits"),
    "fp8": REAL["fp8_8192"],
    "fp8_e5m2": Case(16, 4096, 11008, "float8_e5m2", "bfloat16", 128, "weights of float8"),
    "groups_of_32": Case(16, 4096, 4096, "int8", "bfloat16", 32, "as GGUF has them"),
    "odd": Case(1000, 300, 200, "int8", "float32", None, "no size is a multiple of 128"),
    "odd_groups": Case(33, 192, 200, "int4", "float32", 64, "half a register and a half"),
}


@pytest.mark.parametrize(
    ("name", "machine"), [*((name, V5E) for name in CASES), *((name, V5P) for name in ("int8_8192", "gpu_m16_int4"))]
)
def test_compiles_and_copies_no_codes(name, machine):
    case = CASES[name]
    one = SingleDeviceSharding(devices(machine)[0])
    shapes = jax.eval_shape(lambda: arrays(case, jax.random.key(0)))
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one) for a in shapes]

    def f(x, codes, scale, x_scale=None):
        return quantized_matmul(x, codes, scale, bits=case.bits, x_scale=x_scale, implementation="pallas_tpu")

    made = jax.jit(f).lower(*args).compile()
    program = made.as_text()
    assert testing.show_lowered(program, "tpu", "compiles") == {("quantized_matmul", "pallas_tpu")}
    assert program.count('custom_call_target="tpu_custom_call"') == 1 and "quantized_matmul" in program
    if case.k % 128:
        return
    # Scales are turned, scales of x laid in registers of 128, and with 4 bits x is cut into halves.
    moved = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (?:copy|transpose|fusion|convert|bitcast-convert)\(", program)
    codes = ",".join(map(str, args[1].shape))
    assert codes not in moved
    memory = made.memory_analysis()
    rows = 4 * case.m * (case.k * (case.bits == 4) + 128 * (len(args) > 3))
    assert memory.temp_size_in_bytes <= 8 * args[2].size + 2 * rows + 2**20


def test_refused_where_it_cannot_be():
    x, codes, scale = jax.eval_shape(lambda: arrays(CASES["odd"], jax.random.key(0)))
    with pytest.raises(NotImplementedError, match="x is float16"):
        jax.eval_shape(
            lambda *a: quantized_matmul(*a, implementation="pallas_tpu"),
            jax.ShapeDtypeStruct(x.shape, jnp.float16),
            codes,
            scale,
        )
