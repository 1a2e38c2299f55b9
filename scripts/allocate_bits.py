"""Bits for each layer of trained networks within so many bytes, and the rows of the networks that are rounded so.

    uv run scripts/allocate_bits.py --run=runs/digits_resnet --bytes=30000 [--method=hessian,uniform,random]
        [--options=int2,int4,int8] [--activations=int8] [--batches=8] [--samples=16]
        [--exact_first=1] [--domains=python,english] [--ranges=training,distilled,noise]
        [--fine_tune=200 [--fine_tune_rate=0.1] [--workdir=runs/allocated]] [--out=FOLDER]
    uv run scripts/allocate_bits.py --run=runs/digits_resnet --accuracy=0.98,0.99 --options=int4,int8

Finished runs of networks that were not trained with transforms. `--bytes`: of the network's codes, scales, ranges and
what stays float32 (its rows call it parameter bytes), one number or several; what is told without it is what the
options take for all layers alike. `--accuracy`: instead of that, one or several shares of the exact network's accuracy
on the examples, for bisection between two options. `--method`: what compression/quantization/allocation/methods.py
lists. `--domains`: the two kinds of text whose losses `decoupled` holds apart. `--activations`: their format
("weights": that of the weights; "none": they stay as they are); `--exact_first`: so many tokens of a sequence stay as
they are, and out of the ranges, of the network `language` (MixDQ's outlier).

Sensitivities are taken of the run's first training batches, `--batches` of them, on which ranges of activations are
measured too, here and where the network is stored; by `--ranges` these are measured on as many examples that are made
without data instead, distilled from the statistics of BatchNorm (ZeroQ) or noise, or in each of several ways. The rows
are of the test set, of each network stored and read again, beside the trained one. An allocation is printed as rules,
which `qat` takes as well as `quantize`; with `--fine_tune` the run is trained on with them, so many steps of its own
schedule at a share of its learning rate, below `--workdir`; what is finished there is not trained again.
"""

import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags

from lissom.training.errors import UserError, one_sentence

SHOWN = (
    *("accuracy", "token_accuracy", "bits_per_byte", "loss", "logit_error", "allocation_seconds", "allocation_passes"),
    *("calibration_seconds", "bit_operations", "parameter_bytes", "artefact_bytes"),
)


class Asked(NamedTuple):
    """What the flags say. Either `budgets` or `accuracies` are empty."""

    methods: Sequence[str]
    options: Sequence[str]
    activations: str
    budgets: Sequence[int]
    accuracies: Sequence[float]
    batches: int
    samples: int
    domains: Sequence[str] = ()
    exact_first: int = 0
    ranges: Sequence[str] = ("training",)
    fine_tune: int = 0
    fine_tune_rate: float = 0.1
    workdir: str = "runs/allocated"


class Chosen(NamedTuple):
    """entry: of `evaluation.transforms`; calibration: seconds in which examples were made, if they were, and ranges
    measured on them."""

    entry: dict[str, Any]
    allocation: Any
    calibration: float


def allocations(run: pathlib.Path, asked: Asked) -> dict[str, Chosen]:
    """{label: what was chosen} for each way to measure ranges, method and budget."""
    found = {}
    for ranges in asked.ranges:
        found |= _allocations(run, asked, ranges)
    return found


def _allocations(run: pathlib.Path, asked: Asked, ranges: str) -> dict[str, Chosen]:
    from lissom.compression.quantization.allocation import methods

    problem = problem_of(run, asked, ranges)
    mixed, found, behind = problem.mixed, {}, "" if ranges == "training" else f" {ranges}"
    sensitivity, fixed = methods.Sensitivity(problem), mixed.fixed
    uniform = {option.weights: int(size) + fixed for option, size in zip(mixed.options, mixed.sizes.sum(0))}
    alike = ", ".join(f"{name} {size:,}" for name, size in uniform.items())
    if not (asked.budgets or asked.accuracies):
        raise UserError(f"--bytes=N is missing: of {run} all layers alike take {alike} bytes")
    least = int(mixed.sizes.min(1).sum()) + fixed
    for budget in asked.budgets:
        if budget < least:
            raise UserError(
                f"--bytes={budget} is below {least:,}, the fewest that {run} can have: all layers alike take {alike}"
            )
    try:
        for method in asked.methods:
            for budget in asked.budgets:
                found[f"{method} {budget}{behind}"] = methods.allocate(method, sensitivity, budget - fixed)
            for share in asked.accuracies:
                least = share * problem.value("accuracy")(mixed.choice())
                found[f"{method} accuracy {share}{behind}"] = methods.lowest(method, sensitivity, least)
    except ValueError as error:
        raise UserError(
            f"{run}: {error} (all layers alike take {alike} bytes, {fixed:,} of them stay float32)"
        ) from error
    for label, allocation in found.items():
        told(label, mixed, allocation)
    return {
        label: Chosen(mixed.entry(each.choice, label), each, problem.calibration_seconds)
        for label, each in found.items()
    }


