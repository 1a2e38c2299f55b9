"""Whether kernels are interpreted: run on the CPU, step by step, with a check for races between their threads."""

import contextlib
import contextvars
from collections.abc import Iterator

from jax.experimental.xla_metadata import set_xla_metadata

_interpreting: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreting", default=False)


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Within it, kernels that are traced are interpreted. It enters jax's own trace context (as metadata), so that
    `jit` traces anew what was compiled outside.

    Each thread of an interpreted kernel holds a thread of XLA's pool while it waits at a barrier, and the pool has as
    many as there are cores or CPU devices: with fewer than the kernel needs it hangs. tests/conftest.py has 8 devices;
    elsewhere set XLA_FLAGS=--xla_force_host_platform_device_count=8. `jax.checkpoint` cannot be differentiated here,
    since the interpreter's callbacks are effects.
    """
    token = _interpreting.set(True)
    try:
        with set_xla_metadata(lissom_interpreting="1"):
            yield
    finally:
        _interpreting.reset(token)


def is_interpreting() -> bool:
    return _interpreting.get()
