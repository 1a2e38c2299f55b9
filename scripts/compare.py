"""Trains variants of one recipe with several seeds, measures all, and prints one table.

    uv run scripts/compare.py --config=configs/vision/mnist1d_transformer.py --vary=model.mixer=attention,window,none
        [--also="name: field=value field=value"] [--seeds=3] [--match=params|flops|bytes]
        [--tune=optim.learning_rate=7e-4,2e-3,6e-3]
        [--shard=0/4 [--nomeasure]] [--merge] [--cost=latency_p50]

Runs are interleaved (all variants of a seed, then the next seed) and lie under --workdir, by default
runs/compare/<recipe>; what is finished there is not trained again. Every --vary adds an axis of the grid, every --also
one variant behind it; behind these come the recipe's own `evaluation.baselines`. A variant that sets the field of
--tune itself is not tuned. The field `mode` is that of the recipe, what stands behind its colon.
"""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from lissom.eval import COST, COST_HELP, check_cost, check_writable, finished
from lissom.training import flags as command_line
from lissom.training.config import WATCHING, check, default_workdir, model_settings, overridden, to_json
from lissom.training.errors import UserError, one_sentence
from lissom.training.variants import Variant, axis_of, config_of, directory_of, with_baselines

MATCHES = ("params", "flops", "bytes")
TOLERANCE = 0.01
WIDEST = 1 << 16  # a width beyond which --match gives up


def size_of(config, facts: Mapping[str, Any], what: str) -> float:
    """Parameters, their bytes, or the FLOPs of one example, without building an array."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lissom.evaluation import costs, memory
    from lissom.models.variables import Parts, merge, split
    from lissom.training.building import build_network

    parts = split(nnx.eval_shape(lambda: build_network(config, facts, nnx.Rngs(0))))
    if what == "params":
        return memory.parameter_count(parts.params)
    if what == "bytes":
        return memory.parameter_bytes((parts.params, parts.frozen))
    tokens = facts["kind"] == "tokens"
    shape = (1, facts["length"]) if tokens else (1, *facts["input_shape"])
    inputs = jax.ShapeDtypeStruct(shape, jnp.int32 if tokens else jnp.float32)
    marks = {"meta": jax.ShapeDtypeStruct(shape, jnp.bool_)} if "meta_token" in facts else {}
    if facts["kind"] == "trajectory":
        marks = {"environment": jax.ShapeDtypeStruct((1,), jnp.int32)}
    forward = lambda p, s, f, x, marks: merge(Parts(parts.graph, p, s, f))(x, **marks)[0]
    flops = costs.count(forward, *parts[1:], inputs, marks).flops
    if flops is None:
        raise UserError("--match=flops: the FLOPs of a variant can't be counted, since it holds a dynamic loop")
    return flops


def solvable(config, what: str) -> dict[str, Any]:
    """The settings of the config's model, among which there must be a width to solve for."""
    settings = model_settings(config)
    if "width" not in settings:
        raise UserError(f"--match={what} solves model.width, which model {config.model.name!r} does not have")
    return settings


def matched(config, facts: Mapping[str, Any], what: str, target: float):
    """The config with the width, and where widths are too coarse the feed-forward expansion as well, at which `what`
    is within 1 % of `target`; an error where there is none."""
    settings = solvable(config, what)
    unit = 2 * settings.get("heads", 1)
    sized = lambda *pairs: size_of(overridden(config, pairs), facts, what)
    low, high = unit, unit
    while sized(("model.width", high)) < target:
        if high > WIDEST:
            raise UserError(f"--match={what}: even at model.width={high} this variant does not reach {target:,}")
        low, high = high, high * 2
    while high - low > unit:
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if sized(("model.width", middle)) < target else (low, middle)
    off = lambda value: abs(value / target - 1)
    best = min((low, high), key=lambda width: off(sized(("model.width", width))))
    if off(sized(("model.width", best))) <= TOLERANCE:
        return overridden(config, [("model.width", best)])
    ffn = settings.get("ffn")
    ffn = ffn if isinstance(ffn, str) else None  # of several no one expansion decides
    key = f"model.ffn_kwargs.{ffn}.expansion"
    small, large = 0.25, 16.0
    for _ in range(30 if ffn else 0):
        middle = (small + large) / 2
        value = sized(("model.width", low), (key, middle))
        if off(value) <= TOLERANCE / 4:
            return overridden(config, [("model.width", low), (key, middle)])
        small, large = (middle, large) if value < target else (small, middle)
    raise UserError(
        f"--match={what}: no width (a multiple of {unit}){f' and {ffn} expansion' if ffn else ''} comes within 1 % of "
        f"{target:,}"
    )