def problem_of(run: pathlib.Path, asked: Asked, ranges: str = "training"):
    """A run as the methods take it, its ranges measured on examples of one kind."""
    import itertools

    import jax
    import numpy as np

    from lissom import data
    from lissom.compression.artefacts import structure_of
    from lissom.compression.quantization.allocation.candidates import Mixed, Option
    from lissom.compression.quantization.allocation.methods import Problem
    from lissom.compression.quantization.distillation import examples
    from lissom.models.variables import merge
    from lissom.training.building import build_objective, load_dataset
    from lissom.training.runs import load_network, read_config
    from lissom.training.stages import final_config

    config = final_config(read_config(run))
    network, dataset = merge(load_network(run, structure_of)), load_dataset(config)
    # Those that ranges are measured on when the network is stored.
    size = config.data.batch_size
    stream = data.train_batches(dataset, start_step=0, batch_size=size, seed=config.seed)
    batches = [{**batch, "mask": np.ones(size, np.float32)} for batch in itertools.islice(stream, asked.batches)]
    activations = {"weights": None, "none": ""}.get(asked.activations, asked.activations)
    of = lambda name: name if activations is None else activations
    options = [Option(name, of(name), asked.exact_first) for name in asked.options]
    judge = build_objective(config).judge
    if asked.accuracies and "accuracy" not in jax.eval_shape(judge, network, batches[0], jax.random.key(0)):
        raise UserError(f"--accuracy: {run} is judged by no accuracy")
    inputs = np.concatenate([np.asarray(batch["inputs"], np.float32) for batch in batches])
    input_statistics = (float(inputs.mean()), float(inputs.std()))
    made = {} if ranges == "training" else {"seed": config.seed, "input_statistics": input_statistics}
    try:
        start = time.perf_counter()
        measured = jax.block_until_ready(list(examples(ranges, network, batches, len(batches), **made)))
        making = time.perf_counter() - start
        mixed = Mixed(network, options, measured, made and {"examples": ranges, **made})
    except ValueError as error:
        raise UserError(f"{run}: {error}") from error
    except jax.errors.UnexpectedTracerError as error:
        raise UserError(f"{run}: layers within a loop of the network, or computed anew by model.remat, can't be looked "
                        "into") from error  # fmt: skip
    return Problem(
        mixed,
        judge,
        batches,
        seed=config.seed,
        samples=asked.samples,
        input_statistics=input_statistics,
        calibration_seconds=making + mixed.calibration_seconds,
        kinds=[[kind] for kind in of_domains(batches, dataset, asked.domains)],
    )


def of_domains(batches: Sequence[dict], dataset, domains: Sequence[str]) -> list[dict]:
    """Of each of the domains a batch, of the examples whose text is of it; UserError for one that there is not."""
    import numpy as np

    known = dataset.info.get("domains", [])
    for name in domains:
        if name not in known:
            raise UserError(f"--domains: {dataset.name!r} has no {name!r}, but {', '.join(known) or 'none'}")
    if not domains:
        return []
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    found = []
    for name in domains:
        rows = np.flatnonzero(whole["domains"].argmax(-1) == known.index(name))
        if not len(rows):
            raise UserError(f"--domains: among the examples of --batches={len(batches)} none is of {name!r}")
        found.append({field: values[rows] for field, values in whole.items()})
    return found


def told(label: str, mixed, allocation) -> None:
    """Prints an allocation: its cost, and its rules."""
    size = sum(int(sizes[at]) for sizes, at in zip(mixed.sizes, allocation.choice)) + mixed.fixed
    print(f"{label}: {size:,} bytes, {allocation.seconds:.1f} s, {allocation.passes} passes", file=sys.stderr)
    for pattern, settings in mixed.rules(allocation.choice):
        print(f"    ({pattern!r}, {settings!r}),", file=sys.stderr)


def names_of(runs: Sequence[pathlib.Path]) -> dict[str, str]:
    """{run: its label in the table}: its recipe and what was changed of that, or where all are alike the recipe's name
    alone."""
    from lissom.eval import overrides_of, task_name
    from lissom.evaluation.rows import Identity
    from lissom.training.runs import read_config
    from lissom.training.stages import final_config

    identities = {}
    for run in runs:
        config = read_config(run)
        identities[str(run)] = Identity(
            config.recipe, task_name(final_config(config)), config.seed, overrides_of(config)
        )
    if len({identity.label for identity in identities.values()}) > 1:
        return {run: identity.label for run, identity in identities.items()}
    return {run: pathlib.Path(identity.recipe.partition(":")[0]).stem for run, identity in identities.items()}


