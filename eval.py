"""Measures finished runs: uv run eval.py --runs='runs/*' [--out=runs/table [--cost=latency_p50]]

Every network is exported, reloaded and then measured, as trained and after each transform of its config; latencies of
one table are taken interleaved in this one process.
"""

import contextlib
import dataclasses
import errno
import glob
import itertools
import json
import pathlib
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from lissom.training import flags as command_line
from lissom.training.errors import UserError, one_sentence


def find_runs(patterns: Iterable[str], say=print, flag: str = "--runs") -> list[pathlib.Path]:
    """Every finished run at or under what the patterns match; those skipped are said; none at all is an error."""
    from lissom.training.runs import is_run

    patterns, found, matched = list(patterns), [], False
    for pattern in patterns:
        matches = sorted(glob.glob(str(pattern)))
        if not matches and len(patterns) > 1:
            say(f"skipped {pattern}: it matches nothing")
        for match in matches:
            matched = True
            root = pathlib.Path(match)
            candidates = [root] if is_run(root) else sorted(file.parent for file in root.rglob("config.json"))
            inner = lambda path, root=root: {"exports", "checkpoints"} & set(path.relative_to(root).parts)
            candidates = [path for path in candidates if not inner(path)]
            if not candidates:
                say(f"skipped {root}: it holds no run")
            for path in candidates:
                reason = _unfinished(path)
                if reason:
                    say(f"skipped {path}: {reason}")
                elif "tuned" in path.relative_to(root).parts:
                    say(f"skipped {path}: a trial of a comparison's tuning")
                elif path not in found:
                    found.append(path)
    if not matched:
        raise UserError(f"{flag}={','.join(patterns)} matches nothing")
    if not found:
        raise UserError(f"{flag}={','.join(patterns)} matches no directory with a finished run")
    return found


def given_runs(argv: list[str], script: str) -> list[pathlib.Path]:
    """What the flag --runs names, of a script that reads finished runs and takes no recipe. UserError without one."""
    if command_line.parse(argv, recipe=False):
        raise UserError(f"--config is no flag of {script}: every run holds its own")
    if not flags.FLAGS.runs:
        raise UserError("--runs=PATTERN is missing, for example --runs='runs/*'")
    return find_runs(flags.FLAGS.runs, lambda text: print(text, file=sys.stderr))


def _unfinished(run: pathlib.Path) -> str | None:
    """Why a directory holds no finished run, or None."""
    from lissom.training.checkpoints import Checkpoints
    from lissom.training.runs import read_facts

    steps = Checkpoints(run / "checkpoints").steps()
    if not steps:
        return "it has no checkpoint"
    try:
        with _reading(run / "facts.json"):
            total = int(read_facts(run).get("steps", 0))
    except UserError as error:
        return str(error)
    return f"it was stopped at step {steps[0]} of {total}" if steps[0] < total else None


@contextlib.contextmanager
def _reading(file: pathlib.Path) -> Iterator[None]:
    """What a damaged file of a run makes its reader raise, as one sentence that names the file."""
    from lissom.models.registry import UnknownName

    try:
        yield
    except (UserError, UnknownName):
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).strip().split("\n")[0][:200]
        raise UserError(f"{file} can't be read: {reason}") from error


