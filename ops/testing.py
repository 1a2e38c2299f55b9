"""The check that every implementation of every op passes, for tests and as the gate before a benchmark.

Results and gradients are compared with the op's reference in float64. The error may be at most twice that of
the naive form (the same reference, in the dtype under test) plus 1e-5: a ratio, so that it means the same in
float32 and bfloat16.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lissom.ops import dispatch

FLOOR = 1e-5
RATIO = 2.0


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


def compare(name: str, truth: np.ndarray, naive: np.ndarray, ours: np.ndarray, ratio: float = RATIO) -> None:
    """AssertionError unless `ours` is as near to `truth` as the module says, with `ratio` times the naive error."""
    truth, naive, ours = (np.asarray(x, np.float64) for x in (truth, naive, ours))
    assert ours.shape == truth.shape, f"{name}: shape {ours.shape}, not {truth.shape}"
    assert not np.isnan(truth).any(), f"{name}: the reference itself gives NaN"
    assert not np.isnan(ours).any(), f"{name}: {np.isnan(ours).sum()} of {ours.size} entries are NaN"
    infinite = np.isinf(truth)
    assert (ours[infinite] == truth[infinite]).all(), f"{name}: infinities differ from the reference"
    if infinite.all():
        return
    allowed = ratio * np.abs(naive[~infinite] - truth[~infinite]).max() + FLOOR
    error = np.abs(ours[~infinite] - truth[~infinite]).max()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
