"""One pass over memory: a block of rows is read once, finished in cache, and written once. Reads 1, writes 1.

"One pass" is said of main memory: within the cache each row is still walked for its maximum, for its exponentials (kept
there) with their sum, and for the division. No algorithm gives a row's first output before it has seen the row's last
input, so a row that does not fit is refused.
"""

import jax
import jax.numpy as jnp

from lissom.ops.exponential import exp
from lissom.ops.softmax.rows import along_rows, over_blocks, shifted, wide

LOCAL = True

LONGEST = 2**22
"""Elements of a row, 16 MB in float32: half of a large cache."""


def check(x, *, axis: int) -> None:
    if x.shape[axis] > LONGEST:
        raise NotImplementedError(f"rows of {x.shape[axis]} do not fit into fast memory; one_pass takes {LONGEST}.")


def run(x, *, axis: int) -> jax.Array:
    return along_rows(_forward, x, axis)


def _forward(x: jax.Array) -> jax.Array:
    return over_blocks(_block, x.reshape(-1, x.shape[-1])).reshape(x.shape)


def _block(x: jax.Array) -> jax.Array:
    y = wide(x)
    # The exponentials are stored: they lie in cache, and are needed for the sum and again for the output.
    weights = jax.lax.optimization_barrier(exp(y - shifted(y.max(-1, keepdims=True))))
    total = weights.sum(-1, keepdims=True)
    return (weights * (1 / jnp.where(total == 0, 1, total))).astype(x.dtype)
