"""The check that every implementation of every op passes, for tests and as the gate before a benchmark.

Results and gradients are compared with the op's reference in float64. The largest error of an array may be at most
twice that of the naive form (the same reference, in the dtype under test) plus 1e-5: a ratio, so that it means the same
in float32 and bfloat16. Rows (along the last axis) are judged apart as well: one bound for all would let small rows,
such as the means over many keys at the end of a causal attention, be wrong by several percent. A row's error may be
three times as large, against the largest naive error among the 64 rows whose size (largest entry) is nearest, since
that of few entries is small by chance, and a backward pass that starts from the rounded output loses a bit or two in
rows where much cancels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lissom.ops import dispatch

FLOOR = 1e-5
RATIO = 2.0
LIKE_SIZED = 64
ROWS = 3.0

PLATFORMS = ("cpu", "cuda", "tpu")
FACTS = ("equals", "interpreted", "lowers", "compiles")


class Fact(NamedTuple):
    """Something that a test has shown. `fact`: "equals" (results and gradients are the reference's, run on the
    platform), "interpreted" (the same, of a kernel for the platform that was interpreted on a CPU), "lowers" and
    "compiles" (for the platform, described, without it)."""

    op: str
    implementation: str
    platform: str
    fact: str


shown: list[Fact] = []
"""By the test that runs; the test run gathers them into docs/support.json (tests/conftest.py)."""


def show(op: str, implementation: str, platform: str, fact: str) -> None:
    """Notes a fact, to be called behind the assertion that shows it."""
    if platform not in PLATFORMS or fact not in FACTS:
        raise ValueError(f"a fact is one of {FACTS} on one of {PLATFORMS}, not {fact!r} on {platform!r}")
    shown.append(Fact(op, implementation, platform, fact))


def show_equal(op: str, implementation: str) -> None:
    """Notes that results were the reference's, where the test runs."""
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    home = dispatch.HOMES.get(implementation, here)
    show(op, implementation, home, "equals" if home == here else "interpreted")


def show_lowered(text: str, platform: str, fact: str = "lowers") -> set[tuple[str, str]]:
    """Notes the implementations in the text of a lowered (or compiled) program; returns them as (op, name)."""
    found = dispatch.chosen_in(text)
    for op, name in found:
        show(op, name, platform, fact)
    return found


def normal(seed: int, *shapes: tuple[int, ...], dtype=np.float32) -> list[np.ndarray]:
    """Fresh independent standard normal arrays that are exact in `dtype` and in every wider one."""
    rng = np.random.default_rng(seed)
    return [np.array(jnp.asarray(rng.standard_normal(shape), dtype)) for shape in shapes]


def check_case(
    op: dispatch.Op,
    call: Callable[..., Any],
    arrays: dict[str, np.ndarray],
    implementation: str,
    dtype: Any,
    seed: int = 0,
    transform: Callable[[Callable], Callable] = lambda f: f,
) -> None:
    """Checks `call(implementation, **arrays)`, a function of float arrays whose results are arrays with any
    pytree.

    All `arrays` are cast to `dtype` and differentiated; masks and options are closed over by `call`. Results
    may hold -inf, where the reference has to have it too, and nothing may be NaN. Everything runs under
    `jit`; `transform` wraps the function under test further (`jax.checkpoint`). AssertionError names the
    result or gradient that is off.
    """
    arrays = {name: np.asarray(jnp.asarray(array, dtype)) for name, array in arrays.items()}

    def with_gradients(run: Callable, exact: Any, cotangents):
        def both(arrays, cotangents):
            out, pull = jax.vjp(run, arrays)
            weights = jax.tree.map(lambda o, c: jnp.where(jnp.isneginf(o), 0, c).astype(o.dtype), out, cotangents)
            return out, pull(weights)[0]

        given = {name: jnp.asarray(a, exact) for name, a in arrays.items()}
        return jax.tree.map(np.asarray, jax.jit(both)(given, cotangents))

    shapes = jax.eval_shape(lambda a: call("reference", **a), arrays)
    drawn = normal(seed + 1, *(s.shape for s in jax.tree.leaves(shapes)), dtype=dtype)
    cotangents = jax.tree.unflatten(jax.tree.structure(shapes), drawn)

    naive = with_gradients(lambda a: call("reference", **a), dtype, cotangents)
    with jax.enable_x64(True):
        truth = with_gradients(lambda a: call("reference", **a), np.float64, cotangents)
    with dispatch.record() as choices:
        ours = with_gradients(transform(lambda a: call(implementation, **a)), dtype, cotangents)
    ran = {choice.implementation for choice in choices if choice.op == op.name}
    assert ran == {implementation}, f"asked {op.name} for {implementation}, ran {ran}"
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(truth)]
    for path, *leaves in zip(paths, *map(jax.tree.leaves, (truth, naive, ours))):
        compare(f"{op.name} {implementation} {path}", *leaves)
    show_equal(op.name, implementation)


