"""The stack of layers: the one place that stacks, scans, rematerialises and carries statistics, caches and keys.

Mode "loop" holds `depth` layers; mode "scan" holds one layer for each place of the repeating pattern, whose variables
have a leading axis of depth / len(pattern). Paths are written unstacked (`blocks/3/mixer/q/kernel`) wherever they
are saved, matched or shown: `unstack_layers` and `stack_layers` convert exactly.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from lissom.models.context import Context
from lissom.models.mixers.caches import repeated
from lissom.models.shapes import BATCH
from lissom.models.variables import Parts, Tree, merge, split, stats_of

LOOP_UP_TO = 12  # layers: beyond it, tracing and compiling the unrolled form costs more than the scan's slices


class Stack(nnx.List):
    """`y, caches, aux = stack(x, context, caches=None, key=None)` over layers `y, cache, aux = layer(x, context,
    cache, key)`; aux losses are summed over the layers, aux metrics stacked over the layers that report them, in their
    order."""

    def __init__(
        self,
        make: Sequence[Callable[[nnx.Rngs], nnx.Module]],
        *,
        depth: int,
        mode: str | None = None,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        if mode not in (None, "loop", "scan"):
            raise ValueError(f"model.stack is {mode!r}: it must be 'loop', 'scan' or None (loop up to {LOOP_UP_TO})")
        if depth < 1 or depth % len(make):
            raise ValueError(f"depth={depth} must be a positive multiple of the {len(make)} layers of the pattern")
        mode = mode or ("loop" if depth <= LOOP_UP_TO else "scan")
        # One key a layer, drawn the same way in both modes: the same seed gives the same network.
        keys = jax.random.split(rngs.params(), depth)
        if mode == "loop":
            super().__init__([make[i % len(make)](nnx.Rngs(keys[i])) for i in range(depth)])
        else:
            super().__init__([_stacked(build, keys[place :: len(make)]) for place, build in enumerate(make)])
        self.mode, self.depth, self.remat = mode, depth, remat

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> list[dict]:
        """Zeroed caches: one a layer, or (scan) one for each place of the pattern with a leading axis."""
        groups = self.depth // len(self)
        lead = () if self.mode == "loop" else (groups,)
        zeros = lambda shape: jnp.zeros((*lead, *shape.shape), shape.dtype)
        return [jax.tree.map(zeros, layer.mixer.init_cache(batch, length, dtype)) for layer in self]

    def branch(self, caches: list[dict], ways: int, more: int) -> list[dict]:
        """Caches for `ways` continuations of each sequence, of at most `more` tokens each; see the mixers."""

        def of(layer: nnx.Module, cache: dict) -> dict:
            if hasattr(layer.mixer, "branch"):
                return layer.mixer.branch(cache, ways, more)
            return repeated(cache, layer.mixer.cache_axes, ways, more)

        return self.each(of, caches)

    def each(self, function: Callable, *caches: list[dict]) -> list[dict]:
        """function(layer, cache, ...) of every layer's caches, whichever way they lie."""
        one = function if self.mode == "loop" else lambda layer, *cache: jax.vmap(partial(function, layer))(*cache)
        return [one(layer, *cache) for layer, *cache in zip(self, *caches, strict=True)]

    def __call__(self, x: jax.Array, context: Context, caches: list | None = None, key: jax.Array | None = None):
        keys = None if key is None else jax.random.split(key, self.depth)
        parts = [split(layer) for layer in self]
        run = self._loop if self.mode == "loop" else self._scan
        x, caches, aux, stats = run(parts, x, context, caches, keys)
        for layer, new in zip(self, stats, strict=True):
            if new:
                nnx.update(layer, new)
        losses = {name: jnp.sum(value) for name, value in aux["losses"].items()}
        return x, caches, {"losses": losses, "metrics": aux["metrics"]}

    def _loop(self, parts, x, context, caches, keys):
        auxes, stats, new_caches = [], [], []
        for i, part in enumerate(parts):
            call = _layer_call(part.graph, self.remat)
            x, cache, aux, new = call(
                *part[1:],
                x,
                context,
                None if caches is None else caches[i],
                None if keys is None else keys[i],
            )
            auxes.append(aux)
            stats.append(new)
            new_caches.append(cache)
        return x, None if caches is None else new_caches, _joined(auxes), stats

    def _scan(self, parts, x, context, caches, keys):
        period, groups = len(parts), self.depth // len(parts)
        calls = [_layer_call(part.graph, self.remat) for part in parts]

        def body(carry, sliced):
            # Caches ride in the carry and are updated in place: as scan outputs a decode step copies all of them.
            x, caches = carry
            index, variables, keys = sliced
            auxes, stats = [], []
            for place, call in enumerate(calls):
                cache = None
                if caches is not None:
                    cache = jax.tree.map(
                        lambda c: jax.lax.dynamic_index_in_dim(c, index, keepdims=False), caches[place]
                    )
                x, cache, aux, new = call(*variables[place], x, context, cache, None if keys is None else keys[place])
                if caches is not None:
                    caches = list(caches)
                    caches[place] = jax.tree.map(
                        lambda c, u: jax.lax.dynamic_update_index_in_dim(c, u, index, 0), caches[place], cache
                    )
                auxes.append(aux)
                stats.append(new)
            return (x, caches), (_joined(auxes), stats)

        if keys is not None:
            keys = keys.reshape(groups, period, *keys.shape[1:])
        over = (jnp.arange(groups), [part[1:] for part in parts], keys)
        (x, caches), (aux, stats) = jax.lax.scan(body, (x, caches), over)
        aux = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), aux)
        return x, caches, aux, stats


