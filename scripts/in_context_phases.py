"""Which decoders memorise their training tasks, which find out the task of a sequence, and which learn from it.

    uv run scripts/in_context_phases.py [--mixers=attention,lstm] [--widths=32,64]
        [--also="window 4: model.mixer=window model.mixer_kwargs.window.window=4"]
        [--tasks=1,4,16,64,256,1024,4096,16384,65536] [--rates=3e-4,1e-3,3e-3] [--seeds=1]
        [--workdir=runs/in_context_phases] [--shard=0/2 | --merge] [--out=results/in_context_phases]
        [--config.FIELD=VALUE]

Kirsch et al. 2022, arXiv:2212.04458, figures 2 to 5. Each run is the recipe configs/fewshot/gpicl.py with a mixer, a
width, and so many training tasks; --also, which can be given several times, names a mixer with other settings of the
model: it stands behind those of --mixers (behind --mixers= alone). It is judged on unseen tasks and on the test sets of
config.evaluation.data: tasks of training ("seen"), and of another base set ("other"). The learning rate of each mixer
and width is that of --rates with the lowest loss on unseen tasks, of the most training tasks and seed 0; of one rate
none is tried. It is tried in whole runs: the loss is that of chance for a good part of a run before it falls, so that a
part of one says which rate is the quickest there, and this one may stay there. So the best of these runs is also one of
those that are shown. What is finished in --workdir is not trained again; a --shard trains its part of the mixers and
widths and measures nothing; --merge trains nothing.

Printed and written: rows and tables of all runs, and the phases: accuracies at the first and at the last position, and

    learned       the last is more than 0.1 above the first on unseen tasks
    identified    so on seen tasks alone
    memorised     on neither, and the first on seen tasks is more than 0.1 above chance
    none          nothing of this

phases.png: accuracy at the last position over the number of tasks, where there are several. state.png and
parameters.png: that on unseen tasks over the bytes of the state that a prediction is made from (the cache of a whole
sequence), and over parameters, of the runs of most tasks, where several mixers or widths have one. The remedies of the
paper are fields of the recipe, each for a --workdir and --out of its own: --config.data.batch_size=512,
--config.data.kwargs.in_context.fixed_permutation=0.1.
"""

import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags

from lissom import sweeps
from lissom.sweeps import RATE
from lissom.training import flags as command_line
from lissom.training.errors import UserError, one_sentence
from lissom.training.variants import Variant, directory_of, named

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECIPE = "configs/fewshot/gpicl.py"
OUT = ROOT / "results" / "in_context_phases"
DATA = "data.kwargs.in_context"
MIXER = "model.mixer"
SET = {
    MIXER: "--mixers",
    "model.width": "--widths",
    f"{DATA}.tasks": "--tasks",
    "optim.learning_rate": "--rates",
    "seed": "--seeds",
}
FIXED = ("data.name", "model.name", "objective", f"{DATA}.tested", "evaluation.transforms")
OWN = "unseen"  # what the recipe's own test set has
FLOOR = "nearest centroid in context"
GAIN = 0.1


class Run(NamedTuple):
    """One run of the grid and its config. mixer: its name, or that of --also."""

    mixer: str
    width: int
    tasks: int
    seed: int
    config: Any

    @property
    def name(self) -> str:
        return f"{directory_of(self.mixer)}_{self.width}_{self.tasks}_seed{self.seed}"

    @property
    def learner(self) -> str:
        return f"{self.mixer}, width {self.width}"


class Learner(NamedTuple):
    """A mixer and a width: what is tuned, {rate: its run of the most tasks and seed 0}, and its runs, at the first of
    the rates."""

    label: str
    trials: dict[float, Any]
    runs: list[Run]


class Asked(NamedTuple):
    """What the flags say."""

    mixers: Sequence[Variant]
    widths: Sequence[int]
    tasks: Sequence[int]
    rates: Sequence[float]
    seeds: int
    pairs: Sequence[tuple[str, str]] = ()


