"""Problems of the op `attention`. A new one is one `Spec` in `CPU` or `ACCELERATOR`.

Shapes come from `ops/attention/cases.py` where they are of a real model. The limits are those of the literature: every
seen pair of query and key costs two products, forward, and five, backward (the scores are computed again), and one
exponential each way; inputs and results move once.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lissom.evaluation.benchmarks import prefixes
from lissom.evaluation.benchmarks.problem import InProcess, InWorker, Oracle, Problem, this_platform
from lissom.evaluation.ceilings import Work
from lissom.ops import attention as op
from lissom.ops.attention import (
    BlockSparse,
    Causal,
    Full,
    Mask,
    Neighbourhood,
    Span,
    Window,
    attention,
    listed,
    reference,
    replaced,
)
from lissom.ops.attention.cases import REAL, TINY, Case
from lissom.ops.attention.masks import key_range, square

OP = op.OP


@dataclass(frozen=True)
class Spec:
    """A problem in short. `backward`: gradients of q, k and v are wanted too. `heads_major`: k and v lie as
    [B, H, S, D], as a cache does, and are given to the op as transposed views. `references`: names of `REFERENCES`.
    `on_device`: the lists of the mask are an input, as if they had just been computed."""

    name: str
    case: Case
    references: tuple[str, ...] = ("jax_nn", "torch_sdpa")
    backward: bool = False
    heads_major: bool = False
    dtype: str = "float32"
    family: str | None = None
    on_device: bool = False


def _blocks(length: int, share: float, heads: int, block: int = 128) -> BlockSparse:
    """For each head and block of queries the same number of blocks of keys, drawn at random."""
    blocks = length // block
    every = np.broadcast_to(np.arange(blocks, dtype=np.int32), (1, heads, blocks, blocks))
    drawn = np.random.default_rng(0).permuted(every, axis=3)[..., : max(round(share * blocks), 1)]
    return BlockSparse(np.sort(drawn, axis=3), None, block, block)


def _sparse(spec: str, length: int, share: float, case: Case, **options) -> "Spec":
    mask = _blocks(length, share, case.heads if options.get("on_device") else 1)
    return Spec(spec, _long(case, length, mask=mask), ("lissom_full",), **options)


def _long(case: Case, length: int, **changes) -> Case:
    return dataclasses.replace(case, q_len=length, kv_len=length, **changes)


_CAUSAL, _WINDOW = REAL["causal_4k"], REAL["window_4k"]
_DENSE = ("jax_nn", "torch_sdpa", "lissom_causal")
_H200 = Case(4, 8192, 8192, 16, 16, 128, 128, Causal(), "FlashAttention-3, figure 5")

CPU = (
    Spec("causal_2k", _long(_CAUSAL, 2048)),
    Spec("causal_4k", _CAUSAL),
    Spec("causal_2k_backward", _long(_CAUSAL, 2048), backward=True),
    Spec("causal_4k_backward", _CAUSAL, backward=True),
    Spec("full_1k", _long(_CAUSAL, 1024, mask=Full())),
    *(
        Spec(
            f"window_{length // 1024}k{'_backward' if backward else ''}",
            _long(_WINDOW, length),
            _DENSE if length <= 4096 else (),
            backward,
            family=f"window{'_backward' if backward else ''}",
        )
        for backward in (False, True)
        for length in (2048, 4096, 8192, 16384)
    ),
    *(
        _sparse(f"blocks_{name}{end}", 4096, share, _CAUSAL, **options)
        for name, share in (("half", 0.5), ("quarter", 0.25), ("eighth", 0.125))
        for end, options in (("", {}), ("_on_device", {"on_device": True}), ("_backward", {"backward": True}))
    ),
    Spec("plane_64_7", _long(_CAUSAL, 4096, mask=Neighbourhood((64, 64), 7)), ("jax_nn", "lissom_full")),
    Spec("plane_64_7_backward", _long(_CAUSAL, 4096, mask=Neighbourhood((64, 64), 7)), ("lissom_full",), True),
    Spec("decode_4k", REAL["decode_4k"], ("torch_sdpa", "einsum", "jax_nn"), heads_major=True),
)

_ON_GPU = ("jax_cudnn", "torch_sdpa", "tokamax")
_BANDED = ("jax_cudnn", "torch_flex_attention", "lissom_full")

ACCELERATOR = tuple(
    dataclasses.replace(spec, dtype="bfloat16")
    for spec in (
        Spec("causal_8k", _H200, _ON_GPU),
        Spec("causal_8k_backward", _H200, _ON_GPU, backward=True),
        Spec("causal_8k_d64", dataclasses.replace(_H200, heads=32, kv_heads=32, head_dim=64, v_dim=64), _ON_GPU),
        Spec("full_8k", dataclasses.replace(_H200, mask=Full()), _ON_GPU),
        Spec("window_32k", _long(_H200, 32768, batch=1, mask=Window(1023, 0)), _BANDED),
        Spec("window_32k_backward", _long(_H200, 32768, batch=1, mask=Window(1023, 0)), _BANDED, backward=True),
        *(
            _sparse(f"blocks_{name}{end}", 32768, share, dataclasses.replace(_H200, batch=1), **options)
            for name, share in (("tenth", 0.1), ("half", 0.5))
            for end, options in (("", {}), ("_on_device", {"on_device": True}), ("_backward", {"backward": True}))
        ),
        Spec(
            "decode_8k",
            Case(64, 1, 8192, 32, 8, 128, 128, Causal(8191), "Llama 3 8B, one new token for 64 users"),
            ("torch_sdpa", "einsum", "jax_cudnn"),
            heads_major=True,
        ),
    )
)

TINY_SPECS = (
    Spec("causal_odd", TINY["causal_odd"]),
    Spec("causal_odd_backward", TINY["causal_odd"], backward=True),
    Spec("window_odd", TINY["window_odd"], _DENSE, family="window"),
    Spec("window_odd_longer", _long(TINY["window_odd"], 34), (), family="window"),
    Spec("window_odd_backward", TINY["window_odd"], backward=True),
    Spec("blocks", _long(TINY["full"], 16, mask=_blocks(16, 0.5, 1, 4)), ("lissom_full",)),
    Spec("blocks_on_device", _long(TINY["full"], 16, mask=_blocks(16, 0.5, 2, 4)), (), backward=True, on_device=True),
    Spec("plane", _long(TINY["full"], 20, mask=Neighbourhood((4, 5), 3)), ("jax_nn",)),
    Spec("decode", TINY["decode"], ("torch_sdpa", "einsum", "jax_nn"), heads_major=True),
)


def problems(platform: str, tiny: bool = False) -> list[Problem]:
    """What is measured on a platform ("cpu", "gpu", "tpu")."""
    specs = TINY_SPECS if tiny else CPU if platform == "cpu" else ACCELERATOR
    prefix = prefixes.TINY if tiny else prefixes.CPU if platform == "cpu" else prefixes.ACCELERATOR
    return [*(problem(spec) for spec in specs), *(prefixes.problem(spec) for spec in prefix)]


def case_of(name: str, platform: str, tiny: bool = False) -> tuple:
    """(q, k, v, mask) of a problem as shapes, as implementations' `candidates` and `key_of` want them."""
    specs = TINY_SPECS if tiny else CPU if platform == "cpu" else ACCELERATOR
    spec = next((spec for spec in specs if spec.name == name), None)
    if spec is None:
        raise KeyError(name)
    case = spec.case
    shape = lambda length, heads, d: jax.ShapeDtypeStruct((case.batch, length, heads, d), jnp.dtype(spec.dtype))
    q = shape(case.q_len, case.heads, case.head_dim)
    return q, shape(case.kv_len, case.kv_heads, case.head_dim), shape(case.kv_len, case.kv_heads, case.v_dim), case.mask


