"""Problems of the op `quantized_matmul`: integers by integers, and few and many rows by weights of few bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lissom.evaluation.benchmarks.problem import InProcess, InWorker, Oracle, Problem, this_platform
from lissom.evaluation.ceilings import Work
from lissom.ops import quantized_matmul as op
from lissom.ops.quantized_matmul import quantized_matmul, reference
from lissom.ops.quantized_matmul.cases import REAL, TINY, Case, arrays
from lissom.ops.quantized_matmul.decoding import halves, in_order, is_quantized

OP = op.OP

CPU = ("int8_2048", "gemv_int8", "gemv_int4", "m16_int4", "m512_int8")
ACCELERATOR = ("int8_8192", "fp8_8192", "gpu_gemv_int8", "gpu_gemv_int4", "gpu_m16_int4")

CHECKED_CHANNELS = 64
CHECKED_ROWS = 64
FEW_ROWS = 16
"""With more, torch's products with packed weights are no reference: they take seconds."""


def problems(platform: str, tiny: bool = False) -> list[Problem]:
    """What is measured on a platform ("cpu", "gpu", "tpu")."""
    if tiny:
        return [_problem(name, case) for name, case in TINY.items()]
    return [_problem(name, REAL[name]) for name in (CPU if platform == "cpu" else ACCELERATOR)]


def _problem(name: str, case: Case) -> Problem:
    scaled = is_quantized(jnp.dtype(case.x))
    size = 4 if scaled else jnp.dtype(case.x).itemsize
    # x, codes, scales and y, each once.
    moved = case.m * case.k * jnp.dtype(case.x).itemsize + case.n * case.k * case.bits // 8
    moved += 4 * case.n * case.groups + 4 * case.m * scaled + size * case.m * case.n
    # The ceilings have no rate of float8, whose products take as long as those of int8 where there are any.
    dtype = "int8" if scaled else case.x
    return Problem(
        op=OP.name,
        name=name,
        setting={
            "shape": f"M{case.m} K{case.k} N{case.n}",
            "x": case.x,
            "codes": case.codes,
            "group": case.group or case.k,
        },
        make_inputs=functools.partial(arrays, case),
        ours=lambda name: lambda *inputs: (_product(case, inputs, name),),
        implementations=tuple(name for name in OP.runs_on(this_platform()) if name != "reference"),
        references=_references(case),
        work=Work(2 * case.m * case.k * case.n, moved, 0, dtype),
        oracle=_oracle(case),
    )


def _product(case: Case, inputs, implementation: str | None):
    x, codes, scale, *x_scale = inputs
    return quantized_matmul(
        x, codes, scale, bits=case.bits, x_scale=x_scale[0] if x_scale else None, implementation=implementation
    )


def _references(case: Case) -> dict[str, InProcess | InWorker]:
    """`dense`: the product with the numbers times scales, which lie there in the float type of x (float32, or bfloat16
    on accelerators, for x of few bits). Torch's have no scales of int8, and take bfloat16 for few rows: other problems,
    which are not checked."""
    rows = lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))
    found: dict[str, InProcess | InWorker] = {
        "dense": InProcess(lambda x, w: (rows(x, w),), functools.partial(_dense, case), same=_float(case) == "float32")
    }
    if case.x == "int8" and case.codes == "int8":
        found["torch_int_mm"] = InWorker("torch_int_mm", same=False)
    if not is_quantized(jnp.dtype(case.x)) and case.m <= FEW_ROWS and case.codes in ("int4", "int8"):
        if case.codes == "int4":
            found["torch_packed_bf16"] = InWorker("torch_weight_packed", {"bits": 4}, same=False)
        elif case.groups == 1:
            found["torch_packed_bf16"] = InWorker("torch_weight_packed", {"bits": 8}, same=False)
    return found


def _float(case: Case) -> str:
    if not is_quantized(jnp.dtype(case.x)):
        return case.x
    return "float32" if this_platform() == "cpu" else "bfloat16"


def _dense(case: Case, x, codes, scale, x_scale=None):
    @jax.jit
    def made(x, codes, scale, x_scale):
        numbers = in_order(halves(codes, case.bits), case.bits).astype(jnp.float32)
        w = (numbers.reshape(case.n, case.groups, -1) * scale[..., None]).reshape(case.n, case.k)
        x = x if x_scale is None else x.astype(jnp.float32) * x_scale
        return x.astype(_float(case)), w.astype(_float(case))

    return made(x, codes, scale, x_scale)


def _oracle(case: Case) -> Oracle:
    """The reference on some rows and channels, which don't depend on each other."""
    some = lambda size, most: np.unique(np.linspace(0, size - 1, min(size, most)).astype(int))
    rows, channels = some(case.m, CHECKED_ROWS), some(case.n, CHECKED_CHANNELS)

    def compute(inputs, dtype):
        x, codes, scale, *x_scale = (np.asarray(a) for a in inputs)
        wide = np.float64 if dtype == np.float64 else np.float32
        x = x[rows] if is_quantized(x.dtype) else x[rows].astype(dtype)
        of_x = jnp.asarray(x_scale[0][rows].astype(wide)) if x_scale else None
        given = (jnp.asarray(x), jnp.asarray(codes[channels]), jnp.asarray(scale[channels].astype(wide)), of_x)
        return [np.asarray(jax.jit(functools.partial(reference.run, bits=case.bits))(*given))]

    whole = len(rows) == case.m and len(channels) == case.n
    note = None if whole else f"checked on {len(rows)} of {case.m} rows and {len(channels)} of {case.n} channels"
    return Oracle(compute, lambda results: [np.asarray(results[0])[np.ix_(rows, channels)]], note)
