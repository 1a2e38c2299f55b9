"""Experts on a mesh: experts over the axis `expert`, their hidden width over `tensor`, tokens over all of `BATCH`.

The compiler cannot split what sorts rows, and sizes of groups are a device's own, so that `shard_map` says what each
device does. Tokens lie on other devices than their experts:

    Choices   are sent to the devices of their experts, and what the experts say is sent back: two all-to-alls of
              buffers of a fixed size, b times the even share of the n k choices of a device, b = `buffer`. What does
              not fit goes in further rounds, so that none is dropped: as many rounds as the fullest buffer of any
              device needs, which is one where experts are loaded alike, at most P / b for P devices. The rounds behind
              the first keep nothing for the backward pass, which repeats them. (All-to-all: Lepikhin et al. 2020,
              GShard, arXiv:2006.16668. The rounds are ours.) Of all this `train_flops` counts the buffers of the
              first round, padding too.
    Everyone  Every device of the axis gets the tokens of all and computes its own experts; a sum of which each gets
              its own tokens brings the parts together.

Where the axis does not divide the batch its devices all have the same tokens, and one sum is all that is exchanged.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lissom.models.bounds import UnsupportedForm
from lissom.models.moe.forms import Kernels, dropless, everyone, grouped
from lissom.models.moe.routing import Choices, Everyone
from lissom.models.shapes import BATCH
from lissom.ops.grouped_matmul import permutation, permute, unpermute


def over_devices(kernels: Kernels, x: jax.Array, routing: Choices | Everyone, buffer: float) -> jax.Array:
    """x [B, T, M] -> [B, T, M] on the mesh in force. UnsupportedForm for experts that it does not divide, and where
    their activations are rounded: a device has no range of what others see."""
    form = dropless if isinstance(routing, Choices) else everyone
    mesh = jax.sharding.get_abstract_mesh()
    free = () if mesh.empty else tuple(name for name in mesh.axis_names if name not in mesh.manual_axes)
    split = {name: mesh.shape[name] for name in (*BATCH, "tensor") if name in free and mesh.shape[name] > 1}
    if not split:
        return form(kernels, x, routing)
    if kernels.rounding is not None or kernels.hidden_rounding is not None:
        raise UnsupportedForm(
            "experts whose activations are rounded are on one device: a mesh of several takes a rule of weights alone"
        )
    experts, hidden, _ = kernels.down.shape
    devices = split.get("expert", 1)
    if experts % devices:
        raise UnsupportedForm(f"ffn.experts={experts} must be a multiple of the {devices} devices of mesh.expert")
    # What an axis does not divide is whole on each of its devices, as parameters are (training/sharding.py).
    tensor = "tensor" if "tensor" in split and hidden % split["tensor"] == 0 else None
    batch = tuple(name for name in BATCH if name in split)
    while len(x) % math.prod(split[name] for name in batch):
        batch = batch[:-1]
    axis = "expert" if devices > 1 else None
    specs = Kernels(PartitionSpec(axis, None, None, tensor), PartitionSpec(axis, tensor, None))

    def local(kernels: Kernels, x: jax.Array, routing: Choices | Everyone) -> jax.Array:
        if axis is None:
            y = form(kernels, x, routing)
        elif axis not in batch:
            y = jax.lax.psum(form(kernels, x, _of_device(routing, len(kernels.down))), axis)
        elif isinstance(routing, Choices):
            y = exchanged(kernels, x, routing, experts, buffer, free)
        else:
            x, routing = jax.lax.all_gather((x, routing), axis, tiled=True)
            y = form(kernels, x, _of_device(routing, len(kernels.down)))
            y = jax.lax.psum_scatter(y, axis, tiled=True)
        return jax.lax.psum(y, tensor) if tensor else y

    rows = PartitionSpec(batch or None)
    return jax.shard_map(
        local,
        mesh=None if mesh.manual_axes else mesh,
        in_specs=(specs, rows, rows),
        out_specs=rows,
        axis_names=frozenset(free),
        check_vma=False,
    )(kernels, x, routing)


def _of_device(routing: Choices | Everyone, count: int) -> Choices | Everyone:
    """The routing by the numbers of a device's own `count` experts; those of others are no experts."""
    first = jax.lax.axis_index("expert") * count
    if isinstance(routing, Everyone):
        return Everyone(jax.lax.dynamic_slice_in_dim(routing.weights, first, count, -1))
    return routing._replace(experts=routing.experts - first)


class Places(NamedTuple):
    """Which rows go to which places of a buffer. row [P, c]: the row that lies at each place; n where none does.
    place [n]: the place of each row, p c + i; P c of one that is not in the buffer."""

    row: jax.Array
    place: jax.Array


