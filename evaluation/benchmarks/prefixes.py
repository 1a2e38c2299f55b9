"""Problems of shared prefixes: one new token for each of many sequences that begin alike."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lissom.evaluation.benchmarks.problem import InProcess, Oracle, Problem
from lissom.evaluation.ceilings import Work
from lissom.ops.attention import OP, attention, reference
from lissom.ops.attention.masks import Full
from lissom.ops.attention.shared_prefix import Shared, shared_prefix_attention


@dataclass(frozen=True)
class Spec:
    """`batch` sequences with `own` keys each behind a prefix of `prefix` keys. `levels` > 1: the prefix is a tree, each
    level with twice the nodes of the one above and an equal part of the prefix. Caches are heads-major."""

    name: str
    batch: int
    heads: int
    prefix: int
    own: int
    head_dim: int
    levels: int = 1
    dtype: str = "float32"


CPU = (Spec("prefix_4k", 16, 8, 4096, 256, 64), Spec("prefix_tree_4k", 16, 8, 4096, 256, 64, levels=4))
ACCELERATOR = (Spec("prefix_16k", 128, 32, 16384, 256, 128, dtype="bfloat16"),)
TINY = (Spec("prefix", 4, 2, 12, 5, 8), Spec("prefix_tree", 4, 2, 12, 5, 8, levels=3))


def problem(spec: Spec) -> Problem:
    """The problem of a spec."""
    length = spec.prefix + spec.own
    pairs, size = spec.batch * spec.heads * length, jnp.dtype(spec.dtype).itemsize
    distinct = sum(2**level * spec.prefix // spec.levels for level in range(spec.levels)) + spec.batch * spec.own
    moved = 2 * spec.heads * spec.head_dim * (distinct + spec.batch)
    setting = {name: getattr(spec, name) for name in ("batch", "heads", "prefix", "own", "head_dim", "levels", "dtype")}
    return Problem(
        op=OP.name,
        name=spec.name,
        setting={**setting, "layout": "heads-major cache"},
        make_inputs=functools.partial(_make_inputs, spec),
        ours=lambda name: lambda q, *keys: (_ours(spec, name, q, *keys),),
        implementations=("xla",),
        references={"lissom_whole": InProcess(_whole, jax.jit(functools.partial(_concatenated, spec)))},
        work=Work(4 * spec.head_dim * pairs, size * moved, pairs, spec.dtype),
        oracle=_oracle(spec),
    )


def _make_inputs(spec: Spec, key: jax.Array):
    """q, then k and v of each level from the root on, then the sequences' own."""
    part = spec.prefix // spec.levels
    shapes = [(2**level, spec.heads, part, spec.head_dim) for level in range(spec.levels)]
    shapes = [shape for shape in [*shapes, (spec.batch, spec.heads, spec.own, spec.head_dim)] for _ in "kv"]
    keys = jax.random.split(key, 1 + len(shapes))
    shapes = [(spec.batch, 1, spec.heads, spec.head_dim), *shapes]
    return tuple(jax.random.normal(k, shape, jnp.float32).astype(spec.dtype) for k, shape in zip(keys, shapes))


def _node(spec: Spec, level: int) -> np.ndarray:
    return np.arange(spec.batch) * 2**level // spec.batch


def _ours(spec: Spec, name: str | None, q, *keys):
    tokens_first = [jnp.swapaxes(x, 1, 2) for x in keys]
    shared = [Shared(*tokens_first[2 * i : 2 * i + 2], _node(spec, i)) for i in range(spec.levels)]
    return shared_prefix_attention(q, shared, *tokens_first[-2:], implementation=name)


def _concatenated(spec: Spec, q, *keys):
    """A cache of its own for each sequence, as it is kept where nothing is shared."""
    nodes = [_node(spec, level) for level in range(spec.levels)] + [np.arange(spec.batch)]
    return q, *(jnp.concatenate([x[node] for x, node in zip(keys[i::2], nodes)], 2) for i in (0, 1))


def _whole(q, k, v):
    return (attention(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), implementation="xla"),)


def _oracle(spec: Spec) -> Oracle:
    entries = np.arange(spec.batch) if spec.batch <= 4 else np.array([0, spec.batch - 1])

    def compute(inputs, dtype):
        q, k, v = (np.asarray(x)[entries].astype(dtype) for x in _concatenated(spec, *map(jnp.asarray, inputs)))
        options = {"scale": spec.head_dim**-0.5, "logit_softcap": None, "return_lse": False}
        run = lambda q, k, v: reference.run(q, *(jnp.swapaxes(x, 1, 2) for x in (k, v)), Full(), None, None, **options)
        return [np.asarray(jax.jit(run)(q, k, v))]

    note = None if len(entries) == spec.batch else f"checked on batch entries {', '.join(map(str, entries))}"
    return Oracle(compute, lambda results: [np.asarray(results[0])[entries]], note)
