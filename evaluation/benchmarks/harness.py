"""Gate, then time in turns: how every op is benchmarked.

1. Each candidate is compiled, and the program's text has to name the implementation that was asked for.
2. Its results, of the very program that is timed, are compared with the oracle: a red gate gives no number.
3. Ours and the references, in this process and in the worker, are called in turns on rotated inputs.
4. One row a problem x implementation, with the references' times, the ceilings and the limit of that run (`results`).

Problems of a family are timed together. Times are comparable within a run only; between runs, compare ratios.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lissom.evaluation.benchmarks.candidates import Candidate, right_ones, say
from lissom.evaluation.benchmarks.problem import Problem
from lissom.evaluation.benchmarks.results import Result
from lissom.evaluation.benchmarks.worker import ReferenceWorker
from lissom.evaluation.latency import in_turns
from lissom.evaluation.memory import compiled_memory

SETTLE = 0.005
"""Seconds before each sample: threads of torch and of XLA spin for some milliseconds after a call. Without it, a call
of ours right behind one of torch's took a third longer on two cores."""


def run(
    problems: Sequence[Problem],
    *,
    worker: ReferenceWorker | None,
    repeats: int,
    implementations: Sequence[str] | None = None,
) -> Iterator[list[Result]]:
    """Yields the results of each family as they are there. `implementations`: None takes all that a problem lists and
    that accept it."""
    families: dict[Any, list[Problem]] = {}
    for problem in problems:
        families.setdefault(problem.family or (problem.name,), []).append(problem)
    for family in families.values():
        yield _run_family(family, worker, repeats, implementations)


def _run_family(family: Iterable[Problem], worker, repeats: int, implementations) -> list[Result]:
    candidates: list[Candidate] = []
    red: list[Result] = []
    try:
        for problem in family:
            say(f"{problem.op} {problem.name}")
            for found in right_ones(problem, worker, implementations):
                if isinstance(found, Candidate):
                    candidates.append(found)
                else:
                    name, why, default = found
                    say(f"RED {why}")
                    red.append(Result(problem, name, red=why, default=default))
        timers = {number: candidate.sample for number, candidate in enumerate(candidates)}
        latencies = in_turns(timers, repeats, settle=SETTLE)
        return red + [_result(candidate, latencies.get(number)) for number, candidate in enumerate(candidates)]
    finally:
        for candidate in candidates:
            candidate.free()


def _result(candidate: Candidate, latency) -> Result:
    plan = None if candidate.compiled is None else compiled_memory(candidate.compiled)
    peak = None if plan is None else plan.peak
    return Result(candidate.problem, candidate.name, latency, peak, candidate.reference, candidate.default)


def rates_of_torch(worker: ReferenceWorker, *, tiny: bool, repeats: int = 8) -> dict[str, float]:
    """What torch reaches of the ceilings (`Ceilings.raised`); nothing where the worker has no torch."""
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if "torch" not in worker.versions or device not in worker.devices:
        return {}
    width = 128 if tiny else 8192 if device == "cuda" else 2048
    random = np.random.default_rng(0)
    jobs = {dtype: ("torch_matmul", [(width, width)] * 2, 2 * width**3) for dtype in ("float32", "bfloat16", "int8")}
    jobs["bandwidth"] = ("torch_scale", [(16 * width, width)], 8 * 16 * width**2)
    best = {}
    for key, (case, shapes, operations) in jobs.items():
        if key == "int8":
            inputs = [random.integers(-127, 128, shape, np.int8) for shape in shapes]
        else:
            dtype = jax.numpy.bfloat16 if key == "bfloat16" else np.float32
            inputs = [random.standard_normal(shape, np.float32).astype(dtype) for shape in shapes]
        label = worker.prepare(case, {"device": device}, [inputs])
        best[key] = operations / min(worker.run(label, number) for number in range(repeats))
        worker.drop(label)
    return best
