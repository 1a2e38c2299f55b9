"""Accuracy against mean time steps of spiking networks that stop each example once they are sure of it, and what a
batch that stops early takes on the clock.

    uv run scripts/early_exit.py --runs='runs/compare/digits_snn/*' [--validation=0.5] [--tolerance=0.5]
        [--calibration=accumulated]
        [--budgets=1.25,1.5,2,3,4,6,8,12,16] [--batch=256] [--repeats=30] [--transform='to_spiking steps=8']
        [--out=FOLDER]

Finished runs of networks that go through examples step by step (`models/spiking/stepwise.py`), of more than one step;
with `--transform` what `eval.py` exported after the evaluation transform of that name (a converted dense network).
They were trained on all training examples, on which any network is too sure of itself; so a fixed stratified half of
the TEST set (`--validation`: its share) is held out for the temperature and the thresholds, and every number is of the
rest.

`--calibration`: one temperature, of the scores added up over the steps so far, as the paper has it (`accumulated`: what
the decoding `mean` divides by their number is multiplied by it again; other decodings are as they are), or of the
scores themselves (`shared`); or a temperature for each step (`per_step`).

A line of the table is a run and a policy (`evaluation/early_exit.py`):

    fixed, t steps             all examples after t steps; the first line is the whole run
    dynamic, within b steps    the threshold of the validation front that was most accurate within b mean steps there
    dynamic, chosen            the cheapest threshold of that front that was at most `--tolerance` percentage points
                               below the whole run there; its temperature, its calibration and its time on the clock
    random, ...                floor: the same numbers of steps, dealt out by chance
    dynamic, threshold 1       the program that could stop and never does: what the loop itself costs
    oracle                     ceiling: the first step at which an example is right, by its label

Time: one batch of `--batch` judged examples through the whole run in one call, and through the program that stops and
shrinks (`models/spiking/early_exit.py`), taken in turns; what stopping saves is the ratio to the program that never
does, since a loop over steps may be faster than one call of them all. `agreement` says how many of the judged examples
that program stops and answers as the scores of the whole run say.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags

from lissom.training.errors import UserError, one_sentence

BUDGETS = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
SHOWN = (
    *("accuracy", "mean_steps", "threshold", "temperature", "calibration_error", "agreement"),
    *("latency_p50", "speedup"),
)
NEVER = "dynamic, threshold 1"
CALIBRATIONS = ("accumulated", "shared", "per_step")


class Half(NamedTuple):
    """Examples, and what the network says of them: scores [T, N, classes], right [T, N]."""

    inputs: Any
    labels: Any
    scores: Any
    right: Any


class Line(NamedTuple):
    """A policy of a run, and what was measured of it."""

    policy: str
    role: str
    measurements: list


# ---- what a network says -----------------------------------------------------------------------------------


def chunks(count: int, batch: int, least: int = 1) -> list:
    """Rows of examples 0 .. count - 1 in whole batches, at least so many; the last ones begin anew."""
    import numpy as np

    return [(start + np.arange(batch)) % count for start in range(0, max(count, (least - 1) * batch + 1), batch)]


def half(parts, examples, rows, batch: int) -> Half:
    """The examples `rows` of a test set."""
    import numpy as np

    from lissom.data.dataset import gather

    found = gather(examples, rows)
    run = _with_parts(parts, lambda network, inputs: network.running(inputs))
    said = [np.asarray(run(found["inputs"][chunk])) for chunk in chunks(len(rows), batch)]
    scores = np.concatenate(said, 1)[:, : len(rows)]
    return Half(found["inputs"], found["labels"], scores, scores.argmax(-1) == found["labels"])


def _with_parts(parts, function):
    """jit of function(network, *arguments), the parameters not among the program's constants."""
    import jax

    from lissom.models.variables import merge

    state = tuple(parts[1:])
    run = jax.jit(lambda state, *arguments: function(merge(type(parts)(parts.graph, *state)), *arguments))
    return lambda *arguments: run(state, *arguments)


def split(examples, share: float):
    """(rows that thresholds are read off, rows that are judged) of a test set."""
    import numpy as np

    from lissom.data.dataset import gather
    from lissom.data.splits import stratified_split

    size = round(share * len(examples))
    if not 0 < size < len(examples):
        raise UserError(f"--validation={share} leaves one side of {len(examples)} test examples empty")
    return stratified_split(gather(examples, np.arange(len(examples)))["labels"], train_size=size, seed=0)


