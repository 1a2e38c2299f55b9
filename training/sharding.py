"""The mesh and where every array lies on it: rules from logical axes to mesh axes, in one place.

data      splits the batch                          tensor     splits heads, hidden widths, vocabulary
fsdp      splits the batch and every parameter      sequence   splits the tokens of a sequence
expert    splits the batch and experts
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lissom.models.shapes import BATCH
from lissom.models.variables import Tree
from lissom.ops import dispatch
from lissom.training.errors import UserError

# Those of the batch first, so that the rows of a process are its own where they divide by the processes.
AXES = (*BATCH, "tensor", "sequence")
RULES = {
    "embed": "fsdp",
    "channels": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "experts": "expert",
}


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """The mesh of the given sizes over the first devices; one size may be -1, which takes what is left."""
    devices, sizes = len(jax.devices()), {axis: sizes.get(axis, 1) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1:
            if devices % fixed:
                raise UserError(f"the mesh {sizes} needs a multiple of {fixed} devices, and there are {devices}")
            sizes[axis] = devices // fixed
    needed = math.prod(sizes.values())
    if needed > devices:
        raise UserError(f"the mesh {sizes} needs {needed} devices, and there are {devices}")
    # Auto: under Explicit axes, jax's default, indexing a sharded table raises.
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[:needed]
    )


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """What a step is traced under: activations keep their rows where the batch lies (models/stack.py), and kernels,
    which the compiler cannot split, are run a device by the dispatcher. One device needs neither."""
    if mesh.size == 1:
        yield
        return
    with jax.set_mesh(mesh), dispatch.partition(mesh, batch=BATCH, heads="tensor"):
        yield


def batch_ways(mesh: Mesh) -> int:
    """In how many parts the batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def check_batch(mesh: Mesh, batch_size: int, accumulate: int, processes: int) -> None:
    """One sentence where the batch does not divide."""
    ways = batch_ways(mesh) * accumulate
    if batch_size % ways:
        raise UserError(
            f"config.data.batch_size={batch_size} must be a multiple of {ways}: data x fsdp x expert axes "
            f"{batch_ways(mesh)} x accumulate {accumulate}"
        )
    if batch_ways(mesh) % processes:
        # Two processes that hold the same rows would have to read the same examples.
        raise UserError(
            f"the data x fsdp x expert axes of the mesh split the batch {batch_ways(mesh)} ways, which must be a "
            f"multiple of the {processes} processes"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put(tree: Any, places: Any) -> Any:
    """Every array of the tree where its sharding says, also on devices of other processes. What this process holds
    alone must be the same in all of them."""

    def lay(leaf: jax.Array, place: NamedSharding) -> jax.Array:
        if place.is_fully_addressable or getattr(leaf, "sharding", None) == place:
            return jax.device_put(leaf, place)
        local = np.asarray(leaf) if getattr(leaf, "is_fully_addressable", True) else leaf
        return jax.jit(lambda x: x, out_shardings=place)(local)

    return jax.tree.map(lay, tree, places)


def batch_shardings(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """Rows over the axes of `BATCH`; the second axis of token arrays over sequence."""

    def place(leaf: Any) -> NamedSharding:
        tokens = mesh.shape["sequence"] > 1 and leaf.ndim == 2 and leaf.shape[1] % mesh.shape["sequence"] == 0
        return NamedSharding(mesh, PartitionSpec(BATCH, *(("sequence",) if tokens else ())))

    return {name: place(leaf) for name, leaf in batch.items()}


def global_shapes(batch: Mapping[str, Any], shardings: Mapping[str, NamedSharding], processes: int) -> dict[str, Any]:
    """What `put_batch` gives, as shapes."""
    return {
        name: jax.ShapeDtypeStruct((leaf.shape[0] * processes, *leaf.shape[1:]), leaf.dtype, sharding=shardings[name])
        for name, leaf in batch.items()
    }


def put_batch(batch: Mapping[str, np.ndarray], shardings: Mapping[str, NamedSharding]) -> dict[str, jax.Array]:
    """This process's rows -> global arrays."""
    return {
        name: jax.make_array_from_process_local_data(shardings[name], np.asarray(leaf)) for name, leaf in batch.items()
    }


def partition(axes: tuple, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The spec of one array: each dimension by its rule, a mesh axis once an array, and only where it divides."""
    used, spec = set(), []
    for name, size in zip(axes, shape, strict=True):
        axis = RULES.get(name)
        fits = axis is not None and axis not in used and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0
        spec.append(axis if fits else None)
        used.add(spec[-1])
    return PartitionSpec(*spec)


def tree_shardings(tree: Tree, axes: Mapping[tuple, tuple], mesh: Mesh, prefix: tuple = ()) -> Tree:
    """Nested dict of shapes -> nested dict of shardings, by the logical axes of each path."""
    out = {}
    for key, leaf in tree.items():
        path = (*prefix, key)
        if isinstance(leaf, dict):
            out[key] = tree_shardings(leaf, axes, mesh, path)
        else:
            out[key] = NamedSharding(mesh, partition(axes[path], leaf.shape, mesh))
    return out


def optimizer_shardings(tx: optax.GradientTransformation, shapes: Any, params: Tree, mesh: Mesh) -> Any:
    """Copies of parameters inside the optimizer's state lie where the parameters lie; all else is replicated."""
    return optax.tree_map_params(
        tx, lambda _, sharding: sharding, shapes, params, transform_non_params=lambda _: replicated(mesh)
    )