def exchanged(
    kernels: Kernels, x: jax.Array, choices: Choices, experts: int, buffer: float, axes: tuple[str, ...]
) -> jax.Array:
    """`dropless` on a device of the axis `expert`: its own x [b, T, M] and choices, by the numbers of all `experts`,
    and the kernels of its own. `axes`: those of the mesh, over which all devices agree on the number of rounds."""
    own, k, devices = len(kernels.down), choices.experts.shape[-1], experts // len(kernels.down)
    by = permutation(choices.experts.reshape(-1, k), experts)
    rows = permute(x.reshape(-1, x.shape[-1]), by)
    room = min(len(rows), math.ceil(buffer * len(rows) / devices))
    sizes = by.group_sizes.reshape(devices, own)
    counts = sizes.sum(1)
    # Rows are sorted by expert, hence by device: those of device p are counts[p] rows from starts[p].
    starts = jnp.cumsum(counts) - counts
    ends = jnp.cumsum(jax.lax.all_to_all(sizes, "expert", 0, 0, tiled=True), 1)  # of each sender, of each own expert
    device = (jnp.arange(len(rows))[:, None] >= jnp.cumsum(counts)).sum(1)  # P for the choices of no expert
    within = jnp.arange(len(rows)) - jnp.append(starts, 0)[device]

    # In float32, so that the gradients of several rounds are summed in it.
    wide = jax.tree.map(lambda kernel: kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)), kernels)

    def one(rows: jax.Array, kernels: Kernels, number: jax.Array | int) -> jax.Array:
        """What the experts say to the rows of round `number`, zeros for others."""
        at = number * room + jnp.arange(room)
        row = jnp.where(at < counts[:, None], starts[:, None] + at, len(rows))
        here = (within >= number * room) & (within < (number + 1) * room) & (device < devices)
        places = Places(row, jnp.where(here, device * room + within - number * room, devices * room))
        got = jax.lax.all_to_all(packed(rows, places), "expert", 0, 0)
        expert = (at[:, None] >= ends[:, None, :]).sum(-1)
        local = permutation(expert.reshape(-1, 1), own)
        kernels = jax.tree.map(lambda kernel: kernel.astype(rows.dtype), kernels)
        y = grouped(kernels, permute(got.reshape(-1, rows.shape[1]), local), local.group_sizes)
        y = unpermute(y, local, jnp.ones((len(y), 1), y.dtype)).reshape(got.shape)
        return unpacked(jax.lax.all_to_all(y, "expert", 0, 0), places)

    y = one(rows, wide, 0)
    most = math.ceil(len(rows) / room)
    if most > 1:
        needed = jax.lax.pmax(-(-counts.max() // room), axes)

        def fallback(rows: jax.Array, kernels: Kernels) -> jax.Array:
            """All further rounds; by this name it is no part of the count of operations."""

            def add(y: jax.Array, number: jax.Array):
                further = lambda number: one(rows, kernels, number)
                return y + jax.lax.cond(number < needed, further, lambda _: jnp.zeros_like(rows), number), None

            return jax.lax.scan(jax.checkpoint(add), jnp.zeros_like(rows), jnp.arange(1, most))[0]

        # One question for all of them: where one round does it, neither pass does anything for the others.
        ask = lambda rows, kernels: jax.lax.cond(
            needed > 1, jax.jit(fallback), lambda rows, _: jnp.zeros_like(rows), rows, kernels
        )
        y = y + jax.checkpoint(ask)(rows, wide)
    return unpermute(y, by, choices.weights.reshape(-1, k)).reshape(x.shape)


@jax.custom_vjp
def packed(rows: jax.Array, places: Places) -> jax.Array:
    """rows [n, M] -> buffer [P, c, M], zeros where no row lies. Backward a gather too, where jax would scatter."""
    found = rows[jnp.minimum(places.row, len(rows) - 1)]
    return jnp.where((places.row < len(rows))[..., None], found, 0)


@jax.custom_vjp
def unpacked(buffer: jax.Array, places: Places) -> jax.Array:
    """The transpose: buffer [P, c, M] -> rows [n, M], zeros for a row that is not in it."""
    flat = buffer.reshape(-1, buffer.shape[-1])
    found = flat[jnp.minimum(places.place, len(flat) - 1)]
    return jnp.where((places.place < len(flat))[:, None], found, 0)


packed.defvjp(lambda rows, places: (packed(rows, places), places), lambda places, dy: (unpacked(dy, places), None))
unpacked.defvjp(
    lambda buffer, places: (unpacked(buffer, places), places), lambda places, dy: (packed(dy, places), None)
)