def grid(asked: Asked) -> list[Learner]:
    """All that is trained. What can be wrong with a run is a UserError before any is trained."""
    from flax import nnx

    from lissom.training.building import build_network, further_tests, load_dataset
    from lissom.training.config import check, load_recipe, overridden

    base = overridden(load_recipe(RECIPE), asked.pairs)
    check(base)
    dataset = load_dataset(base)
    further_tests(base, dataset)
    facts = {**dataset.info, "kind": dataset.kind}
    found = []
    for mixer in asked.mixers:
        for width in asked.widths:
            sized = overridden(base, [*mixer.overrides, ("model.width", width), (RATE, asked.rates[0])])
            check(sized)
            nnx.eval_shape(lambda config=sized: build_network(config, facts, nnx.Rngs(0)))
            of = lambda tasks, seed, sized=sized: overridden(sized, [(f"{DATA}.tasks", tasks), ("seed", seed)])
            runs = [Run(mixer.label, width, n, seed, of(n, seed)) for seed in range(asked.seeds) for n in asked.tasks]
            trials = {rate: overridden(of(max(asked.tasks), 0), [(RATE, rate)]) for rate in asked.rates}
            found.append(Learner(runs[0].learner, trials, runs))
    return found


def tuned(learner: Learner, workdir: pathlib.Path, merge: bool) -> tuple[dict[pathlib.Path, Run], str | None]:
    """({where it lies: run} at the learner's best rate, what a reader must know of it); the trial of this rate is one
    of the runs."""
    from lissom.training.config import overridden

    place = lambda run, rate: workdir / f"{run.name}_{rate:g}"
    most = max((run for run in learner.runs if run.seed == 0), key=lambda run: run.tasks)
    rate, note = sweeps.tuned(learner.label, learner.trials, lambda rate: place(most, rate), merge)
    of = lambda run: run._replace(config=overridden(run.config, [(RATE, rate)]))
    return {place(run, rate): of(run) for run in learner.runs}, note


def trained(learners: Sequence[Learner], workdir: pathlib.Path) -> None:
    """Trains what is not finished."""
    for learner in learners:
        for place, run in tuned(learner, workdir, False)[0].items():
            sweeps.trained(run.config, place)


def measured(learners: Sequence[Learner], workdir: pathlib.Path) -> tuple[list[Run], list]:
    """(all runs that did not diverge; their rows, in their order, then the floors); a run that is missing is a
    UserError."""
    from lissom.eval import evaluate

    runs, notes = {}, {}
    for learner in learners:
        chosen, note = tuned(learner, workdir, True)
        for place, run in chosen.items():
            if sweeps.trained(run.config, place, merge=True) is None:
                print(f"{run.name} diverged, and has no row", file=sys.stderr)
                continue
            runs[place] = run
            notes[str(place)] = [note] if note else []
    labels = {str(place): run.learner for place, run in runs.items()}
    return list(runs.values()), evaluate(list(runs), variants=labels, notes=notes, named=[RATE])


def value(row, name: str, tested: str | None = None) -> float | None:
    """A measurement of a row: of what does not depend on the test set, or of one of `tests`."""
    for m in row.measurements:
        if m.name == name and tested in (None, test_of(m.conditions)):
            return m.value
    return None


def test_of(conditions) -> str:
    """What a test set is called: "unseen", "seen", "other", and the settings that it has besides."""
    told = {key: entry for key, entry in conditions.items() if key != "examples"}
    return ", ".join([told.pop("tested", OWN), *(f"{key}={entry}" for key, entry in told.items())])


def tests_of(rows: Sequence) -> list[str]:
    """The test sets, the run's own first."""
    found = [test_of(m.conditions) for row in rows for m in row.measurements if m.name == "last_accuracy"]
    return list(dict.fromkeys([OWN, *found]))


