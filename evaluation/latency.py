"""Latency of compiled functions, taken in turns (A B A B ...) in one process.

Interleaving spreads whatever the machine does meanwhile (clock changes, other processes) over all candidates.
Inputs rotate, so that no cache and no speculation can learn one input; the garbage collector rests while the
clock runs.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from lissom.evaluation.rows import Measurement, measure


@dataclass(frozen=True)
class Latency:
    """Median and 90th percentile in seconds, and all samples in the order taken."""

    p50: float
    p90: float
    samples: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Half of the samples lie in a range of this many medians (the interquartile range / the median)."""
        low, high = np.percentile(self.samples, [25, 75])
        return float((high - low) / self.p50)


# Argument tuples that are given in rotation, or a function call number -> fresh argument tuple.
Inputs = Sequence[tuple] | Callable[[int], tuple]


def measure_interleaved(
    candidates: Mapping[str, tuple[Callable, Inputs]], *, repeats: int = 50, warmup: int = 3
) -> dict[str, Latency]:
    """Times each compiled callable `repeats` times, all of them in turns, after `warmup` untimed calls each.

    `candidates` maps a label to (callable, inputs). Inputs are two or more argument tuples of equal shapes,
    used in rotation; where the callable donates its arguments, a function `call number -> argument tuple`
    that makes fresh ones: it is called, and waited for, outside of the timed region. A sample runs from the
    call to `block_until_ready` of everything it returns. Every rotated input is called once before the clock
    runs.
    """
    if repeats < 2:
        raise ValueError(f"a latency needs at least 2 repeats, not {repeats}")
    if warmup < 1:
        raise ValueError("at least one untimed call is needed: the first one may compile")
    for label, (_, inputs) in candidates.items():
        _check_inputs(label, inputs)
    for function, inputs in candidates.values():
        calls = warmup if callable(inputs) else max(warmup, len(inputs))
        for number in range(calls):
            jax.block_until_ready(function(*_arguments(inputs, number)))
    return in_turns({label: _timer(*candidate) for label, candidate in candidates.items()}, repeats)


def _timer(function: Callable, inputs: Inputs) -> Callable[[int], float]:
    def sample(number: int) -> float:
        arguments = _arguments(inputs, number)
        start = time.perf_counter()
        output = jax.block_until_ready(function(*arguments))
        seconds = time.perf_counter() - start
        del output, arguments  # freed here, not inside the next sample
        return seconds

    return sample


def in_turns(
    timers: Mapping[str, Callable[[int], float | None]], repeats: int, *, settle: float = 0.0
) -> dict[str, Latency]:
    """`repeats` samples of each timer, a function call number -> seconds, all of them in turns: A B C A B C ...

    `settle` seconds pass before each sample: where some candidates run in another process, the threads of the one
    that ran last spin a while before they sleep, and take the cores from the next. A timer that returns None can't go
    on and is missing from the result.
    """
    samples: dict[str, list[float]] = {label: [] for label in timers}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(repeats):
            for label in list(samples):
                time.sleep(settle)
                seconds = timers[label](number)
                if seconds is None:
                    del samples[label]
                else:
                    samples[label].append(seconds)
    finally:
        if collecting:
            gc.enable()
    return {label: summarize_samples(times) for label, times in samples.items()}


class Recycled:
    """A compiled function that writes its results over those of its previous call, which are gone with it.

    Without it every call of a function with large results gets fresh pages from the system, and touching them takes
    longer than many a kernel (on a CPU, `x * c` on 256 MB: 7 GB/s fresh, 55 GB/s donated). A training step donates
    what it replaces; so does this, with results that the function does not read.

    `compiled` is the program, for its text and its memory plan.
    """

    def __init__(self, function: Callable, *arguments):
        spare = jax.eval_shape(function, *arguments)
        into = jax.jit(lambda spare, *arguments: function(*arguments), donate_argnums=0, keep_unused=True)
        self.compiled = into.lower(spare, *arguments).compile()
        self._spare = jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), spare)

    def __call__(self, *arguments):
        self._spare = self.compiled(self._spare, *arguments)
        return self._spare


def summarize_samples(samples: Sequence[float]) -> Latency:
    """Percentiles with linear interpolation between the nearest samples."""
    p50, p90 = np.percentile(samples, [50, 90])
    return Latency(float(p50), float(p90), tuple(samples))


def latency_measurements(latency: Latency, batch: int, kind: str = "measured", **conditions) -> list[Measurement]:
    """p50, p90 and throughput (batch / p50, examples a second) at this batch size."""
    conditions = {"batch": batch, **conditions}
    return [
        measure("latency_p50", latency.p50, kind, **conditions),
        measure("latency_p90", latency.p90, kind, **conditions),
        measure("throughput", batch / latency.p50, kind, **conditions),
    ]


def iid_inputs(shapes, count: int, *, seed: int = 0, integers_below: int = 256) -> list:
    """`count` independent copies of the tree of shapes, filled with random numbers on the default device.

    Floats are standard normal, integers uniform in [0, integers_below), booleans fair coins: never zeros,
    which sparse kernels and denormal handling would treat differently. Serves as `inputs` where `shapes` is a
    tuple.
    """
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), count * len(leaves)).reshape(count, len(leaves))
    copies = [
        jax.tree.unflatten(tree, [_random(k, leaf, integers_below) for k, leaf in zip(row, leaves)]) for row in keys
    ]
    return jax.block_until_ready(copies)


def _random(key, leaf, integers_below: int) -> jax.Array:
    if jax.numpy.issubdtype(leaf.dtype, jax.numpy.bool_):
        return jax.random.bernoulli(key, 0.5, leaf.shape)
    if jax.numpy.issubdtype(leaf.dtype, jax.numpy.integer):
        # int8 and int4 cannot hold every bound: those are drawn over what they hold.
        below = min(integers_below, int(jax.numpy.iinfo(leaf.dtype).max) + 1)
        return jax.random.randint(key, leaf.shape, 0, below, jax.numpy.int32).astype(leaf.dtype)
    if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
        return jax.random.normal(key, leaf.shape, jax.numpy.float32).astype(leaf.dtype)
    raise ValueError(f"no random input is defined for dtype {leaf.dtype}")


def _arguments(inputs: Inputs, number: int) -> tuple:
    if callable(inputs):
        return jax.block_until_ready(inputs(number))
    return inputs[number % len(inputs)]


def _check_inputs(label: str, inputs: Inputs) -> None:
    if callable(inputs):
        return
    if len(inputs) < 2:
        raise ValueError(f"{label}: inputs are rotated, so at least 2 argument tuples are needed, not {len(inputs)}")
    kinds = [_shapes(arguments) for arguments in inputs]
    for number, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(f"{label}: input {number} has other shapes or dtypes than input 0")


def _shapes(arguments: tuple):
    leaves, tree = jax.tree.flatten(arguments)
    return tree, [(np.shape(leaf), jax.numpy.result_type(leaf)) for leaf in leaves]
