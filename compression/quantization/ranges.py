"""Where the range of activations comes from, of layers whose activations share one scale.

    frozen      measured and then fixed: the mean, over the first `warm_up` calls in training or over calibration
                batches, of max |x|. Until then activations are not rounded (AQT, Abdolrashidi et al. 2021,
                arXiv:2105.03536)
    learned     the scale is a parameter (LSQ, Esser et al. 2020, arXiv:1902.08153)
    clipped     the largest number is one (PACT, Choi et al. 2018, arXiv:1805.06085)

`rounded` is what is trained with; `scale` is what is left of it in an exported network. While `observing`, a layer with
a range works unrounded and notes what it sees.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping
from itertools import chain, islice
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError

from lissom.compression.quantization.formats import Format
from lissom.compression.quantization.rounding import LEAST, at_scale, clipped_at, with_learned_scale
from lissom.compression.quantization.rules import Rounding
from lissom.models.norms import BatchNorm
from lissom.models.variables import Param, Parts, Stat, merge, split, stats_of
from lissom.training.errors import UserError


class Range(nnx.Module):
    """Of one layer. `seen`: the mean over `calls` of what `measure` finds in an x."""

    state_moves = False  # in training: of most it is for calibration alone

    def __init__(self, rounding: Rounding):
        self.rounding, self.observing = rounding, False
        self.seen, self.calls = Stat(jnp.zeros(()), out_sharding=()), Stat(jnp.zeros(()), out_sharding=())

    @property
    def format(self) -> Format:
        return self.rounding.scheme.numbers

    def measure(self, x: jax.Array) -> jax.Array:
        return jnp.abs(x).max()

    def note(self, x: jax.Array, wanted: jax.Array | bool = True) -> None:
        """Takes x into the mean, where it is wanted and holds numbers. Within a loop of a network nothing can be noted:
        decoding needs nothing more, and a range that is measured nowhere else is an error when it is stored."""
        found = jax.lax.stop_gradient(self.measure(x.astype(jnp.float32)))
        wanted, calls = wanted & jnp.isfinite(found), self.calls[...] + 1
        seen = self.seen[...] + (found - self.seen[...]) / calls
        with contextlib.suppress(TraceContextError):
            self.seen[...] = jnp.where(wanted, seen, self.seen[...])
            self.calls[...] = jnp.where(wanted, calls, self.calls[...])

    def rounded(self, x: jax.Array) -> jax.Array:
        raise NotImplementedError

    @property
    def scale(self) -> jax.Array:
        """Of the numbers of the format, 0 where none is known."""
        raise NotImplementedError

    def settle(self) -> None:
        """Begins with what was seen."""


class Frozen(Range):
    """See above. `rounding.scheme.clip`: the share of the range that is kept."""

    @property
    def state_moves(self):
        return self.rounding.warm_up > 0

    def rounded(self, x):
        scale, operand = self.scale, self.rounding.operand
        known = scale > 0
        if self.rounding.warm_up:
            self.note(x, ~known)
        return jnp.where(known, at_scale(x, jnp.where(known, scale, 1.0), self.format, operand.gradient), x)

    @property
    def scale(self):
        # Of what was always 0 any scale does.
        scale = self.rounding.scheme.clip * self.seen[...] / self.format.largest
        known = self.calls[...] >= max(self.rounding.warm_up, 1)
        return jnp.where(known, jnp.where(scale > 0, scale, 1.0), 0.0)

    def settle(self):
        known = float(max(self.rounding.warm_up, 1))
        self.calls[...] = jnp.where(self.calls[...] > 0, jnp.maximum(self.calls[...], known), 0.0)


class Learned(Range):
    """Begins with what suits numbers of unit variance, behind a calibration with what suits those that were seen."""

    def __init__(self, rounding: Rounding):
        super().__init__(rounding)
        self.step = Param(jnp.asarray(self._step(math.sqrt(2 / math.pi))), out_sharding=())

    def _step(self, mean: jax.Array | float) -> jax.Array:
        return 2 * mean / math.sqrt(self.format.largest)

    def measure(self, x):
        return jnp.abs(x).mean()

    def rounded(self, x):
        # LSQ counts the numbers of an example: the loss is a mean over the examples. Of rows that are sorted by expert
        # it is those of a row.
        shared = x.size // len(x)
        return with_learned_scale(x, self.step[...].reshape((1,) * x.ndim), self.format, shared)

    @property
    def scale(self):
        return jnp.maximum(self.step[...], LEAST)

    def settle(self):
        self.step[...] = jnp.where(self.seen[...] > 0, self._step(self.seen[...]), self.step[...])


class Clipped(Range):
    def __init__(self, rounding: Rounding):
        super().__init__(rounding)
        self.largest = Param(jnp.asarray(rounding.initial), out_sharding=())

    def rounded(self, x):
        return clipped_at(x, self._largest, self.format)

    @property
    def _largest(self) -> jax.Array:
        return jnp.maximum(self.largest[...], LEAST)

    @property
    def scale(self):
        return self._largest / self.format.largest

    def settle(self):
        self.largest[...] = jnp.where(self.seen[...] > 0, self.seen[...], self.largest[...])


KINDS = {"frozen": Frozen, "learned": Learned, "clipped": Clipped}


def given(batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What a network is called with; of episodes the queries of all tasks as one batch, and not yet adapted to any."""
    found = {name: jnp.asarray(batch[name]) for name in ("inputs", "meta", "environment") if name in batch}
    if "support_inputs" in batch:
        found["inputs"] = found["inputs"].reshape(-1, *found["inputs"].shape[2:])
    return found


