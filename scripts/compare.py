"""Trains variants of one recipe with several seeds, measures all, and prints one table.

    uv run scripts/compare.py --config=configs/vision/mnist1d_transformer.py --vary=model.mixer=attention,window,none
        [--seeds=3] [--match=params|flops|bytes] [--tune=optim.learning_rate=7e-4,2e-3,6e-3] [--shard=0/4] [--merge]

Runs are interleaved (all variants of a seed, then the next seed) and lie under --workdir, by default
runs/compare/<recipe>; what is finished there is not trained again. Every --vary adds an axis of the grid.
"""

import itertools
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from lissom.training import flags as command_line
from lissom.training.config import check, default_workdir, differences, from_json, overridden, to_json
from lissom.training.errors import UserError, one_sentence

MATCHES = ("params", "flops", "bytes")
TOLERANCE = 0.01


class Variant(NamedTuple):
    """A point of the grid: its label in the table and what it sets."""

    label: str
    overrides: tuple[tuple[str, Any], ...]


def grid(axes: Sequence[str]) -> list[Variant]:
    """['model.mixer=attention,none', 'model.depth=2,4'] -> the variants of the product, the first one first."""
    parsed = []
    for axis in axes:
        key, equals, values = axis.partition("=")
        if not (key and equals and values):
            raise UserError(f"--vary={axis} must be field=value,value")
        parsed.append([(key, value) for value in _values(values)])
    variants = []
    for point in itertools.product(*parsed):
        label = " ".join(f"{key.split('.')[-1]}={value}" for key, value in point)
        variants.append(Variant(label or "recipe", tuple(point)))
    return variants


def _values(text: str) -> list[str]:
    """Splits at commas that stand outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def shard_of(text: str) -> tuple[int, int]:
    """'1/4' -> (1, 4)."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--shard={text} must be i/n with 0 <= i < n")
    return int(index), int(count)


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
    forward = lambda p, s, f, x: merge(Parts(parts.graph, p, s, f))(x)[0]
    flops = costs.count(forward, *parts[1:], inputs).flops
    if flops is None:
        raise UserError("--match=flops: the FLOPs of a variant can't be counted, since it holds a dynamic loop")
    return flops


def matched(config, facts: Mapping[str, Any], what: str, target: float):
    """The config with the width, and where widths are too coarse the feed-forward expansion as well, at which `what`
    is within 1 % of `target`; an error where there is none."""
    from lissom.models import SIZES

    settings = {
        **SIZES.get(config.model.name, {}).get(config.model.size, {}),
        **{key: value for key, value in config.model.to_dict().items() if value is not None},
    }
    if "width" not in settings:
        raise UserError(f"--match={what} solves model.width, which model {config.model.name!r} does not have")
    unit = 2 * settings.get("heads", 1)
    sized = lambda *pairs: size_of(overridden(config, pairs), facts, what)
    low, high = unit, unit
    while sized(("model.width", high)) < target:
        low, high = high, high * 2
    while high - low > unit:
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if sized(("model.width", middle)) < target else (low, middle)
    off = lambda value: abs(value / target - 1)
    best = min((low, high), key=lambda width: off(sized(("model.width", width))))
    if off(sized(("model.width", best))) <= TOLERANCE:
        return overridden(config, [("model.width", best)])
    ffn = settings.get("ffn")
    key = f"model.ffn_kwargs.{ffn}.expansion"
    small, large = 0.25, 16.0
    for _ in range(30):
        middle = (small + large) / 2
        value = sized(("model.width", low), (key, middle))
        if off(value) <= TOLERANCE / 4:
            return overridden(config, [("model.width", low), (key, middle)])
        small, large = (middle, large) if value < target else (small, middle)
    raise UserError(
        f"--match={what}: no width (a multiple of {unit}) and {ffn} expansion come within 1 % of {target:,}"
    )


def tuned(config, workdir: pathlib.Path, axis: str, label: str, merge: bool = False):
    """The config with the value of the axis that has the lowest test loss at one seed and half the length; the runs
    and the choice are kept under `workdir`, and a choice at the grid's edge is said."""
    key, _, values = axis.partition("=")
    values = _values(values)
    if len(values) < 2:
        raise UserError(f"--tune={axis} must be field=value,value with two values at least")
    record = workdir / "tuned" / f"{_file(label)}.json"
    losses = json.loads(record.read_text()) if record.is_file() else {}
    for value in values:
        name = f"{key}={value}"
        if name in losses:
            continue
        if merge:
            raise UserError(f"--merge: {label} was not tuned at {name}")
        trial = overridden(config, [(key, value), *_halved(config)])
        try:
            losses[name] = _trained(trial, workdir / "tuned" / _file(f"{label} {key}={value}"))
        except UserError as error:
            if "the loss is" not in str(error):
                raise
            losses[name] = None  # it diverged: a result, and a bad one
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(losses))
    alive = {value: losses[f"{key}={value}"] for value in values if losses[f"{key}={value}"] is not None}
    if not alive:
        raise UserError(f"--tune={axis}: {label} diverged at every value")
    best = min(alive, key=alive.get)
    edge = best in (values[0], values[-1])
    print(
        f"{label}: {key}={best} of {', '.join(values)}{' (AT THE EDGE of the grid)' if edge else ''}", file=sys.stderr
    )
    return overridden(config, [(key, best)])


