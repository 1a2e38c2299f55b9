"""Early exit: each example of a batch stops at the step at which its answer is confident (Dynamic Confidence, Li, Jones
& Furber 2023, arXiv:2303.10276), and the batch shrinks as they stop.

    confidence_t = max softmax(scores_t / temperature),    stops at the first t with confidence_t > threshold, else at T

scores_t[B, classes] are what the decoder says of the first t steps (the paper: the output accumulated to step t). The
paper lets one example run at a time and counts steps; how a batch stops early it leaves open. Here:

    a `while_loop` over steps, which ends where no more than half of the batch is still running
    those are gathered into a batch of half the size, with their state and inputs, and go on in the next loop

down to a smallest size, whose loop ends where nobody is running. All sizes are static, and all loops are one program:
the host, which would have to be asked for the number of those running after each step, is not waited for. The price is
the time of compiling a network for each size. An example that has stopped is still computed until its batch shrinks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lissom.models.bounds import at_least_one
from lissom.models.spiking.stepwise import StepwiseNetwork


class Exited(NamedTuple):
    """scores float32 [B, classes] and steps int32 [B] of the step at which each example stopped; passes int32 [sizes]:
    how many steps were computed with a batch of each of `batch_sizes`."""

    scores: jax.Array
    steps: jax.Array
    passes: jax.Array


class _Live(NamedTuple):
    """t: steps taken. Of the b examples that are computed: their rows in the whole batch, whether they have stopped,
    and, of those that have, what was found."""

    t: jax.Array
    rows: jax.Array
    done: jax.Array
    scores: jax.Array
    steps: jax.Array
    carry: Any


def confidence(scores: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """float32 [...]: max softmax(scores[..., classes] / temperature). In float32 it may round to 1, and no more."""
    scores = jnp.asarray(scores, jnp.float32) / temperature
    return 1 / jnp.exp(scores - scores.max(-1, keepdims=True)).sum(-1)


def batch_sizes(batch: int, smallest: int = 16) -> tuple[int, ...]:
    """(B, B // 2, B // 4, ...), none below `smallest` but B itself."""
    at_least_one("early_exit", batch=batch, smallest=smallest)
    found = [batch]
    while found[-1] // 2 >= smallest:
        found.append(found[-1] // 2)
    return tuple(found)


def run(
    network: StepwiseNetwork,
    inputs: jax.Array,
    temperature: float | jax.Array,
    threshold: float | jax.Array,
    *,
    smallest: int = 16,
) -> Exited:
    """What `network.running(inputs)` says at the step at which each example stops, and nothing computed behind the last
    of these steps. To be called under `jit`, in which temperature (a number, or [T], one a step) and threshold may be
    traced. threshold 1 stops nobody; below 1 / classes it stops all at the first step.

    Scores are those of `running` but for the rounding of sums, whose order may differ between batch sizes. Computed
    once, in front of the loops: the encoding of all steps, also of those that nobody sees, and where it is the same at
    all steps (`encoder.repeats`) what the network makes of it without its state (`entered`: the first
    product).
    """
    encoder, batch = network.encoder, len(inputs)
    last = encoder.steps(inputs.shape[1]) if encoder.timed else network.steps
    axes = carry_axes(network, inputs)
    x = encoder(inputs, network.steps, None)
    x = network.entered(x) if encoder.repeats else x
    temperatures = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (last,))

    def step(x, t, carry):
        now = x if encoder.repeats else jax.lax.dynamic_slice_in_dim(x, t, 1, 0)
        scores, carry, _ = network.advance(now, 1, carry)
        return scores[0], confidence(scores[0], temperatures[t]) > threshold, carry

    def following(x, live: _Live) -> _Live:
        scores, sure, carry = step(x, live.t, live.carry)
        return _Live(
            live.t + 1,
            live.rows,
            live.done | sure,
            jnp.where(live.done[:, None], live.scores, scores),
            jnp.where(live.done, live.steps, live.t + 1),
            carry,
        )

    # The first step stands in front of the loops: only behind it the carry has its shape, and nobody takes none.
    scores, sure, carry = step(x, 0, network.start(batch))
    live = _Live(jnp.int32(1), jnp.arange(batch), sure, scores, jnp.ones(batch, jnp.int32), carry)
    found, steps, passes, before = scores, live.steps, [], 0
    sizes = batch_sizes(batch, smallest)
    for smaller in (*sizes[1:], 0):
        on = lambda live, smaller=smaller: (live.t < last) & ((~live.done).sum() > smaller)
        live = jax.lax.while_loop(on, lambda live, x=x: following(x, live), live)
        found, steps = found.at[live.rows].set(live.scores), steps.at[live.rows].set(live.steps)
        passes.append(live.t - before)
        before = live.t
        if smaller:
            # Those that are running come first; where there is room behind them, some that have stopped go along.
            kept = jnp.argsort(live.done, stable=True)[:smaller]
            x = jax.tree.map(lambda leaf, kept=kept: leaf[:, kept], x)
            rest = [leaf[kept] for leaf in (live.rows, live.done, live.scores, live.steps)]
            live = _Live(live.t, *rest, gathered(live.carry, axes, kept))
    return Exited(found, steps, jnp.stack(passes))


def carry_axes(network: StepwiseNetwork, inputs: jax.Array) -> Any:
    """A tree as the carry behind a step: which axis of each leaf is that of the examples, -1 where all share it (a
    count of steps). It is the one that has the size of the batch, for two sizes."""

    def carry(inputs):
        x = network.encoder(inputs, network.steps, None)
        return network.advance(x[:1], 1, network.start(len(inputs)))[1]

    few, more = (jax.eval_shape(carry, jax.ShapeDtypeStruct((n, *inputs.shape[1:]), inputs.dtype)) for n in (2, 3))

    def axis(two, three):
        found = [at for at, sizes in enumerate(zip(two.shape, three.shape, strict=True)) if sizes[0] != sizes[1]]
        if found and (len(found) > 1 or (two.shape[found[0]], three.shape[found[0]]) != (2, 3)):
            raise ValueError(f"a state {two.shape} of 2 examples and {three.shape} of 3 has no axis of examples")
        return found[0] if found else -1

    return jax.tree.map(axis, few, more)


def gathered(carry: Any, axes: Any, rows: jax.Array) -> Any:
    """The carry of the examples `rows` alone."""
    return jax.tree.map(lambda leaf, axis: leaf if axis < 0 else jnp.take(leaf, rows, axis), carry, axes)
