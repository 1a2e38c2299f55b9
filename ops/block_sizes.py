"""Block sizes of kernels, as measured: a small table keyed by chip and shape.

A kernel knows sizes that fit, from a model of its machine. Where scripts/tune_ops.py has measured better ones they
stand in block_sizes.toml, one entry a kernel, chip, dtype, head sizes and kind of mask, at one pair of lengths; a
request takes the entry whose lengths are nearest (in octaves, at most one off each), and the kernel's own choice
where there is none.
"""

import contextlib
import contextvars
import functools
import math
import pathlib
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

from lissom.ops.attention.masks import And, Mask

TABLE = pathlib.Path(__file__).parent / "block_sizes.toml"
OCTAVES = 1.0
KEY = ("kernel", "chip", "dtype", "head_dim", "v_dim", "mask", "q_len", "kv_len")

_forced: contextvars.ContextVar[tuple[str, Mapping[str, Any] | None] | None] = contextvars.ContextVar(
    "forced", default=None
)


def chip() -> str | None:
    """The kind of machine that is compiled for, as far as tracing knows it: of an abstract device, else of the default
    device."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described.device_kind if described is not None else jax.devices()[0].device_kind


def key_of(
    kernel: str, mask: Mask, *, dtype: Any, q_len: int, kv_len: int, head_dim: int, v_dim: int
) -> dict[str, Any]:
    """What an entry of the table is for."""
    shape = {"head_dim": head_dim, "v_dim": v_dim, "mask": mask_kind(mask), "q_len": q_len, "kv_len": kv_len}
    return {"kernel": kernel, "chip": chip(), "dtype": str(jnp.dtype(dtype)), **shape}


def mask_kind(mask: Mask) -> str:
    """The types of its parts: "Causal", "Causal & Segments"."""
    return " & ".join(sorted(type(part).__name__ for part in (mask.parts if isinstance(mask, And) else (mask,))))


def tuned(key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sizes for a key: those that are forced (`force`), else those of the nearest entry; None without one."""
    forced = _forced.get()
    if forced is not None and forced[0] == key["kernel"]:
        return None if forced[1] is None else dict(forced[1])
    lengths = ("q_len", "kv_len")
    near = {}
    for number, entry in enumerate(entries()):
        if all(entry[name] == key[name] for name in key if name not in lengths):
            off = [abs(math.log2(entry[name] / key[name])) for name in lengths]
            if max(off) <= OCTAVES:
                near[number] = sum(off)
    return dict(entries()[min(near, key=near.get)]["sizes"]) if near else None


@contextlib.contextmanager
def force(kernel: str, sizes: Mapping[str, Any] | None) -> Iterator[None]:
    """Within it the kernel takes these sizes (None: its own choice), whatever the table says. Read while tracing, and
    part of the key of jax's caches."""
    token = _forced.set((kernel, sizes))
    try:
        with set_xla_metadata(lissom_block_sizes=f"{kernel} {sizes}"):
            yield
    finally:
        _forced.reset(token)


@functools.cache
def entries() -> tuple[dict[str, Any], ...]:
    """The table."""
    return read(TABLE)


def read(table: pathlib.Path) -> tuple[dict[str, Any], ...]:
    """The entries of a file; each has the fields `KEY`, "sizes", and how much was gained when."""
    return tuple(tomllib.loads(table.read_text()).get("entry", ()))
