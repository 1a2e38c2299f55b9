"""Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv:2403.07816), as stages of one run:

    seed      a network learns all domains together
    branch    a copy a domain (the transform `branches`), each learns its own alone (the objective `branch_training`)
    mix       the feed-forward layers of the copies become the experts of a mixture, all else is their mean, the router
              is new; tuned on all domains

The other steps between the stages are converters (old state, fresh state) -> state, which a stage names:

    mixed      branch -> mix        expert e is the feed-forward layer of branch e
    averaged   branch -> dense      the mean of all branches, feed-forward layers too (a uniform soup of them)
    upcycled   seed -> mix          every expert is the feed-forward layer of the seed (sparse upcycling, Komatsuzaki et
                                    al. 2022, arXiv:2212.05055): BTX without the stage in between

Without the stage `mix` the branches are an ensemble (`models.branches`). The optimizer begins anew in each stage. The
paper mixes with top-2 of a softmax and a balancing loss; the expansion of the experts must be that of the layers.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.compression.transforms import Transform
from lissom.models.branches import Branches as Copies
from lissom.models.variables import flatten, map_paths
from lissom.training.errors import UserError

State = dict[str, Any]


class Branches(Transform):
    """The network becomes `count` copies of itself, which begin alike."""

    def __init__(self, *, count: int):
        self.count = count

    def structure(self, module: nnx.Module) -> nnx.Module:
        return Copies(module, self.count)

    def values(self, module: nnx.Module, source: nnx.Module, data) -> nnx.Module:
        del module, data
        return self.structure(source)


def averaged(old: State, fresh: State) -> State:
    """The mean of the branches."""
    return _filled(old, fresh, lambda name, _: _of(old, f"network/{name}").mean(0))


def mixed(old: State, fresh: State) -> State:
    """Feed-forward layers of the branches become experts, the router stays fresh, the rest is the mean."""
    return _mixture(old, fresh, lambda name: _of(old, f"network/{name}"))


def upcycled(old: State, fresh: State) -> State:
    """Every expert is the feed-forward layer of the network so far, the router stays fresh."""
    return _mixture(old, fresh, lambda name: _of(old, name)[None])


def _mixture(old: State, fresh: State, networks: Callable[[str], jax.Array]) -> State:
    """`networks(name)` is a parameter of all networks, with an axis of them in front."""

    def value(name: str, leaf: jax.Array) -> jax.Array:
        layer, experts, kernel = name.rpartition("experts/")
        if experts and kernel == "inner/kernel":  # gate and up, or up alone
            return jnp.stack([networks(f"{layer}{part}/kernel") for part in ("gate", "up")[-leaf.shape[2] :]], 2)
        if experts:
            return networks(f"{layer}down/kernel")
        return leaf if ROUTER.search(name) else networks(name).mean(0)

    names = flatten(old["params"])
    if any(ROUTER.search(name) for name in names):
        raise UserError("experts are made of feed-forward layers, and these are mixtures of experts already")
    if any(BIAS.search(name) for name in names):
        raise UserError("experts have no biases, and the feed-forward layers that they would be made of do: use swiglu")
    return _filled(old, fresh, value)


# Of a mixture; the gate of a gated layer is a kernel.
ROUTER = re.compile(r"ffn/gate/(?!kernel$)")
BIAS = re.compile(r"ffn/(up|down)/bias$")


def _of(state: State, name: str) -> jax.Array:
    try:
        return flatten(state["params"])[name]
    except KeyError as error:
        raise UserError(f"parameter {name} has no counterpart in the stage before") from error


def _filled(old: State, fresh: State, value: Callable[[str, jax.Array], jax.Array]) -> State:
    """The fresh state with parameters value(name, fresh leaf); an axis of one network in front is repeated."""

    def fitting(name: str, leaf: jax.Array) -> jax.Array:
        new = value(name, leaf)
        if new.shape[:1] == (1,) and new.ndim == leaf.ndim:
            new = jnp.repeat(new, leaf.shape[0], 0)
        if new.shape != leaf.shape:
            raise UserError(
                f"parameter {name} would have the shape {new.shape} by the stage before, and needs {leaf.shape}: "
                "there must be a branch an expert, and feed-forward layers of the experts' hidden width"
            )
        return new.astype(leaf.dtype)

    return {**fresh, "step": old["step"], "params": map_paths(fitting, fresh["params"])}
