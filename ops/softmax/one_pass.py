"""One pass over memory: a block of rows is read once, finished in cache, and written once. Reads 1, writes 1.

Nothing but the equation, written so that XLA's CPU compiler takes it as one kernel (a fusion for its library YNNPACK),
which keeps a few rows in cache at a time. `jnp.where` in its midst would break it into five; here a maximum and a sum
stand guard, which the library knows. A loop over blocks in JAX reads once too, but XLA writes each block into the
output on one thread and fills the output with zeros before.

The compiler (jax 0.11.2) does so from FROM_ROWS rows on. Of fewer it makes five kernels, with the exponentials stored
between them; that is still one pass over main memory while all lies in cache, and is refused where it does not.

"One pass" is said of main memory: within the cache a row is walked for its maximum, its exponentials and their sum, and
the division. No algorithm gives a row's first output before it has seen the row's last input.
"""

import math

import jax
import jax.numpy as jnp

from lissom.ops.dispatch import Unavailable
from lissom.ops.softmax.rows import along_rows, subtrahend, wide

LOCAL = False

FROM_ROWS = 4096

IN_CACHE = 2**22
"""Elements, 16 MB in float32."""

NEGLIGIBLE = 2.0**-60
"""Beside a sum of exponentials, which is 1 at least."""


def check(x, *, axis: int) -> None:
    rows = math.prod(x.shape) // x.shape[axis]
    if rows < FROM_ROWS and math.prod(x.shape) > IN_CACHE:
        raise Unavailable(f"XLA for CPUs takes {rows} rows out of cache in several passes, from {FROM_ROWS} on in one.")


def run(x, *, axis: int) -> jax.Array:
    return along_rows(_forward, x, axis)


def _forward(x: jax.Array) -> jax.Array:
    x = wide(x)
    weights = jnp.exp(x - subtrahend(x.max(-1, keepdims=True)))
    return weights / (weights.sum(-1, keepdims=True) + NEGLIGIBLE)
