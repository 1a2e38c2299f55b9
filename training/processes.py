"""Several processes, one run: who joins, who writes, and how they agree. With one process everything here is free."""

import json
import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from lissom.training.errors import UserError


def several() -> bool:
    """Whether this process was started as one of several: under Slurm with several tasks, or where LISSOM_DISTRIBUTED
    is set (Kubernetes, TPU VMs)."""
    tasks = os.environ.get("SLURM_NTASKS", "1")
    return (tasks.isdigit() and int(tasks) > 1) or os.environ.get("LISSOM_DISTRIBUTED", "") not in ("", "0")


def join() -> None:
    """Finds the other processes, where there are any. LISSOM_DISTRIBUTED may hold the JSON arguments of
    `jax.distributed.initialize`; anything else leaves it to jax to detect them."""
    if not several() or jax.distributed.is_initialized():
        return
    given = os.environ.get("LISSOM_DISTRIBUTED", "")
    try:
        jax.distributed.initialize(**(json.loads(given) if given.startswith("{") else {}))
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"LISSOM_DISTRIBUTED={given} and SLURM_NTASKS={os.environ.get('SLURM_NTASKS', '')} say that this is one of "
            f"several processes, and the others can't be found ({reason}): start it by srun, or unset them"
        ) from error


def together(what: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process; every process must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
