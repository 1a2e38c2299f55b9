"""Problems of the op `softmax`: how often each form walks over memory, and how long it takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lissom.evaluation.benchmarks.problem import InProcess, InWorker, Oracle, Problem, this_platform
from lissom.evaluation.ceilings import Work
from lissom.evaluation.passes import SOFTMAX_ONLINE, SOFTMAX_THREE_PASS, SOFTMAX_TWO_PASS, passes
from lissom.ops import softmax as op
from lissom.ops.softmax import reference, softmax
from lissom.ops.softmax.cases import REAL, TINY, Case

OP = op.OP

CPU = ("square_4k", "vit_b16", "gpt2_vocabulary", "router_64", "long_row")
ACCELERATOR = ("rows_32k", "gpt2_vocabulary", "long_row")

WALKS = {
    "three_pass": passes(SOFTMAX_THREE_PASS, "i") + 1,
    "two_pass": passes(SOFTMAX_TWO_PASS, "i") + 1,
    "online": passes(SOFTMAX_ONLINE, "i") + 1,
    # A block of rows stays in fast memory: it is read once, whatever the cascade.
    "one_pass": 2,
    "pallas_tpu": 2,
    "pallas_gpu": 2,
}
"""Reads and writes of main memory: the passes over the row, and one write."""

CHECKED_ROWS = 64


def problems(platform: str, tiny: bool = False) -> list[Problem]:
    """What is measured on a platform ("cpu", "gpu", "tpu")."""
    if tiny:
        return [_problem(name, case, "float32", backward) for name, case in TINY.items() for backward in (False, True)]
    dtype = "float32" if platform == "cpu" else "bfloat16"
    names = CPU if platform == "cpu" else ACCELERATOR
    found = [_problem(name, REAL[name], dtype, False) for name in names]
    return [*found, _problem(names[0], REAL[names[0]], dtype, True)]


def _problem(name: str, case: Case, dtype: str, backward: bool) -> Problem:
    size, count = jnp.dtype(dtype).itemsize, int(np.prod(case.shape))
    # x and y; with gradients, which one program may compute on the way, dy and dx too.
    work = Work(0, size * count * (4 if backward else 2), count, dtype)
    jax_nn = InProcess(_passes(lambda x: jax.nn.softmax(x, -1), backward))
    references = {"jax_nn": jax_nn} if backward else {"jax_nn": jax_nn, "torch": InWorker("torch_softmax")}
    return Problem(
        op=OP.name,
        name=f"{name}_backward" if backward else name,
        setting={
            "shape": "x".join(map(str, case.shape)),
            "dtype": dtype,
            "passes": "forward and backward" if backward else "forward",
        },
        make_inputs=functools.partial(_make_inputs, case.shape, dtype, backward),
        ours=lambda name: _passes(lambda x: softmax(x, implementation=name), backward),
        implementations=OP.runs_on(this_platform()),
        references=references,
        work=work,
        oracle=_oracle(case, backward),
        walks={} if backward else WALKS,
    )


def _make_inputs(shape, dtype, backward: bool, key: jax.Array):
    keys = jax.random.split(key, 1 + backward)
    return tuple((4 * jax.random.normal(k, shape, jnp.float32)).astype(dtype) for k in keys)


def _passes(forward, backward: bool):
    def both(x, cotangent):
        y, pull = jax.vjp(forward, x)
        return y, *pull(cotangent)

    return both if backward else lambda x: (forward(x),)


def _oracle(case: Case, backward: bool) -> Oracle:
    """The reference, on some rows: rows don't depend on each other."""
    length = case.shape[-1]
    rows = int(np.prod(case.shape)) // length
    checked = np.unique(np.linspace(0, rows - 1, min(rows, CHECKED_ROWS)).astype(int))
    pick = lambda x: np.asarray(x).reshape(rows, length)[checked]

    def compute(inputs, dtype):
        part = [jnp.asarray(pick(x).astype(dtype)) for x in inputs]
        return [np.asarray(x) for x in jax.jit(_passes(lambda x: reference.run(x, axis=1), backward))(*part)]

    note = None if len(checked) == rows else f"checked on {len(checked)} of {rows} rows"
    return Oracle(compute, lambda results: [pick(x) for x in results], note)
