"""Gate, then time in turns, then rows: how every op is benchmarked.

1. Each candidate is compiled, and the program's text has to name the implementation that was asked for.
2. Its results, of the very program that is timed, are compared with the oracle: a red gate gives no number.
3. Ours and the references, in this process and in the worker, are called in turns on rotated inputs.
4. One row a problem x implementation, with the references' times, the ceilings and the limit of that run.

Problems of a family are timed together. Times are comparable within a run only; between runs, compare ratios.
"""

import contextlib
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lissom.evaluation.benchmarks.problem import InProcess, InWorker, Problem
from lissom.evaluation.benchmarks.worker import ReferenceWorker, WorkerError
from lissom.evaluation.ceilings import Ceilings
from lissom.evaluation.latency import Latency, Recycled, in_turns
from lissom.evaluation.memory import parameter_bytes, peak_measurement
from lissom.evaluation.rows import Identity, Measurement, Provenance, Row, measure
from lissom.ops import dispatch, testing

ROTATED_BYTES = 60 << 20
"""Inputs are rotated over more than so much: no cache holds them all."""

MOST_SETS = 16

SETTLE = 0.005
"""Seconds before each sample: threads of torch and of XLA spin for up to some milliseconds after a call."""

SHORTEST_SAMPLE = 2e-3
"""On an accelerator, calls are repeated within a sample until it takes so long: the host's part is hidden."""

REFERENCE_RATIO = 10.0
"""References are gated too, with more room than ours: it must be the same problem, their rounding is their own."""


class WrongImplementation(AssertionError):
    """The program does not contain what was asked for, or more than that."""


@dataclasses.dataclass
class Candidate:
    """One thing that is timed. `reference`: whether it is not ours. `sample(number)`: seconds, None where it can't go
    on. `compiled`: the program, where it runs in this process. `free`: lets go of what it holds."""

    problem: Problem
    name: str
    reference: bool
    outputs: Callable[[], list[np.ndarray]]
    sample: Callable[[int], float | None]
    compiled: Any = None
    free: Callable[[], None] = lambda: None
    latency: Latency | None = None
    default: bool = False


def say(sentence: str) -> None:
    """What the reader of the terminal should know, beside the table."""
    print(sentence, file=sys.stderr, flush=True)


