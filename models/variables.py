"""The three kinds of variable a module may hold, and the one split of a module into plain dicts.

    Param       trained: nnx.Param
    Stat        carried from step to step without gradient: batch statistics, router bias, ranges, EMA copies, memories
    Frozen      neither differentiated nor donated, saved once: a teacher, the base of LoRA

`nnx.BatchStat` and qwix's `QuantStat` count as `Stat`. Anything else that holds an array (an `Rngs`, a constant
array, a stateful dropout) is an error at the split: random keys, caches and states are arguments, not attributes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

# Logical axes are metadata for training/sharding.py; flax must not apply them while a module is built. Who makes a
# parameter imports its kind from here.
nnx.use_eager_sharding(False)

Tree = dict[Any, Any]


Param = nnx.Param


class Stat(nnx.Variable):
    """State that training carries from step to step without a gradient."""


class StepSum(Stat):
    """A sum over all micro-batches of a step that each of them needs: `total(own)`, to be called once in training.

    Between steps it is 0. Where a step has micro-batches, training/step.py runs all of them forward first, which adds
    up, and hands the negative sum to those that are differentiated; so the sign says which of the two is running. Where
    it has one, its own addend is the sum.
    """

    def total(self, own: jax.Array) -> jax.Array:
        """The sum of the step's addends, as far as it is known; adds `own` where sums are being taken."""
        found, own = self[...], jax.lax.stop_gradient(own)
        is_known = (found < 0).any()
        self[...] = jax.numpy.where(is_known, found, found + own)
        return jax.numpy.where(is_known, -found, found + own)


class Frozen(nnx.Variable):
    """An array that is neither trained nor updated."""


def is_stat(_path: tuple, value: Any) -> bool:
    """nnx filter for every variable that counts as a `Stat`."""
    kind = getattr(value, "type", type(value))
    # QuantStat is known by name: importing qwix for a comparison would cost every run its start-up time.
    return isinstance(kind, type) and (
        issubclass(kind, Stat | nnx.BatchStat) or any(base.__name__ == "QuantStat" for base in kind.__mro__)
    )


class Parts(NamedTuple):
    """A module as its static graph and three pure dicts."""

    graph: nnx.GraphDef
    params: Tree
    stats: Tree
    frozen: Tree


def split(module: nnx.Module) -> Parts:
    """Module -> (graph, params, stats, frozen); raises ValueError where the module holds any other array."""
    try:
        graph, *states = nnx.split(module, nnx.Param, is_stat, Frozen)
    except ValueError as error:
        raise ValueError(
            f"{type(module).__name__} holds an array that is neither nnx.Param, Stat nor Frozen (pass random keys "
            f"and caches as arguments, build constant tables in __call__): {error}"
        ) from error
    return Parts(graph, *(nnx.to_pure_dict(state) for state in states))


def merge(parts: Parts) -> nnx.Module:
    """The inverse of `split`; to be called inside the transformation that uses the module."""
    return nnx.merge(parts.graph, parts.params, parts.stats, parts.frozen)


def stats_of(module: nnx.Module) -> Tree:
    """The module's current `Stat` values as a pure dict."""
    return nnx.to_pure_dict(nnx.state(module, is_stat))


def logical_axes(module: nnx.Module) -> dict[tuple, tuple]:
    """{path: logical axis names} of every variable; a missing name is an error that says which parameter."""
    axes = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        names = variable.get_metadata().get("out_sharding")
        if names is None:
            names = (None,) * len(jax.numpy.shape(variable.get_value()))
            if isinstance(variable, nnx.Param) and names:
                raise ValueError(f"parameter {'/'.join(map(str, path))} names no logical axes")
        axes[path] = tuple(names)
    return axes


def path_name(path: tuple) -> str:
    """('blocks', 3, 'mixer', 'q', 'kernel') -> 'blocks/3/mixer/q/kernel'."""
    return "/".join(str(part) for part in path)


def flatten(tree: Tree, prefix: tuple = ()) -> dict[str, Any]:
    """Nested dict -> {'blocks/3/mixer/q/kernel': leaf}, in sorted order of the names."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, (*prefix, key)))
        else:
            flat[path_name((*prefix, key))] = value
    return dict(sorted(flat.items()))


def map_paths(function: Any, tree: Tree, prefix: tuple = ()) -> Tree:
    """Nested dict -> nested dict with leaf = function(path name, leaf)."""
    return {
        key: map_paths(function, value, (*prefix, key))
        if isinstance(value, dict)
        else function(path_name((*prefix, key)), value)
        for key, value in tree.items()
    }


def freeze(module: nnx.Module) -> nnx.Module:
    """Turns every variable of the module into `Frozen`, in place, and returns it."""
    return replace_variables(module, lambda variable, axes: Frozen(variable[...], **axes))


def repeat(module: nnx.Module, count: int) -> nnx.Module:
    """Gives every variable of the module a leading axis of `count` copies, in place, and returns it."""

    def repeated(variable: nnx.Variable, axes: dict) -> nnx.Variable:
        named = {name: (None, *names) for name, names in axes.items() if names is not None}
        return type(variable)(jnp.repeat(variable[...][None], count, 0), **named)

    return replace_variables(module, repeated)


def replace_variables(module: nnx.Module, function: Any) -> nnx.Module:
    """Puts function(variable, {"out_sharding": its logical axes} where it names them) in the place of every variable,
    in place, and returns the module."""
    for _, node in list(nnx.iter_graph(module)):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                if isinstance(value, nnx.Variable):
                    axes = {key: axes for key, axes in value.get_metadata().items() if key == "out_sharding"}
                    setattr(node, name, function(value, axes))
    return module