def phase(accuracies: dict[str, tuple[float, float]], chance: float) -> str:
    """What a run has come to, by {test set: (first, last) accuracy}; see the top of this file."""
    gains = {name: last - first for name, (first, last) in accuracies.items()}
    if gains[OWN] > GAIN:
        return "learned"
    if gains.get("seen", 0.0) > GAIN:
        return "identified"
    return "memorised" if accuracies.get("seen", (0.0, 0.0))[0] > chance + GAIN else "none"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def phases(runs: Sequence[Run], rows: Sequence) -> str:
    """The table of phases, means over the seeds."""
    of = {}
    for run, row in zip(runs, rows[: len(runs)], strict=True):
        of.setdefault((run.mixer, run.width, run.tasks), []).append(row)
    data = runs[0].config.data.kwargs.in_context
    names = tests_of(rows[: len(runs)])
    heads = ["mixer", "width", "state [B]", "training tasks", *(f"{name}, first - last [%]" for name in names), "phase"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (mixer, width, tasks), some in of.items():
        at = lambda name, test, some=some: mean([value(row, name, test) for row in some])
        found = {test: (at("first_accuracy", test), at("last_accuracy", test)) for test in names}
        cells = [f"{100 * first:.1f} - {100 * last:.1f}" for first, last in found.values()]
        state = value(some[0], "cache_bytes")
        told = phase(found, 1 / data.classes)
        lines.append(f"| {mixer} | {width} | {state:,.0f} | {tasks:,} | {' | '.join(cells)} | {told} |")
    return "\n".join(lines)


def curve(label: str, points: Sequence[tuple[float, float]]):
    """The mean and the spread of the accuracies [%] at each x, of (x, accuracy)."""
    from lissom.evaluation.plots import Curve
    from lissom.evaluation.statistics import summarize

    at: dict[float, list[float]] = {}
    for x, y in points:
        at.setdefault(x, []).append(100 * y)
    return Curve(label, tuple((x, mean(ys), 0.0, summarize(ys).sd or 0.0) for x, ys in sorted(at.items())))


def plots(runs: Sequence[Run], rows: Sequence, out: pathlib.Path) -> None:
    """phases.png, state.png and parameters.png, where there is more than one x to draw over."""
    from lissom.evaluation.plots import curve_plot

    own = list(zip(runs, rows[: len(runs)], strict=True))
    label, floor = "accuracy at the last position [%]", []
    task_of = {row.identity.task: run.tasks for run, row in own}
    for row in rows[len(runs) :]:
        if row.identity.variant == FLOOR:
            floor.append((task_of[row.identity.task], value(row, "last_accuracy")))
    panels = {}
    for learner in dict.fromkeys(run.learner for run in runs):
        mine = [(run.tasks, row) for run, row in own if run.learner == learner]
        panels[learner] = [
            curve(test, [(tasks, value(row, "last_accuracy", test)) for tasks, row in mine])
            for test in tests_of([row for _, row in mine])
        ]
        panels[learner] += [curve(FLOOR, floor)] if floor else []
    if len({run.tasks for run in runs}) > 1:
        curve_plot(panels, out / "phases.png", x_label="training tasks", y_label=label, x_scale="log")
    most = max(run.tasks for run in runs)
    if len({run.learner for run in runs}) == 1:
        return

    def over(name: str, said: str, file: str) -> None:
        of_most = [
            (run.mixer, value(row, name), value(row, "last_accuracy", OWN)) for run, row in own if run.tasks == most
        ]
        curves = [
            curve(mixer, [(x, y) for other, x, y in of_most if other == mixer])
            for mixer in dict.fromkeys(run.mixer for run in runs)
        ]
        title = f"unseen tasks, {most:,} training tasks"
        curve_plot({title: curves}, out / file, x_label=said, y_label=label, x_scale="log")

    over("cache_bytes", "state of a sequence [B]", "state.png")
    over("parameters", "parameters", "parameters.png")


def report(learners: Sequence[Learner], workdir: pathlib.Path, out: pathlib.Path, say: Callable = print) -> list:
    """Rows, tables, phases and pictures under `out`."""
    from lissom.evaluation.rows import write_rows
    from lissom.evaluation.tables import shown_text, tables

    runs, rows = measured(learners, workdir)
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "rows.jsonl", rows)
    text = phases(runs, rows)
    (out / "table.md").write_text(f"{text}\n\n{shown_text(tables(rows))}\n")
    plots(runs, rows, out)
    say(text)
    say(f"written to {out}")
    return rows


