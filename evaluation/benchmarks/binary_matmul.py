"""Problems of the op `binary_matmul`: signs that are packed already, beside the products of the same signs in float32
and int8, which lie unpacked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lissom.evaluation.benchmarks.problem import InProcess, Oracle, Problem, this_platform
from lissom.evaluation.ceilings import Work
from lissom.ops import binary_matmul as op
from lissom.ops.binary_matmul import binary_matmul, pack_signs, reference
from lissom.ops.binary_matmul.cases import REAL, TINY, Case
from lissom.ops.binary_matmul.packing import unpack_signs

OP = op.OP

CPU = ("gemv", "m64_1024", "square_2048", "conv_3x3_256")
ACCELERATOR = ("gemv", "m64_1024", "square_8192", "conv_3x3_256_batch")

CHECKED = 64


def problems(platform: str, tiny: bool = False) -> list[Problem]:
    """What is measured on a platform ("cpu", "gpu", "tpu")."""
    cases = TINY if tiny else {name: REAL[name] for name in (CPU if platform == "cpu" else ACCELERATOR)}
    return [_problem(name, case) for name, case in cases.items()]


def _problem(name: str, case: Case) -> Problem:
    words = -(-case.k // 32)
    # Bits are counted by no unit whose rate is a ceiling: what must take time is that words and results move.
    work = Work(0, 4 * ((case.m + case.n) * words + case.m * case.n), 0, "int8")
    return Problem(
        op=OP.name,
        name=name,
        setting={"shape": f"M{case.m} K{case.k} N{case.n}", "dtype": "1 bit", "passes": "forward"},
        make_inputs=functools.partial(_make_inputs, case),
        ours=lambda name: lambda x, w: (binary_matmul(x, w, length=case.k, implementation=name),),
        implementations=tuple(name for name in OP.runs_on(this_platform()) if name != "reference"),
        references={"f32_dot": _product(case, jnp.float32), "int8_dot": _product(case, jnp.int8)},
        work=work,
        oracle=_oracle(case),
    )


def _make_inputs(case: Case, key: jax.Array):
    keys = jax.random.split(key)
    return tuple(pack_signs(jax.random.normal(k, (rows, case.k))) for k, rows in zip(keys, (case.m, case.n)))


def _product(case: Case, dtype) -> InProcess:
    """The product that XLA has for a dtype, of signs that are unpacked before the clock runs."""
    wide = jnp.promote_types(dtype, jnp.int32) if dtype == jnp.int8 else dtype
    dot = lambda x, w: (jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=wide),)
    return InProcess(dot, lambda *bits: tuple(unpack_signs(part, case.k, dtype) for part in bits))


def _oracle(case: Case) -> Oracle:
    """The reference, on some rows and columns. All of it are integers, so that nothing but equality passes."""
    some = lambda size: np.unique(np.linspace(0, size - 1, min(size, CHECKED)).astype(int))
    rows, columns = some(case.m), some(case.n)

    def compute(inputs, dtype):
        x, w = (jnp.asarray(np.asarray(bits)[chosen]) for bits, chosen in zip(inputs, (rows, columns)))
        return [np.asarray(jax.jit(functools.partial(reference.run, length=case.k))(x, w))]

    whole = (len(rows), len(columns)) == (case.m, case.n)
    note = None if whole else f"checked on {len(rows)} of {case.m} rows and {len(columns)} of {case.n} columns"
    return Oracle(compute, lambda results: [np.asarray(results[0])[np.ix_(rows, columns)]], note)
