"""Binary matmul on TPUs: signs are unpacked in fast memory, a bit of all words at a time, for the matrix unit.

Never run on a TPU. The kernel is run in jax's interpreter of a TPU, and compiled by the real compiler for v5e and v5p;
no number here was measured.

    y = sum over b of X_b W_b^T + c,    X_b[m, j] = -1 where bit b of word j of row m is 1, else 1

The sum over entries has no order, so bit b of each of a block's words makes an operand [rows, words] with words along
the lanes, as they lie: nothing is moved, and 32 products of int8 are summed in int32. Entries behind `length` give 1
each, which c takes off. Both signs are turned, which leaves the product.

Why not xor and popcount: with the sum they are three operations of the vector unit for each word of each pair of rows,
3 m n for the words of m rows of x and n of w. Unpacking is four for each entry, 4 * 32 (m + n): a sixth of that in a
block of 512 by 512, beside which the matrix unit works. (With one row of x it is 43 times as much: for that xor and
popcount would be better.)

A block of words is 128, or all of a row that has no more; with fewer than 128 words (4096 entries) lanes are idle.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lissom.ops.binary_matmul.batches import on_rows
from lissom.ops.binary_matmul.packing import WORD
from lissom.ops.interpreting import is_interpreting

LOCAL = True

ROWS, COLUMNS, WORDS = 512, 512, 128
"""The most of a block: of x, of w, and of words."""


def check(x_bits, w_bits, *, length: int) -> None:
    """Does everything."""


def run(x_bits, w_bits, *, length: int) -> jax.Array:
    return on_rows(functools.partial(_product, length, is_interpreting()), x_bits, w_bits)


def _product(length: int, interpret: bool, x: jax.Array, w: jax.Array) -> jax.Array:
    (m, words), n = x.shape, len(w)
    rows, columns, part = min(m, ROWS), min(n, COLUMNS), min(words, WORDS)
    # The compiler takes its bits as int32.
    x, w = (jax.lax.bitcast_convert_type(bits, jnp.int32) for bits in (x, w))
    grid = (pl.cdiv(m, rows), pl.cdiv(n, columns), pl.cdiv(words, part))
    return pl.pallas_call(
        functools.partial(_kernel, words, length),
        grid=grid,
        in_specs=[
            pl.BlockSpec((rows, part), lambda i, j, k: (i, k)),
            pl.BlockSpec((columns, part), lambda i, j, k: (j, k)),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.int32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * n * length,
            transcendentals=0,
            bytes_accessed=4 * (m * words * grid[1] + n * words * grid[0] + m * n),
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="binary_matmul",
    )(x, w)


def _kernel(words: int, length: int, x_ref, w_ref, y_ref):
    """x_ref [rows, part], w_ref [columns, part], y_ref [rows, columns], all int32."""
    step, part = pl.program_id(2), x_ref.shape[1]

    def within(ref) -> jax.Array:
        """A block, with 0 in the words behind the end of the rows."""
        if words % part == 0:
            return ref[...]
        word = step * part + jax.lax.broadcasted_iota(jnp.int32, ref.shape, 1)
        return jnp.where(word < words, ref[...], 0)

    x, w = within(x_ref), within(w_ref)

    def signs(bits: jax.Array, b) -> jax.Array:
        # The bit at the highest place, and spread from there: all ones, which is -1, or 0.
        return ((bits << (WORD - 1 - b)) >> (WORD - 1) | 1).astype(jnp.int8)

    def plane(b, total: jax.Array) -> jax.Array:
        return total + jax.lax.dot_general(
            signs(x, b), signs(w, b), (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )

    total = jax.lax.fori_loop(0, WORD, plane, jnp.zeros(y_ref.shape, jnp.int32))

    @pl.when(step == 0)
    def _():
        behind = pl.cdiv(words, part) * part * WORD - length
        y_ref[...] = total - behind

    @pl.when(step > 0)
    def _():
        y_ref[...] += total
