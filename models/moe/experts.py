"""The experts: feed-forward layers whose kernels lie in one stack, and the ways of bringing tokens to them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from lissom.models.bounds import UnsupportedForm
from lissom.models.linear import stacked_kernels
from lissom.models.moe.routing import Choices, Everyone, Picks, Routing, Slots
from lissom.models.shapes import BATCH
from lissom.models.variables import Param
from lissom.ops.grouped_matmul import grouped_matmul, permutation, permute, unpermute


class Kernels(NamedTuple):
    """inner [E, M, h, F], h = 2 for gated experts (gate and up in one product), else 1; down [E, F, M]."""

    inner: jax.Array
    down: jax.Array


class Experts(nnx.Module):
    """E feed-forward layers without biases: (silu(x Wg) * (x Wu)) Wd if `gated`, else gelu(x Wu) Wd."""

    def __init__(self, width: int, hidden: int, *, experts: int, gated: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        def stacked(inputs: int, outputs: tuple[int, ...], axes: tuple) -> Param:
            kernels = stacked_kernels(experts, inputs, math.prod(outputs), rngs)
            return Param(kernels.reshape(experts, inputs, *outputs), out_sharding=("experts", *axes))

        self.inner = stacked(width, (2 if gated else 1, hidden), ("embed", None, "mlp"))
        self.down = stacked(hidden, (width,), ("mlp", "embed"))
        self.dtype = dtype

    @property
    def kernels(self) -> Kernels:
        return Kernels(self.inner[...].astype(self.dtype), self.down[...].astype(self.dtype))

    def __call__(
        self, x: jax.Array, routing: Routing, capacity: float | None, priority: bool = False
    ) -> tuple[jax.Array, dict]:
        """x [B, T, M] -> (y [B, T, M], metrics). `capacity`: of `Choices`, an expert takes so many times its even share
        and drops the rest, by `priority` as `with_capacity` says; None drops nothing."""
        x, kernels, dropped = x.astype(self.dtype), self.kernels, jnp.zeros(())
        if isinstance(routing, Choices) and capacity is not None:
            routing, dropped = with_capacity(routing, len(kernels.down), capacity, priority)
        if isinstance(routing, Choices | Everyone):
            y = over_devices(_dropless if isinstance(routing, Choices) else _everyone, kernels, x, routing)
        else:
            y = (_picked if isinstance(routing, Picks) else _mixed)(kernels, x, routing)
        return y, {"dropped": dropped}


def with_capacity(choices: Choices, experts: int, capacity: float, priority: bool = False) -> tuple[Choices, jax.Array]:
    """(choices of which each expert has at most ceil(capacity x N k / E), the rest named no expert; their share).

    First choices of all tokens come before second ones, and of these earlier tokens before later ones (GShard, Lepikhin
    et al. 2020, arXiv:2006.16668); with `priority` those of tokens of a larger weight, the largest of their k, before
    those of others (batch prioritised routing: Riquelme et al. 2021, arXiv:2106.05974), for encoders: what is
    dropped depends on later tokens then. Weights stay as they are: a
    token whose choice is dropped gets less.
    """
    batch, length, k = choices.experts.shape
    room = math.ceil(capacity * batch * length * k / experts)
    flat = choices.experts.reshape(-1, k)
    order = jnp.argsort(-choices.weights.max(-1).reshape(-1)) if priority else jnp.arange(len(flat))
    ranked = flat[order].T.reshape(-1)
    one_hot = ranked[:, None] == jnp.arange(experts)
    place = jnp.where(one_hot, jnp.cumsum(one_hot, 0) - 1, 0).sum(1)
    named = one_hot.any(1)
    fits = (named & (place < room)).reshape(k, -1).T
    kept = jnp.zeros_like(fits).at[order].set(fits).reshape(batch, length, k)
    dropped = 1 - kept.sum() / jnp.maximum(named.sum(), 1)
    return choices._replace(experts=jnp.where(kept, choices.experts, experts)), dropped.astype(jnp.float32)


def activated(inner: jax.Array) -> jax.Array:
    """[..., h, F] -> [..., F], as `Experts` says."""
    return jax.nn.silu(inner[..., 0, :]) * inner[..., 1, :] if inner.shape[-2] == 2 else jax.nn.gelu(inner[..., 0, :])


def _dropless(kernels: Kernels, x: jax.Array, choices: Choices) -> jax.Array:
    """Rows sorted by expert, through grouped matmuls: every choice is computed, and nothing else."""
    (experts, width, h, hidden), k = kernels.inner.shape, choices.experts.shape[-1]
    by = permutation(choices.experts.reshape(-1, k), experts)
    rows = permute(x.reshape(-1, width), by)
    inner = grouped_matmul(rows, kernels.inner.reshape(experts, width, h * hidden), by.group_sizes)
    y = grouped_matmul(activated(inner.reshape(-1, h, hidden)), kernels.down, by.group_sizes)
    return unpermute(y, by, choices.weights.reshape(-1, k)).reshape(x.shape)


def _everyone(kernels: Kernels, x: jax.Array, routing: Everyone) -> jax.Array:
    """Every expert on every token: sum_e w_e f_e(x)."""
    inner = activated(jnp.einsum("btm,emhf->btehf", x, kernels.inner))
    return jnp.einsum("btef,efm->btm", inner * routing.weights[..., None].astype(x.dtype), kernels.down)


def _slotted(kernels: Kernels, x: jax.Array) -> jax.Array:
    """x [E, c, M], each expert's own tokens."""
    return jnp.einsum("ecf,efm->ecm", activated(jnp.einsum("ecm,emhf->echf", x, kernels.inner)), kernels.down)


