"""Products with few bits on TPUs: codes are read once for each block of rows, and become numbers in vector memory.

Never run on a TPU. The kernel is run in jax's interpreter of a TPU, and compiled by the real compiler for v5e and v5p;
no number here was measured.

A block of y [bm, bn] is a sum over parts of k. In each, and for each group of scales in it,

    y += scale[n, g] * (x numbers^T)       over the k of the group

where the product is of int8 to int32 on the matrix unit, or of bfloat16 or float32 to float32: numbers of 8 bits and
fewer are exact in bfloat16, so that no product is rounded, and scales come after it. With a scale a channel the sum of
all parts is kept, of integers in int32, and scaled once at the end. A part has whole groups otherwise.

The lanes of a register are 128 numbers along k. Of groups of which several share them x is cleared in turn of all but
one: the matrix unit works as often, which for few rows waits for memory.

4 bits: bytes are read as they lie; x comes in halves, its even and its odd columns (a copy of x, not of the codes).
Float8 is made bfloat16 or float32 in the kernel.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lissom.ops.interpreting import is_interpreting
from lissom.ops.quantized_matmul.decoding import FP8, in_halves, result_dtype
from lissom.ops.quantized_matmul.rows import as_rows, batched_as_rows, forward_only

LOCAL = True

LANES = 128
MOST_ROWS, MOST_CHANNELS = 256, 512
PART = 1024
"""Lanes of a part that are aimed at: long enough that the 0.35 us of a grid step (jax's Pallas documentation) are less
than reading the codes takes. Modelled, not measured."""
VMEM_BYTES = 13 * 2**20
"""What a kernel may take. The compiler's default limit is 16 MB, of the 16 to 128 MB that a chip has."""


@dataclass(frozen=True)
class Plan:
    """What is static. lanes: of a part, of which there are `parts`; of each half, where there are `halves` (2 for 4
    bits). group: lanes of a group; `groups` of them, 1 being a scale a channel. rows, channels: of a block."""

    halves: int
    lanes: int
    parts: int
    group: int
    groups: int
    rows: int
    channels: int

    @property
    def tile(self) -> int:
        """Lanes of a product: a group, or a register of several groups; all of a part where registers do not divide
        it, and with a scale a channel."""
        tile = self.lanes if self.groups == 1 else max(self.group, LANES)
        return self.lanes if self.lanes % tile else tile


def check(x, codes, scale, x_scale, *, bits: int) -> None:
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.int8, *FP8):
        raise NotImplementedError(f"x is {x.dtype}; this kernel takes float32, bfloat16, int8 and float8.")
    if scale.dtype != jnp.float32:
        raise NotImplementedError(f"scale is {scale.dtype}; this kernel takes float32.")
    _plan(x.size // x.shape[-1], codes.shape, scale.shape[1], bits, x.dtype)


def _plan(m: int, codes: tuple[int, int], groups: int, bits: int, dtype) -> Plan:
    n, lanes = codes
    group = lanes // groups
    if groups > 1 and group % LANES and LANES % group:
        raise NotImplementedError(
            f"scale: groups of {group * 8 // bits} numbers neither fill registers of {LANES} numbers (with bits=4, of "
            f"{2 * LANES}) nor divide them."
        )
    # A part is whole groups and whole registers, or all there is.
    unit = LANES if groups == 1 else max(group, LANES)
    whole = lanes // unit if lanes % unit == 0 else 1
    unit = lanes // whole
    rows, channels = min(m, MOST_ROWS), min(n, MOST_CHANNELS)
    makes = lambda part: Plan(8 // bits, part, lanes // part, group, groups, rows, channels)
    parts = [makes(unit * count) for count in range(1, whole + 1) if whole % count == 0]
    fits = [plan for plan in parts if _bytes(plan, dtype) <= VMEM_BYTES]
    if not fits:
        raise NotImplementedError(
            f"codes: parts of {unit * 8 // bits} numbers along k, the least that can be taken of {lanes * 8 // bits} "
            f"in groups of {group * 8 // bits}, do not fit into vector memory."
        )
    return max((plan for plan in fits if plan.lanes <= PART), key=lambda plan: plan.lanes, default=fits[0])


def _bytes(plan: Plan, dtype) -> int:
    """Of vector memory: operands and the result, each twice, the sum, a product, and numbers on their way from codes:
    of 32 bits, and as they are multiplied."""
    tiled = lambda size, tile: -(-size // tile) * tile
    rows, channels, lanes = tiled(plan.rows, 32), tiled(plan.channels, LANES), tiled(plan.lanes, LANES)
    size = jnp.dtype(dtype).itemsize
    copied = plan.halves * rows * lanes * size + channels * lanes + 4 * rows * channels
    scales = 4 * channels * tiled(plan.groups, 8) + 4 * rows * LANES
    tile = tiled(plan.tile, LANES)
    numbers = channels * tile * (4 + 4 + 4) + (3 * 2 * (rows + channels) * tile if dtype == jnp.float32 else 0)
    return 2 * (copied + scales) + 2 * 4 * rows * channels + numbers + rows * tile * 4


def run(x, codes, scale, x_scale, *, bits: int) -> jax.Array:
    product = forward_only("pallas_tpu", functools.partial(_call, bits))
    return as_rows(batched_as_rows(product), x, codes, scale, x_scale)


def _call(bits: int, x, codes, scale, x_scale) -> jax.Array:
    (m, k), n = x.shape, len(codes)
    plan = _plan(m, codes.shape, scale.shape[1], bits, x.dtype)
    halves = in_halves(x, bits).swapaxes(0, 1)  # [h, m, lanes]
    result = jax.ShapeDtypeStruct((m, n), result_dtype(x, scale))
    operands = [halves, codes, scale.T] + ([] if x_scale is None else [x_scale])
    specs = [
        pl.BlockSpec((plan.halves, plan.rows, plan.lanes), lambda row, column, part: (0, row, part)),
        pl.BlockSpec((plan.channels, plan.lanes), lambda row, column, part: (column, part)),
        pl.BlockSpec((plan.groups, plan.channels), lambda row, column, part: (0, column)),
        pl.BlockSpec((plan.rows, 1), lambda row, column, part: (row, 0)),
    ]
    # Of groups the sum is scaled; else it is that of the products.
    sums = jnp.int32 if x.dtype == jnp.int8 and plan.groups == 1 else jnp.float32
    moved = sum(a.size * a.dtype.itemsize for a in operands) + m * n * result.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan, has_scale=x_scale is not None),
        grid=(pl.cdiv(m, plan.rows), pl.cdiv(n, plan.channels), plan.parts),
        in_specs=specs[: len(operands)],
        out_specs=pl.BlockSpec((plan.rows, plan.channels), lambda row, column, part: (row, column)),
        out_shape=result,
        scratch_shapes=[pltpu.VMEM((plan.rows, plan.channels), sums)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=2 * m * n * k, transcendentals=0, bytes_accessed=moved),
        interpret=pltpu.InterpretParams() if is_interpreting() else False,
        name="quantized_matmul",
    )(*operands)


def _kernel(x_ref, codes_ref, scale_ref, *refs, plan: Plan, has_scale: bool):
    """x [h, bm, lanes], codes [bn, lanes], scale [g, bn], x_scale [bm, 1] if there is one, y [bm, bn], its sum."""
    x_scale_ref, (y_ref, sum_ref) = (refs[0] if has_scale else None), refs[-2:]
    part = pl.program_id(2)

    @pl.when(part == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    for start in range(0, plan.lanes, plan.tile):
        at = pl.ds(start, plan.tile)
        x = [_operand(x_ref[half, :, at]) for half in range(plan.halves)]
        numbers = _numbers(codes_ref[:, at], plan.halves, x[0].dtype)
        if plan.groups == 1:
            sum_ref[...] += sum(map(_dot, x, numbers))
            continue
        for within in range(plan.tile // plan.group):
            own = [_cleared(a, within * plan.group, plan.group) for a in x]
            group = part * (plan.lanes // plan.group) + start // plan.group + within
            sum_ref[...] += sum(map(_dot, own, numbers)).astype(jnp.float32) * scale_ref[pl.ds(group, 1), :]

    @pl.when(part == plan.parts - 1)
    def _():
        y = sum_ref[...].astype(jnp.float32)
        y = y * scale_ref[...] if plan.groups == 1 else y
        y_ref[...] = (y if x_scale_ref is None else y * x_scale_ref[...]).astype(y_ref.dtype)


def _operand(x: jax.Array) -> jax.Array:
    """As the matrix unit takes it: float8 as bfloat16, which has its numbers."""
    return x.astype(jnp.float32).astype(jnp.bfloat16) if x.dtype in FP8 else x


def _numbers(codes: jax.Array, halves: int, dtype) -> list[jax.Array]:
    """[n, lanes] of each half, in a dtype that has them exactly."""
    if halves == 1:
        # There is no way from bytes to bfloat16 but by float32.
        return [codes if codes.dtype == dtype else codes.astype(jnp.float32).astype(dtype)]
    # Registers shift 32 bits. Bytes come as they are: made signed outside they would be copied.
    byte = codes.astype(jnp.int32)
    return [half.astype(jnp.float32).astype(dtype) for half in ((byte << 28) >> 28, (byte << 24) >> 28)]


def _cleared(x: jax.Array, start: int, length: int) -> jax.Array:
    """x with zeros outside of the lanes from `start`."""
    if length == x.shape[1]:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where((lane >= start) & (lane < start + length), x, jnp.zeros_like(x))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Of rows with rows."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    wide = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=exact, preferred_element_type=wide)