def problem(spec: Spec) -> Problem:
    """The problem of a spec. Implementations that refuse it are left out when they are called."""
    case = spec.case
    names = {"batch": case.batch, "heads": case.heads, "kv_heads": case.kv_heads, "q_len": case.q_len}
    names |= {"kv_len": case.kv_len, "head_dim": case.head_dim, "v_dim": case.v_dim, "mask": _mask_name(case.mask)}
    passes = "forward and backward" if spec.backward else "forward"
    layout = "heads-major cache" if spec.heads_major else "[B, T, H, D]"
    return Problem(
        op=OP.name,
        name=spec.name,
        setting={**names, "dtype": spec.dtype, "passes": passes, "layout": layout},
        make_inputs=functools.partial(_make_inputs, spec),
        ours=lambda name: _passes(
            spec, lambda q, k, v, *lists: attention(q, k, v, mask=_mask(spec, lists), implementation=name)
        ),
        implementations=tuple(name for name in OP.runs_on(this_platform()) if name != "reference"),
        references={name: made for name in spec.references if (made := REFERENCES[name](spec)) is not None},
        work=work(spec),
        oracle=oracle(spec),
        family=spec.family,
        size=case.q_len if spec.family else None,
    )


def _mask(spec: Spec, lists: tuple[jax.Array, ...]) -> Mask:
    """The mask, with its lists as they come in, where they do."""
    mask = spec.case.mask
    if not spec.on_device:
        return mask
    blocks = listed(mask)
    return replaced(mask, blocks, dataclasses.replace(blocks, index=lists[0]))


