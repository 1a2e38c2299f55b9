"""Measures finished runs: uv run eval.py --runs='runs/*' [--out=results/mine]

Every network is exported, reloaded and then measured, as trained and after each transform of its config; latencies of
one table are taken interleaved in this one process.
"""

import glob
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from absl import flags

from lissom.training import flags as command_line
from lissom.training.errors import UserError, one_sentence


def find_runs(patterns: Iterable[str], say=print) -> list[pathlib.Path]:
    """Every finished run at or under what the patterns match; those skipped are said; none at all is an error."""
    from lissom.training.checkpoints import Checkpoints
    from lissom.training.runs import is_run, read_facts

    found, matched = [], False
    for pattern in patterns:
        for match in sorted(glob.glob(str(pattern))):
            matched = True
            root = pathlib.Path(match)
            candidates = [root] if is_run(root) else sorted(file.parent for file in root.rglob("config.json"))
            candidates = [
                path for path in candidates if "exports" not in path.parts and "checkpoints" not in path.parts
            ]
            if not candidates:
                say(f"skipped {root}: it holds no run")
            for path in candidates:
                steps = Checkpoints(path / "checkpoints").steps()
                if not steps:
                    say(f"skipped {path}: it has no checkpoint")
                elif steps[0] < read_facts(path).get("steps", 0):
                    say(f"skipped {path}: it was stopped at step {steps[0]} of {read_facts(path)['steps']}")
                elif "tuned" in path.relative_to(root).parts:
                    say(f"skipped {path}: a trial of a comparison's tuning")
                elif path not in found:
                    found.append(path)
    if not matched:
        raise UserError(f"--runs={','.join(patterns)} matches nothing")
    if not found:
        raise UserError(f"--runs={','.join(patterns)} matches no directory with a finished run")
    return found


def task_name(config) -> str:
    """The task of a run: the data and the settings that were chosen for it."""
    settings = config.data.kwargs.get(config.data.name, {})
    inner = ", ".join(f"{key}={value}" for key, value in sorted(settings.items()))
    return config.data.name + (f"({inner})" if inner else "")


