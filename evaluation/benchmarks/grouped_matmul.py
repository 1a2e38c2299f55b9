"""Problems of the op `grouped_matmul`: the experts of a mixture, forward and with gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lissom.evaluation.benchmarks.problem import InProcess, InWorker, Oracle, Problem, this_platform
from lissom.evaluation.ceilings import Work
from lissom.ops import grouped_matmul as op
from lissom.ops.grouped_matmul import grouped_matmul, reference
from lissom.ops.grouped_matmul.cases import REAL, TINY, Case, sizes

OP = op.OP

CPU = ("cpu_equal", "cpu_random", "cpu_zipf", "cpu_decode")
ACCELERATOR = ("qwen3_up", "qwen3_up_zipf", "qwen3_down", "mixtral_up")
BACKWARD = ("cpu_random", "cpu_zipf", "qwen3_up")

CHECKED_COLUMNS = 64


def problems(platform: str, tiny: bool = False) -> list[Problem]:
    """What is measured on a platform ("cpu", "gpu", "tpu")."""
    if tiny:
        return [_problem(name, case, "float32", backward) for name, case in TINY.items() for backward in (False, True)]
    dtype = "float32" if platform == "cpu" else "bfloat16"
    names = CPU if platform == "cpu" else ACCELERATOR
    forward = [_problem(name, REAL[name], dtype, False) for name in names]
    return [*forward, *(_problem(name, REAL[name], dtype, True) for name in names if name in BACKWARD)]


def _problem(name: str, case: Case, dtype: str, backward: bool) -> Problem:
    size = jnp.dtype(dtype).itemsize
    used = np.count_nonzero(sizes(case))
    # Every array once: x, y, the matrices of groups that have rows; with gradients dy, dx and dw as well.
    moved = case.m * (case.k + case.n) + used * case.k * case.n
    rows = int(sizes(case).sum())
    work = Work(2 * rows * case.k * case.n * (3 if backward else 1), size * moved * (2 if backward else 1), 0, dtype)
    return Problem(
        op=OP.name,
        name=f"{name}_backward" if backward else name,
        setting={
            "shape": f"G{case.g} M{case.m} K{case.k} N{case.n}",
            "groups": case.spread,
            "dtype": dtype,
            "passes": "forward and backward" if backward else "forward",
        },
        make_inputs=functools.partial(_make_inputs, case, dtype, backward),
        ours=lambda name: _passes(functools.partial(grouped_matmul, implementation=name), backward),
        implementations=_timed(),
        references=_references(case, backward),
        work=work,
        oracle=_oracle(case, backward),
    )


def _timed() -> tuple[str, ...]:
    """All but the reference; `ragged_dot` stands among the references where it is not the default."""
    default = OP.defaults.get(this_platform(), OP.defaults["default"])
    return tuple(
        name for name in OP.runs_on(this_platform()) if name in default or name not in ("reference", "ragged_dot")
    )


def _make_inputs(case: Case, dtype: str, backward: bool, key: jax.Array):
    """x, w, sizes, and for gradients dy."""
    keys = jax.random.split(key, 3)
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.float32).astype(dtype)
    # Weights as a layer has them, so that results are of the size of x.
    w = normal(keys[1], case.g, case.k, case.n) / jnp.asarray(case.k**0.5, dtype)
    inputs = (normal(keys[0], case.m, case.k), w, jnp.asarray(sizes(case)))
    return (*inputs, normal(keys[2], case.m, case.n)) if backward else inputs


def _passes(product, backward: bool):
    def both(x, w, of, dy):
        y, pull = jax.vjp(lambda x, w: product(x, w, of), x, w)
        return y, *pull(dy)

    return both if backward else lambda x, w, of: (product(x, w, of),)


def _references(case: Case, backward: bool) -> dict[str, InProcess | InWorker]:
    found: dict[str, InProcess | InWorker] = {
        "jax_ragged_dot": InProcess(_passes(jax.lax.ragged_dot, backward)),
        "torch": InWorker("torch_grouped_mm", {"backward": backward}),
    }
    if case.m % case.g == 0:
        # The yardstick: another problem, where the groups are equal, as one batched product.
        cut = lambda x: x.reshape(case.g, -1, x.shape[1])
        equal = lambda x, w, of: jnp.einsum("gmk,gkn->gmn", cut(x), w).reshape(case.m, case.n)
        found["equal_groups"] = InProcess(_passes(equal, backward), same=case.spread == "equal")
    return found


def _oracle(case: Case, backward: bool) -> Oracle:
    """The reference: columns of w don't depend on each other. With gradients dx does, on all of them: small problems
    are checked whole, of large ones y and dw."""
    whole = case.m * case.k * case.n * case.g < 1e8
    columns = np.unique(np.linspace(0, case.n - 1, case.n if whole else min(case.n, CHECKED_COLUMNS)).astype(int))

    def part(results):
        y, *gradients = (np.asarray(x) for x in results)
        y = y[:, columns]
        if not backward:
            return [y]
        dx, dw = gradients
        return [y, dx, dw[:, :, columns]] if whole else [y, dw[:, :, columns]]

    def compute(inputs, dtype):
        x, w, of, *dy = (np.asarray(a) for a in inputs)
        product = lambda x, w, of: reference.run(x, w, of, form="rows", activation=None, dtype=dtype)
        given = [jnp.asarray(x.astype(dtype)), jnp.asarray(w[:, :, columns].astype(dtype)), jnp.asarray(of)]
        given += [jnp.asarray(a[:, columns].astype(dtype)) for a in dy]
        found = [np.asarray(a) for a in jax.jit(_passes(product, backward))(*given)]
        return found if whole or not backward else [found[0], found[2]]

    if whole:
        return Oracle(compute, part)
    left_out = ", and no gradient of x" if backward else ""
    return Oracle(compute, part, f"checked on {len(columns)} of {case.n} columns{left_out}")