def tuned(
    config, workdir: pathlib.Path, axis: str, label: str, merge: bool = False, shared: bool = False
) -> tuple[Any, str | None]:
    """(the config with the best value of the axis at one seed and half the length: that of the lowest test loss, or of
    the largest accuracy, where its objective is chosen by that; what a reader of the table must know of the choice).

    The runs and the choice are kept under `workdir`. Where it is `shared` with other shards, one of them tunes, and
    the others wait and read what it found.
    """
    key, values = axis_of(axis, "--tune")
    record = workdir / "tuned" / f"{directory_of(label)}.json"
    with _alone(record.with_suffix(".lock"), label) if shared and not merge else contextlib.nullcontext():
        costs = _read_record(record)
        for value in values:
            name, trial = f"{key}={value}", overridden(config, [(key, value), *_halved(config)])
            run = workdir / "tuned" / directory_of(f"{label} {name}")
            if name in costs:
                if costs[name]["config"] != _digest(trial):
                    raise UserError(f"{record} is of another config: give another --workdir")
                continue
            if merge:
                raise UserError(f"--merge: {label} was not tuned at {name}")
            try:
                cost = _trained(trial, run)
            except UserError as error:
                if "the loss is" not in str(error):
                    raise
                cost = None  # it diverged: a result, and a bad one
            costs[name] = {"cost": cost, "config": _digest(trial)}
            _write_record(record, costs)
    found = {value: costs[f"{key}={value}"]["cost"] for value in values}
    alive = {value: cost for value, cost in found.items() if cost is not None}
    if not alive:
        raise UserError(f"--tune={axis}: {label} diverged at every value")
    best = min(alive, key=alive.get)
    edge = at_edge(best, values)
    print(f"{label}: {key}={best} of {', '.join(values)}{f' (AT THE EDGE: {edge})' if edge else ''}", file=sys.stderr)
    note = f"{key}={best} is the {edge} of the values tried ({', '.join(values)}), so that one beyond may be better"
    return overridden(config, [(key, best)]), note if edge else None


def tuned_axes(variant: Variant, tune: Sequence[str]) -> list[str]:
    """Those of --tune whose field the variant does not set itself."""
    own = {key for key, _ in variant.overrides}
    return [axis for axis in tune if axis_of(axis, "--tune")[0] not in own]