# ---- what policies are worth -------------------------------------------------------------------------------


def policies(validation: Half, judged: Half, tolerance: float, budgets: Sequence[float], calibration: str, mean: bool):
    """(lines, temperatures of the scores, threshold of the chosen point). Everything that is chosen is chosen on
    `validation`. mean: the scores are means over the steps so far."""
    import numpy as np

    from lissom.evaluation import early_exit
    from lissom.evaluation.rows import measure
    from lissom.models.spiking.early_exit import confidence

    per_step = calibration == "per_step"
    counts = np.arange(1, len(validation.scores) + 1) if mean and calibration == "accumulated" else np.ones(())
    whole = validation.scores * counts.reshape(-1, 1, 1)
    fitted = early_exit.temperature(whole, validation.labels, per_step=per_step)
    # A sum of t scores by a temperature is their mean by the t-th part of it.
    temperature = np.float32(fitted / counts)
    sure = lambda half, at: np.asarray(confidence(half.scores, np.reshape(at, (-1, 1, 1))))
    known, found = sure(validation, temperature), sure(judged, temperature)
    front, right = early_exit.validation_front(validation.right, known), judged.right

    def line(policy, point, role="variant", *more):
        threshold = [] if point.threshold is None else [measure("threshold", point.threshold)]
        at = [measure("accuracy", point.accuracy), measure("mean_steps", point.steps)]
        return Line(policy, role, [*at, *threshold, *more])

    def stopped(name, threshold, *more):
        chance = early_exit.random_exit(right, early_exit.exit_steps(found, threshold))
        point = early_exit.dynamic(right, found, threshold)
        return [line(f"dynamic, {name}", point, "variant", *more), line(f"random, {name}", chance, "floor")]

    fixed = early_exit.fixed(right)
    lines = [line(f"fixed, {point.steps:.0f} steps", point) for point in [fixed[-1], *fixed[:-1]]]
    for budget in budgets:
        if budget < len(right):
            lines += stopped(f"within {budget:g} steps", early_exit.within(front, budget).threshold)
    chosen = early_exit.cheapest(front, validation.right[-1].mean() - tolerance / 100)
    of_step = [{"step": t} for t in range(1, fitted.size + 1)] if per_step else [{}]
    more = [measure("temperature", value, **at) for value, at in zip(np.ravel(fitted), of_step, strict=True)]
    for is_fitted, confidences in ((False, sure(judged, 1 / counts)), (True, found)):
        more.append(measure("calibration_error", early_exit.calibration_error(confidences, right), fitted=is_fitted))
    lines += stopped("chosen", chosen.threshold, *more)
    lines.append(line("oracle", early_exit.oracle(right), "ceiling"))
    return lines, temperature, chosen.threshold


def on_the_clock(parts, judged: Half, temperature, threshold: float, batch: int, repeats: int) -> list[Line]:
    """What the program that stops says and takes, beside the whole run and the program that never stops."""
    import jax
    import numpy as np

    from lissom.evaluation.early_exit import exit_steps
    from lissom.evaluation.latency import latency_measurements, measure_interleaved
    from lissom.evaluation.rows import measure
    from lissom.models.spiking import early_exit

    stop = _with_parts(parts, lambda network, x, at: early_exit.run(network, x, temperature, at))
    whole = _with_parts(parts, lambda network, x: network.running(x)[-1])
    count = len(judged.labels)
    ran = [stop(judged.inputs[rows], np.float32(threshold)) for rows in chunks(count, batch)]
    steps, answers = (np.concatenate(found)[:count] for found in zip(*((r.steps, r.scores.argmax(-1)) for r in ran)))
    expected = exit_steps(early_exit.confidence(judged.scores, np.reshape(temperature, (-1, 1, 1))), threshold)
    said = judged.scores[expected - 1, np.arange(count)].argmax(-1)
    agreement = ((steps == expected) & (answers == said)).mean()
    rotated = [jax.device_put(judged.inputs[rows]) for rows in chunks(count, batch, least=2)]
    full = f"fixed, {len(judged.scores)} steps"
    times = measure_interleaved(
        {
            full: (whole, [(x,) for x in rotated]),
            "dynamic, chosen": (stop, [(x, np.float32(threshold)) for x in rotated]),
            NEVER: (stop, [(x, np.float32(1)) for x in rotated]),
        },
        repeats=repeats,
    )
    lines = []
    for policy, latency in times.items():
        # Both: one call of all steps may be slower than a loop over them, with no example that stops.
        references = {full: "whole run", NEVER: "threshold 1"}
        more = [
            measure("speedup", times[other].p50 / latency.p50, batch=batch, reference=name)
            for other, name in references.items()
            if policy not in (full, other)
        ]
        more += [measure("agreement", agreement)] if policy == "dynamic, chosen" else []
        lines.append(Line(policy, "variant", latency_measurements(latency, batch) + more))
    return lines


