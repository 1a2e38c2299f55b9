"""Memory: what the compiler plans for one call, what parameters take, and what the process was seen to
take.
"""

import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from lissom.evaluation.rows import Measurement, measure


@dataclass(frozen=True)
class CompiledMemory:
    """Bytes on one device as the compiler planned them.

        peak = arguments + outputs + temporaries - aliased

    Aliased are donated arguments that outputs are written into. The plan holds no fragmentation and no other
    program.
    """

    arguments: int
    outputs: int
    temporaries: int
    aliased: int

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs + self.temporaries - self.aliased


def compiled_memory(compiled) -> CompiledMemory | None:
    """The plan of `jax.jit(f).lower(...).compile()`; None where the backend does not tell."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    return CompiledMemory(
        arguments=plan.argument_size_in_bytes,
        outputs=plan.output_size_in_bytes,
        temporaries=plan.temp_size_in_bytes,
        aliased=plan.alias_size_in_bytes,
    )


def peak_measurement(compiled, **conditions) -> Measurement:
    """`peak_memory`, kind "compiled"; its value is None where the backend does not tell."""
    plan = compiled_memory(compiled)
    return measure("peak_memory", None if plan is None else plan.peak, "compiled", **conditions)


def step_memory(compiled) -> dict[str, int]:
    """{"train_peak_memory", "train_temporaries"} of a compiled training step; empty where the backend does not tell."""
    plan = compiled_memory(compiled)
    return {} if plan is None else {"train_peak_memory": plan.peak, "train_temporaries": plan.temporaries}


# ---- parameters --------------------------------------------------------------------------------------------


def parameter_count(tree) -> int:
    """Scalars in all array leaves (arrays or `jax.ShapeDtypeStruct`s)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def parameter_bytes(tree) -> int:
    """Bytes by the bits of each leaf's dtype, every leaf rounded up to a whole byte.

    Not `.nbytes`, which counts an int4 as one byte. A bool is one byte.
    """
    return sum(math.ceil(math.prod(leaf.shape) * dtype_bits(leaf.dtype) / 8) for leaf in jax.tree.leaves(tree))


def dtype_bits(dtype) -> int:
    """Bits of one element: int4 4, bool 8, bfloat16 16, complex64 64."""
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        raise ValueError(f"{dtype} is a random key, not a parameter")
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.bool_):
        return 8
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return 8 * dtype.itemsize
    return jnp.finfo(dtype).bits


def cache_bytes(init_cache: Callable[[int], Any], length: int) -> int:
    """Bytes of the cache of one sequence of at most `length` tokens; `init_cache(length)`: its arrays or shapes."""
    return parameter_bytes(jax.eval_shape(lambda: _arrays(init_cache(length))))


def cache_bytes_per_token(init_cache: Callable[[int], Any], length: int) -> float:
    """Bytes by which a cache grows a token in the second half of `length`; 0 where it holds a fixed part."""
    half = length // 2
    return (cache_bytes(init_cache, length) - cache_bytes(init_cache, half)) / (length - half)


def _arrays(tree):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def artefact_bytes(directory: str | os.PathLike) -> int:
    """Sum of the sizes of all files under the directory."""
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}")
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


# ---- measured ----------------------------------------------------------------------------------------------


def process_peak(function: Callable[[], object], interval: float = 0.001) -> tuple[object, int]:
    """(result, bytes): calls the function and says by how much the process's resident memory rose at most.

    Sampled every `interval` seconds by a thread, so a shorter peak can be missed. Memory that the allocator
    kept from earlier work is used again and does not show: take it in a fresh process for a number to be
    published.
    """
    process, peak, done = psutil.Process(), 0, threading.Event()
    before = process.memory_info().rss

    def watch():
        nonlocal peak
        while not done.wait(interval):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = jax.block_until_ready(function())
        peak = max(peak, process.memory_info().rss)
    finally:
        done.set()
        watcher.join()
    return result, max(peak - before, 0)


def device_peak(device: jax.Device | None = None) -> int | None:
    """Most bytes in use on an accelerator since the process began; None where the backend keeps no such count
    (CPU).
    """
    statistics = (device or jax.devices()[0]).memory_stats()
    return None if statistics is None else statistics.get("peak_bytes_in_use")
