"""What kernels for Hopper GPUs (Mosaic GPU) share, whichever op they are of: sizes, registers, shared memory."""

import math
from typing import NamedTuple

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


def drain(count, stages: int, *free) -> None:
    """The producer's last act: waits until the stages that were filled are free again. (Nothing comes after it; a
    barrier that is left with a completion that nobody awaited is an error to the interpreter.)"""
    for slot in range(stages):

        @pl.when(slot < count)
        def _(slot=slot):
            for barrier in free:
                plgpu.barrier_wait(barrier.at[slot])