def of_run(path, transform, *, validation, tolerance, budgets, calibration, batch, repeats) -> tuple[Any, list, str]:
    """(the run's config, its lines, a note); UserError for a run whose network takes no steps, or one."""
    from lissom.compression.artefacts import reload, structure_of
    from lissom.eval import export_name
    from lissom.models.spiking.decoders import Mean
    from lissom.models.spiking.stepwise import StepwiseNetwork
    from lissom.models.variables import merge
    from lissom.training.building import load_dataset
    from lissom.training.runs import load_network, read_config
    from lissom.training.stages import final_config

    config = final_config(read_config(path))
    exported = pathlib.Path(path) / "exports" / export_name(transform)
    parts = reload(exported) if transform else load_network(path, structure_of)
    network = merge(parts)
    if not isinstance(network, StepwiseNetwork):
        raise UserError("its network does not go through examples step by step")
    if network.steps < 2:
        raise UserError("it takes one step, behind which there is nothing to stop")
    examples = load_dataset(config).test
    known, judged = (half(parts, examples, rows, batch) for rows in split(examples, validation))
    lines, temperature, threshold = policies(
        known, judged, tolerance, budgets, calibration, isinstance(network.decoder, Mean)
    )
    timed = {line.policy: line for line in on_the_clock(parts, judged, temperature, threshold, batch, repeats)}
    lines = [
        Line(*line[:2], line.measurements + timed.pop(line.policy, Line("", "", [])).measurements) for line in lines
    ]
    note = f"judged on {len(judged.labels)} test examples; what is chosen is chosen on the {len(known.labels)} others"
    return config, [*lines, *timed.values()], note


# ---- rows and their picture --------------------------------------------------------------------------------


def picture(rows, path: pathlib.Path) -> None:
    """Accuracy against mean steps, for each task and variant, mean and standard deviation over seeds."""
    from lissom.evaluation.plots import Curve, curve_plot
    from lissom.evaluation.statistics import summarize

    values: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        told = {m.name: m.value for m in row.measurements if m.name in ("accuracy", "mean_steps")}
        if len(told) == 2:
            variant, _, policy = row.identity.variant.rpartition(": ")
            of_policy = values.setdefault((row.identity.task, variant), {}).setdefault(policy, {})
            for name, value in told.items():
                of_policy.setdefault(name, []).append(value)
    panels = {}
    for (task, variant), policies in values.items():
        found: dict[str, list] = {}
        for policy, told in policies.items():
            steps, accuracy = (summarize(told[name]) for name in ("mean_steps", "accuracy"))
            kind = policy if policy == "dynamic, chosen" else policy.partition(",")[0]
            point = (steps.mean, 100 * accuracy.mean, steps.sd or 0.0, 100 * (accuracy.sd or 0.0))
            found.setdefault(kind, []).append(point)
        curves = [Curve(kind, tuple(sorted(points))) for kind, points in found.items()]
        panels[f"{task}\n{variant}"] = curves
    curve_plot(panels, path, x_label="mean time steps", y_label="accuracy [%]")


def _check_apart(runs: Sequence[pathlib.Path | str]) -> None:
    """UserError for two runs that would be one line of the table, or two seeds of one line and not of one config."""
    from lissom.eval import overrides_of, task_name
    from lissom.training.runs import read_config
    from lissom.training.stages import final_config

    seeds: dict[tuple, pathlib.Path | str] = {}
    configs: dict[tuple, tuple] = {}
    for path in runs:
        given = read_config(path)
        line = (task_name(final_config(given)), pathlib.Path(path).name.partition("_seed")[0])
        found = (given.recipe, sorted(overrides_of(given).items()))
        first, known = configs.setdefault(line, (path, found))
        other = seeds.setdefault((*line, given.seed), path)
        if known != found or other != path:
            other = first if known != found else other
            raise UserError(f"{other} and {path} would be one line of the table: call their directories other names")