def fine_tuned(run: pathlib.Path, chosen: Chosen, asked: Asked) -> pathlib.Path | None:
    """Where the run was trained on with the rules that were chosen, to be measured as it is stored; None where it
    diverged. What is finished there is not trained again."""
    import zlib

    from lissom.eval import finished
    from lissom.train import train
    from lissom.training.config import to_json

    config = fine_tuning(run, asked, chosen.entry["rules"])
    # What else is trained on below the same directory, from another run or with other settings, is another one.
    directory = pathlib.Path(asked.workdir) / f"{run.name}_{zlib.crc32(to_json(config).encode()):08x}"
    if finished(directory):
        return directory
    try:
        result = train(config, directory)
    except UserError as error:
        if "the loss is" not in str(error):
            raise
        print(f"{directory} is left out: {error}", file=sys.stderr)
        return None
    if "loss" not in result:  # it was asked to stop
        raise SystemExit(0)
    return directory


def fine_tuning(run: pathlib.Path, asked: Asked, rules: Sequence = ()):
    """The config by which a run is trained on; UserError for a run that can't be."""
    from lissom.training.runs import as_loop, read_config
    from lissom.training.stages import final_config

    config = as_loop(final_config(read_config(run))).copy_and_resolve_references()
    if config.data.order == "by_class":
        raise UserError(f"--fine_tune: {run} was trained by one class after the other, and would learn the first again")
    with config.unlocked(), config.ignore_type():
        config.stages, config.init_from, config.train = (), (str(run),), {"steps": asked.fine_tune}
        config.transforms = (*config.transforms, {"name": "qat", "rules": tuple(rules), "batches": asked.batches})
        config.evaluation.transforms = ({"name": "packed"},)
        config.optim.learning_rate *= asked.fine_tune_rate
    return config


def rows_of(runs: Sequence[pathlib.Path], asked: Asked) -> list:
    """The rows of all runs: as trained, and behind each allocation, with what that took; then those trained on."""
    from lissom.eval import evaluate
    from lissom.evaluation.rows import measure

    names = names_of(runs)
    for run in runs if asked.fine_tune else ():
        fine_tuning(run, asked)  # what can't be trained on is said before the work
    found = {str(run): allocations(run, asked) for run in runs}
    # Methods that choose the same share a run, and each has its rows of it.
    tuned: dict[str, list[str]] = {}
    for run in runs if asked.fine_tune else ():
        for label, chosen in found[str(run)].items():
            directory = fine_tuned(run, chosen, asked)
            if directory is not None:
                named = f"{names[str(run)]}, {label}, {asked.fine_tune} steps"
                tuned.setdefault(str(directory), []).append(named)
    entries = {run: [chosen.entry for chosen in of_run.values()] for run, of_run in found.items()}
    first = {directory: labels[0] for directory, labels in tuned.items()}
    rows = evaluate([*runs, *tuned], transforms=entries, variants=names | first)
    # A row for each run and entry, in their order, and behind them those trained on and the floors.
    spent = [chosen for of_run in found.values() for chosen in [None, *of_run.values()]]
    for number, chosen in enumerate(spent):
        if chosen is not None:
            cost = {
                "allocation_seconds": chosen.allocation.seconds,
                "allocation_passes": chosen.allocation.passes,
                "calibration_seconds": chosen.calibration,
            }
            row = rows[number]
            added = [measure(name, value) for name, value in cost.items()]
            rows[number] = dataclasses.replace(row, measurements=(*row.measurements, *added))
    measured, rest = rows[: len(spent)], rows[len(spent) :]
    for labels in tuned.values():
        of_run, rest = rest[:2], rest[2:]  # in training's arithmetic, and as it is stored
        measured += of_run
        for label in labels[1:]:
            measured += [
                dataclasses.replace(row, identity=dataclasses.replace(row.identity, variant=label)) for row in of_run
            ]
    return measured + rest


