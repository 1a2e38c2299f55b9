"""What kernels for Hopper GPUs (Mosaic GPU) share, whichever op they are of: sizes, registers, shared memory."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

LOG2E = math.log2(math.e)
ROWS = 64  # of a product a warpgroup: the least that `wgmma` takes, and what leaves room for its accumulators
PRODUCER_REGISTERS = 40
SHARED_BYTES = 223 * 1024  # of 227 KiB for a block of threads; the rest is for reductions (2 KiB) and barriers


class Block(NamedTuple):
    """One kernel's tile: 64 rows for each of `consumers` warpgroups by `columns` a step, `stages` in the ring."""

    consumers: int
    columns: int
    stages: int

    @property
    def rows(self) -> int:
        return ROWS * self.consumers


def tile(shape: tuple[int, ...], dtype):
    """Shared memory for operands of `wgmma` and the copy engine: rows of 128 bytes, swizzled."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))


def consumer_registers(consumers: int) -> int:
    """Registers a thread: what the producer leaves of the file of 64 Ki, in steps of 8, at most 256."""
    return min(256, (512 - PRODUCER_REGISTERS) // consumers // 8 * 8)


def by_role(consumers: int, consume: Callable[[jax.Array], None], produce: Callable[[], None]) -> None:
    """The last warpgroup produces, the others consume: consume(number). They divide the registers."""
    group = jax.lax.axis_index("warpgroup")

    @pl.when(group < consumers)
    def _():
        plgpu.set_max_registers(consumer_registers(consumers), action="increase")
        consume(group)

    @pl.when(group == consumers)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        produce()


def fill(step, copies: Callable[[jax.Array], list[tuple]], ready, free) -> None:
    """Fills the stage of a step: `copies(slot)` are pairs of what to copy and where to."""
    stages = ready.shape[0]
    slot = jax.lax.rem(step, jnp.int32(stages))
    pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
    for source, target in copies(slot):
        plgpu.copy_gmem_to_smem(source, target, ready.at[slot])


def multiply(acc_ref, begin, end, operands: Callable, ready, free, prepare: Callable = lambda step, slot: None):
    """acc += a b over the stages of the steps from `begin` to `end`; `operands(slot)` are a and b in shared memory.

    A stage is free when the product of the next one is begun: so one is always under way.
    """
    stages = ready.shape[0]
    slot_of = lambda step: jax.lax.rem(step, jnp.int32(stages))

    @pl.loop(begin, end)
    def _(step):
        slot = slot_of(step)
        plgpu.barrier_wait(ready.at[slot])
        prepare(step, slot)
        plgpu.wgmma(acc_ref, *operands(slot))
        plgpu.wgmma_wait(1)
        pl.when(step > begin)(lambda: plgpu.barrier_arrive(free.at[slot_of(step - 1)]))

    plgpu.wgmma_wait(0)
    pl.when(end > begin)(lambda: plgpu.barrier_arrive(free.at[slot_of(end - 1)]))


def drain(count, stages: int, *free) -> None:
    """The producer's last act: waits until the stages that were filled are free again. (Nothing comes after it; a
    barrier that is left with a completion that nobody awaited is an error to the interpreter.)"""
    for slot in range(stages):

        @pl.when(slot < count)
        def _(slot=slot):
            for barrier in free:
                plgpu.barrier_wait(barrier.at[slot])