def _mask_name(mask: Mask) -> str:
    if isinstance(mask, Window):
        return f"window {mask.left},{mask.right}"
    if isinstance(mask, Neighbourhood):
        return f"neighbourhood {'x'.join(map(str, mask.window))} of {'x'.join(map(str, mask.shape))}"
    if isinstance(mask, BlockSparse):
        each = "one for each head" if mask.index.shape[1] > 1 else "one for all heads"
        return f"{mask.index.shape[3]} of {mask.index.shape[2]} blocks of {mask.block_k}, {each}"
    return type(mask).__name__.lower()


def _make_inputs(spec: Spec, key: jax.Array) -> tuple[jax.Array, ...]:
    """q, k, v, for the backward pass the cotangent of the result, and lists where they are inputs."""
    case = spec.case
    shapes = [
        (case.batch, case.q_len, case.heads, case.head_dim),
        (case.batch, case.kv_len, case.kv_heads, case.head_dim),
        (case.batch, case.kv_len, case.kv_heads, case.v_dim),
    ]
    if spec.heads_major:
        shapes[1:] = [(b, h, s, d) for b, s, h, d in shapes[1:]]
    if spec.backward:
        shapes.append((case.batch, case.q_len, case.heads, case.v_dim))
    keys = jax.random.split(key, len(shapes))
    arrays = [jax.random.normal(k, shape, jnp.float32).astype(spec.dtype) for k, shape in zip(keys, shapes)]
    return (*arrays, jnp.asarray(listed(case.mask).index)) if spec.on_device else tuple(arrays)


def _passes(spec: Spec, attend: Callable) -> Callable:
    """The function of the inputs that is timed: a tuple (out,), or (out, dq, dk, dv)."""

    def forward(q, k, v, *lists):
        if spec.heads_major:
            k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        return attend(q, k, v, *lists)

    def both(q, k, v, cotangent, *lists):
        out, pull = jax.vjp(lambda q, k, v: forward(q, k, v, *lists), q, k, v)
        return out, *pull(cotangent)

    return both if spec.backward else lambda q, k, v, *lists: (forward(q, k, v, *lists),)


# ---- references ----------------------------------------------------------------------------------------------


def _sees_all(mask: Mask, q_len: int, kv_len: int) -> bool:
    return seen_pairs(mask, q_len, kv_len) == q_len * kv_len


def _jax_nn(spec: Spec, implementation: str) -> InProcess:
    """`jax.nn.dot_product_attention`, with its own words for the mask where it has some, and the dense mask else. Its
    cache lies as it wants it, [B, S, H, D]."""
    case = spec.case
    mask, square = case.mask, case.q_len == case.kv_len
    options: dict = {}
    if square and mask == Causal():
        options = {"is_causal": True}
    elif square and isinstance(mask, Window) and mask.offset == 0 and None not in (mask.left, mask.right):
        # The window alone says the same; with is_causal too, cuDNN takes it.
        options = {"local_window_size": (mask.left, mask.right), "is_causal": mask.right == 0}
    dense = not options and not _sees_all(mask, case.q_len, case.kv_len)

    def attend(q, k, v):
        given = {**options, "mask": mask.dense(case.q_len, case.kv_len)} if dense else options
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation, **given)

    if not spec.heads_major:
        return InProcess(_passes(spec, attend))
    turned = lambda q, k, v: (q, *(jnp.asarray(x.transpose(0, 2, 1, 3)) for x in (k, v)))
    return InProcess(_passes(dataclasses.replace(spec, heads_major=False), attend), jax.jit(turned))