def check_forward(
    op: dispatch.Op, call: Callable[..., Any], arrays: dict[str, np.ndarray], implementation: str, dtype: Any
) -> None:
    """`check_case` without gradients, for ops of inference."""
    run = lambda name, kind: jax.tree.map(
        np.asarray, jax.jit(lambda a: call(name, **a))({n: jnp.asarray(x, kind) for n, x in arrays.items()})
    )
    with jax.enable_x64(True):
        truth = run("reference", np.float64)
    naive = run("reference", dtype)
    with dispatch.record() as choices:
        ours = run(implementation, dtype)
    ran = {choice.implementation for choice in choices if choice.op == op.name}
    assert ran == {implementation}, f"asked {op.name} for {implementation}, ran {ran}"
    for number, leaves in enumerate(zip(*map(jax.tree.leaves, (truth, naive, ours)))):
        compare(f"{op.name} {implementation} result {number}", *leaves)
    show_equal(op.name, implementation)


def compare(name: str, truth: np.ndarray, naive: np.ndarray, ours: np.ndarray, ratio: float = RATIO) -> None:
    """AssertionError unless `ours` is as near to `truth` as the module says, with `ratio` times the naive error."""
    truth, naive, ours = (np.asarray(x, np.float64) for x in (truth, naive, ours))
    assert ours.shape == truth.shape, f"{name}: shape {ours.shape}, not {truth.shape}"
    assert not np.isnan(truth).any(), f"{name}: the reference itself gives NaN"
    assert not np.isnan(ours).any(), f"{name}: {np.isnan(ours).sum()} of {ours.size} entries are NaN"
    infinite = np.isinf(truth)
    assert (ours[infinite] == truth[infinite]).all(), f"{name}: infinities differ from the reference"
    rows = lambda x: np.where(infinite, 0, x).reshape(-1, x.shape[-1] if x.ndim else 1)
    truth, naive, ours = rows(truth), rows(naive), rows(ours)
    if not truth.size:
        return
    naive_error, error, size = (np.abs(x).max(1) for x in (naive - truth, ours - truth, truth))
    allowed = np.minimum(ratio * naive_error.max() + FLOOR, ROWS * ratio * _among_like_sized(naive_error, size) + FLOOR)
    worst = np.argmax(error / allowed)
    assert error[worst] <= allowed[worst], (
        f"{name}: error {error[worst]:.3g}, allowed {allowed[worst]:.3g} "
        f"(row {worst} of {len(error)}, whose largest entry is {size[worst]:.3g})"
    )


def _among_like_sized(errors: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[rows]: the largest of the errors of the `LIKE_SIZED` rows around each in the order of size."""
    if len(errors) <= LIKE_SIZED:
        return np.full_like(errors, errors.max())
    order = np.argsort(sizes, kind="stable")
    largest = np.lib.stride_tricks.sliding_window_view(errors[order], LIKE_SIZED).max(1)
    at = np.clip(np.arange(len(errors)) - LIKE_SIZED // 2, 0, len(largest) - 1)
    found = np.empty_like(errors)
    found[order] = largest[at]
    return found
