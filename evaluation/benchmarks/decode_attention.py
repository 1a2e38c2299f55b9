"""Problems of the op `decode_attention`: one new token a sequence, against caches that lie in different ways."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lissom.evaluation.benchmarks.problem import InProcess, InWorker, Oracle, Problem, this_platform
from lissom.evaluation.ceilings import Work
from lissom.ops import decode_attention as op
from lissom.ops.attention import Lengths, attention
from lissom.ops.decode_attention import decode_attention, reference

OP = op.OP


@dataclass(frozen=True)
class Spec:
    """`length` tokens in each cache, which has room for `room`. `page`: tokens a page, None for a dense cache."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    room: int
    length: int
    head_dim: int
    dtype: str = "float32"
    page: int | None = None


CPU = (
    Spec("dense_4k", 8, 8, 8, 4096, 4096, 64),
    Spec("dense_4k_grouped", 8, 8, 2, 4096, 4096, 64),
    Spec("dense_4k_an_eighth_full", 8, 8, 8, 4096, 512, 64),
    Spec("paged_4k", 8, 8, 8, 4096, 4096, 64, page=128),
    Spec("paged_4k_pages_of_16", 8, 8, 8, 4096, 4096, 64, page=16),
    Spec("paged_4k_an_eighth_full", 8, 8, 8, 4096, 512, 64, page=128),
)
ACCELERATOR = (
    Spec("dense_8k", 64, 32, 8, 8192, 8192, 128, "bfloat16"),
    Spec("paged_8k", 64, 32, 8, 8192, 8192, 128, "bfloat16", page=128),
    Spec("dense_8k_one_user", 1, 32, 8, 8192, 8192, 128, "bfloat16"),
)
TINY = (Spec("dense", 2, 4, 2, 24, 17, 8), Spec("paged", 2, 4, 2, 24, 17, 8, page=4))


def problems(platform: str, tiny: bool = False) -> list[Problem]:
    """What is measured on a platform ("cpu", "gpu", "tpu")."""
    return [problem(spec) for spec in (TINY if tiny else CPU if platform == "cpu" else ACCELERATOR)]


def problem(spec: Spec) -> Problem:
    """The problem of a spec. The inputs are the dense caches; pages are cut from them untimed, in any order."""
    pairs = spec.batch * spec.heads * spec.length
    size = jnp.dtype(spec.dtype).itemsize
    moved = 2 * spec.batch * spec.head_dim * (spec.kv_heads * spec.length + spec.heads)
    setting = {name: getattr(spec, name) for name in ("batch", "heads", "kv_heads", "room", "length", "head_dim")}
    return Problem(
        op=OP.name,
        name=spec.name,
        setting={**setting, "dtype": spec.dtype, "cache": f"pages of {spec.page}" if spec.page else "dense"},
        make_inputs=functools.partial(_make_inputs, spec),
        ours=lambda name: _ours(spec, name),
        implementations=tuple(name for name in OP.runs_on(this_platform()) if name != "reference"),
        references=_references(spec),
        work=Work(4 * spec.head_dim * pairs, size * moved, pairs, spec.dtype),
        oracle=_oracle(spec),
    )


def _ours(spec: Spec, name: str | None) -> Callable:
    def dense(q, k, v, lengths, *_):
        return (decode_attention(q, k, v, lengths=lengths, implementation=name),)

    def paged(q, k, v, lengths, table):
        return (decode_attention(q, k, v, lengths=lengths, block_table=table, implementation=name),)

    return paged if spec.page else dense


def _make_inputs(spec: Spec, key: jax.Array):
    """q, k, v, lengths, and for pages their table: k and v are the pages then."""
    keys = jax.random.split(key, 4)
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.float32).astype(spec.dtype)
    q = normal(keys[0], spec.batch, 1, spec.heads, spec.head_dim)
    lengths = jnp.full(spec.batch, spec.length, jnp.int32)
    if not spec.page:
        k, v = (normal(key, spec.batch, spec.kv_heads, spec.room, spec.head_dim) for key in keys[1:3])
        return q, k, v, lengths
    pages = spec.batch * spec.room // spec.page
    k, v = (normal(key, pages, spec.kv_heads, spec.page, spec.head_dim) for key in keys[1:3])
    table = jax.random.permutation(keys[3], pages).reshape(spec.batch, -1).astype(jnp.int32)
    return q, k, v, lengths, table


def _dense(spec: Spec, q, k, v, lengths, *table):
    """The inputs with dense caches, cut to what is filled: other libraries are given no empty room to read."""
    if table:
        k, v = (reference.in_order(pages, table[0]) for pages in (k, v))
    return q, k[:, :, : spec.length], v[:, :, : spec.length]


def _references(spec: Spec) -> dict[str, InProcess | InWorker]:
    def einsum(q, k, v):
        grouped = q.reshape(spec.batch, spec.kv_heads, -1, spec.head_dim)
        scores = jnp.einsum("bkgd,bksd->bkgs", grouped, k, preferred_element_type=jnp.float32) * spec.head_dim**-0.5
        weights = jax.nn.softmax(scores, -1).astype(v.dtype)
        return (jnp.einsum("bkgs,bksd->bkgd", weights, v).reshape(q.shape),)

    def positions_first(q, k, v):
        """The other layout of a cache, [batch, length, kv_heads, head_dim], in our op."""
        return (attention(q, k, v, mask=Lengths(jnp.full(spec.batch, spec.length, jnp.int32)), implementation="xla"),)

    turned = lambda q, k, v: (q, *(jnp.asarray(x.transpose(0, 2, 1, 3)) for x in (k, v)))
    dense = jax.jit(functools.partial(_dense, spec))
    found: dict[str, InProcess | InWorker] = {
        "einsum": InProcess(einsum, dense),
        "lissom_positions_first": InProcess(positions_first, lambda *x: jax.jit(turned)(*dense(*x))),
    }
    if not spec.page and spec.length == spec.room:
        options = {"causal": False, "backward": False, "heads_major": True, "first": 3}
        found["torch_sdpa"] = InWorker("torch_sdpa", options)
    return found


def _oracle(spec: Spec) -> Oracle:
    entries = np.arange(spec.batch) if spec.batch <= 4 else np.array([0, spec.batch - 1])
    pick = lambda x: np.asarray(x)[entries]

    def compute(inputs, dtype):
        q, k, v = (pick(x).astype(dtype) for x in _dense(spec, *map(jnp.asarray, inputs)))
        lengths = np.full(len(entries), spec.length, np.int32)
        options = {"window": None, "scale": spec.head_dim**-0.5, "logit_softcap": None, "splits": None}
        run = functools.partial(reference.run, **options, return_lse=False)
        return [np.asarray(jax.jit(lambda q, k, v: run(q, k, v, lengths, None, None))(q, k, v))]

    note = None if len(entries) == spec.batch else f"checked on batch entries {', '.join(map(str, entries))}"
    return Oracle(compute, lambda results: [pick(results[0])], note)
