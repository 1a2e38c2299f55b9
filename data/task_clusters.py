"""Synthetic regression tasks of known clusters: tasks of one cluster share most of their function, others nothing."""

from typing import NamedTuple

import numpy as np

from lissom.data.errors import require


class Tasks(NamedTuple):
    """inputs float32 [N, D + code]: features, and behind them the code of the example's task; targets float32 [N], of
    variance about 1; task, cluster int32 [N]."""

    inputs: np.ndarray
    targets: np.ndarray
    task: np.ndarray
    cluster: np.ndarray


def task_clusters(
    *,
    size: int = 4096,
    clusters: int = 4,
    tasks: int = 4,
    dims: int = 8,
    code: int = 8,
    shared: float = 0.9,
    noise: float = 0.1,
    seed: int = 0,
    draw: int = 0,
) -> Tasks:
    """`clusters` x `tasks` tasks. A target of task t in cluster c is

        y = sqrt(shared) f_c(x) + sqrt(1 - shared) g_t(x) + noise e,    f(x) = sqrt(2 / 8) sum_i sin(w_i x + b_i)

    with x and e standard normal, eight normal w_i of length about 2 and uniform b_i for each function. A task is known
    by its code, standard normal, which says nothing of its cluster: that has to be learned from targets. `seed` draws
    functions and codes, `draw` the examples: another draw of the same seed is a test set.
    """
    require(size >= 1 and clusters >= 1 and tasks >= 1, f"task_clusters: {size=}, {clusters=}, {tasks=} must be over 0")
    require(
        dims >= 1 and code >= 1 and noise >= 0, f"task_clusters: {dims=}, {code=} must be over 0, {noise=} not below"
    )
    require(0 <= shared <= 1, f"task_clusters: shared={shared} must be in 0..1")
    waves = 8

    def drawn(of: int, count: int):
        """Directions and phases of functions; those of clusters do not depend on how many tasks there are."""
        rng = np.random.default_rng([seed, 0x7461736B, of])
        return 2 / np.sqrt(dims) * rng.standard_normal((count, waves, dims)), rng.uniform(0, 2 * np.pi, (count, waves))

    of_clusters, of_tasks = drawn(0, clusters), drawn(1, clusters * tasks)
    codes = np.random.default_rng([seed, 0x7461736B, 2]).standard_normal((clusters * tasks, code))

    rng = np.random.default_rng([seed, draw])
    x, task = rng.standard_normal((size, dims)), rng.integers(0, clusters * tasks, size)
    cluster = task // tasks

    def value(functions: tuple, which: np.ndarray) -> np.ndarray:
        directions, phases = functions
        return np.sqrt(2 / waves) * np.sin(np.einsum("nwd,nd->nw", directions[which], x) + phases[which]).sum(1)

    targets = np.sqrt(shared) * value(of_clusters, cluster) + np.sqrt(1 - shared) * value(of_tasks, task)
    targets += noise * rng.standard_normal(size)
    inputs = np.concatenate([x, codes[task]], 1)
    return Tasks(inputs.astype(np.float32), targets.astype(np.float32), task.astype(np.int32), cluster.astype(np.int32))
