"""What tests read from traced programs."""

from collections.abc import Callable

import jax
from jax.extend.core import jaxprs_in_params


def grids(function: Callable, *args) -> list[tuple[int, ...]]:
    """The grid of each Pallas kernel in `function`, in order. AssertionError for one in a loop, which is how jax takes
    a kernel under vmap where it cannot add a dimension to the grid."""
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            before = len(found)
            if equation.primitive.name == "pallas_call":
                found.append(tuple(equation.params["grid_mapping"].grid))
                continue
            for inner in jaxprs_in_params(equation.params):
                visit(inner)
            assert len(found) == before or equation.primitive.name not in ("scan", "while"), "a kernel in a loop"

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return found