def run(
    runs: Sequence[pathlib.Path | str],
    *,
    validation: float = 0.5,
    tolerance: float = 0.5,
    budgets: Sequence[float] = BUDGETS,
    calibration: str = "accumulated",
    batch: int = 256,
    repeats: int = 30,
    transform: str | None = None,
    out: pathlib.Path | None = None,
) -> list:
    """Measures, writes and returns the rows; a run without steps is left out and said so."""
    if not 0 < validation < 1:
        raise UserError(f"--validation={validation} must be above 0 and below 1")
    if calibration not in CALIBRATIONS:
        raise UserError(f"--calibration={calibration} must be one of {', '.join(CALIBRATIONS)}")
    if tolerance < 0:
        raise UserError(f"--tolerance={tolerance} must be at least 0 percentage points")
    if not budgets or not all(budget >= 1 for budget in budgets):
        raise UserError(f"--budgets={','.join(map(str, budgets))} must be at least 1 step each")
    for name, value, least in (("--batch", batch, 1), ("--repeats", repeats, 2)):
        if value < least:
            raise UserError(f"{name}={value} must be at least {least}")
    from lissom.eval import check_writable, overrides_of, task_name
    from lissom.evaluation.rows import Identity, Row, provenance
    from lissom.evaluation.tables import write_report
    from lissom.training.runs import read_config

    if out is not None:
        check_writable(out, "--out")
    settings = {"validation": validation, "tolerance": tolerance, "budgets": budgets, "calibration": calibration}
    here, rows = provenance(), []
    _check_apart(runs)
    for path in runs:
        try:
            config, lines, note = of_run(path, transform, **settings, batch=batch, repeats=repeats)
        except UserError as error:
            print(f"skipped {path}: {error}", file=sys.stderr)
            continue
        variant, overrides = pathlib.Path(path).name.partition("_seed")[0], overrides_of(read_config(path))
        task = f"early exit, {task_name(config)}"
        for line in lines:
            label = f"{variant}: {line.policy}"
            identity = Identity(config.recipe, task, config.seed, overrides, transform, label, line.role)
            rows.append(Row(identity, here, tuple(line.measurements), notes=(note,)))
            said = ", ".join(f"{_told(m)} {m.value:.4g}" for m in line.measurements if m.name in SHOWN)
            print(f"{label}, seed {config.seed}: {said}")
    if not rows:
        raise UserError(f"none of {len(runs)} runs can be judged: the lines above say why")
    if out is not None:
        write_report(rows, out, plot=False, shown=SHOWN)
        picture(rows, out / "early_exit.png")
    return rows


def _told(measurement) -> str:
    """Its name, and by what it differs from others of that name; all have one size of batch."""
    apart = [f"{key}={value}" for key, value in measurement.conditions.items() if key != "batch"]
    return measurement.name + (f" ({', '.join(apart)})" if apart else "")


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_multi_string("runs", [], "directories of runs, or patterns; each may hold several")
    flags.DEFINE_float("validation", 0.5, "share of the test set that thresholds are read off")
    flags.DEFINE_float("tolerance", 0.5, "percentage points of accuracy that may be given up for steps")
    flags.DEFINE_list("budgets", [f"{budget:g}" for budget in BUDGETS], "mean steps that a threshold keeps within")
    flags.DEFINE_string("calibration", "accumulated", f"what the temperature is of: {', '.join(CALIBRATIONS)}")
    flags.DEFINE_integer("batch", 256, "examples of a batch that is timed")
    flags.DEFINE_integer("repeats", 30, "samples of each latency")
    flags.DEFINE_string("transform", None, "the evaluation transform whose exported networks are taken")
    flags.DEFINE_string("out", None, "the directory of the rows, the table and the picture")
    with one_sentence():
        from lissom.eval import given_runs

        runs, given = given_runs(argv, "early_exit.py"), flags.FLAGS
        try:
            budgets = [float(budget) for budget in given.budgets]
        except ValueError as error:
            raise UserError(f"--budgets holds numbers: {error}") from error
        names = ("validation", "tolerance", "calibration", "batch", "repeats", "transform")
        settings = {name: given[name].value for name in names}
        run(runs, **settings, budgets=budgets, out=pathlib.Path(given.out) if given.out else None)


if __name__ == "__main__":
    main(sys.argv)
