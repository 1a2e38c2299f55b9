"""One mapping from the settings and tensors of a Llama-family checkpoint to a `LanguageModel` and its parameters.

    x += Wo attention(rope(Wq n), rope(Wk n), Wv n),   n = rmsnorm(x)
    x += Wd (silu(Wg n) * (Wu n)),                     n = rmsnorm(x)

Touvron et al. 2023, arXiv:2302.13971 (Llama); Jiang et al. 2023, arXiv:2310.06825 (Mistral: a window); Qwen2 (biases of
q, k, v; arXiv:2407.10671) and Qwen3 (norms of q and k; arXiv:2505.09388) are the same decoder with a setting changed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lissom.models.language import LanguageModel
from lissom.models.norms import RMSNorm
from lissom.models.pretrained.checkpoint import Checkpoint, Settings
from lissom.models.pretrained.errors import CheckpointError
from lissom.models.registry import settings_of
from lissom.models.stack import stack_layers, stacks, unstack_layers
from lissom.models.variables import Parts, flatten, map_paths, merge, split


class Source(NamedTuple):
    """Where a parameter comes from: the tensor's name, its shape there, and how it is turned into ours."""

    name: str
    shape: tuple[int, ...]
    turn: Callable[[np.ndarray], np.ndarray]


def language_settings(settings: Settings) -> dict[str, Any]:
    """The arguments of `LanguageModel` (but dtype, stack and rngs) that make it the checkpoint's decoder."""
    mixer = "attention" if settings.window is None else "window"
    same = ("kv_heads", "head_dim", "rope_theta", "rope_factors", "qk_norm", "bias", "out_bias")
    attention = {name: getattr(settings, name) for name in same}
    if settings.window is not None:
        attention["window"] = settings.window
    return {
        "vocab_size": settings.vocab_size,
        "width": settings.width,
        "depth": settings.depth,
        "heads": settings.heads,
        "tied": settings.tied,
        "embedding_multiplier": 1.0,
        "mixer": mixer,
        "mixer_kwargs": {mixer: attention},
        "ffn": "swiglu",
        # A SwiGLU's hidden width is 2/3 of expansion x width, rounded.
        "ffn_kwargs": {"swiglu": {"expansion": 1.5 * settings.hidden / settings.width}},
        "norm": "rmsnorm",
        "norm_kwargs": {"rmsnorm": {"epsilon": settings.epsilon}},
    }


def sources(settings: Settings) -> dict[str, Source]:
    """{path of a parameter, unstacked: where it comes from}."""
    width, hidden, size = settings.width, settings.hidden, settings.head_dim
    transposed = lambda name, rows, columns: Source(f"{name}.weight", (rows, columns), lambda w: w.T)
    same = lambda name, *shape: Source(name, shape, lambda w: w)
    found = {
        "embed/table": same("model.embed_tokens.weight", settings.vocab_size, width),
        "norm/scale": same("model.norm.weight", width),
    }
    if not settings.tied:
        found["head/kernel"] = transposed("lm_head", settings.vocab_size, width)
    for i in range(settings.depth):
        ours, theirs = f"blocks/{i}", f"model.layers.{i}"
        found[f"{ours}/mixer_norm/scale"] = same(f"{theirs}.input_layernorm.weight", width)
        found[f"{ours}/ffn_norm/scale"] = same(f"{theirs}.post_attention_layernorm.weight", width)
        for name, heads in (("q", settings.heads), ("k", settings.kv_heads), ("v", settings.kv_heads)):
            part = f"{theirs}.self_attn.{name}_proj"
            found[f"{ours}/mixer/{name}/kernel"] = Source(
                f"{part}.weight", (heads * size, width), lambda w, heads=heads: w.T.reshape(width, heads, size)
            )
            if settings.bias:
                found[f"{ours}/mixer/{name}/bias"] = Source(
                    f"{part}.bias", (heads * size,), lambda b, heads=heads: b.reshape(heads, size)
                )
        found[f"{ours}/mixer/o/kernel"] = transposed(f"{theirs}.self_attn.o_proj", width, settings.heads * size)
        if settings.out_bias:
            found[f"{ours}/mixer/o/bias"] = same(f"{theirs}.self_attn.o_proj.bias", width)
        if settings.qk_norm:
            for name in ("q_norm", "k_norm"):
                found[f"{ours}/mixer/{name}/scale"] = same(f"{theirs}.self_attn.{name}.weight", size)
        found[f"{ours}/ffn/gate/kernel"] = transposed(f"{theirs}.mlp.gate_proj", hidden, width)
        found[f"{ours}/ffn/up/kernel"] = transposed(f"{theirs}.mlp.up_proj", hidden, width)
        found[f"{ours}/ffn/down/kernel"] = transposed(f"{theirs}.mlp.down_proj", width, hidden)
    return found


def build(checkpoint: Checkpoint, *, dtype: jnp.dtype = jnp.float32, stack: str | None = None) -> LanguageModel:
    """The decoder with the checkpoint's values; parameters are float32, `dtype` computes, `stack` as in LanguageModel.

    Raises CheckpointError, naming it, for a tensor that is missing, has another shape, or that nothing reads.
    """
    settings = checkpoint.settings
    _check(checkpoint)
    arguments = language_settings(settings)
    try:
        abstract = nnx.eval_shape(lambda: LanguageModel(**arguments, dtype=dtype, stack=stack, rngs=nnx.Rngs(0)))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.source}: {error}") from error
    parts, where = split(abstract), stacks(abstract)
    shapes = jax.eval_shape(lambda tree: unstack_layers(tree, where), parts.params)
    table = sources(settings)
    _check_names(checkpoint, table, set(flatten(shapes)))

    def value(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        source = table[path]
        tensor = checkpoint.tensors[source.name]()
        if tensor.shape != source.shape:
            raise CheckpointError(
                f"{checkpoint.source}: {source.name} has shape {list(tensor.shape)}, and by the settings of the "
                f"checkpoint it must have {list(source.shape)}"
            )
        turned = jnp.asarray(source.turn(tensor), leaf.dtype)
        assert turned.shape == leaf.shape, (path, turned.shape, leaf.shape)
        return turned

    params = stack_layers(map_paths(value, shapes), where)
    return merge(Parts(parts.graph, params, parts.stats, parts.frozen))


def _check(checkpoint: Checkpoint) -> None:
    settings = checkpoint.settings
    own = settings_of(RMSNorm)["epsilon"].default
    if settings.qk_norm and settings.epsilon != own:
        raise CheckpointError(
            f"{checkpoint.source}: epsilon={settings.epsilon} in the norms of q and k; in this decoder it is {own}"
        )
    for check in checkpoint.explained.values():
        check()


def _check_names(checkpoint: Checkpoint, table: dict[str, Source], paths: set[str]) -> None:
    assert set(table) == paths, f"the mapping and the decoder differ: {sorted(set(table) ^ paths)}"
    wanted = {source.name: path for path, source in table.items()}
    missing = [name for name in wanted if name not in checkpoint.tensors]
    if missing:
        raise CheckpointError(
            f"{checkpoint.source}: no tensor {missing[0]} for the parameter {wanted[missing[0]]} "
            f"({len(missing)} missing in all)"
        )
    unread = sorted(set(checkpoint.tensors) - set(wanted))
    if unread:
        raise CheckpointError(
            f"{checkpoint.source}: nothing in this decoder reads the tensor {unread[0]} ({len(unread)} such in all)"
        )