def read(given: flags.FlagValues) -> Asked:
    """What the flags say, or a UserError."""
    from lissom.compression.quantization.allocation.methods import METHODS, SENSITIVITIES
    from lissom.compression.quantization.distillation import EXAMPLES
    from lissom.compression.quantization.formats import FORMATS

    weights = [name for name, format in FORMATS.items() if format.signed]
    known = {
        "method": ("random", *SENSITIVITIES) if given.accuracy else METHODS,
        "options": weights,
        "activations": (*weights, "weights", "none"),
        "ranges": EXAMPLES,
    }
    for flag, names in known.items():
        for name in [given[flag].value] if isinstance(given[flag].value, str) else given[flag].value:
            if name not in names:
                raise UserError(f"--{flag}: {name!r} must be one of {', '.join(names)}")
    try:
        accuracies = [float(text) for text in given.accuracy]
    except ValueError:
        accuracies = [math.nan]
    if not all(0 < share <= 1 for share in accuracies):
        raise UserError(f"--accuracy={','.join(given.accuracy)} must be shares, above 0 and at most 1")
    if given.bytes and given.accuracy:
        raise UserError("--bytes and --accuracy are two questions: give one of them")
    if given.accuracy and len(given.options) != 2:
        raise UserError(
            f"--accuracy chooses between two --options, and {','.join(given.options)} are {len(given.options)}"
        )
    if not all(text.isdigit() for text in given.bytes):
        raise UserError(f"--bytes={','.join(given.bytes)} must be whole numbers")
    if given.batches < 1:
        raise UserError(f"--batches={given.batches} must be at least 1")
    if given.samples < 2:
        raise UserError(f"--samples={given.samples} must be at least 2")
    if ("decoupled" in given.method) != bool(given.domains) or len(given.domains) not in (0, 2):
        raise UserError("the method 'decoupled' takes two --domains, and no other method takes any")
    if given.exact_first < 0 or (given.exact_first and given.activations == "none"):
        raise UserError(f"--exact_first={given.exact_first} is a number of tokens whose activations are not rounded")
    if not given.ranges:
        raise UserError(f"--ranges= must be one or several of {', '.join(EXAMPLES)}")
    if given.ranges != ["training"] and given.activations == "none":
        raise UserError(f"--ranges={','.join(given.ranges)} are of activations, and --activations=none rounds none")
    for flag in ("fine_tune_rate", "workdir"):
        if given[flag].present and not given.fine_tune:
            raise UserError(f"--{flag} is for networks that are trained on: --fine_tune=STEPS is missing")
    if given.fine_tune and given.ranges != ["training"]:
        raise UserError("--fine_tune needs the training data, so that --ranges without them make no sense")
    if given.fine_tune < 0:
        raise UserError(f"--fine_tune={given.fine_tune} must be a number of steps, 0 for none")
    if not given.fine_tune_rate > 0:
        raise UserError(f"--fine_tune_rate={given.fine_tune_rate} must be above 0")
    if not given.run:
        raise UserError("--run=DIRECTORY is missing, for example --run=runs/digits_resnet")
    budgets = [int(text) for text in given.bytes]
    fields = (given.method, given.options, given.activations, budgets, accuracies)
    fields = (*fields, given.batches, given.samples, given.domains, given.exact_first, given.ranges)
    return Asked(*fields, given.fine_tune, given.fine_tune_rate, given.workdir)


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_multi_string("run", [], "directories of runs, or patterns; runs of several seeds are one line")
    flags.DEFINE_list("bytes", [], "of the network's numbers, as stored; one or several")
    flags.DEFINE_list("method", ["hessian"], "how bits are chosen")
    flags.DEFINE_list("options", ["int2", "int4", "int8"], "formats of weights to choose from")
    flags.DEFINE_string("activations", "int8", "their format; 'weights' (as those), 'none'")
    flags.DEFINE_list("accuracy", [], "share of the exact accuracy that bisection keeps; one or several")
    flags.DEFINE_integer("batches", 8, "training batches that sensitivities and ranges are measured on")
    flags.DEFINE_integer("samples", 16, "random vectors for the traces of the Hessian")
    flags.DEFINE_integer("exact_first", 0, "tokens at the beginning of a sequence whose activations stay exact")
    flags.DEFINE_list("ranges", ["training"], "examples that they are measured on: training, distilled, noise")
    flags.DEFINE_integer("fine_tune", 0, "steps that each network is trained on with the bits chosen for it")
    flags.DEFINE_float("fine_tune_rate", 0.1, "share of the run's learning rate for that")
    flags.DEFINE_string("workdir", "runs/allocated", "where that is done")
    flags.DEFINE_list("domains", [], "the two kinds of text of the method 'decoupled'")
    flags.DEFINE_string("out", None, "write rows.jsonl, table.md, table.csv and pareto.png there")
    with one_sentence():
        from lissom.eval import check_writable, find_runs
        from lissom.evaluation.tables import shown_text, tables, write_report
        from lissom.training import flags as command_line

        if command_line.parse(argv, recipe=False):
            raise UserError("allocate_bits.py takes no --config: every run holds its own")
        asked = read(flags.FLAGS)
        runs = find_runs(flags.FLAGS.run, lambda text: print(text, file=sys.stderr), "--run")
        for flag, place in (("--out", flags.FLAGS.out), ("--workdir", asked.fine_tune and asked.workdir)):
            if place:
                check_writable(place, flag)
        rows = rows_of(runs, asked)
        print(shown_text(tables(rows), SHOWN))
        if flags.FLAGS.out:
            write_report(rows, flags.FLAGS.out, x="parameter_bytes", shown=SHOWN)


if __name__ == "__main__":
    main(sys.argv)