def run(
    problems: Sequence[Problem],
    *,
    ceilings: Ceilings,
    worker: ReferenceWorker | None,
    provenance: Provenance,
    repeats: int,
    implementations: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Yields the rows of all problems, family by family, as they are done. `implementations`: None takes all that the
    problem lists and that accept it."""
    for group in _families(problems):
        yield from _run_family(group, ceilings, worker, provenance, repeats, implementations)


def _families(problems: Iterable[Problem]) -> list[list[Problem]]:
    groups: dict[Any, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem.family or (problem.name,), []).append(problem)
    return list(groups.values())


def _run_family(group, ceilings, worker, provenance, repeats, implementations) -> list[Row]:
    candidates: list[Candidate] = []
    refused: list[tuple[Problem, str, str]] = []
    try:
        for problem in group:
            say(f"{problem.op} {problem.name}: inputs, compilation, gate")
            for found in _gated(problem, worker, implementations, refused):
                candidates.append(found)
        timers = {number: candidate.sample for number, candidate in enumerate(candidates)}
        for number, latency in in_turns(timers, repeats, settle=SETTLE).items():
            candidates[number].latency = latency
        rows = [
            _row(candidate, candidates, ceilings, provenance) for candidate in candidates if not candidate.reference
        ]
    finally:
        for candidate in candidates:
            candidate.free()
    return rows + [_red_row(*entry, ceilings, provenance) for entry in refused]


# ---- candidates and their gate -------------------------------------------------------------------------------


def _gated(problem: Problem, worker, implementations, refused: list) -> Iterator[Candidate]:
    """The candidates of a problem that are right; those of ours that are not are added to `refused`."""
    inputs = input_sets(problem)
    host = tuple(np.asarray(array) for array in inputs[0])
    with jax.enable_x64(True):
        truth = problem.oracle.compute(host, np.float64)
    naive = problem.oracle.compute(host, host[0].dtype)

    def wrong(name: str, candidate: Candidate, ratio: float) -> str | None:
        try:
            results = problem.oracle.part(candidate.outputs())
            for i, leaves in enumerate(zip(truth, naive, results, strict=True)):
                testing.compare(f"{problem.op} {problem.name} {name} result {i}", *leaves, ratio)
        except AssertionError as error:
            candidate.free()
            return str(error)
        return None

    default = default_of(problem, inputs[0])
    for name in problem.implementations if implementations is None else implementations:
        try:
            candidate = _ours(problem, name, inputs)
        except NotImplementedError as refusal:
            if implementations is not None:
                say(f"{problem.op} {problem.name}: {refusal}")
            continue
        except (WrongImplementation, RuntimeError) as error:
            sentence = " ".join(str(error).split())
            refused.append((problem, name, sentence))
            say(f"RED {sentence}")
            continue
        candidate.default = name == default
        if sentence := wrong(name, candidate, testing.RATIO):
            refused.append((problem, name, sentence))
            say(f"RED {sentence}")
        else:
            yield candidate
    for name, reference in problem.references.items():
        try:
            if isinstance(reference, InProcess):
                candidate = _in_process(problem, name, reference.run, [reference.prepare(*x) for x in inputs])
                candidate.reference = True
            elif worker is None or not worker.alive:
                continue
            else:
                candidate = _in_worker(problem, name, reference, inputs, worker)
        except (NotImplementedError, WorkerError, RuntimeError, ValueError) as error:
            say(f"{problem.op} {problem.name}: no {name}: {error}")
            continue
        same = isinstance(reference, InWorker) or reference.same
        if same and (sentence := wrong(name, candidate, REFERENCE_RATIO)):
            say(f"{problem.op} {problem.name}: {name} is left out: {sentence}")
        else:
            yield candidate


def input_sets(problem: Problem) -> list[tuple[jax.Array, ...]]:
    """Independent sets of inputs, as many as `ROTATED_BYTES` asks for."""
    size = parameter_bytes(jax.eval_shape(problem.make_inputs, jax.random.key(0)))
    count = min(max(2, ROTATED_BYTES // size + 1), MOST_SETS)
    make = jax.jit(problem.make_inputs)
    return jax.block_until_ready([make(key) for key in jax.random.split(jax.random.key(0), count)])


def default_of(problem: Problem, inputs: tuple) -> str | None:
    """Which implementation a call without a name runs on this platform; None where it is not one."""
    lowered = jax.jit(problem.ours(None)).lower(*inputs)
    chosen = {name for op, name in dispatch.chosen_in(lowered.as_text(debug_info=True)) if op == problem.op}
    return chosen.pop() if len(chosen) == 1 else None


def _ours(problem: Problem, name: str, inputs: list[tuple]) -> Candidate:
    candidate = _in_process(problem, name, problem.ours(name), inputs)
    chosen = dispatch.chosen_in(candidate.compiled.as_text())
    if chosen != {(problem.op, name)}:
        ran = ", ".join(sorted(f"{op}.{other}" for op, other in chosen)) or "nothing of ours"
        candidate.free()
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

    return Candidate(problem, name, False, lambda: call(*inputs[0]), sample, call.compiled)


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

    return Candidate(problem, name, True, lambda: worker.outputs(label), sample, free=free)


# ---- rows ----------------------------------------------------------------------------------------------------


def _identity(problem: Problem, implementation: str, default: bool) -> Identity:
    return Identity(
        recipe=f"ops/{problem.op}",
        task=f"{problem.op} {problem.name}",
        overrides={**problem.setting, "platform": jax.default_backend(), "default": default},
        variant=implementation,
    )


def _times(latency: Latency | None, work, limit, **conditions) -> list[Measurement]:
    known = latency is not None
    conditions = {"repeats": len(latency.samples), **conditions} if known else conditions
    return [
        measure("latency_p50", latency.p50 if known else None, **conditions),
        measure("latency_p90", latency.p90 if known else None, **conditions),
        measure("latency_spread", latency.spread if known else None, **conditions),
        measure("flop_rate", work.flops / latency.p50 if known else None, **conditions),
        measure("efficiency", limit.seconds / latency.p50 if known else None, **conditions),
    ]


def _row(ours: Candidate, candidates: Sequence[Candidate], ceilings: Ceilings, provenance: Provenance) -> Row:
    problem = ours.problem
    limit = ceilings.limit(problem.work)
    found = _times(ours.latency, problem.work, limit)
    found += [measure("limit", limit.seconds, "modelled", term=limit.term)]
    found += [measure("flops", problem.work.flops, "modelled"), peak_measurement(ours.compiled)]
    for other in candidates:
        if other.reference and other.problem is problem and other.latency is not None:
            found += _times(other.latency, problem.work, limit, reference=other.name)
            found += [measure("speedup", other.latency.p50 / ours.latency.p50, reference=other.name)]
            if other.compiled is not None:
                found += [peak_measurement(other.compiled, reference=other.name)]
    found += _growth(ours, candidates)
    notes = [problem.oracle.note] if problem.oracle.note else []
    return Row(
        _identity(problem, ours.name, ours.default), provenance, (*found, *ceilings.measurements()), notes=tuple(notes)
    )


def _growth(ours: Candidate, candidates: Sequence[Candidate]) -> list[Measurement]:
    """The exponent of the time in the size, from the next smaller problem of the family."""
    size = ours.problem.size
    smaller = (
        [c for c in candidates if c.name == ours.name and not c.reference and c.problem.size < size] if size else []
    )
    if not smaller:
        return []
    near = max(smaller, key=lambda c: c.problem.size)
    exponent = math.log(ours.latency.p50 / near.latency.p50) / math.log(size / near.problem.size)
    return [measure("growth_exponent", exponent, **{"from": near.problem.size, "to": size})]


def _red_row(problem: Problem, name: str, sentence: str, ceilings: Ceilings, provenance: Provenance) -> Row:
    limit = ceilings.limit(problem.work)
    found = (*_times(None, problem.work, limit), measure("limit", limit.seconds, "modelled", term=limit.term))
    return Row(
        _identity(problem, name, False), provenance, (*found, *ceilings.measurements()), notes=(f"RED: {sentence}",)
    )


def is_red(row: Row) -> bool:
    """Whether the gate kept the row from having a time."""
    return any(note.startswith("RED: ") for note in row.notes)


# ---- the ceilings, with the worker's help ----------------------------------------------------------------------


def raised_by_torch(ceilings: Ceilings, worker: ReferenceWorker, *, tiny: bool, repeats: int = 8) -> Ceilings:
    """The ceilings, where torch reaches more."""
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if "torch" not in worker.versions or device not in worker.devices:
        return ceilings
    width = 128 if tiny else 8192 if device == "cuda" else 2048
    random = np.random.default_rng(0)
    normal = lambda *shape: random.standard_normal(shape, np.float32)
    best = {}
    jobs = {dtype: ("torch_matmul", dtype, 2 * width**3) for dtype in ("float32", "bfloat16", "int8")}
    jobs["bandwidth"] = ("torch_scale", "float32", 8 * 16 * width**2)
    for key, (case, dtype, operations) in jobs.items():
        shapes = [(16 * width, width)] if key == "bandwidth" else [(width, width)] * 2
        draw = (lambda *s: random.integers(-127, 128, s, np.int8)) if dtype == "int8" else normal
        inputs = tuple(np.asarray(jax.numpy.asarray(draw(*shape), dtype)) for shape in shapes)
        label = worker.prepare(case, {"device": device}, [inputs])
        best[key] = operations / min(worker.run(label, number) for number in range(repeats))
        worker.drop(label)
    return ceilings.raised("torch", best)


def merged(old: Iterable[Row], new: Iterable[Row], names: Iterable[str]) -> list[Row]:
    """The rows of a file after a run: a new row replaces the old one of its problem and implementation. Of the old,
    those of problems that the op still has (`names`) are kept."""
    key = lambda row: (row.identity.task, row.identity.variant)
    known = set(names)
    kept = {key(row): row for row in old if row.identity.task in known}
    kept.update({key(row): row for row in new})
    order = {task: number for number, task in enumerate(dict.fromkeys(itertools.chain(names)))}
    return sorted(kept.values(), key=lambda row: order.get(row.identity.task, len(order)))
