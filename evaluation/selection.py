"""Block-sparse selectors on the heads of a trained decoder: its q, k, v on real tokens, and its loss with them."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.block import Block
from lissom.models.context import Context
from lissom.models.language import LanguageModel
from lissom.models.mixers.block_sparse import BlockSparseAttention
from lissom.models.registry import construct
from lissom.models.selectors import SELECTORS
from lissom.models.selectors.base import Selector
from lissom.models.variables import Parts, merge, split
from lissom.ops.attention import Causal


class Heads(NamedTuple):
    """q [B, T, H, D] and k, v [B, T, K, D] of one layer, and q and k in front of the rotary angles."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    raw: tuple[jax.Array, jax.Array]


def heads_of(model: LanguageModel, tokens: jax.Array, layers: Sequence[int] | None = None) -> list[Heads]:
    """What attention reads in each of `layers`, in rising order (None: all), on tokens [B, T]. `model` has its layers
    apart and one kind of them, the mixer "attention"; ValueError otherwise."""
    check_layers(model)
    graph = split(model.blocks[0]).graph

    @jax.jit
    def layer(variables, x):
        block = merge(Parts(graph, *variables))
        context, normed = Context(mask=Causal()), block.mixer_norm(x)
        q, k, v, _ = block.mixer.project(normed, context, None)
        raw = block.mixer.q(normed), block.mixer.k(normed)
        if block.mixer.q_norm is not None:
            raw = block.mixer.q_norm(raw[0]), block.mixer.k_norm(raw[1])
        return block(x, context)[0], Heads(q, k, v, raw)

    x, found = model.embed(tokens), []
    wanted = range(len(model.blocks)) if layers is None else layers
    for number, block in enumerate(list(model.blocks)[: max(wanted) + 1]):
        x, heads = layer(split(block)[1:], x)
        if number in wanted:
            found.append(heads)
    return found


class Selection(NamedTuple):
    """A selector's name, its settings, and trained selectors of the layers, or settings of each (None: `settings`)."""

    name: str
    settings: Mapping[str, Any]
    trained: Sequence[Selector] | None = None
    of_layers: Sequence[Mapping[str, Any]] | None = None

    def of(self, layer: int, **facts) -> Selector:
        """The selector of a layer; facts: heads, kv_heads, head_dim, block."""
        if self.trained is not None:
            return self.trained[layer]
        return construct(SELECTORS, self.name, self.kwargs(layer), "selector", **facts, rngs=nnx.Rngs(layer))

    def kwargs(self, layer: int) -> dict[str, Any]:
        """As `construct` takes them: under the name, or under that of a plug-in's class."""
        settings = self.settings if self.of_layers is None else self.of_layers[layer]
        return {self.name.rpartition(":")[2]: settings}


def loss_of(model: LanguageModel, selection: Selection | None, tokens: jax.Array, *, block: int, skip: int) -> tuple:
    """(mean cross-entropy in nats of the labels of tokens [B, T + 1] behind the first `skip`, mean density): the model
    with the selection in front of the attention of every layer; None: dense."""
    check_layers(model)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    x, densities = model.embed(inputs), []
    for number, dense in enumerate(model.blocks):
        layer = dense if selection is None else _with_selector(dense, selection, number, block)
        graph, *variables = split(layer)
        x, density = _run(graph, variables, x)
        densities.append(density)
    return _cross_entropy(model, x[:, skip:], labels[:, skip:]), jnp.stack(densities).mean()


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, variables, x):
    """A layer; one program for all of the same structure, and for all texts of a length."""
    x, _, aux = merge(Parts(graph, *variables))(x, Context(mask=Causal()))
    return x, aux["metrics"].get("density", jnp.ones(()))


def _with_selector(dense: Block, selection: Selection, number: int, block: int) -> Block:
    """The layer with the mixer `block_sparse` around the parameters of its own."""
    old = dense.mixer
    facts = {"heads": old.q.kernel.shape[1], "kv_heads": old.kv_heads, "head_dim": old.head_dim, "block": block}
    selector = selection.of(number, **facts)
    made = nnx.eval_shape(
        lambda: BlockSparseAttention(
            old.q.kernel.shape[0], selector=selection.name, selector_kwargs=selection.kwargs(number),
            rope_theta=old.rope_theta, rope_factors=old.rope_factors, qk_norm=old.q_norm is not None,
            dtype=old.q.dtype, rngs=nnx.Rngs(0), **facts,
        )
    )  # fmt: skip
    layer = merge(split(dense))
    for name in ("q", "k", "v", "o", *(("q_norm", "k_norm") if old.q_norm is not None else ())):
        setattr(made, name, getattr(layer.mixer, name))
    made.selector = selector
    layer.mixer = made
    return layer


def _cross_entropy(model: LanguageModel, x: jax.Array, labels: jax.Array, rows: int = 512) -> jax.Array:
    """By parts of the sequence: all logits at once are [T, vocabulary]."""
    graph, *variables = split(model)
    parts = (slice(at, at + rows) for at in range(0, x.shape[1], rows))
    return sum(_sum_of_losses(graph, variables, x[:, part], labels[:, part]) for part in parts) / labels.size


@functools.partial(jax.jit, static_argnums=0)
def _sum_of_losses(graph, variables, x, labels):
    network = merge(Parts(graph, *variables))
    log_p = jax.nn.log_softmax(network.logits(network.norm(x)))
    return -jnp.take_along_axis(log_p, labels[..., None], -1).sum()


def check_layers(model: LanguageModel) -> None:
    """ValueError where selectors can't be judged on the layers."""
    if model.blocks.mode != "loop":
        raise ValueError("the model's layers must stand apart: load it with stack='loop'")
    kinds = {type(block.mixer).__name__ for block in model.blocks}
    if kinds != {"Attention"}:
        raise ValueError(f"selectors are judged on layers with the mixer 'attention', not {', '.join(sorted(kinds))}")