def _picked(kernels: Kernels, x: jax.Array, picks: Picks) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    y = _slotted(kernels, rows[picks.tokens]) * picks.weights[..., None].astype(x.dtype)
    return jnp.zeros_like(rows).at[picks.tokens.reshape(-1)].add(y.reshape(-1, x.shape[-1])).reshape(x.shape)


def _mixed(kernels: Kernels, x: jax.Array, slots: Slots) -> jax.Array:
    rows, (n, _, experts, s) = x.reshape(-1, x.shape[-1]), slots.dispatch.shape
    groups = rows[slots.tokens]
    taken = jnp.einsum("ngm,nges->ensm", groups, slots.dispatch.astype(x.dtype))
    y = _slotted(kernels, taken.reshape(experts, n * s, -1)).reshape(experts, n, s, -1)
    back = jnp.einsum("ensm,nges->ngm", y, slots.combine.astype(x.dtype))
    return jnp.zeros_like(rows).at[slots.tokens.reshape(-1)].set(back.reshape(rows.shape)).reshape(x.shape)


def over_devices(form: Callable, kernels: Kernels, x: jax.Array, routing: Choices | Everyone) -> jax.Array:
    """`form(kernels, x, routing)` on every device of the mesh in force: its own sequences, its own experts (axis
    `expert`), its part of their hidden width (axis `tensor`), and the sum over both.

    The compiler cannot split what sorts rows, and sizes of groups are a device's own. Tokens lie on every device of the
    `expert` axis, so each computes the choices of its experts, and one sum brings them together.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = () if mesh.empty else tuple(name for name in mesh.axis_names if name not in mesh.manual_axes)
    split = {name: mesh.shape[name] for name in (*BATCH, "expert", "tensor") if name in free and mesh.shape[name] > 1}
    if not split:
        return form(kernels, x, routing)
    experts, width, _ = kernels.down.shape
    if experts % split.get("expert", 1):
        raise UnsupportedForm(
            f"ffn.experts={experts} must be a multiple of the {split['expert']} devices of mesh.expert"
        )
    # What an axis does not divide is whole on each of its devices, as parameters are (training/sharding.py).
    if width % split.get("tensor", 1):
        split.pop("tensor")
    if len(x) % (split.get("data", 1) * split.get("fsdp", 1)):
        split = {name: size for name, size in split.items() if name not in BATCH}
    of = lambda name: name if name in split else None
    rows = PartitionSpec(tuple(name for name in BATCH if name in split) or None)
    specs = Kernels(
        PartitionSpec(of("expert"), None, None, of("tensor")), PartitionSpec(of("expert"), of("tensor"), None)
    )
    summed = tuple(name for name in ("expert", "tensor") if name in split)

    def local(kernels, x, routing):
        if "expert" in split:
            routing = _of_device(routing, jax.lax.axis_index("expert") * len(kernels.down), len(kernels.down))
        y = form(kernels, x, routing)
        return jax.lax.psum(y, summed) if summed else y

    return jax.shard_map(
        local,
        mesh=None if mesh.manual_axes else mesh,
        in_specs=(specs, rows, rows),
        out_specs=rows,
        axis_names=frozenset(free),
        check_vma=False,
    )(kernels, x, routing)


def _of_device(routing: Choices | Everyone, first: jax.Array, count: int) -> Choices | Everyone:
    """The routing by the numbers of a device's own experts; those of others are no experts."""
    if isinstance(routing, Everyone):
        return Everyone(jax.lax.dynamic_slice_in_dim(routing.weights, first, count, -1))
    return routing._replace(experts=routing.experts - first)