def _einsum(spec: Spec) -> InProcess:
    """The equation on a heads-major cache, for queries that see all keys."""

    def attend(q, k, v):
        batch, q_len, heads, dim = q.shape
        q = q.reshape(batch, q_len, k.shape[1], -1, dim)
        scores = jnp.einsum("btkgd,bksd->bkgts", q, k, preferred_element_type=jnp.float32) * dim**-0.5
        weights = jax.nn.softmax(scores, -1).astype(v.dtype)
        return (jnp.einsum("bkgts,bksd->btkgd", weights, v).reshape(batch, q_len, heads, -1),)

    return InProcess(attend)


def _torch_sdpa(spec: Spec) -> InWorker:
    case = spec.case
    causal = case.mask == Causal() and case.q_len == case.kv_len
    options = {"causal": causal, "backward": spec.backward, "heads_major": spec.heads_major}
    if not causal and not _sees_all(case.mask, case.q_len, case.kv_len):
        options["mask"] = np.asarray(case.mask.dense(case.q_len, case.kv_len))
    return InWorker("torch_sdpa", options)


def _torch_flex_attention(spec: Spec) -> InWorker:
    mask = spec.case.mask
    window = [mask.left, mask.right] if isinstance(mask, Window) else [None, 0] if mask == Causal() else [None, None]
    return InWorker(
        "torch_flex_attention", {"window": window, "backward": spec.backward, "heads_major": spec.heads_major}
    )


def _tokamax(spec: Spec) -> InProcess | None:
    if importlib.util.find_spec("tokamax") is None:
        return None
    import tokamax

    causal = spec.case.mask == Causal()
    attend = lambda q, k, v: tokamax.dot_product_attention(q, k, v, is_causal=causal)
    return InProcess(_passes(spec, attend))


def _ours_with(mask: Mask) -> Callable[[Spec], InProcess]:
    """Our own default under another mask: what a sparse mask is to save."""
    return lambda spec: InProcess(_passes(spec, lambda q, k, v, *_: attention(q, k, v, mask=mask)), same=False)


REFERENCES: dict[str, Callable[[Spec], InProcess | InWorker | None]] = {
    "jax_nn": functools.partial(_jax_nn, implementation="xla"),
    "jax_cudnn": functools.partial(_jax_nn, implementation="cudnn"),
    "einsum": _einsum,
    "torch_sdpa": _torch_sdpa,
    "torch_flex_attention": _torch_flex_attention,
    "tokamax": _tokamax,
    "lissom_causal": _ours_with(Causal()),
    "lissom_full": _ours_with(Full()),
}
"""Name -> the reference of a spec; None where a library is not installed."""


# ---- work ----------------------------------------------------------------------------------------------------

COUNTED_ROWS = 512


