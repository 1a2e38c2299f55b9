"""Results of a run as plain data, and the rows they make under its ceilings."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax

from lissom.evaluation.benchmarks.problem import Problem
from lissom.evaluation.ceilings import Ceilings, Limit
from lissom.evaluation.latency import Latency
from lissom.evaluation.rows import Identity, Measurement, Provenance, Row, machine_name, measure

RED = "RED: "


@dataclass(frozen=True)
class Result:
    """What came of one candidate. `red`: why it has no latency. `peak`: bytes as the compiler planned them."""

    problem: Problem
    name: str
    latency: Latency | None = None
    peak: int | None = None
    reference: bool = False
    default: bool = False
    red: str | None = None


def rows_of(
    results: Sequence[Result], ceilings: Ceilings, provenance: Provenance, notes: Sequence[str] = ()
) -> list[Row]:
    """One row for each of ours, with the times of the references that were taken in turns with it."""
    return [_row(ours, results, ceilings, provenance, notes) for ours in results if not ours.reference]


def _row(ours: Result, results: Sequence[Result], ceilings: Ceilings, provenance: Provenance, notes) -> Row:
    problem = ours.problem
    limit = ceilings.limit(problem.work)
    found = _times(ours, limit)
    found += [measure("limit", limit.seconds, "modelled", term=limit.term)]
    found += [measure("flops", problem.work.flops, "modelled")]
    if ours.name in problem.walks:
        found += [measure("memory_walks", problem.walks[ours.name], "modelled")]
    if ours.latency is not None:
        for other in results:
            if other.reference and other.problem is problem and other.latency is not None:
                found += _times(other, limit, reference=other.name)
                found += [measure("speedup", other.latency.p50 / ours.latency.p50, reference=other.name)]
        found += _growth(ours, results)
    identity = Identity(
        recipe=f"ops/{problem.op}",
        task=f"{problem.op} {problem.name}",
        overrides={**problem.setting, "platform": jax.default_backend(), "default": ours.default},
        variant=ours.name,
    )
    said = [RED + ours.red] if ours.red else []
    said += [problem.oracle.note] if problem.oracle.note else []
    return Row(identity, provenance, (*found, *ceilings.measurements()), notes=(*said, *notes))


def _times(result: Result, limit: Limit, **conditions) -> list[Measurement]:
    latency, flops = result.latency, result.problem.work.flops
    known = latency is not None
    peak = measure("peak_memory", result.peak, "compiled", **conditions)
    conditions = {"repeats": len(latency.samples), **conditions} if known else conditions
    return [
        measure("latency_p50", latency.p50 if known else None, **conditions),
        measure("latency_p90", latency.p90 if known else None, **conditions),
        measure("latency_spread", latency.spread if known else None, **conditions),
        measure("flop_rate", flops / latency.p50 if known else None, **conditions),
        measure("efficiency", limit.seconds / latency.p50 if known else None, **conditions),
        peak,
    ]


def _growth(ours: Result, results: Sequence[Result]) -> list[Measurement]:
    """The exponent of the time in the size, from the next smaller problem of the family."""
    problem = ours.problem
    if problem.family is None:
        return []
    smaller = [
        result
        for result in results
        if (result.name, result.reference, result.problem.family) == (ours.name, False, problem.family)
        and result.problem.size < problem.size
        and result.latency is not None
    ]
    if not smaller:
        return []
    near = max(smaller, key=lambda result: result.problem.size)
    exponent = math.log(ours.latency.p50 / near.latency.p50) / math.log(problem.size / near.problem.size)
    return [measure("growth_exponent", exponent, **{"from": near.problem.size, "to": problem.size})]


def is_red(row: Row) -> bool:
    """Whether the gate kept the row from having a time."""
    return any(note.startswith(RED) for note in row.notes)


def merged(old: Iterable[Row], new: Iterable[Row], tasks: Sequence[str]) -> list[Row]:
    """The rows of a file after a run of some problems: a new row replaces the old one of its problem, implementation
    and machine. Sorted as `tasks`, what these don't name last."""
    key = lambda row: (row.identity.task, row.identity.variant, machine_name(row.provenance.hardware))
    kept = {**{key(row): row for row in old}, **{key(row): row for row in new}}
    order = {task: number for number, task in enumerate(tasks)}
    return sorted(kept.values(), key=lambda row: order.get(row.identity.task, len(order)))
