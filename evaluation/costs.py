"""Our own count of floating-point operations, over a jaxpr.

    flops = sum over live products and convolutions of 2 * multiply-accumulates * trip count

Counted are `dot_general`, `conv_general_dilated`, `ragged_dot_general` and `scaled_dot` exactly, `fft`,
`cholesky` and `triangular_solve` by their textbook leading terms; elementwise arithmetic, reductions and data
movement count nothing, as in the literature. A complex multiply-accumulate is 8 operations. Equations whose
results nobody reads count nothing: XLA removes them too. XLA's `cost_analysis()` counts the body of a loop
once and a kernel as nothing, so it serves as a check on the unrolled form only.

A loop over blocks of several kinds (`scan` over a constant list, `cond` on its entries, as in blocked
attention) counts each block as its own kind; any other `cond` counts its largest branch. A jitted function
named `fallback`, for inputs that no sound program gives (NaN in padding), counts nothing, and one named `products_N`
counts N: loops whose lengths depend on values, and whose sum does not (a grouped matmul). What cannot be known (a
`while` with products in it, a kernel without cost estimate, a foreign call) makes the whole count None and is listed by
name: never 0.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Call-like primitives: the parameter that holds the one jaxpr whose outputs are the equation's outputs.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "eval_jaxpr": "call_jaxpr",  # what a checkpoint within a checkpoint leaves behind
    "compute_on": "jaxpr",
}
KERNELS = ("pallas_call", "core_map", "mpmd_map")
# These hold a jaxpr that combines two scalars: elementwise work, not products.
COMBINERS = ("reduce", "reduce_window", "scatter", "select_and_scatter", "cumred", "argmin", "argmax", "sort")
# Arithmetic that is neither elementwise nor countable from the shapes alone.
OPAQUE = frozenset(
    (
        *("eig", "eigh", "svd", "lu", "qr", "geqrf", "geqp3", "householder_product", "schur", "hessenberg"),
        *("tridiagonal", "tridiagonal_solve", "custom_linear_solve", "linear_call", "scaled_matmul"),
        *("ffi_call", "pure_callback", "io_callback", "buffer_callback", "call_exported", "call_hi_primitive"),
        *("custom_fusion", "cudnn_fusion", "tpu_custom_call", "triton_kernel_call"),
        *("dot_product_attention_fwd", "dot_product_attention_bwd"),
        *("dot_product_attention_fp8_fwd", "dot_product_attention_fp8_bwd"),
    )
)


@dataclass(frozen=True)
class Costs:
    """`flops`: operations of one call, or None when something in it is unknown; `unknown`: what, in words.

    `by_primitive` splits the known part, for the reader who wonders where it goes.
    """

    flops: int | float | None
    unknown: tuple[str, ...] = ()
    by_primitive: dict[str, int | float] = field(default_factory=dict)


def count(
    function: Callable, *arguments, while_trips: Sequence[float] | None = None, platform: str | None = None
) -> Costs:
    """Counts the operations of `function(*arguments)`; arguments may be `jax.ShapeDtypeStruct`s. Nothing is
    run.

    `while_trips`: measured trip counts of the `while` loops that hold products, in the order in which they
    stand in the jaxpr (outer before inner, each inner one given per outer trip); as many as there are, or a
    ValueError. `platform` ("cpu", "cuda", "tpu"; default: the default backend's) chooses the branch of
    `platform_dependent`.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    return count_jaxpr(closed, while_trips=while_trips, platform=platform)


def count_jaxpr(
    closed: ClosedJaxpr, *, while_trips: Sequence[float] | None = None, platform: str | None = None
) -> Costs:
    """`count` for a jaxpr that is at hand."""
    if platform is None:
        platform = jax.devices()[0].platform
    # A GPU device says "gpu", the lowering rules say which.
    names = {"gpu": ("cuda", "rocm", "gpu")}.get(platform, (platform,))
    counter = _Counter(names, None if while_trips is None else list(while_trips))
    parts, unknown = counter.jaxpr(closed, [True] * len(closed.jaxpr.outvars))
    if counter.trips:
        raise ValueError(f"{len(counter.trips)} of the given while_trips belong to no loop with products")
    flops = None if unknown else sum(parts.values())
    return Costs(flops, tuple(dict.fromkeys(unknown)), parts)


class _Each(NamedTuple):
    """What a variable inside a `scan` is on each trip."""

    values: np.ndarray


class _Counter:
    """Walks a jaxpr. Every method returns (operations by primitive, unknown things) of what it was given.
    `known` has the values of constant integers, by which a `cond` may be decided."""

    def __init__(self, platforms: tuple[str, ...], trips: list[float] | None):
        self.platforms = platforms
        self.trips = trips

    def jaxpr(self, jaxpr: Jaxpr | ClosedJaxpr, live_outputs: Sequence[bool], inputs: Sequence = ()):
        """`inputs`: for each argument its value, an `_Each`, or None where it is not known."""
        constants = jaxpr.consts if isinstance(jaxpr, ClosedJaxpr) else ()
        jaxpr = _open(jaxpr)
        known = {v: value for v, value in zip(jaxpr.invars, inputs, strict=False) if value is not None}
        for variable, value in zip(jaxpr.constvars, constants, strict=False):
            if _is_integer(variable):
                known[variable] = np.asarray(value)
        parts, unknown = {}, []
        for equation, live in _live_equations(jaxpr, live_outputs):
            more, why = self.equation(equation, live, known)
            _add(parts, more)
            unknown += why
            if equation.primitive.name in FOLDED:
                values = [_value(variable, known) for variable in equation.invars]
                if all(value is not None for value in values) and _is_integer(equation.outvars[0]):
                    known[equation.outvars[0]] = _folded(equation, values)
        return parts, unknown

    def equation(self, equation, live: Sequence[bool], known: dict):
        name, params = equation.primitive.name, equation.params
        if name in PRODUCTS:
            return {name: PRODUCTS[name](equation)}, []
        if name == "jit" and params["name"] == "fallback":
            return {}, []
        if name == "jit" and params["name"].startswith("products_"):
            return {"products": int(params["name"].removeprefix("products_"))}, []
        if name in CALLS:
            return self.jaxpr(params[CALLS[name]], live, [_value(v, known) for v in equation.invars])
        if name == "scan":
            return self.scan(equation, live, known)
        if name == "while":
            return self.while_loop(params)
        if name == "cond":
            return self.cond(equation, live, known)
        if name == "shard_map":
            size = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            parts, unknown = self.jaxpr(params["jaxpr"], live)
            return _times(parts, size), unknown
        if name in KERNELS:
            estimate = params.get("cost_estimate")
            if estimate is None:
                return {}, [f"{name} {params.get('name') or ''} without a cost estimate".replace("  ", " ")]
            return {name: estimate.flops}, []
        if name.removesuffix("_wrapper") in OPAQUE:
            return {}, [name]
        return self.other(equation)

    def other(self, equation):
        """A primitive of no special kind: nothing, unless it hides a jaxpr that holds products."""
        name = equation.primitive.name
        if name.startswith(COMBINERS):
            return {}, []
        for value in equation.params.values():
            for inner in _jaxprs_in(value):
                parts, unknown = self.jaxpr(inner, [True] * len(inner.outvars))
                if parts or unknown:
                    return {}, [f"{name} (holds products, trip count not known)"]
        return {}, []

    def scan(self, equation, live: Sequence[bool], known: dict):
        inner, length = equation.params["jaxpr"], equation.params["length"]
        # A stacked output has one axis more outside than inside. Carries stay live: the next trip reads them.
        carries = [
            outer.aval.ndim == variable.aval.ndim
            for outer, variable in zip(equation.outvars, _open(inner).outvars, strict=True)
        ]
        inside = [is_live or carry for is_live, carry in zip(live, carries, strict=True)]
        # In front of the carries stand what is the same on every trip, behind them what is sliced.
        sliced = sum(o.aval.ndim > v.aval.ndim for o, v in zip(equation.invars, _open(inner).invars, strict=True))
        same = len(equation.invars) - sliced - sum(carries)
        values = [_value(variable, known) for variable in equation.invars]
        inputs = [None] * len(values)
        inputs[:same] = values[:same]
        for at in range(same + sum(carries), len(values)):
            if isinstance(values[at], np.ndarray) and values[at].ndim == 1:
                inputs[at] = _Each(values[at])
        parts, unknown = self.jaxpr(inner, inside, inputs)
        return {name: _whole(length * value) for name, value in parts.items()}, unknown

    def while_loop(self, params):
        mark = None if self.trips is None else list(self.trips)
        taken = self.trips.pop(0) if self.trips else None
        parts, unknown = {}, []
        for key in ("cond_jaxpr", "body_jaxpr"):
            inner = _open(params[key])
            more, why = self.jaxpr(inner, [True] * len(inner.outvars))
            _add(parts, more)
            unknown += why
        if not parts and not unknown:
            self.trips = mark  # a loop without products costs nothing, however often it turns
            return {}, []
        if self.trips is None:
            return {}, ["while (trip count depends on data)"]
        if taken is None:
            raise ValueError("fewer while_trips were given than there are while loops with products")
        return _times(parts, taken), unknown

    def cond(self, equation, live: Sequence[bool], known: dict):
        params = equation.params
        branches = params["branches"]
        platforms = params.get("branches_platforms")
        taken, *inputs = (_value(variable, known) for variable in equation.invars)
        if platforms is not None:
            return self.jaxpr(branches[self.platform_branch(platforms)], live, inputs)
        if isinstance(taken, _Each):  # the mean of the trips, which the scan multiplies by their number
            parts, unknown = {}, []
            for index in np.unique(taken.values):
                trips = taken.values == index
                chosen = [_Each(value.values[trips]) if isinstance(value, _Each) else value for value in inputs]
                more, why = self.jaxpr(branches[int(index)], live, chosen)
                _add(parts, _times(more, Fraction(int(trips.sum()), len(trips))))
                unknown += why
            return parts, unknown
        if taken is not None:
            return self.jaxpr(branches[int(taken)], live, inputs)
        counts = [self.jaxpr(branch, live, inputs) for branch in branches]
        unknown = [why for _, reasons in counts for why in reasons]
        return max((parts for parts, _ in counts), key=lambda parts: sum(parts.values())), unknown

    def platform_branch(self, platforms) -> int:
        """Index of the branch for our platform; the one under None is the default."""
        for index, names in enumerate(platforms):
            if names is not None and set(names) & set(self.platforms):
                return index
        for index, names in enumerate(platforms):
            if names is None:
                return index
        raise ValueError(f"no branch for {'/'.join(self.platforms)} among {platforms}")


def _live_equations(jaxpr: Jaxpr, live_outputs: Sequence[bool]) -> Iterator[tuple]:
    """(equation, which of its outputs are read), in order, for the equations that are read or have
    effects.
    """
    live = {v for v, is_live in zip(jaxpr.outvars, live_outputs, strict=True) if is_live and not _literal(v)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        mask = [variable in live for variable in equation.outvars]
        if any(mask) or equation.effects:
            kept.append((equation, mask))
            live.update(v for v in equation.invars if not _literal(v))
    return reversed(kept)


def _is_integer(variable) -> bool:
    return jax.numpy.issubdtype(variable.aval.dtype, np.integer)


def _value(variable, known: dict):
    """The value of a variable or literal, an `_Each`, or None."""
    return variable.val if _literal(variable) else known.get(variable)


def _folded(equation, values: Sequence):
    """What `jax.lax.switch` does with an index before it gets to `cond`, done with known values."""
    if equation.primitive.name == "clamp":
        change = lambda value: np.clip(value, values[0], values[2])
        value = values[1]
    else:
        change = lambda value: np.asarray(value).astype(equation.params["new_dtype"])
        value = values[0]
    return _Each(change(value.values)) if isinstance(value, _Each) else change(value)


FOLDED = ("clamp", "convert_element_type")


def _whole(number):
    """A count of operations as an int where it is one."""
    return int(number) if isinstance(number, Fraction) and number.denominator == 1 else number


def _literal(variable) -> bool:
    return isinstance(variable, Literal)


def _open(jaxpr) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _jaxprs_in(value) -> Iterator[Jaxpr]:
    if isinstance(value, Jaxpr | ClosedJaxpr):
        yield _open(value)
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _jaxprs_in(entry)


def _times(parts: dict, factor) -> dict:
    return {name: factor * value for name, value in parts.items()}


def _add(parts: dict, more: dict) -> None:
    for name, value in more.items():
        parts[name] = parts.get(name, 0) + value


# ---- one equation ------------------------------------------------------------------------------------------


def _multiply_add(dtype) -> int:
    """Real operations of one multiply-accumulate: a complex one is 4 products and 4 sums."""
    return 8 if jax.numpy.issubdtype(dtype, jax.numpy.complexfloating) else 2


def _shape(variable) -> tuple[int, ...]:
    return variable.aval.shape


def _dot_general(equation) -> int:
    """2 * size of the output * length of the contraction."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    length = math.prod(_shape(equation.invars[0])[axis] for axis in contracted)
    output = equation.outvars[0].aval
    return _multiply_add(output.dtype) * math.prod(output.shape) * length


def _ragged_dot_general(equation) -> int:
    """As `_dot_general`, each row meeting one group; with the contraction ragged, the groups share its
    length.
    """
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    length = math.prod(_shape(equation.invars[0])[axis] for axis in contracted)
    output = equation.outvars[0].aval
    flops = _multiply_add(output.dtype) * math.prod(output.shape) * length
    if set(numbers.lhs_ragged_dimensions) & set(contracted):
        groups = _shape(equation.invars[2])[-1]
        return flops // groups
    return flops


def _convolution(equation) -> int:
    """2 * batch * output channels * input channels a group * pairs of (output, kernel) positions that meet an
    input.

    Zeros from padding and from dilated inputs are not counted, as XLA does it: the gradient of a strided
    convolution is a convolution over an input that is mostly holes.
    """
    params, output = equation.params, equation.outvars[0].aval
    numbers = params["dimension_numbers"]
    left, right = _shape(equation.invars[0]), _shape(equation.invars[1])
    flops = _multiply_add(output.dtype) * output.shape[numbers.out_spec[0]] * output.shape[numbers.out_spec[1]]
    flops *= right[numbers.rhs_spec[1]]
    for axis in range(len(params["window_strides"])):
        low, _ = params["padding"][axis]
        dilation = params["lhs_dilation"][axis]
        starts = np.arange(output.shape[numbers.out_spec[2 + axis]]) * params["window_strides"][axis] - low
        offsets = np.arange(right[numbers.rhs_spec[2 + axis]]) * params["rhs_dilation"][axis]
        positions = starts[:, None] + offsets[None, :]
        extent = (left[numbers.lhs_spec[2 + axis]] - 1) * dilation + 1
        flops *= int(((positions >= 0) & (positions < extent) & (positions % dilation == 0)).sum())
    return flops


def _fft(equation) -> int:
    """5 N log2 N a complex transform of N points (Cooley and Tukey), half of it where one side is real."""
    lengths = equation.params["fft_lengths"]
    points = math.prod(lengths)
    real = any(not jax.numpy.issubdtype(v.aval.dtype, np.complexfloating) for v in equation.invars)
    real = real or not jax.numpy.issubdtype(equation.outvars[0].aval.dtype, np.complexfloating)
    batch = math.prod(_shape(equation.invars[0])[: len(_shape(equation.invars[0])) - len(lengths)])
    return round(batch * (2.5 if real else 5) * points * math.log2(points)) if points > 1 else 0


def _cholesky(equation) -> int:
    """n^3 / 3 a matrix."""
    *batch, n, _ = _shape(equation.invars[0])
    return round(math.prod(batch) * n**3 / 3)


def _triangular_solve(equation) -> int:
    """n^2 a right-hand side."""
    n = _shape(equation.invars[0])[-1]
    return n * math.prod(_shape(equation.invars[1]))


PRODUCTS = {
    "dot_general": _dot_general,
    "scaled_dot": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
    "conv_general_dilated": _convolution,
    "fft": _fft,
    "cholesky": _cholesky,
    "triangular_solve": _triangular_solve,
}
