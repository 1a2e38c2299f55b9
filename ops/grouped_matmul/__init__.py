"""Grouped matmul: every row of x times the matrix of its group, as the experts of a mixture need it."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lissom.ops import dispatch
from lissom.ops.grouped_matmul.differentiable import ACTIVATIONS
from lissom.ops.grouped_matmul.permuting import Permutation, permutation, permute, unpermute

__all__ = [
    "OP",
    "Permutation",
    "grouped_matmul",
    "permutation",
    "permute",
    "transposed_grouped_matmul",
    "unpermute",
]

OP = dispatch.Op(
    name="grouped_matmul",
    implementations={
        "reference": "lissom.ops.grouped_matmul.reference",
        "xla": "lissom.ops.grouped_matmul.xla",
        "ragged_dot": "lissom.ops.grouped_matmul.ragged_dot",
        # Never run on their hardware: in no default order.
        "pallas_gpu": "lissom.ops.grouped_matmul.pallas_gpu",
        "pallas_tpu": "lissom.ops.grouped_matmul.pallas_tpu",
    },
    # A TPU has an own lowering of `lax.ragged_dot`; elsewhere that is a dense product for each group.
    defaults={"tpu": ("ragged_dot",), "default": ("xla",)},
)


def grouped_matmul(
    x: Float[Array, "m k"],
    w: Float[Array, "g k n"],
    group_sizes: Int[Array, "g"],
    *,
    activation: str | None = None,
    preferred_element_type=None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "m n"]:
    """Rows of x in groups that follow one another, each times the matrix of its group.

        y_i = f(x_i w_j)    for s_j <= i < s_j + group_sizes[j],  s_j = group_sizes[0] + ... + group_sizes[j - 1]

    x, w: of one float dtype. Sums are taken in float32 (float64 for float64).
    group_sizes: integers of at least 0; a group may be empty. Rows behind the last group are 0, before f too, and have
    zero gradients. Sizes that sum to more than m are cut where x ends: they are values, which no check sees.
    activation: f: None, "relu", "gelu" (by tanh), "silu". Applied to a product before it is written; a forward pass
    that is differentiated writes the product as well, for the backward pass.
    preferred_element_type: the dtype of y; None is that of x. The cotangent is rounded to the dtype of x first.
    implementation: see `lissom.ops.dispatch`: None (the platform's default), "reference", "xla", "ragged_dot",
    "pallas_gpu", "pallas_tpu", or a sequence. Positional arguments and results are those of `jax.lax.ragged_dot`.

    The op is whole: rows are sorted by group, so that `dispatch.partition` has no axis to split. A layer that is split
    over devices calls it inside of its own `shard_map`, with the rows and sizes of a device.

    ValueError names the argument that does not fit. Megablocks (arXiv 2211.15841) made the product of a mixture's
    experts one grouped op.
    """
    x, w, group_sizes = _operands(x, w, group_sizes, "w", rank=3)
    if w.shape[0] != group_sizes.shape[0] or w.shape[1] != x.shape[1]:
        raise ValueError(
            f"w is [groups, k, n] for x {x.shape} and {group_sizes.shape[0]} group_sizes, got shape {w.shape}."
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation is None or one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    return _call(x, w, group_sizes, preferred_element_type, implementation, form="rows", activation=activation)


def transposed_grouped_matmul(
    x: Float[Array, "m k"],
    y: Float[Array, "m n"],
    group_sizes: Int[Array, "g"],
    *,
    preferred_element_type=None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "g k n"]:
    """The sum over the rows of each group of x_i y_i^T: the gradient of `grouped_matmul` with respect to w.

        z_j = sum_i x_i^T y_i    over s_j <= i < s_j + group_sizes[j]

    An empty group has zeros. Everything else is as for `grouped_matmul`; each is the gradient of the other, so that
    both can be differentiated any number of times (in reverse).
    """
    x, y, group_sizes = _operands(x, y, group_sizes, "y", rank=2)
    if y.shape[0] != x.shape[0]:
        raise ValueError(f"y has as many rows as x {x.shape}, got shape {y.shape}.")
    return _call(x, y, group_sizes, preferred_element_type, implementation, form="sums", activation=None)


def _operands(x, other, group_sizes, name: str, rank: int):
    for label, array in (("x", x), (name, other)):
        if not hasattr(array, "dtype") or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{label} is a float array, got {getattr(array, 'dtype', type(array).__name__)}.")
    if x.ndim != 2 or other.ndim != rank or 0 in (*x.shape, *other.shape):
        raise ValueError(
            f"x is of rank 2 and {name} of rank {rank}, neither empty, got shapes {x.shape} and {other.shape}."
        )
    if x.dtype != other.dtype:
        raise ValueError(f"x and {name} are of one dtype, got {x.dtype} and {other.dtype}.")
    if not hasattr(group_sizes, "dtype") or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes is an array of integers, got {getattr(group_sizes, 'dtype', type(group_sizes).__name__)}."
        )
    if group_sizes.ndim != 1 or not group_sizes.shape[0]:
        raise ValueError(f"group_sizes is of rank 1 and not empty, got shape {group_sizes.shape}.")
    return jnp.asarray(x), jnp.asarray(other), jnp.asarray(group_sizes).astype(jnp.int32)


def _call(x, other, group_sizes, dtype, implementation, **options):
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"preferred_element_type is a float dtype, got {dtype}.")
    return dispatch.call(
        OP,
        operands=(x, other, group_sizes),
        options={**options, "dtype": dtype},
        implementation=implementation,
        operand_dims=((None,) * 2, (None,) * other.ndim, (None,)),
        result_dims=(None,) * (2 if options["form"] == "rows" else 3),
    )