def read_metrics(run: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. A last line without its end was cut off by a kill and counts nothing;
    any other that is no record is a UserError."""
    file, entries = run / "metrics.jsonl", []
    with _reading(file):
        lines = file.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            entry["kind"], entry["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise UserError(f"{file} can't be read: line {number} is no record of a step") from error
        entries.append(entry)
    return entries


def trained_by(run: pathlib.Path):
    """The `Provenance` of a run's training."""
    from lissom.evaluation.rows import provenance_of

    with _reading(run / "provenance.json"):
        return provenance_of(json.loads((run / "provenance.json").read_text()))


def finished(run: pathlib.Path) -> bool:
    """Whether a run stands there that came to its end."""
    try:
        total = json.loads((run / "facts.json").read_text())["steps"]
        return any(line["kind"] == "test" and line["step"] == total for line in read_metrics(run))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _training_times(run: pathlib.Path) -> dict[str, float]:
    """What the training took: the sum of its sessions, of each the last that it wrote; of memory the largest. Steps
    that a kill lost, and that were taken again, count once."""
    sessions: dict[Any, dict[str, float]] = {}
    with _reading(run / "metrics.jsonl"):
        for number, entry in enumerate(read_metrics(run)):
            if entry["kind"] == "times":
                sessions[entry.get("start", f"line {number}")] = entry
        times = {
            key: sum(session[key] for session in sessions.values()) for key in ("compile_seconds", "train_seconds")
        }
        for key, of_all in (("train_peak_memory", max), ("train_temporaries", max), ("train_flops", sum)):
            # Some backends don't tell, some programs can't be counted.
            if sessions and all(key in session for session in sessions.values()):
                times[key] = of_all(session[key] for session in sessions.values())
        last = [session["examples_per_second"] for session in sessions.values()][-1:]
        return {**times, "examples_per_second": last[0]} if sessions else {}


def _forgetting(run: pathlib.Path, config, dataset) -> dict[str, float]:
    """What a run by class forgot of the tasks in front of its last one, by the evaluations of its metrics.jsonl; empty
    for other runs, and where the objective did not count classes apart."""
    from lissom.evaluation.forgetting import forgetting
    from lissom.models.tallies import CLASS_ACCURACY
    from lissom.training.building import class_stream

    stream = class_stream(config, dataset)
    with _reading(run / "metrics.jsonl"):
        tests = [entry for entry in read_metrics(run) if entry["kind"] == "test"]
        # Behind a task, and at the end: more evaluations in between would find higher maxima.
        tests = [entry for entry in tests[:-1] if stream and entry["step"] in stream.ends] + tests[-1:]
        if stream is None or not tests or not any(name.startswith(CLASS_ACCURACY) for name in tests[-1]):
            return {}
        reached = sum(end <= tests[-1]["step"] for end in stream.ends)
        # A class that the test set does not have is told nowhere.
        known = lambda entry, classes: [entry[name] for c in classes if (name := f"{CLASS_ACCURACY}{c}") in entry]
        tasks = [task for task in stream.tasks[:reached] if known(tests[-1], task)]
        means = [[sum(known(entry, task)) / len(known(entry, task)) for task in tasks] for entry in tests]
        lost = forgetting(means)
    return {} if lost is None else {"forgetting": lost}


def task_name(config) -> str:
    """The task of a run: the data and the settings that were chosen for it."""
    from lissom.training.building import data_settings

    settings = data_settings(config)
    inner = ", ".join(f"{key}={value}" for key, value in sorted(settings.items()))
    return config.data.name + (f"({inner})" if inner else "")


def overrides_of(config, named: Sequence[str] = ()) -> dict[str, Any]:
    """{field: value} of what differs from the recipe, but for the seed and for fields that change no result, and of the
    `named` fields though they don't; empty where the recipe's file is gone."""
    from flax.traverse_util import flatten_dict

    from lissom.training.config import WATCHING, from_json, load_recipe, to_json

    try:
        base = flatten_dict(from_json(to_json(load_recipe(config.recipe))).to_dict(), sep=".")
    except UserError:
        return {}
    return {
        key: value if isinstance(value, str | int | float | bool) else str(value)
        for key, value in flatten_dict(config.to_dict(), sep=".").items()
        if key in named or (key != "seed" and not key.startswith(WATCHING) and value != base.get(key, "unset"))
    }


def evaluate(
    runs: Iterable[pathlib.Path | str],
    *,
    variants: Mapping[str, str] | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
    transforms: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    floors: bool = True,
    named: Sequence[str] = (),
    skip: Callable[[str], None] | None = None,
) -> list:
    """The rows of finished runs: one for each run, evaluation transform and seed, then the floors of each task.

    `variants` maps a run's path to its label in tables, `notes` to sentences that its rows carry, `transforms` to what
    it is measured behind instead of the transforms of its config. `named` fields stand in the rows though they are the
    recipe's, as tuned ones should: recipes change. A directory without a whole run is a UserError; with
    `skip` it is left out and said there, and only when none is left is it an error.
    """
    from lissom.data.errors import DataError
    from lissom.evaluation.measuring import adapting, compare_outputs, decoding, few_bits, latencies, measure_subject
    from lissom.evaluation.rows import provenance
    from lissom.models.registry import UnknownName

    here, runs = provenance(), [pathlib.Path(run) for run in runs]
    variants, notes, transforms = variants or {}, notes or {}, transforms or {}
    loaded: dict[str, Any] = {}  # the data of each task
    beside: dict[str, list] = {}  # and its further test sets, [(conditions, dataset)]
    subjects = []
    for run in runs:
        try:
            of_run = (variants.get(str(run)), notes.get(str(run), ()), transforms.get(str(run)), named)
            subjects += _subjects(run, loaded, beside, here, *of_run)
        except (UserError, DataError, UnknownName) as error:
            if skip is None:
                raise
            skip(f"skipped {run}: {error}")
    if not subjects:
        raise UserError(f"none of {len(runs)} runs can be measured")
    told = time.monotonic()
    for number, subject in enumerate(subjects, 1):
        measure_subject(subject)
        # Many networks on a large test set take an hour.
        if time.monotonic() - told > 30:
            told = time.monotonic()
            print(f"{number} of {len(subjects)} networks are judged; their latencies come last", file=sys.stderr)
    for _, (trained, *rest) in itertools.groupby(subjects, lambda subject: subject.run):
        compare_outputs(trained, [subject for subject in rest if subject.blank.identity.transform])
    tasks: dict[str, list] = {}
    for subject in subjects:
        tasks.setdefault(subject.blank.identity.task, []).append(subject)
    for group in tasks.values():
        few_bits(group)
        latencies(group)
        adapting(group)
        decoding(group)
    _tell_apart(subjects)
    rows = [subject.row() for subject in subjects]
    for task, group in tasks.items():
        dataset = loaded[task]
        if floors and any(subject.floor for subject in group):
            rows += _floor_rows(task, dataset, beside[task], group[0].blank.provenance)
    return rows


def _tell_apart(subjects: list) -> None:
    """Two runs of one label, transform and seed would be one line of the table: their directories name them."""
    seen: dict[tuple, list] = {}
    for subject in subjects:
        identity = subject.blank.identity
        seen.setdefault((identity.task, identity.label, identity.transform, identity.seed), []).append(subject)
    for same in seen.values():
        if len(same) > 1:
            places = [subject.run for subject in same]
            for number, subject in enumerate(same):
                identity = subject.blank.identity
                # Two transforms of one name and the same settings come from one run.
                place = f"{subject.run} #{number + 1}" if places.count(subject.run) > 1 else subject.run
                identity = dataclasses.replace(identity, variant=f"{identity.label} ({place})")
                subject.blank = dataclasses.replace(subject.blank, identity=identity)


def _subjects(
    run: pathlib.Path,
    loaded: dict,
    beside: dict,
    here,
    variant: str | None,
    notes: Sequence[str],
    transforms: Sequence[Mapping[str, Any]] | None,
    named: Sequence[str],
) -> list:
    """A run's network as trained, and after each of the transforms (None: those of its config); `loaded` keeps the data
    of each task, `beside` the test sets beside it."""
    from lissom.evaluation.rows import Identity, Row, elsewhere
    from lissom.training.building import as_learned, further_tests, load_plain
    from lissom.training.config import check
    from lissom.training.runs import check_facts, read_config, read_facts
    from lissom.training.stages import final_config

    with _reading(run / "config.json"):
        given = read_config(run)
        config = final_config(given)
        check(config)
        task = task_name(config)
    with _reading(run / "facts.json"):
        facts = dict(read_facts(run))
    trained = dataclasses.replace(trained_by(run), data=_checksum(facts))
    times = _training_times(run)
    if task not in loaded:
        loaded[task] = load_plain(config)
    dataset = as_learned(config, loaded[task])
    check_facts(run, {**dataset.info, "kind": dataset.kind})  # a network fits the data that it was trained on
    further = [(_conditions(settings), other) for settings, other in further_tests(config, dataset)]
    known = beside.setdefault(task, [])
    known += [each for each in further if all(each[0] != settings for settings, _ in known)]
    measured = dataclasses.replace(here, data=_checksum(dataset.info))
    identity = Identity(config.recipe, task, config.seed, overrides_of(given, named), variant=variant)
    blank = Row(identity, measured, (), elsewhere(trained, measured), tuple(notes))
    times |= _forgetting(run, config, dataset)
    entries = [dict(entry) for entry in (config.evaluation.transforms if transforms is None else transforms)]
    return [
        _subject(run, config, entry, name, dataset, further, blank, {} if entry else times)
        for entry, name in zip([{}, *entries], [None, *_told_apart(entries)], strict=True)
    ]


def export_name(transform: str | None) -> str:
    """The folder of a network behind a transform, by its name in the table; a long name is cut off, with a checksum."""
    name = (transform or "trained").replace("/", "_")
    return name if len(name) <= 80 else f"{name[:80]} {zlib.crc32(name.encode()):08x}"


def _told_apart(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of transforms; those of one name with their label, or the settings by which they differ: 'yarn
    factor=4'."""
    named: dict[str, list] = {}
    for entry in entries:
        named.setdefault(entry["name"], []).append(entry)
    shown = []
    for entry in entries:
        same = named[entry["name"]]
        if entry.get("label"):
            label = f"{entry['name']} {entry['label']}"
            shown.append(label if label not in shown else f"{label} #{len(shown) + 1}")
            continue
        keys = [key for key in entry if any(key not in other or other[key] != entry[key] for other in same)]
        shown.append(" ".join([entry["name"], *(f"{key}={entry[key]}" for key in keys)]))
    return shown


def _checksum(info: Mapping[str, Any]) -> dict[str, str]:
    """What a row keeps of a dataset's facts: the checksum of its bytes, where it has one."""
    return {"sha256": str(info["sha256"])} if info.get("sha256") else {}


def _subject(run: pathlib.Path, config, entry: dict, name, dataset, further, blank, times: Mapping[str, float]):
    """Exports, reloads and wraps one network."""
    from flax import nnx

    from lissom import data
    from lissom.compression.artefacts import export, reload
    from lissom.evaluation.measuring import Subject, imitates
    from lissom.evaluation.memory import artefact_bytes
    from lissom.models.variables import merge
    from lissom.training.building import build_objective

    try:
        directory = export(
            run,
            run / "exports" / export_name(name),
            [entry] if entry else [],
            data.train_batches(dataset, start_step=0, batch_size=config.data.batch_size, seed=config.seed),
        )
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise UserError(f"{run / 'exports'} can't be written: {error.strerror}") from error
    parts = reload(directory)
    network, objective = nnx.eval_shape(lambda: merge(parts)), build_objective(config)
    batches = lambda dataset: lambda: data.eval_batches(dataset, batch_size=config.evaluation.batch_size)
    return Subject(
        run=str(run),
        blank=dataclasses.replace(
            blank,
            identity=dataclasses.replace(blank.identity, transform=name),
            notes=(*blank.notes, *objective.notes(network)),
        ),
        graph=parts.graph,
        state=tuple(parts[1:]),
        merge=lambda graph, state: merge(type(parts)(graph, *state)),
        judge=objective.judge,
        answers=objective.answers,
        adaptation=getattr(objective, "adaptation", None),
        batches=batches(dataset),
        examples=dataset.test,
        kind=dataset.kind,
        vocab_size=dataset.info.get("meta_token", dataset.info.get("vocab_size")),  # of the text
        latency_batches=tuple(config.evaluation.latency_batches),
        repeats=config.evaluation.latency_repeats,
        decode_length=config.evaluation.decode_length,
        artefact_bytes=artefact_bytes(directory),
        times=times,
        simulated=imitates(network),
        floor=bool(config.evaluation.floor),
        further=[(settings, batches(other)) for settings, other in further],
    )


def _conditions(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a further test set as a row holds them: a list or a table of them as text."""
    return {
        name: value if isinstance(value, str | int | float | bool) else str(value) for name, value in settings.items()
    }


# What a floor of these kinds says of a test example is, but for settings, what it learns from it: it costs nothing to
# judge it on more test sets.
IN_TASK = ("stream", "episode")


def _floor_rows(task: str, dataset, further: Sequence[tuple[Mapping[str, Any], Any]], provenance) -> list:
    """The trivial methods on the test set and, where they learn from a test example itself, on the further ones."""
    from lissom.evaluation.measuring import floor_rows

    def of(dataset):
        oracle = _oracle(dataset)
        return floor_rows(task, dataset.kind, dataset.train, dataset.test, dataset.info, provenance, oracle)

    rows = of(dataset)
    for settings, other in further if dataset.kind in IN_TASK else ():
        for number, row in enumerate(of(dataclasses.replace(other, train=dataset.train))):  # as the networks' was
            more = [dataclasses.replace(m, conditions={**m.conditions, **settings}) for m in row.measurements]
            rows[number] = dataclasses.replace(rows[number], measurements=(*rows[number].measurements, *more))
    return rows


def _oracle(dataset) -> Callable | None:
    """Of generated data whose answer can be worked out what does so (`measuring.floor_rows`)."""
    import functools

    from lissom.data import cue_match, dynamics
    from lissom.data.episodes import nearest_of_all, regression

    info = dataset.info
    oracles = {
        "cue_match": functools.partial(cue_match.solve, classes=info.get("classes")),
        "dynamics": functools.partial(dynamics.solve, systems=info.get("systems"), interval=info.get("interval")),
        "episodes": nearest_of_all,
        **({"regression_tasks": regression.solve} if set(info.get("families", ())) <= set(regression.CURVES) else {}),
    }
    return oracles.get(dataset.name)


def check_writable(path: pathlib.Path | str, flag: str) -> None:
    """Raises UserError where no file could be written under `path`; leaves nothing there. Asked before the hours of
    work whose result belongs there."""
    standing = pathlib.Path(path)
    try:
        while not standing.exists() and standing != standing.parent:
            standing = standing.parent
        if not standing.is_dir():
            raise UserError(f"{flag}={path} must be a directory, and {standing} is a file")
        with tempfile.TemporaryFile(dir=standing):
            pass
    except OSError as error:
        raise UserError(f"{flag}={path} can't be written: {error.strerror} ({standing})") from error


COST = "latency_p50"
COST_HELP = "the metric on the x axis of pareto.png, such as bit_operations"


def check_cost(name: str) -> None:
    """Raises UserError where --cost names no metric."""
    from lissom.evaluation.metrics import metric

    try:
        metric(name)
    except ValueError as error:
        raise UserError(f"--cost: {error}") from error


def write(rows: list, out: pathlib.Path | str, cost: str = COST) -> None:
    """rows.jsonl and table.csv with everything, table.md as it is printed, and pareto.png over `cost`, under `out`."""
    from lissom.evaluation.tables import write_report

    write_report(rows, out, shown=shown(rows), x=cost)
    text = (pathlib.Path(out) / "table.md").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("No plot"):
            print(line, file=sys.stderr)


# What is printed; table.csv and rows.jsonl hold everything.
SHOWN = (
    "accuracy",
    "accuracy_interval",
    "prototype_accuracy",
    "kmeans_accuracy",
    "laplacian_accuracy",
    "transported_accuracy",
    "mse",
    "mse_interval",
    "first_accuracy",
    "last_accuracy",
    "corruption_accuracy",
    "forgetting",
    "token_accuracy",
    "bits_per_byte",
    "loss",
    "log_likelihood",
    "likelihood_gap",
    "adjusted_rand",
    "trajectory_error",
    "purity",
    "skipped_updates",
    "density",
    "load_entropy",
    "max_load",
    "dropped",
    "firing_rate",
    "synaptic_operations",
    "inference_energy",
    "domain_information",
    "logit_error",
    "train_seconds",
    "train_flops",
    "train_peak_memory",
    "latency_p50",
    "adaptation_p50",
    "adaptation_memory",
    "decode_p50",
    "cache_bytes_per_token",
    "peak_memory",
    "flops",
    "bit_operations",
    "parameters",
    "artefact_bytes",
)


def shown(rows: list) -> tuple[str, ...]:
    """The metrics that are printed: of the loss only where no other number says what it would."""
    others = {"accuracy", "bits_per_byte", "log_likelihood", "trajectory_error", "mse"}
    told = {measurement.name for row in rows for measurement in row.measurements} & others
    return tuple(name for name in SHOWN if name != "loss" or not told)


def render(rows: list) -> str:
    """The tables for the terminal, one a task; the first variant is what the others are compared to."""
    from lissom.evaluation.tables import shown_text, tables

    return shown_text(tables(rows), shown(rows))


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
    flags.DEFINE_string("cost", COST, COST_HELP)
    with one_sentence():
        if command_line.parse(argv, recipe=False):
            raise UserError("eval.py takes no --config: every run holds its own")
        check_cost(flags.FLAGS.cost)
        if flags.FLAGS["cost"].present and not flags.FLAGS.out:
            raise UserError("--cost is of the picture that --out=DIRECTORY gets")
        if not flags.FLAGS.runs:
            raise UserError("--runs=PATTERN is missing, for example --runs='runs/*'")
        say = lambda text: print(text, file=sys.stderr)
        runs = find_runs(flags.FLAGS.runs, say)
        if flags.FLAGS.out:
            check_writable(flags.FLAGS.out, "--out")
        rows = evaluate(runs, skip=say)
        print(render(rows))
        if flags.FLAGS.out:
            write(rows, flags.FLAGS.out, flags.FLAGS.cost)
            print(f"written to {flags.FLAGS.out}")


if __name__ == "__main__":
    main(sys.argv)