def at_edge(best: str, values: Sequence[str]) -> str | None:
    """'largest' or 'smallest' where the best of several numbers is that; names have no edge."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return None
    if float(best) == max(numbers):
        return "largest"
    return "smallest" if float(best) == min(numbers) else None


@contextlib.contextmanager
def _alone(file: pathlib.Path, label: str) -> Iterator[None]:
    """Holds a lock file; who has to wait is told."""
    import filelock

    file.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(file)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"{label}: waiting for the shard that tunes it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _digest(config) -> str:
    """Of two configs of the same run the same, whatever their fields that change nothing in a run."""
    from flax.traverse_util import flatten_dict

    fields = flatten_dict(json.loads(to_json(config)), sep=".", keep_empty_nodes=True)
    kept = {key: value for key, value in fields.items() if not key.startswith(WATCHING)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=lambda empty: {}).encode()).hexdigest()[:16]


def _read_record(record: pathlib.Path) -> dict[str, dict[str, Any]]:
    if not record.is_file():
        return {}
    try:
        entries = json.loads(record.read_text()).items()
        number = lambda cost: None if cost is None else float(cost)
        return {name: {"cost": number(entry["cost"]), "config": entry["config"]} for name, entry in entries}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{record} can't be read ({error}): without it, this variant is tuned again") from error


def _write_record(record: pathlib.Path, costs: Mapping[str, Mapping[str, Any]]) -> None:
    """As a whole or not at all: a shard may be killed at any moment."""
    record.parent.mkdir(parents=True, exist_ok=True)
    partial = record.with_name(f"{record.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(costs, allow_nan=False))
    os.replace(partial, record)


def _halved(config) -> list[tuple[str, Any]]:
    """What makes a run half as long; stages in steps become shares of it."""
    ((name, length),) = config.train.items()
    stages = [dict(stage) for stage in config.stages]
    if name == "steps":
        for stage in stages:
            stage["duration"] = float(
                stage["duration"] / length if isinstance(stage["duration"], int) else stage["duration"]
            )
    half = max(1, length // 2) if name == "steps" else length / 2
    return [(f"train.{name}", half), *([("stages", tuple(stages))] if stages else [])]


def check_axes(variants: Sequence[Variant], seeds: int, match: str | None, tune: Sequence[str]) -> None:
    """What one flag sets no other may vary: a label of the table would name a value that no run had."""
    if seeds < 1:
        raise UserError(f"--seeds={seeds} must be at least 1")
    varied = dict.fromkeys(key for variant in variants for key, _ in variant.overrides)
    fixed = {"seed": "--seeds"} | ({"model.width": f"--match={match}"} if match else {})
    for axis in tune:
        key, values = axis_of(axis, "--tune")
        if len(set(values)) < max(2, len(values)):
            raise UserError(f"--tune={axis} must be field=value,value with two values at least, and none twice")
        if key in fixed or not any(tuned_axes(variant, [axis]) for variant in variants):
            raise UserError(f"--tune={key} does not go with {fixed.get(key, '--vary=' + key)}, which sets it too")
        fixed[key] = f"--tune={key}"
    for key in varied:
        if key in fixed and not fixed[key].startswith("--tune"):
            raise UserError(f"--vary={key} does not go with {fixed[key]}, which sets it too")


def configs_of(
    config,
    variants: Sequence[Variant],
    match: str | None,
    tune: Sequence[str],
    wanted: Container[str],
    of_mode: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """{label: config} of all variants, their sizes matched. What can be wrong with one that is `wanted`, or with a
    value it is to be tuned at, is found here, before anything is trained. `of_mode(mode)` is the config of another mode
    of the recipe."""
    from lissom.training.building import build_objective, class_stream, epoch_examples, load_dataset

    datasets, configs, target = {}, {}, None
    for variant in variants:
        changed = config_of(variant, config, of_mode)
        if tune and changed.data.order == "by_class":
            raise UserError("--tune trains for half the length, which for data.order='by_class' is half of the classes")
        single = build_objective(changed).single
        data = json.dumps([changed.data.to_dict(), single], sort_keys=True, default=list)
        if data not in datasets:
            datasets[data] = load_dataset(changed)
        dataset = datasets[data]
        facts = {**dataset.info, "kind": dataset.kind, "length": dataset.train[0]["inputs"].shape[0]}
        if match and target is None:
            solvable(changed, match)
            target = size_of(changed, facts, match)
        elif match:
            changed = matched(changed, facts, match, target)
        configs[variant.label] = changed
        if variant.label in wanted:
            epoch = epoch_examples(changed, dataset, class_stream(changed, dataset))
            try_out(changed, facts, epoch)
            for key, values in (axis_of(axis, "--tune") for axis in tuned_axes(variant, tune)):
                for value in values:
                    try_out(overridden(changed, [(key, value), *_halved(changed)]), facts, epoch)
    return configs


def try_out(config, facts: Mapping[str, Any], examples: int) -> None:
    """Raises what train.py would raise for this config, without building an array."""
    from lissom.compression.artefacts import check_transforms, structure_of
    from lissom.training import sharding, stages

    check(config)
    stages.assembled(config, facts, examples, sharding.make_mesh(config.mesh), structure_of)
    check_transforms(config, facts)


def compare(
    config,
    variants: Sequence[Variant],
    workdir: pathlib.Path,
    *,
    seeds: int,
    match: str | None = None,
    tune: Sequence[str] = (),
    shard: tuple[int, int] = (0, 1),
    merge: bool = False,
    measure: bool = True,
    of_mode: Callable[[str], Any] | None = None,
) -> list:
    """Trains what is missing and returns the rows of all variants and seeds (of this shard; none where there are more
    shards than runs, or without `measure`). With `merge` nothing is trained, and a missing run is an error."""
    from lissom.training import processes
    from lissom.training.runs import check_same

    check_axes(variants, seeds, match, tune)
    if processes.several():
        raise UserError(
            "compare.py is one process, and this one was started as one of several: share runs by --shard=i/n"
        )
    jobs = list(enumerate((seed, variant) for seed in range(seeds) for variant in variants))
    mine = jobs if merge else share(jobs, shard)
    if not mine:
        print(f"--shard={shard[0]}/{shard[1]} has nothing to do: there are {len(jobs)} runs", file=sys.stderr)
        return []
    from lissom.eval import evaluate

    place = lambda seed, variant: workdir / f"{directory_of(variant.label)}_seed{seed}"
    # What is finished is only measured, maybe on a machine that could not train it.
    wanted = set() if merge else {job[1].label for _, job in mine if not finished(place(*job))}
    configs, notes = configs_of(config, variants, match, tune, wanted, of_mode), {}
    runs, labels = [], {}
    for number, (seed, variant) in mine:
        run = place(seed, variant)
        if variant.label not in notes:
            notes[variant.label] = []
            for axis in tuned_axes(variant, tune):
                configs[variant.label], note = tuned(
                    configs[variant.label], workdir, axis, variant.label, merge, shared=shard[1] > 1
                )
                notes[variant.label] += [note] if note else []
        final = overridden(configs[variant.label], [("seed", seed)])
        if merge and not finished(run):
            raise UserError(f"--merge: the run {run} is not finished")
        if finished(run):
            check_same(run, final)
        else:
            print(f"[{number + 1}/{len(jobs)}] {variant.label}, seed {seed}", file=sys.stderr)
            _trained(final, run)
        runs.append(run)
        labels[str(run)] = variant.label
    if not measure:
        return []
    notes_of = {run: notes[label] for run, label in labels.items()}
    return evaluate(runs, variants=labels, notes=notes_of, named=[axis_of(axis, "--tune")[0] for axis in tune])


def share(jobs: Sequence, shard: tuple[int, int]) -> list:
    """Every n-th job from the i-th on: by number alone, so that no two shards ever train the same run."""
    return list(jobs[shard[0] :: shard[1]])


def _trained(config, run: pathlib.Path) -> float | None:
    """Trains one run to its end and returns what a setting is chosen by, the less the better: its test loss, or its
    error where the objective is chosen by accuracy; None where the loss is not finite. Where training was asked to
    stop, so does the comparison."""
    from lissom.train import train
    from lissom.training.building import build_objective

    result = train(config, run)
    if "loss" not in result:
        raise SystemExit(0)
    if not math.isfinite(result["loss"]):
        return None
    by = build_objective(config).chosen_by
    return 1 - float(result[by]) if by == "accuracy" and by in result else float(result["loss"])


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_multi_string("vary", [], "field=value,value: an axis of the grid; may be given several times")
    flags.DEFINE_multi_string("also", [], "'name: field=value field=value': one more variant, behind those of --vary")
    flags.DEFINE_integer("seeds", 3, "seeds a variant")
    flags.DEFINE_enum("match", None, MATCHES, "solve the width so that all variants equal the first one in this")
    flags.DEFINE_multi_string("tune", [], "field=value,value: tuned for each variant first, at half the length")
    flags.DEFINE_string("shard", "0/1", "i/n: this process's share of the runs")
    flags.DEFINE_bool("merge", False, "train nothing: join what the shards have finished")
    flags.DEFINE_bool("measure", True, "measure what is trained; --nomeasure where a --merge will")
    flags.DEFINE_string("workdir", None, "where the runs lie; runs/compare/<recipe> if not given")
    flags.DEFINE_string("out", None, "where rows.jsonl, table.md, table.csv and pareto.png go; --workdir if not given")
    flags.DEFINE_string("cost", COST, COST_HELP)
    with one_sentence():
        pairs = command_line.parse(argv)
        spec, config = command_line.config_from(pairs)
        given = flags.FLAGS
        workdir = pathlib.Path(given.workdir or pathlib.Path("runs/compare") / default_workdir(spec).name)
        variants = with_baselines(given.vary, given.also, config.evaluation.baselines)
        shard = command_line.shard_of(given.shard)
        out = pathlib.Path(given.out or workdir)
        if given.merge and not given.measure:
            raise UserError("--merge measures what the shards have trained: it does not go with --nomeasure")
        if shard[1] > 1 and not given.merge:  # the table of a share must not stand where that of all runs will
            out = out / "shards" / f"{shard[0]}_of_{shard[1]}"
        check_cost(given.cost)
        check_writable(workdir, "--workdir")
        check_writable(out, "--out")
        rows = compare(
            config,
            variants,
            workdir,
            seeds=given.seeds,
            match=given.match,
            tune=given.tune,
            shard=shard,
            merge=given.merge,
            measure=given.measure,
            of_mode=command_line.modes_of(pairs),
        )
        if not rows:
            return
        from lissom.eval import render, write

        print(render(rows))
        write(rows, out, given.cost)
        print(f"written to {out}")


if __name__ == "__main__":
    main(sys.argv)
