"""The training step and the evaluation step: pure functions of plain dicts."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lissom.models import tallies
from lissom.models.bounds import UnsupportedForm
from lissom.models.variables import Parts, StepSum, Tree, flatten, map_paths, merge, path_name
from lissom.ops import dispatch
from lissom.training.building import Assembly, shardings_of
from lissom.training.errors import UserError
from lissom.training.objectives.base import Objective
from lissom.training.sharding import on_mesh, replicated


def make_step(assembly: Assembly, accumulate: int) -> Callable:
    """step(state without frozen, frozen, batch, key) -> (state, metrics).

    With `accumulate` > 1 the batch is split into that many micro-batches, scanned over inside the one step:
    gradients and metrics are their mean by the objective's `weight`, statistics pass from one to the next. Where the
    module has a `StepSum`, all of them run forward once before.
    """
    objective, graph, optimizer = assembly.objective, assembly.graph, assembly.optimizer
    module = merge(Parts(graph, *(assembly.shapes[name] for name in ("params", "stats", "frozen"))))
    sums = frozenset(path_name(path) for path, _ in nnx.to_flat_state(nnx.state(module, StepSum)))

    def step(state: dict[str, Any], frozen: Any, batch: dict, key: jax.Array):
        key = jax.random.fold_in(key, state["step"])
        gradients = lambda stats, batch, key: objective.gradients(
            graph, state["params"], stats, frozen, batch, key, state["step"]
        )
        if accumulate == 1:
            grads, stats, metrics = gradients(state["stats"], batch, key)
        else:
            micro, keys = _micro_batches(batch, accumulate), jax.random.split(key, accumulate)
            stats = state["stats"]
            if sums:
                forward = lambda stats, batch, key: objective.statistics(
                    graph, state["params"], stats, frozen, batch, key, state["step"]
                )
                stats = _with_sums(sums, stats, forward, micro, keys)
            grads, stats, metrics = _accumulated(objective, gradients, stats, micro, keys)
        stats = _of(sums, jnp.zeros_like, stats)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        return {"params": params, "stats": stats, "opt": opt, "step": state["step"] + 1}, metrics

    return step


def trace_step(assembly: Assembly, accumulate: int, batch: Any, key: jax.Array, traced: Callable[[], None]) -> Any:
    """The step of `make_step` as jax traces it from shapes alone: `.lower().compile()` is what is left to do. What an
    op, a layer or the mesh refuses is a UserError here, before anything of a run is touched. `traced` is called once a
    trace."""
    body = make_step(assembly, accumulate)

    def step(*args):
        traced()
        return body(*args)

    state = {name: leaf for name, leaf in assembly.shapes.items() if name != "frozen"}
    places = (shardings_of(state), replicated(assembly.mesh))
    try:
        with on_mesh(assembly.mesh):
            return jax.jit(step, donate_argnums=0, out_shardings=places).trace(
                state, assembly.shapes["frozen"], batch, key
            )
    except (NotImplementedError, UnsupportedForm, dispatch.RequestError) as refusal:
        raise UserError(str(refusal)) from refusal


def _micro_batches(batch: dict, parts: int) -> dict:
    """With a leading axis of `parts`; each takes every parts-th row, so that rows stay on the device that has them."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def _of(names: frozenset[str], function: Callable, stats: Tree) -> Tree:
    """`stats`, with `function` of those that have the names."""
    return map_paths(lambda name, leaf: function(leaf) if name in names else leaf, stats)


def _with_sums(names: frozenset[str], stats: Tree, forward: Callable, micro: dict, keys: jax.Array) -> Tree:
    """`stats`, in which those that have the names are minus what all micro-batches add to them (`StepSum`)."""
    after, _ = jax.lax.scan(lambda stats, over: (forward(stats, *over), None), stats, (micro, keys))
    found = flatten(after)
    return map_paths(lambda name, leaf: -found[name] if name in names else leaf, stats)


def _accumulated(objective: Objective, gradients: Callable, stats: Any, micro: dict, keys: jax.Array):
    first = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(gradients, stats, first, keys[0])
    zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)

    def body(carry, over):
        total, stats, metrics, weights = carry
        new, stats, values = gradients(stats, *over)
        weight = jnp.asarray(objective.weight(over[0]), jnp.float32)
        add = lambda sums, terms: jax.tree.map(lambda s, t: s + weight.astype(s.dtype) * t, sums, terms)
        return (add(total, new), stats, add(metrics, values), weights + weight), None

    start = (zeros(shapes[0]), stats, zeros(shapes[2]), jnp.zeros(()))
    (total, stats, metrics, weights), _ = jax.lax.scan(body, start, (micro, keys))
    mean = lambda tree: jax.tree.map(lambda leaf: leaf / jnp.maximum(weights, 1e-30).astype(leaf.dtype), tree)
    return mean(total), stats, mean(metrics)


def make_evaluation(assembly: Assembly) -> Callable:
    """evaluate(params, stats, frozen, batch, key) -> {name: (sum, count)}."""

    def evaluate(params, stats, frozen, batch, key):
        module = merge(Parts(assembly.graph, params, stats, frozen))
        return assembly.objective.evaluate(module, batch, key)

    return evaluate


def mean_over(batches: Iterable[dict[str, tuple]]) -> dict[str, float]:
    """Sums and counts of many batches -> {name: mean}; a name that was counted nowhere is left out. Each batch is
    waited for, so that at most one is in flight."""
    totals: tallies.Totals = {}
    for sums in batches:
        tallies.add(totals, sums)
    return {name: mean for name, (mean, _) in tallies.means(totals).items()}
