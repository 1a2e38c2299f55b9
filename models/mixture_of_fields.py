"""A mixture of neural ordinary differential equations: every environment has a context, and its context an expert."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models import ENVIRONMENT_GATES
from lissom.models.bounds import at_least_one, shape_of
from lissom.models.linear import StackedLinear
from lissom.models.moe.routing import counts_of, load_metrics
from lissom.models.registry import construct
from lissom.models.variables import Param
from lissom.ops.grouped_matmul import permutation

Field = Callable[[jax.Array], jax.Array]
BLOCK = 8  # rows


def runge_kutta(field: Field, x: jax.Array, h: float) -> jax.Array:
    """x(t + h) of dx/dt = field(x): the classical method, whose error in a step is of order h^5."""
    a = field(x)
    b = field(x + h / 2 * a)
    c = field(x + h / 2 * b)
    d = field(x + h * c)
    return x + h / 6 * (a + 2 * b + 2 * c + d)


def integrate(field: Field, x: jax.Array, *, interval: float, count: int, substeps: int = 1) -> jax.Array:
    """[count, *x.shape]: the states at the times interval, 2 interval, ... behind x, `substeps` steps to each."""
    h = interval / substeps
    step = lambda x, _: (runge_kutta(field, x, h), None)

    def forward(x, _):
        x, _ = jax.lax.scan(step, x, length=substeps)
        return x, x

    return jax.lax.scan(forward, x, length=count)[1]


class Blocks(NamedTuple):
    """Rows in blocks, each of one expert. source int32 [n, r]: the row at each place (row 0 where there is none, and
    nobody looks at what becomes of it); expert int32 [n]: that of each block; place int32 [B]: the place of each row,
    block x r + number in it."""

    source: jax.Array
    expert: jax.Array
    place: jax.Array


def blocks_of(expert: jax.Array, experts: int, rows: int) -> Blocks:
    """Blocks of `rows` rows (or all, if there are fewer) of the rows whose experts [B] are, as many blocks as any
    experts can need. Shapes are static, and kernels are gathered once for a whole integration, whose many small
    products are then one batched product each; every `grouped_matmul` is loops over the experts."""
    count, rows = len(expert), min(rows, len(expert))
    number = min(count, (count + experts * (rows - 1)) // rows)
    by = permutation(expert[:, None], experts)
    ends = jnp.cumsum(-(-by.group_sizes // rows))  # of the blocks of each expert
    firsts = ends + by.group_sizes // -rows
    rank = by.row - (jnp.cumsum(by.group_sizes) - by.group_sizes)[expert]
    place = firsts[expert] * rows + rank
    source = jnp.zeros(number * rows, jnp.int32).at[place].set(jnp.arange(count, dtype=jnp.int32), unique_indices=True)
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(number), side="right"), experts - 1)
    return Blocks(source.reshape(number, rows), owner.astype(jnp.int32), place)


class Gathered(StackedLinear):
    """Its kernels are gathered once, in front of an integration."""

    kernel_alone = True


class MixtureOfFields(nnx.Module):
    """First states of trajectories inputs [B, T, D], environment [B] -> the trajectories [B, T, D], float32.

        e, w = gate(c_n)        n the environment, c_n its context, e its expert, w the weight of that
        dx/dt = w f_e(x, c_n),  x(0) = inputs[:, 0]
        f_e(x, c) = W_depth s(... s(W_1 s(W_0 x + V c + b_0) + b_1) ...) + b_depth,   s(z) = z sigmoid(z)

    with every W, V and b an expert's own, of `depth` hidden layers. Contexts [environments, context_size] begin at 0
    and are parameters, learned together with the experts; of an expert only its own environments have a gradient.
    States are `interval` apart, with `substeps` steps of the classical Runge-Kutta method to each. `gate`: "mixer" or
    "softmax" (`models/environment_gates.py`). MixER: Nzoyem et al. 2025, arXiv:2502.05335.

    Any conditioned field can be an expert: the authors' code (github.com/ddrous/MixER) has three meta-learners, here it
    is a plain network. The code takes proximal steps of contexts and of experts in turns, here one step is of both. In
    its examples each expert reads a part of the context of its own and all begin at the same values; here all read the
    whole context and begin at other values.

    Rows lie in blocks of BLOCK rows of one expert, so that a trajectory costs one expert, and an expert at most
    BLOCK - 1 rows too many; with the gate "mixer" a training call that updates it costs all experts, forward, besides.
    In training it reads all of inputs, as what the experts are judged by. `families` [B, F], shares, are counted for
    the tally `family_use`.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        environments: int,
        interval: float,
        width: int,
        depth: int = 2,
        experts: int = 1,
        context_size: int = 16,
        substeps: int = 1,
        gate: str = "mixer",
        gate_kwargs: Mapping | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        at_least_one("model", width=width, depth=depth, experts=experts, context_size=context_size, substeps=substeps)
        _, features = shape_of("mixture_of_fields", input_shape, "states, features")
        if experts > environments:
            raise ValueError(f"model.experts={experts} must be at most the number of environments, {environments}")
        layer = partial(Gathered, experts=experts, rngs=rngs)
        self.first = layer(features, width, axes=("channels", "mlp"))
        self.conditioned = layer(context_size, width, axes=("channels", "mlp"), bias=False)
        self.inner = nnx.List([layer(width, width, axes=("embed", "mlp")) for _ in range(depth - 1)])
        self.last = layer(width, features, axes=("mlp", "channels"))
        self.contexts = Param(jnp.zeros((environments, context_size)), out_sharding=(None, None))
        self.gate = construct(
            ENVIRONMENT_GATES, gate, gate_kwargs, "gate", context_size=context_size, experts=experts, rngs=rngs
        )
        self.experts, self.interval, self.substeps, self.dtype = experts, interval, substeps, dtype

    def __call__(
        self,
        inputs: jax.Array,
        environment: jax.Array,
        families: jax.Array | None = None,
        *,
        train: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        del key
        inputs = inputs.astype(jnp.float32)
        chosen, weights, aux = self.gate(self.contexts[...], partial(self._losses, inputs, environment), train)
        of_rows = chosen[environment]
        metrics = {**aux["metrics"], **load_metrics(counts_of(of_rows, self.experts))}
        if families is not None:
            metrics["family_use"] = families.T @ jax.nn.one_hot(of_rows, self.experts)
        states = self._integrated(inputs[:, 0], inputs.shape[1] - 1, environment, of_rows, weights[environment])
        return jnp.concatenate([inputs[:, :1], states], 1), {"losses": aux["losses"], "metrics": metrics}

    def _integrated(self, x, count: int, environment, expert, weights) -> jax.Array:
        """[B, count, D] behind the first states x [B, D], each by its own expert."""
        blocks = blocks_of(expert, self.experts, len(x) if self.experts == 1 else BLOCK)
        of_block = lambda array: array[blocks.expert]
        contexts, factor = self.contexts[...][environment][blocks.source], weights[blocks.source][..., None]
        field = self._field(of_block, contexts)
        advance = partial(integrate, interval=self.interval, count=count, substeps=self.substeps)
        states = advance(lambda x: factor * field(x), x[blocks.source])
        return states.reshape(count, -1, x.shape[-1])[:, blocks.place].swapaxes(0, 1)

    def _losses(self, inputs: jax.Array, environment: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(mean squared error of every expert on every environment [N, E], whether the batch has the environment)."""
        contexts = self.contexts[...]
        everywhere = lambda rows: jnp.broadcast_to(rows, (self.experts, *rows.shape))
        field = self._field(jax.lax.stop_gradient, everywhere(contexts[environment]))
        advance = partial(integrate, interval=self.interval, count=inputs.shape[1] - 1, substeps=self.substeps)
        states = advance(field, everywhere(inputs[:, 0]))
        errors = jnp.square(states - inputs[:, 1:].swapaxes(0, 1)[:, None]).mean((0, 3))  # [E, B]
        rows = jax.nn.one_hot(environment, len(contexts), axis=0)
        counts = rows.sum(1)
        return rows @ errors.T / jnp.maximum(counts, 1)[:, None], counts > 0

    def _field(self, of_block: Callable, contexts: jax.Array) -> Field:
        """f(x [n, r, D]) [n, r, D] with contexts [n, r, C], of n blocks of r rows of one expert each; `of_block` gives
        the experts' kernels or biases [E, ...] as those of the blocks [n, ...]."""
        kernel = lambda layer: of_block(layer.kernel[...].astype(self.dtype))
        bias = lambda layer: of_block(layer.bias[...].astype(self.dtype))[:, None]
        # What does not depend on the state is computed once, and kernels are gathered once.
        condition = contexts.astype(self.dtype) @ kernel(self.conditioned) + bias(self.first)
        inner = [(kernel(layer), bias(layer)) for layer in self.inner]
        first, last, end = kernel(self.first), kernel(self.last), bias(self.last)

        def field(x: jax.Array) -> jax.Array:
            h = jax.nn.silu(x.astype(self.dtype) @ first + condition)
            for w, b in inner:
                h = jax.nn.silu(h @ w + b)
            # The state is summed over many steps, in float32 whatever the products are in.
            return (h @ last + end).astype(jnp.float32)

        return field