def overrides_of(config) -> dict[str, Any]:
    """{field: value} of what differs from the recipe; empty where the recipe's file is gone."""
    from lissom.training.config import from_json, load_recipe, to_json

    try:
        base = from_json(to_json(load_recipe(config.recipe))).to_dict()
    except UserError:
        return {}

    def walk(one: Mapping, other: Mapping, prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in one.items():
            if isinstance(value, Mapping) and isinstance(other.get(key), Mapping):
                found |= walk(value, other[key], f"{prefix}{key}.")
            elif value != other.get(key, "unset") and prefix + key != "seed":
                found[prefix + key] = value if isinstance(value, str | int | float | bool) else str(value)
        return found

    return walk(config.to_dict(), base, "")


def evaluate(
    runs: Iterable[pathlib.Path | str], *, variants: Mapping[str, str] | None = None, floors: bool = True
) -> list:
    """The rows of finished runs: one for each run, evaluation transform and seed, then the floors of each task.

    `variants` maps a run's path to its label in tables. Raises UserError for a directory without a whole run.
    """
    from lissom.evaluation.measuring import Subject, latencies, measure_subject
    from lissom.training.building import load_dataset
    from lissom.training.runs import read_config
    from lissom.training.stages import final_config

    subjects, tasks = [], {}
    for run in map(pathlib.Path, runs):
        config = final_config(read_config(run))
        task = task_name(config)
        if task not in tasks:
            tasks[task] = (load_dataset(config), config)
        for entry in ({}, *config.evaluation.transforms):
            subjects.append(_subject(Subject, run, config, dict(entry), task, tasks[task][0], variants or {}))
    for subject in subjects:
        measure_subject(subject)
    for task in tasks:
        latencies([subject for subject in subjects if subject.task == task])
    _tell_apart(subjects)
    rows = [subject.row() for subject in subjects]
    for task, (dataset, config) in tasks.items():
        if floors and config.evaluation.floor:
            rows += _floor_rows(task, dataset, rows[0].provenance)
    return rows


def _tell_apart(subjects: list) -> None:
    """Two runs of one label, transform and seed would be one line of the table: their directories name them."""
    seen: dict[tuple, list] = {}
    for subject in subjects:
        label = subject.variant or (subject.recipe, str(subject.overrides))
        seen.setdefault((subject.task, label, subject.transform, subject.seed), []).append(subject)
    for same in seen.values():
        if len(same) > 1:
            for number, subject in enumerate(same):
                subject.variant = (
                    f"{subject.variant or subject.recipe} ({subject.run}{f' #{number}' if number else ''})"
                )


def _subject(kind, run: pathlib.Path, config, entry: dict, task: str, dataset, variants: Mapping[str, str]):
    """Exports, reloads and wraps one network."""
    import json

    from lissom import data
    from lissom.compression.artefacts import export, reload
    from lissom.evaluation.memory import artefact_bytes
    from lissom.models.variables import merge
    from lissom.training.building import build_objective
    from lissom.training.objectives.classification import Classification

    name = entry.get("name")
    directory = export(
        run,
        run / "exports" / (name or "trained"),
        [entry] if name else [],
        data.train_batches(dataset, start_step=0, batch_size=config.data.batch_size, seed=config.seed),
    )
    parts = reload(directory)
    # A distilled student is judged as a classifier: its teacher's run need not exist any more.
    objective = Classification() if config.objective == "distillation" else build_objective(config)
    times = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        entry_ = json.loads(line)
        if entry_["kind"] == "times":
            for key in ("compile_seconds", "train_seconds"):
                times[key] = times.get(key, 0.0) + entry_[key]  # a run that was resumed took the sum
            times["examples_per_second"] = entry_["examples_per_second"]
    batches = lambda: data.eval_batches(dataset, batch_size=config.evaluation.batch_size)
    return kind(
        run=str(run),
        recipe=config.recipe,
        task=task,
        seed=config.seed,
        overrides=overrides_of(config),
        transform=name,
        variant=variants.get(str(run)),
        provenance=json.loads((run / "provenance.json").read_text()),
        graph=parts.graph,
        state=tuple(parts[1:]),
        merge=lambda graph, state: merge(type(parts)(graph, *state)),
        judge=objective.judge,
        batches=batches,
        examples=dataset.test,
        kind=dataset.kind,
        vocab_size=dataset.info.get("vocab_size"),
        latency_batches=tuple(config.evaluation.latency_batches),
        repeats=config.evaluation.latency_repeats,
        artefact_bytes=artefact_bytes(directory),
        times=times if name is None else {},
    )


def _floor_rows(task: str, dataset, provenance) -> list:
    import functools

    from lissom.data import cue_match
    from lissom.evaluation.measuring import floor_rows

    # The generated set whose answer can be worked out from its input.
    solve = functools.partial(cue_match.solve, classes=dataset.info.get("classes"))
    oracle = solve if dataset.name == "cue_match" else None
    return floor_rows(task, dataset.kind, dataset.train, dataset.test, dataset.info, provenance, oracle)


def write(rows: list, out: pathlib.Path | str) -> None:
    """rows.jsonl and table.csv with everything, table.md as it is printed, and pareto.png, under `out`."""
    from lissom.evaluation.tables import write_report

    write_report(rows, out)
    (pathlib.Path(out) / "table.md").write_text(render(rows), encoding="utf-8")


# What is printed; table.csv and rows.jsonl hold everything.
SHOWN = (
    "accuracy",
    "token_accuracy",
    "bits_per_byte",
    "train_seconds",
    "latency_p50",
    "peak_memory",
    "flops",
    "parameters",
    "artefact_bytes",
)


def render(rows: list) -> str:
    """The tables for the terminal, one a task; the first variant is what the others are compared to."""
    import dataclasses

    from lissom.evaluation.tables import markdown, tables

    shown = [
        dataclasses.replace(table, columns=tuple(c for c in table.columns if c.name in SHOWN)) for table in tables(rows)
    ]
    return "\n".join(map(markdown, shown))


def report_run(workdir: pathlib.Path, result: Mapping[str, Any]) -> None:
    """What train.py ends with: the run's own row beside its floor, its times, its place."""
    from lissom.evaluation.rows import write_rows

    if "loss" not in result:
        return
    rows = evaluate([workdir])
    write_rows(workdir / "rows.jsonl", rows)
    print(render(rows))
    print(
        f"compiled in {result['compile_seconds']:.1f} s, trained in {result['train_seconds']:.1f} s; "
        f"the run lies in {workdir}"
    )


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_multi_string("runs", [], "directories of runs, or patterns; each may hold several")
    flags.DEFINE_string("out", None, "write rows.jsonl, table.md, table.csv and pareto.png there")
    with one_sentence():
        if command_line.parse(argv):
            raise UserError("eval.py takes no --config: every run holds its own")
        if not flags.FLAGS.runs:
            raise UserError("--runs=PATTERN is missing, for example --runs='runs/*'")
        rows = evaluate(find_runs(flags.FLAGS.runs, lambda text: print(text, file=sys.stderr)))
        print(render(rows))
        if flags.FLAGS.out:
            write(rows, flags.FLAGS.out)
            print(f"written to {flags.FLAGS.out}")


if __name__ == "__main__":
    main(sys.argv)
