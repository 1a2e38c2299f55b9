"""Products of activations with the kernel of a layer, as another arithmetic needs to know them.

    y = product(x, kernel)                                  the product itself, in the dtype of its operands
    y = product.result(product.rows(x, kernel) @ product.matrix(kernel), x, kernel)

The second line is the same as one product of matrices, [rows, K] [K, N]; of a kernel `rows` and `result` need the shape
alone, and `kernel` is the inverse of `matrix`. `x_axes` and `kernel_axes` are what is summed over; K runs over them in
their order, so that the last one varies fastest. Kernels that lie beside each other along `stack_axis`, each of which
sees other rows, are no such product: they have neither `rows` nor `result`, and the columns of `matrix` are those of
all. `multiplied` is what layers call, and `noted` lists the calls.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import UnsupportedForm


class Dense:
    """x[..., in] kernel[in, *out]."""

    stack_axis = None

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.tensordot(x, kernel, axes=1)

    def x_axes(self, axes: int) -> tuple[int, ...]:
        return (axes - 1,)

    def kernel_axes(self, axes: int) -> tuple[int, ...]:
        del axes
        return (0,)

    def rows(self, x: jax.Array, kernel: jax.Array, outside: float = 0) -> jax.Array:
        del kernel, outside
        return x.reshape(-1, x.shape[-1])

    def matrix(self, kernel: jax.Array) -> jax.Array:
        return kernel.reshape(kernel.shape[0], -1)

    def kernel(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return matrix.reshape(shape)

    def result(self, y: jax.Array, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return y.reshape(*x.shape[:-1], *kernel.shape[1:])


class Logits(Dense):
    """x[..., width] table[vocab, width]^T."""

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.einsum("...m,vm->...v", x, kernel)

    def kernel_axes(self, axes: int) -> tuple[int, ...]:
        del axes
        return (1,)

    def matrix(self, kernel: jax.Array) -> jax.Array:
        return kernel.T

    def kernel(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return matrix.T.reshape(shape)

    def result(self, y: jax.Array, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return y.reshape(*x.shape[:-1], kernel.shape[0])


@dataclass(frozen=True)
class Convolution:
    """x[B, *spatial, in] kernel[*window, in, out], 'SAME' padding; beyond its edges x is 0, or `outside`. All of an
    example counts as summed over, since its places meet in sums: only what is the same for all of them can be taken out
    of the product."""

    stride: int = 1
    stack_axis = None

    def __call__(self, x: jax.Array, kernel: jax.Array, outside: float = 0) -> jax.Array:
        letters = "XYZ"[: x.ndim - 2]
        numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
        x, padding = (x, "SAME") if outside == 0 else (self._padded(x, kernel, outside), "VALID")
        stride = (self.stride,) * (x.ndim - 2)
        return jax.lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=numbers)

    def x_axes(self, axes: int) -> tuple[int, ...]:
        return tuple(range(1, axes))

    def kernel_axes(self, axes: int) -> tuple[int, ...]:
        return tuple(range(axes - 1))

    def rows(self, x: jax.Array, kernel: jax.Array, outside: float = 0) -> jax.Array:
        """The windows of x, each flattened as the kernel is, of as many numbers a place as x has. Beyond its edges x is
        `outside`, a number of x's dtype."""
        stride, places, padded, shifted = self.stride, self._reached(x), self._padded(x, kernel, outside), []
        for offset in _offsets(kernel.shape[:-2]):
            starts = (0, *offset, 0)
            stops = (len(x), *(o + (n - 1) * stride + 1 for o, n in zip(offset, places, strict=True)), x.shape[-1])
            shifted.append(jax.lax.slice(padded, starts, stops, (1, *(stride,) * len(places), 1)))
        return jnp.stack(shifted, -2).reshape(-1, math.prod(kernel.shape[:-2]) * x.shape[-1])

    def _padded(self, x: jax.Array, kernel: jax.Array, outside: float) -> jax.Array:
        sizes = zip(self._reached(x), kernel.shape[:-2], x.shape[1:-1], strict=True)
        pads = [max((n - 1) * self.stride + w - size, 0) for n, w, size in sizes]
        around = ((0, 0), *((pad // 2, pad - pad // 2) for pad in pads), (0, 0))
        return jnp.pad(x, around, constant_values=outside)

    def matrix(self, kernel: jax.Array) -> jax.Array:
        return kernel.reshape(-1, kernel.shape[-1])

    def kernel(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return matrix.reshape(shape)

    def result(self, y: jax.Array, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return y.reshape(len(x), *self._reached(x), kernel.shape[-1])

    def places(self, x: jax.Array) -> int:
        """How many rows an example has."""
        return math.prod(self._reached(x))

    def _reached(self, x: jax.Array) -> list[int]:
        return [-(-size // self.stride) for size in x.shape[1:-1]]


def _offsets(window: tuple[int, ...]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for size in window:
        found = [(*before, at) for before in found for at in range(size)]
    return found


class Depthwise:
    """x[B, rows, columns, C] kernel[size, size, C], each channel alone, at the places whose window lies within x: what
    is outside of a picture is part of x."""

    stack_axis = -1

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        # Shifted products, which the compiler makes one loop of; a grouped convolution of as many groups as channels
        # takes a loop over the channels on a CPU.
        rows, columns = (n - size + 1 for n, size in zip(x.shape[1:3], kernel.shape[:2], strict=True))
        shifts = _offsets(kernel.shape[:2])
        return sum(x[:, u : u + rows, v : v + columns] * kernel[u, v] for u, v in shifts)

    def x_axes(self, axes: int) -> tuple[int, ...]:
        del axes
        return (1, 2)

    def kernel_axes(self, axes: int) -> tuple[int, ...]:
        del axes
        return (0, 1)

    def matrix(self, kernel: jax.Array) -> jax.Array:
        return kernel.reshape(-1, kernel.shape[-1])

    def kernel(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return matrix.reshape(shape)


class Stacked:
    """x[experts, n, in] kernel[experts, in, *out]: the rows of each expert by its own kernel. Where rows lie in another
    form, who brings them to experts multiplies (`models/moe/forms.py`); x[..., in] then."""

    stack_axis = 0

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.einsum("eni,ei...->en...", x, kernel)

    def x_axes(self, axes: int) -> tuple[int, ...]:
        return (axes - 1,)

    def kernel_axes(self, axes: int) -> tuple[int, ...]:
        del axes
        return (1,)

    def matrix(self, kernel: jax.Array) -> jax.Array:
        return jnp.moveaxis(kernel, 1, 0).reshape(kernel.shape[1], -1)

    def kernel(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.moveaxis(matrix.reshape(shape[1], shape[0], *shape[2:]), 0, 1)


_places: list[jax.Array] = []


@contextlib.contextmanager
def placed(positions: jax.Array) -> Iterator[None]:
    """Inside of it the tokens that layers see, x[B, T, ...], stand at `positions` int [B, T]; else at 0 .. T - 1."""
    _places.append(positions)
    try:
        yield
    finally:
        _places.pop()


def is_continued() -> bool:
    """Whether tokens stand behind others that layers do not see."""
    return bool(_places)


def leading(x: jax.Array, count: int) -> jax.Array:
    """bool [B or 1, T, 1, ...]: which of the tokens x[B, T, ...] are the first `count` of their sequence.
    UnsupportedForm where x has no axis of tokens, or not those that are continued."""
    if x.ndim < 3:
        raise UnsupportedForm(
            f"the first tokens of a sequence are those of x [B, T, ...], and this one is {list(x.shape)}"
        )
    positions = _places[-1] if _places else jnp.arange(x.shape[1])[None]
    if positions.shape[1] != x.shape[1]:
        raise UnsupportedForm(f"{x.shape[1]} rows stand where {positions.shape[1]} tokens are continued")
    return (positions < count).reshape(*positions.shape, *(1,) * (x.ndim - 2))


class Quantizer(nnx.Module):
    """What computes a layer's product in its stead; of a product that others compute, what rounds its operands.
    simulated: whether it imitates the arithmetic that it is about; bits: of the wider operand, a float counts as 16."""

    simulated = False
    bits = 16

    def __call__(self, product: Any, x: jax.Array, kernel: Any) -> jax.Array:
        raise NotImplementedError

    def kernel(self, product: Any, kernel: Any) -> jax.Array:
        """The kernel as it is multiplied, float32."""
        raise NotImplementedError

    def rounding(self, product: Any) -> Callable | None:
        """x -> x as it is multiplied; None where that is x."""
        raise NotImplementedError

    def rounding_operations(self, call: "Call") -> int:
        """What rounding adds to a training step that makes this call."""
        del call
        return 0


class Call(NamedTuple):
    """One product of a layer: rows x K numbers by K x N, the rows those of so many examples, each row by one of so many
    kernels."""

    rows: int
    length: int
    outputs: int
    quantizer: Any
    examples: int
    kernels: int

    @property
    def multiply_adds(self) -> int:
        return self.rows * self.length * self.outputs

    @property
    def weights(self) -> int:
        return self.kernels * self.length * self.outputs


_noting: list[list[Call]] = []
_as_matrices: list[bool] = []


@contextlib.contextmanager
def as_matrices(on: bool = True) -> Iterator[None]:
    """Convolutions inside of it are computed as products of matrices, of windows with the flattened kernel (or, inside
    of another of these, again as they are). Under `vmap` over kernels, a network a task, XLA makes of a convolution one
    of as many groups as there are kernels, which on a CPU takes longer than the batched product
    (scripts/meta_steps.py)."""
    _as_matrices.append(on)
    try:
        yield
    finally:
        _as_matrices.pop()


@contextlib.contextmanager
def noted() -> Iterator[list[Call]]:
    """The products that layers compute, or trace, inside of it; of experts by the rows that are brought to them."""
    _noting.append([])
    try:
        yield _noting[-1]
    finally:
        _noting.pop()


def multiplied(product: Any, x: jax.Array, kernel: Any, dtype: jnp.dtype, quantizer: Any = None) -> jax.Array:
    """The product in `dtype`, of a variable `kernel`; or what a `Quantizer` makes of them."""
    x = x.astype(dtype)
    if quantizer is not None:
        y = quantizer(product, x, kernel).astype(dtype)
    elif _as_matrices and _as_matrices[-1] and isinstance(product, Convolution):
        own = kernel[...].astype(dtype)
        y = product.result(product.rows(x, own) @ product.matrix(own), x, own)
    else:
        y = product(x, kernel[...].astype(dtype))
    note(product, len(x), y.size, kernel, quantizer)
    return y


def note(product: Any, examples: int, results: int, kernel: Any, quantizer: Any) -> None:
    """Tells `noted` of a product that has so many results, of so many examples."""
    shape, stack = kernel.shape, product.stack_axis
    kernels = 1 if stack is None else shape[stack]
    length = math.prod(shape[axis] for axis in product.kernel_axes(len(shape)))
    outputs = math.prod(shape) // (length * kernels)
    for calls in _noting:
        calls.append(Call(results // outputs, length, outputs, quantizer, examples, kernels))