def _halved(config) -> list[tuple[str, Any]]:
    ((name, length),) = config.train.items()
    return [(f"train.{name}", max(1, length // 2 if isinstance(length, int) else length / 2))]


def _file(label: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._=-" else "_" for letter in label)


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
) -> list:
    """Trains what is missing and returns the rows of all variants and seeds (of this shard). With `merge` nothing is
    trained, and a missing run is an error."""
    from lissom.eval import evaluate
    from lissom.training.building import load_dataset
    from lissom.training.runs import read_config

    configs, target = {}, None
    dataset = load_dataset(config)
    for variant in variants:
        changed = overridden(config, variant.overrides)
        check(changed)
        facts = {**dataset.info, "kind": dataset.kind, "length": dataset.train[0]["inputs"].shape[0]}
        if match and target is None:
            target = size_of(changed, facts, match)
        elif match:
            changed = matched(changed, facts, match, target)
        configs[variant.label] = changed
    jobs = [(seed, variant) for seed in range(seeds) for variant in variants]
    runs, labels = [], {}
    for number, (seed, variant) in enumerate(jobs):
        if number % shard[1] != shard[0] and not merge:
            continue
        run = workdir / f"{_file(variant.label)}_seed{seed}"
        settings = configs[variant.label]
        for axis in tune:  # the second time it only reads its record
            settings = tuned(settings, workdir, axis, variant.label, merge)
        final = overridden(settings, [("seed", seed)])
        if merge and not _finished(run):
            raise UserError(f"--merge: the run {run} is not finished")
        if _finished(run):
            # The same label may stand for another run: other flags, another recipe.
            changed = differences(read_config(run).to_dict(), from_json(to_json(final)).to_dict())
            if changed:
                raise UserError(
                    f"{run} holds a run of another config ({'; '.join(changed[:3])}): give another --workdir"
                )
        else:
            print(f"[{number + 1}/{len(jobs)}] {variant.label}, seed {seed}", file=sys.stderr)
            _trained(final, run)
        runs.append(run)
        labels[str(run)] = variant.label
    return evaluate(runs, variants=labels)


def _trained(config, run: pathlib.Path) -> float:
    """Trains one run to its end and returns its test loss; where it was asked to stop, so does the comparison."""
    from lissom.train import train

    result = train(config, run)
    if "loss" not in result:
        raise SystemExit(0)
    return result["loss"]


def _finished(run: pathlib.Path) -> bool:
    """Whether a run stands there that came to its end."""
    try:
        total = json.loads((run / "facts.json").read_text())["steps"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError, KeyError):
        return False
    return any(line["kind"] == "test" and line["step"] == total for line in lines)


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_multi_string("vary", [], "field=value,value: an axis of the grid; may be given several times")
    flags.DEFINE_integer("seeds", 3, "seeds a variant", lower_bound=1)
    flags.DEFINE_enum("match", None, MATCHES, "solve the width so that all variants equal the first one in this")
    flags.DEFINE_multi_string("tune", [], "field=value,value: tuned for each variant first, at half the length")
    flags.DEFINE_string("shard", "0/1", "i/n: this process's share of the runs")
    flags.DEFINE_bool("merge", False, "train nothing: join what the shards have finished")
    flags.DEFINE_string("workdir", None, "where the runs lie; runs/compare/<recipe> if not given")
    flags.DEFINE_string("out", None, "write rows.jsonl, table.md, table.csv and pareto.png there")
    with one_sentence():
        spec, config = command_line.config_from(command_line.parse(argv))
        given = flags.FLAGS
        workdir = pathlib.Path(given.workdir or pathlib.Path("runs/compare") / default_workdir(spec).name)
        variants = grid(given.vary)
        rows = compare(
            config,
            variants,
            workdir,
            seeds=given.seeds,
            match=given.match,
            tune=given.tune,
            shard=shard_of(given.shard),
            merge=given.merge,
        )
        from lissom.eval import render, write

        print(render(rows))
        out = given.out or workdir
        write(rows, out)
        print(f"written to {out}")


if __name__ == "__main__":
    main(sys.argv)
