"""Whether a network is spike-driven: of every product behind the stem one operand is 0 or 1, so that it is additions.

The program of one batch is computed equation by equation, with its numbers, and the operands of each product are looked
at (convolutions, and what becomes a `dot_general`: linear layers, q (k^T v)), whatever the layers say of themselves.
Arithmetic by element is not: the leak of potentials, masks of spikes, norms that are not folded, the mean of scores.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from lissom.evaluation.costs import CALLS, PRODUCTS


class Product(NamedTuple):
    """A product of the program: its primitive, the shapes of its operands, and which of them hold 0 and 1 alone."""

    primitive: str
    shapes: tuple[tuple[int, ...], ...]
    binary: tuple[bool, ...]

    @property
    def is_additions(self) -> bool:
        return any(self.binary)


class NotSpikeDriven(ValueError):
    """A product of numbers with numbers, in one sentence."""


def check_spike_driven(function: Callable, *arguments: jax.Array, stem: int = 1) -> list[Product]:
    """The products of `function(*arguments)` behind the first `stem`, which see what is encoded; NotSpikeDriven where
    one has no binary operand. Weights that are all 0 or 1 count as binary: give it a network with weights."""
    found = products(function, *arguments)[stem:]
    if not found:
        raise NotSpikeDriven(f"there are no products behind the first {stem} that could be spike-driven")
    for number, product in enumerate(found, stem):
        if not product.is_additions:
            shapes = " and ".join(str(list(shape)) for shape in product.shapes)
            raise NotSpikeDriven(f"product {number} ({product.primitive} of {shapes}) has no operand of 0 and 1 alone")
    return found


def products(function: Callable, *arguments: jax.Array) -> list[Product]:
    """Every product of the call, in the order of the program. NotImplementedError for one in a loop or in a branch."""
    closed, found = jax.make_jaxpr(function)(*arguments), []
    _compute(closed, jax.tree.leaves(arguments), found)
    return found


def _compute(jaxpr: ClosedJaxpr | Jaxpr, inputs: Sequence, found: list[Product]) -> list:
    """The outputs of the jaxpr; its products are added to `found`."""
    constants, inner = (jaxpr.consts, jaxpr.jaxpr) if isinstance(jaxpr, ClosedJaxpr) else ((), jaxpr)
    values = dict(zip((*inner.constvars, *inner.invars), (*constants, *inputs), strict=True))
    read = lambda variable: variable.val if isinstance(variable, Literal) else values[variable]
    for equation in inner.eqns:
        given, name = [read(variable) for variable in equation.invars], equation.primitive.name
        if name in PRODUCTS:
            operands = given[:2]
            binary = tuple(bool(((x == 0) | (x == 1)).all()) for x in operands)
            found.append(Product(name, tuple(jnp.shape(x) for x in operands), binary))
        if name in CALLS and _holds_products(equation):
            outputs = _compute(equation.params[CALLS[name]], given, found)
        elif name not in PRODUCTS and _holds_products(equation):
            raise NotImplementedError(f"products within {name!r} are not looked at")
        else:
            outputs = equation.primitive.bind(*given, **equation.primitive.get_bind_params(equation.params))
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in inner.outvars]


def _holds_products(equation) -> bool:
    return any(
        inner.primitive.name in PRODUCTS or _holds_products(inner)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
        if _is_jaxpr(value)
        for inner in value.eqns
    )


def _is_jaxpr(value) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)
