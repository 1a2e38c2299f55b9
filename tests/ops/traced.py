"""What tests read from traced programs."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.extend.core import jaxprs_in_params


def operations(jaxpr) -> Iterator:
    """All equations, of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from operations(inner)


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
            if equation.primitive.name == "mpmd_map":  # a kernel for Mosaic GPU
                found.extend(tuple(mesh.grid) for mesh in equation.params["meshes"])
                continue
            for inner in jaxprs_in_params(equation.params):
                visit(inner)
            assert len(found) == before or equation.primitive.name not in ("scan", "while"), "a kernel in a loop"

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return found


class Store(NamedTuple):
    """From shared memory: the shape of what is copied, and of the array of which it is a part."""

    copied: tuple[int, ...]
    array: tuple[int, ...]


@dataclass
class Stores:
    plain: list[Store] = field(default_factory=list)
    swizzled: list[Store] = field(default_factory=list)


@contextlib.contextmanager
def stores(monkeypatch) -> Iterator[Stores]:
    """The copies out of shared memory in Mosaic GPU kernels that are traced while it is open, apart by whether what is
    copied is swizzled, and so goes by a map of the array."""
    found, real = Stores(), plgpu.copy_smem_to_gmem

    def copy(source, to, *args, **options):
        is_swizzled = any("swizzle" in type(t).__name__.lower() for t in getattr(source, "transforms", ()))
        (found.swizzled if is_swizzled else found.plain).append(Store(source.shape, to.ref.shape))
        return real(source, to, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(plgpu, "copy_smem_to_gmem", copy)
        yield found