def check_warm_up(network: nnx.Module, calls: int | None) -> None:
    """UserError where a range would still be measured when a training of so many calls is over (None: of how many is
    not known): what is stored then would have none."""
    longest = max((node.rounding.warm_up for node in _ranges(network)), default=0)
    if calls is not None and longest > calls:
        raise UserError(
            f"activations have warm_up={longest}, longer than the run's {calls} steps, so that there is no range to "
            "store: give the run more steps, or the rules of 'qat' a shorter warm_up"
        )


def has_ranges(network: nnx.Module) -> bool:
    """Whether there is anything for `calibrate` to measure."""
    return bool(_ranges(network))


def _ranges(network: nnx.Module) -> list[Range]:
    return [node for _, node in nnx.iter_graph(network) if isinstance(node, Range)]


def calibrate(
    network: nnx.Module, data: Iterable[Mapping[str, Any]], batches: int, *, training: bool = False
) -> nnx.Module:
    """Settles every range of the network on what it sees, unrounded, of so many batches; in place. ValueError where
    there is none.

    A BatchNorm whose running averages no training has moved normalises by the batch, where the network will do so too:
    where it is for `training`, and of episodes, whose statistics are then those of the tasks. (A network of episodes
    that has not been trained, and is judged by running averages, is taken for one that does not use them.)"""
    found = _ranges(network)
    if not found:
        return network
    data = iter(islice(data, batches))
    first = next(data, None)
    if first is None:
        raise ValueError("ranges of activations are measured on batches of the training data, and there are none")
    for node in found:
        node.observing, node.seen[...], node.calls[...] = True, jnp.zeros(()), jnp.zeros(())
    norms = []
    if training or "support_inputs" in first:
        norms = [node for _, node in nnx.iter_graph(network) if isinstance(node, BatchNorm) and node.untrained]
    before = [(node.by_batch, node.momentum) for node in norms]
    for node in norms:
        node.by_batch, node.momentum = True, 1.0  # which leaves the averages as they are
    parts = split(network)

    @jax.jit
    def stats(stats, params, frozen, inputs):
        copy = merge(Parts(parts.graph, params, stats, frozen))
        copy(**inputs)
        return stats_of(copy)

    now = parts.stats
    for batch in chain([first], data):
        now = stats(now, parts.params, parts.frozen, given(batch))
    nnx.update(network, now)
    for node, was in zip(norms, before, strict=True):
        node.by_batch, node.momentum = was
    for node in found:
        node.observing = False
        node.settle()
    return network
