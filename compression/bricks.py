"""The transform that puts the channels of trained feed-forward layers into bricks (`models/bricks.py`)."""

import functools
import re
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lissom.compression import partitions
from lissom.compression.channels import copy_channels, recorded
from lissom.compression.transforms import Transform, layer_paths, replace_layers
from lissom.models.bricks import Bricked, Scores
from lissom.models.ffn import SwiGLU
from lissom.models.variables import Parts, freeze, merge, split
from lissom.training.errors import UserError

WAYS = ("coactivation", "weights", "random")


class Bricks(Transform):
    """Every gated feed-forward layer of H channels becomes `bricks` of H / bricks, of which a token has `k`.

    by: coactivation   channels that are active on the same tokens, active being among the `active` (share, None: a
                       tenth) most active ones of a token (`partitions.graph_parts`)
        weights        channels whose columns of the gate's kernel, at length 1, are alike
                       (`partitions.balanced_k_means`)
        random         drawn: what the others must beat
    router, router_width, router_steps: of `models/bricks.py`; "learned" is fitted here, by so many (None: 500) steps of
        Adam on cross-entropy with the bricks' shares of a token's |activation|.
    batches: of data, which layers are watched on. `seed`: of what is drawn.

    Source: Zhang et al. 2022, MoEfication, arXiv:2110.01786, for ReLU layers without a gate, whose activity has zeros.
    A network with ReLUs is not needed here: what is active is a share, and activity is |silu(x Wg) (x Wu)|. The paper
    leaves the router's loss and width open; the authors' code has binary cross-entropy with scores over their maximum,
    a width of the number of experts, no biases, centres as first values, and inputs of length 1.
    """

    def __init__(
        self,
        *,
        bricks: int,
        k: int,
        by: str = "coactivation",
        active: float | None = None,
        router: str = "learned",
        router_width: int | None = None,
        router_steps: int | None = None,
        batches: int = 8,
        seed: int = 0,
    ):
        if by not in WAYS:
            raise UserError(f"bricks: by={by!r} is none of {', '.join(WAYS)}")
        if active is not None and by != "coactivation":
            raise UserError(f"bricks: active={active} is of by='coactivation', not of {by!r}")
        if router != "learned" and not router_width is router_steps is None:
            raise UserError(f"bricks: router_width and router_steps are of router='learned', not of {router!r}")
        active = 0.1 if active is None else active
        router_width = 32 if router_width is None else router_width
        router_steps = 500 if router_steps is None else router_steps
        if not 0 < active <= 1:
            raise UserError(f"bricks: active={active} must be above 0 and at most 1")
        least = {"bricks": bricks, "router_width": router_width, "router_steps": router_steps, "batches": batches}
        for name, value in least.items():
            if value < 1:
                raise UserError(f"bricks: {name}={value} must be at least 1")
        self.bricks, self.k, self.by, self.active, self.seed = bricks, k, by, active, seed
        self.router, self.router_width, self.router_steps, self.batches = router, router_width, router_steps, batches

    def structure(self, module: nnx.Module) -> nnx.Module:
        if not layer_paths(module, (SwiGLU,)):
            raise UserError("bricks are made of gated feed-forward layers, such as ffn='swiglu', and there are none")
        rngs = nnx.Rngs(0)  # for shapes: `values` fills everything
        for path in layer_paths(module, (SwiGLU,)):
            if not re.search(r"(^|/)blocks/\d+/ffn$", path):
                raise UserError(
                    f"bricks are made of the feed-forward layers of blocks; {path} is part of another layer"
                )

        def bricked(path: str, layer: SwiGLU) -> Bricked:
            width, channels = layer.up.kernel.shape
            if channels % self.bricks:
                raise UserError(f"bricks={self.bricks} must divide the {channels} channels of {path}")
            return Bricked(
                width,
                bricks=self.bricks,
                size=channels // self.bricks,
                k=self.k,
                router=self.router,
                router_width=self.router_width,
                rate=layer.dropout,
                dtype=layer.up.dtype,
                rngs=rngs,
            )

        return replace_layers(module, (SwiGLU,), bricked)

    def values(self, module: nnx.Module, source: nnx.Module, data: Iterable[dict]) -> nnx.Module:
        watched = watch(source, islice(data, self.batches))
        new, rng = layer_paths(module, (Bricked,)), np.random.default_rng(self.seed)
        for number, (path, old) in enumerate(layer_paths(source, (SwiGLU,)).items()):
            inputs, activity = watched[path]
            parts = self.partition(old, activity, rng)
            channels = partitions.numbered(parts, self.bricks)
            layer = new[path]
            copy_channels(layer.experts, old, jnp.asarray(channels))
            layer.channels[...] = jnp.asarray(channels, jnp.int32)
            if layer.centres is not None:
                layer.centres[...] = _unit(old)[:, channels].mean(2).T.astype(jnp.float32)
            if layer.learned is not None:
                shares = activity[:, channels].sum(2)
                shares /= np.maximum(shares.sum(1, keepdims=True), 1e-30)
                layer.learned = freeze(self._taught(inputs, shares, number))
        return module

    def partition(self, layer: SwiGLU, activity: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The part of each channel; activity [N, H]."""
        if self.by == "random":
            return partitions.random(activity.shape[1], self.bricks, rng)
        if self.by == "weights":
            return partitions.balanced_k_means(_unit(layer).T, self.bricks, rng)
        together = partitions.coactivation(partitions.active(activity, self.active))
        return partitions.graph_parts(together, self.bricks, rng)

    def _taught(self, inputs: np.ndarray, shares: np.ndarray, number: int) -> Scores:
        key = jax.random.fold_in(jax.random.key(self.seed), number)
        fresh = Scores(inputs.shape[1], self.router_width, self.bricks, rngs=nnx.Rngs(params=key))
        parts = split(fresh)
        return merge(parts._replace(params=_fitted(parts.graph, parts.params, inputs, shares, key, self.router_steps)))


class Watched(NamedTuple):
    """What a gated layer saw and did on N tokens: inputs [N, M], activity [N, H]."""

    inputs: np.ndarray
    activity: np.ndarray


def watch(source: nnx.Module, batches: Iterable[dict]) -> dict[str, Watched]:
    """{path of a gated layer: what it did}. UserError without data."""
    run, found = recorded(source), []
    flat = lambda x: np.asarray(x, np.float32).reshape(-1, x.shape[-1])
    for batch in batches:
        told = run(batch["inputs"])
        found.append({path: Watched(flat(of["inputs"]), flat(of["activity"])) for path, of in told.items()})
    if not found:
        raise UserError("bricks are made by what layers do on data, and there is none here")
    join = lambda path: (np.concatenate(parts) for parts in zip(*(of_batch[path] for of_batch in found), strict=True))
    return {path: Watched(*join(path)) for path in found[0]}


def _unit(layer: SwiGLU) -> np.ndarray:
    """float64 [M, H]: the columns of the gate, each at length 1."""
    kernel = np.asarray(layer.gate.kernel[...], np.float64)
    return kernel / np.maximum(np.linalg.norm(kernel, axis=0), 1e-30)


@functools.partial(jax.jit, static_argnames=("graph", "steps", "rows"))
def _fitted(graph, params, inputs: jax.Array, shares: jax.Array, key: jax.Array, steps: int, rows: int = 512):
    """The parameters of a router after `steps` of Adam on so many tokens each, at a rate that falls from 1e-2 to 0."""
    tx = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def step(carry, key):
        params, state = carry
        at = jax.random.randint(key, (rows,), 0, len(inputs))

        def loss(params):
            return optax.softmax_cross_entropy(merge(Parts(graph, params, {}, {}))(inputs[at]), shares[at]).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))[0][0]
