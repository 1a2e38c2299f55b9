"""Candidates: what is timed, compiled and found right."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lissom.evaluation.benchmarks.problem import InProcess, InWorker, Problem
from lissom.evaluation.benchmarks.worker import ReferenceWorker, WorkerError
from lissom.evaluation.latency import Recycled
from lissom.evaluation.memory import parameter_bytes
from lissom.ops import dispatch, testing

ROTATED_BYTES = 60 << 20
"""Inputs are rotated over more than so much: no cache holds them all."""

MOST_SETS = 16

SHORTEST_SAMPLE = 2e-3
"""On an accelerator, calls are repeated within a sample until it takes so long: the host's part is hidden."""

REFERENCE_RATIO = 10.0
"""References are gated too, with more room than ours: it must be the same problem, their rounding is their own."""


class WrongImplementation(AssertionError):
    """The program does not contain what was asked for, or more than that."""


@dataclass
class Candidate:
    """One thing to time. `reference`: whether it is not ours; `default`: whether it is what a call without a name runs.

    `outputs()`: its results on input set 0. `sample(number)`: seconds of a call on set number % sets, None where it
    can't go on. `compiled`: the program, where it runs in this process. `free()` lets go of what it holds elsewhere.
    """

    problem: Problem
    name: str
    outputs: Callable[[], Any]
    sample: Callable[[int], float | None]
    compiled: Any = None
    free: Callable[[], None] = lambda: None
    reference: bool = False
    default: bool = False


def say(sentence: str) -> None:
    """What the reader of the terminal should know, beside the table."""
    print(sentence, file=sys.stderr, flush=True)


def right_ones(
    problem: Problem, worker: ReferenceWorker | None, implementations: Sequence[str] | None
) -> Iterator[Candidate | tuple[str, str, bool]]:
    """The candidates that pass the gate, ours first; for those of ours that don't: (name, why, whether a call without a
    name runs it)."""
    inputs = input_sets(problem)
    host = tuple(np.asarray(array) for array in inputs[0])
    with jax.enable_x64(True):
        truth = problem.oracle.compute(host, np.float64)
    naive = problem.oracle.compute(host, host[0].dtype)

    def check(candidate: Candidate, ratio: float) -> None:
        results = problem.oracle.part(candidate.outputs())
        for i, leaves in enumerate(zip(truth, naive, results, strict=True)):
            testing.compare(f"{problem.op} {problem.name} {candidate.name} result {i}", *leaves, ratio)

    default = default_of(problem, inputs[0])
    for name in problem.implementations if implementations is None else implementations:
        try:
            candidate = _ours(problem, name, inputs)
            candidate.default = name == default
            check(candidate, testing.RATIO)
            yield candidate
        except NotImplementedError as refusal:
            if implementations is not None:
                say(f"{problem.op} {problem.name}: {refusal}")
        except (AssertionError, RuntimeError) as error:
            yield name, " ".join(str(error).split()), name == default
    for name, reference in problem.references.items():
        try:
            if isinstance(reference, InProcess):
                candidate = _in_process(problem, name, reference.run, [reference.prepare(*x) for x in inputs])
            elif worker is not None and worker.alive:
                candidate = _in_worker(problem, name, reference, inputs, worker)
            else:
                continue
            candidate.reference = True
        except Exception as error:  # whatever a library of others raises
            say(f"{problem.op} {problem.name}: no {name}: {' '.join(str(error).split())[:300]}")
            continue
        try:
            if reference.same:
                check(candidate, REFERENCE_RATIO)
        except (AssertionError, WorkerError) as error:
            candidate.free()
            say(f"{problem.op} {problem.name}: {name} is left out: {error}")
            continue
        yield candidate


def one_of_ours(problem: Problem, name: str) -> Candidate:
    """One implementation, compiled and through the gate. AssertionError where it is wrong, NotImplementedError where it
    refuses."""
    found = next(right_ones(problem, None, [name]), None)
    if isinstance(found, Candidate):
        return found
    raise AssertionError(found[1]) if found else NotImplementedError(f"{name} refuses {problem.name}")


def input_sets(problem: Problem) -> list[tuple[jax.Array, ...]]:
    """Independent sets of inputs, as many as `ROTATED_BYTES` asks for."""
    size = parameter_bytes(jax.eval_shape(problem.make_inputs, jax.random.key(0)))
    count = min(max(2, ROTATED_BYTES // size + 1), MOST_SETS)
    make = jax.jit(problem.make_inputs)
    return jax.block_until_ready([make(key) for key in jax.random.split(jax.random.key(0), count)])


def default_of(problem: Problem, inputs: tuple) -> str | None:
    """Which implementation a call without a name runs on this platform; None where it is not one."""
    try:
        lowered = jax.jit(problem.ours(None)).lower(*inputs)
    except NotImplementedError:
        return None
    chosen = {name for op, name in dispatch.chosen_in(lowered.as_text(debug_info=True)) if op == problem.op}
    return chosen.pop() if len(chosen) == 1 else None


def _ours(problem: Problem, name: str, inputs: list[tuple]) -> Candidate:
    candidate = _in_process(problem, name, problem.ours(name), inputs)
    chosen = dispatch.chosen_in(candidate.compiled.as_text())
    if chosen != {(problem.op, name)}:
        ran = ", ".join(sorted(f"{op}.{other}" for op, other in chosen)) or "nothing of ours"
        raise WrongImplementation(f"{problem.op} {problem.name}: asked for {name}, the program runs {ran}")
    return candidate


def _in_process(problem: Problem, name: str, function: Callable, inputs: list[tuple]) -> Candidate:
    call = Recycled(function, *inputs[0])
    for arguments in inputs:
        start = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        seconds = time.perf_counter() - start
    calls = calls_in_sample(seconds)

    def sample(number: int) -> float:
        arguments = inputs[number % len(inputs)]
        start = time.perf_counter()
        for _ in range(calls):
            results = call(*arguments)
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / calls

    return Candidate(problem, name, lambda: call(*inputs[0]), sample, call.compiled)


def calls_in_sample(seconds: float) -> int:
    """1 on a CPU; elsewhere as many as `SHORTEST_SAMPLE` asks for."""
    return 1 if jax.default_backend() == "cpu" else max(1, math.ceil(SHORTEST_SAMPLE / seconds))


def _in_worker(
    problem: Problem, name: str, reference: InWorker, inputs: list[tuple], worker: ReferenceWorker
) -> Candidate:
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if device not in worker.devices:
        raise WorkerError(f"the interpreter of the reference worker has no {device}")
    sets = [tuple(np.asarray(array) for array in arguments) for arguments in inputs]
    label = worker.prepare(reference.case, {**reference.options, "device": device}, sets)
    calls = calls_in_sample(worker.run(label, 0))

    def sample(number: int) -> float | None:
        try:
            return worker.run(label, number, calls)
        except WorkerError as error:
            say(f"{problem.op} {problem.name}: {name} is left out: {error}")
            return None

    def free() -> None:
        with contextlib.suppress(WorkerError):  # it may be gone, and what it held with it
            worker.drop(label)

    return Candidate(problem, name, lambda: worker.outputs(label), sample, free=free)