def _joined(auxes: Sequence[dict]) -> dict:
    """Stacks what layers report. Layers of a pattern may report different things."""
    stacked = {}
    for kind in ("losses", "metrics"):
        names = dict.fromkeys(name for aux in auxes for name in aux[kind])
        stacked[kind] = {name: jnp.stack([aux[kind][name] for aux in auxes if name in aux[kind]]) for name in names}
    return stacked


def batch_split(x: jax.Array) -> jax.Array:
    """Says that the rows of x lie where the batch does. Without it the compiler may follow a parameter's `fsdp` split
    into the activations, and then copies whole arrays between two layouts. Off a mesh it is the identity."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or "fsdp" not in mesh.axis_names:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(tuple(name for name in BATCH if name in mesh.axis_names)))


def _layer_call(graph: nnx.GraphDef, remat: bool) -> Callable:
    """The layer as a pure function; a module must be merged inside what jax.checkpoint and scan trace."""

    def call(params, stats, frozen, x, context, cache, key):
        layer = merge(Parts(graph, params, stats, frozen))
        y, cache, aux = layer(batch_split(x), context, cache, key)
        return y, cache, aux, stats_of(layer)

    return jax.checkpoint(call) if remat else call


def _stacked(build: Callable[[nnx.Rngs], nnx.Module], keys: jax.Array) -> nnx.Module:
    """A layer whose variables have a leading axis, one slice a key."""
    graph = split(nnx.eval_shape(lambda: build(nnx.Rngs(0)))).graph
    layer = merge(Parts(graph, *jax.vmap(lambda key: tuple(split(build(nnx.Rngs(key)))[1:]))(keys)))
    for _, variable in nnx.to_flat_state(nnx.state(layer)):
        axes = variable.get_metadata().get("out_sharding")
        if axes is not None:
            variable.set_metadata(out_sharding=("layers", *axes))
    return nnx.merge(*nnx.split(layer))


def stacks(module: nnx.Module) -> dict[tuple, tuple[int, int]]:
    """{path of a scanned stack: (depth, length of its pattern)}; empty where nothing is scanned."""
    return {
        path: (node.depth, len(node))
        for path, node in nnx.iter_graph(module)
        if isinstance(node, Stack) and node.mode == "scan"
    }


def unstack_layers(tree: Any, where: dict[tuple, tuple[int, int]]) -> Any:
    """Every dict inside `tree` (a state, an optimizer state) that has the stacks at their paths, with one entry a
    layer: layer g x period + p is slice g of place p."""

    def unstack(places: Tree, depth: int, period: int) -> Tree:
        return {
            i: jax.tree.map(operator.itemgetter(i // period), places[i % period])
            for i in range(depth)
            if i % period in places
        }

    return _convert(tree, where, unstack)


def stack_layers(tree: Any, where: dict[tuple, tuple[int, int]]) -> Any:
    """The inverse of `unstack_layers`."""

    def stack(layers: Tree, depth: int, period: int) -> Tree:
        return {
            p: jax.tree.map(lambda *leaves: _stack(leaves), *(layers[i] for i in range(p, depth, period)))
            for p in range(period)
            if p in layers
        }

    return _convert(tree, where, stack)


def _stack(leaves: tuple) -> Any:
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return jnp.stack(leaves)


def _convert(tree: Any, where: dict, function: Callable) -> Any:
    """Applies `function` to the nodes at the paths of `where`, in every dict of the tree that has such a path; looks
    into tuples, lists and named tuples, where optimizer states keep their copies of the parameters."""
    if isinstance(tree, dict):
        found = [path for path in where if _get(tree, path) is not None]
        if found:
            for path in found:
                tree = _set(tree, path, function(_get(tree, path), *where[path]))
            return tree
        return {key: _convert(value, where, function) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_convert(value, where, function) for value in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(_convert(value, where, function) for value in tree)
    return tree


def _get(tree: Any, path: tuple) -> Any:
    for key in path:
        if not isinstance(tree, dict) or key not in tree:
            return None
        tree = tree[key]
    return tree if isinstance(tree, dict) else None


def _set(tree: Tree, path: tuple, value: Any) -> Tree:
    key, *rest = path
    return {**tree, key: _set(tree[key], tuple(rest), value) if rest else value}