def seen_pairs(mask: Mask, q_len: int, kv_len: int, batch: int = 1, heads: int = 1) -> int:
    """How many (query, key) pairs of the batch and its heads the mask shows: exact, block by block."""
    if isinstance(mask, BlockSparse):
        named = np.asarray(mask.block_map(kv_len))
        rows, keys = (
            np.minimum(np.arange(n) * size + size, length) - np.arange(n) * size
            for n, size, length in zip(named.shape[2:], (mask.block_q, mask.block_k), (q_len, kv_len))
        )
        return int(rows @ named.sum((0, 1)) @ keys) * (batch // named.shape[0]) * (heads // named.shape[1])
    if listed(mask) is not None:
        raise NotImplementedError("pairs are counted of lists of blocks alone")
    total, tests = 0, mask.intervals(q_len, kv_len)
    for start in range(0, q_len, COUNTED_ROWS):
        size = min(COUNTED_ROWS, q_len - start)
        low, high = key_range(tests, start, start + size, kv_len)
        seen = square(tests, Span(start, size), Span(low, high - low))
        shown = size * (high - low) if seen is None else int(np.asarray(seen).sum())
        total += shown * heads * (batch if seen is None else batch // seen.shape[0])
    return total


def work(spec: Spec) -> Work:
    """flops 2 (D + Dv) a pair forward, 2 (3 D + 2 Dv) backward; one exponential a pair and pass; bytes of q, k, v and
    the result, and backward of the cotangent and the gradients too."""
    case = spec.case
    pairs = seen_pairs(case.mask, case.q_len, case.kv_len, case.batch, case.heads)
    d, dv = case.head_dim, case.v_dim
    inputs = case.batch * (case.q_len * case.heads * d + case.kv_len * case.kv_heads * (d + dv))
    result = case.batch * case.q_len * case.heads * dv
    size = jnp.dtype(spec.dtype).itemsize
    if not spec.backward:
        return Work(2 * (d + dv) * pairs, size * (inputs + result), pairs, spec.dtype)
    return Work(2 * (4 * d + 3 * dv) * pairs, size * 2 * (inputs + result), 2 * pairs, spec.dtype)


# ---- the oracle ----------------------------------------------------------------------------------------------

CHECKED_SCORES, CHECKED_KEYS = 1 << 25, 1 << 26
"""Up to so many scores, and numbers in k and v, all is checked; else the first and the last key head of the last batch
entry."""

ORACLE_ROWS = 512


@dataclass(frozen=True)
class _Seen(Mask):
    """A mask that is given as the square that it shows."""

    seen: jax.Array

    def dense(self, q_len: int, kv_len: int):
        return self.seen


def oracle(spec: Spec) -> Oracle:
    """The op's reference in float64, for all heads or for some: heads don't depend on each other."""
    case = spec.case
    scores = case.batch * case.heads * case.q_len * case.kv_len
    keys = case.batch * case.kv_heads * case.kv_len * (case.head_dim + case.v_dim)
    group = case.heads // case.kv_heads
    if scores <= CHECKED_SCORES and keys <= CHECKED_KEYS:
        entries, kv_heads, note = np.arange(case.batch), np.arange(case.kv_heads), None
    else:
        entries, kv_heads = np.array([case.batch - 1]), np.unique([0, case.kv_heads - 1])
        note = f"checked on key heads {', '.join(map(str, kv_heads))} of batch entry {entries[0]}"
    heads = (kv_heads[:, None] * group + np.arange(group)).ravel()

    def pick(array, which, heads_axis: int = 2):
        return np.take(np.take(np.asarray(array), entries, 0), which, heads_axis)

    def compute(inputs, dtype) -> list[np.ndarray]:
        keys_axis = 1 if spec.heads_major else 2
        q, k, v, *cotangent = inputs[: 3 + spec.backward]
        part = (pick(q, heads), *(pick(x, kv_heads, keys_axis) for x in (k, v)), *(pick(x, heads) for x in cotangent))
        part = [jnp.asarray(x.astype(dtype)) for x in part]
        mask = case.mask
        if isinstance(mask, BlockSparse):
            own = [
                np.asarray(table)[:, heads] if table.shape[1] > 1 else table for table in (mask.index, mask.counts())
            ]
            mask = BlockSparse(*own, mask.block_q, mask.block_k)
        plain = dataclasses.replace(spec, on_device=False)
        return [np.asarray(x) for x in jax.jit(_passes(plain, functools.partial(_in_chunks, mask)))(*part)]

    def part(results) -> list[np.ndarray]:
        return [pick(x, which) for x, which in zip(results, (heads, heads, kv_heads, kv_heads))]

    return Oracle(compute, part, note)


def _in_chunks(mask, q, k, v):
    """`reference`, over the queries in chunks: a softmax is over the keys of one query. Each chunk meets the keys that
    the mask can show it, so that long sequences with narrow windows can be checked. Masks are without a batch."""
    q_len, kv_len = q.shape[1], k.shape[1]
    rows = next(n for n in range(min(ORACLE_ROWS, q_len), 0, -1) if q_len % n == 0)
    starts, tests = range(0, q_len, rows), mask.intervals(q_len, kv_len)
    ranges = [key_range(tests, start, start + rows, kv_len) for start in starts]
    width = max(1, *(high - low for low, high in ranges))
    lows = np.array([min(low, kv_len - width) for low, _ in ranges])
    take = lambda x, at, size: jax.lax.dynamic_slice_in_dim(x, at, size, 1)

    @jax.checkpoint
    def chunk(start, low):
        if isinstance(mask, BlockSparse):
            named = jnp.asarray(mask.block_map(kv_len))[:, :, (start + np.arange(rows)) // mask.block_q]
            seen = jnp.repeat(named, mask.block_k, 3)[..., :kv_len]
        else:
            seen = square(tests, Span(start, rows), Span(low, width))
            seen = None if seen is None else seen[:, None]
        part = (take(q, start, rows), take(k, low, width), take(v, low, width), Full() if seen is None else _Seen(seen))
        return reference.run(*part, None, None, scale=q.shape[-1] ** -0.5, logit_softcap=None, return_lse=False)

    out = jax.lax.map(lambda at: chunk(*at), (np.array(list(starts)), lows))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], q_len, *out.shape[3:])