def read(given: flags.FlagValues, pairs: Sequence[tuple[str, str]]) -> Asked:
    """What the flags say, or a UserError."""
    numbers = {}
    for flag in ("widths", "tasks"):
        texts = given[flag].value
        if not texts or not all(text.isdigit() and int(text) for text in texts) or len(set(texts)) < len(texts):
            raise UserError(f"--{flag}={','.join(texts)} must be whole numbers above 0, none twice")
        numbers[flag] = [int(text) for text in texts]
    try:
        rates = [float(text) for text in given.rates]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
        raise UserError(f"--rates={','.join(given.rates)} must be numbers above 0, none twice")
    if len(set(given.mixers)) < len(given.mixers):
        raise UserError(f"--mixers={','.join(given.mixers)} must name mixers, none twice")
    also = named(given.also)
    mixers = [Variant(mixer, ((MIXER, mixer),)) for mixer in given.mixers] + also
    if not mixers:
        raise UserError("neither --mixers nor --also names a mixer")
    known = {directory_of(mixer) for mixer in given.mixers}
    for label, overrides in also:
        if directory_of(label) in known:
            raise UserError(f"--also={label!r} is called as one of --mixers is: give it another name")
        keys = [key for key, _ in overrides]
        if MIXER not in keys:
            raise UserError(f"--also={label!r} names no mixer: {MIXER}=...")
        for key in keys:
            if not key.startswith("model.") or key == "model.name":
                raise UserError(f"--also={label!r} sets {key}: it may set what the network is made of, model.FIELD")
            if key in SET and key != MIXER:
                raise UserError(f"--also={label!r} sets {key}, which is what the grid sets: give {SET[key]}")
    if given.seeds < 1:
        raise UserError(f"--seeds={given.seeds} must be at least 1")
    for key, _ in pairs:
        if not key:
            raise UserError(f"the recipe is {RECIPE}: --config.FIELD=VALUE changes it")
        if key in SET:
            raise UserError(f"--config.{key} is what the grid sets: give {SET[key]}")
        if key in FIXED:
            raise UserError(f"--config.{key} is the same in all of the grid")
    return Asked(mixers, numbers["widths"], numbers["tasks"], rates, given.seeds, tuple(pairs))


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_list("mixers", ["attention", "lstm"], "of the decoders")
    flags.DEFINE_multi_string("also", [], "'name: field=value field=value': in the place of a mixer")
    flags.DEFINE_list("widths", ["32", "64"], "of the decoders")
    flags.DEFINE_list("tasks", [str(4**n) for n in range(9)], "numbers of training tasks")
    flags.DEFINE_list("rates", ["3e-4", "1e-3", "3e-3"], "learning rates that are tried for each mixer and width")
    flags.DEFINE_integer("seeds", 1, "seeds a run")
    flags.DEFINE_string("workdir", "runs/in_context_phases", "where the runs lie")
    flags.DEFINE_string("shard", "0/1", "i/n: this process's share of the runs")
    flags.DEFINE_bool("merge", False, "train nothing: read what the shards have finished")
    flags.DEFINE_string("out", str(OUT), "where rows.jsonl, table.md and the pictures go")
    with one_sentence():
        pairs = command_line.parse(argv)
        asked = read(flags.FLAGS, pairs)
        sweeps.in_shares(lambda: grid(asked), trained, report)


if __name__ == "__main__":
    main(sys.argv)
