"""What the magnitude-invariant parametrization is worth to a hypernetwork: losses, steps, variance of its gradients.

    uv run scripts/hypernetworks.py [--variants=default,scaled,code,residual,both] [--optimizers=adamw,sgd]
        [--rates=adamw:1e-3,sgd:3e-2] [--factors=1/3,1,3] [--steps=3000] [--evaluations=30] [--seeds=3] [--batches=100]
        [--workdir=runs/hypernetworks] [--shard=0/2 | --merge] [--tiny] [--out=results/hypernetworks]
        [--config.FIELD=VALUE]

Task: configs/vision/mnist1d_hypernetwork.py, signals under noise whose strength is the condition. Variants: `default`
(the weights are h of the raw condition), `code` and `residual` (one part of the parametrization each), `both` (the
paper's); and a control that is not the paper's: `scaled`, the default with weights that begin as large as those of the
main network alone. "no condition" (floor) is the main network alone, trained at all conditions; "a network a condition"
(ceiling) are main networks each trained, and judged, at one condition of the grid. All learn without clipping and
decay, at a constant rate, unless --config.optim.FIELD=VALUE says so.

Every network's learning rate is the best of --factors times that of --rates in whole runs of seed 0, by the test loss:
a part of a run can prefer a rate that is behind at the end. So the best of these runs is also one of those that are
shown. Of one factor none is tried. A run whose loss is not finite has diverged: it is worse than any other, and has no
loss.

    loss, accuracy       on the test set, means over the grid of conditions; the loss also at each condition
    steps_to_loss        to the first of the --evaluations whose loss is at most the floor's last one, same seed and
                         optimizer; unknown where there is none such
    gradient_variance    sum over parameters of the variance of the gradient of a batch, with its conditions and noise,
                         over --batches batches / the squared norm of its mean; with the first parameters and the last.
                         Unbiased both; unknown where the mean can't be told from 0

What is finished in --workdir is not trained again; a --shard trains its part and measures nothing, --merge trains
nothing. --tiny checks the script itself, on few examples and steps; it writes to a given --out only.
"""

import fractions
import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from lissom import sweeps
from lissom.sweeps import RATE, rates_of, tests_of, trained
from lissom.training import flags as command_line
from lissom.training.errors import UserError, one_sentence

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECIPE = "configs/vision/mnist1d_hypernetwork.py"
OUT = ROOT / "results" / "hypernetworks"
VARIANTS = {
    "default": {"model.code": "raw", "model.residual": False},
    "scaled": {"model.code": "raw", "model.residual": False, "model.head_init": "main"},
    "code": {"model.code": "cosine", "model.residual": False},
    "residual": {"model.code": "raw", "model.residual": True},
    "both": {"model.code": "cosine", "model.residual": True},
}
FLOOR, CEILING = "no condition", "a network a condition"
CONDITION = "objective_kwargs.conditional_noise.condition"
PLAIN = (("optim.clip_norm", 0.0), ("optim.weight_decay", 0.0))
FEW = (("data.kwargs.mnist1d.train_size", 60), ("data.kwargs.mnist1d.test_size", 40), ("data.batch_size", 16))
SET = ("seed", "evaluation.every", "objective", "optim.name", "optim.learning_rate", CONDITION)
SHOWN = ("loss", "accuracy", "steps_to_loss", "gradient_variance")


class Asked(NamedTuple):
    """What the flags say."""

    variants: Sequence[str]
    rates: Mapping[str, float]  # of each optimizer
    factors: Sequence[float]
    steps: int
    evaluations: int
    seeds: int
    batches: int
    tiny: bool = False
    pairs: Sequence[tuple[str, Any]] = ()


class Network(NamedTuple):
    """One that is tuned, and trained with every seed; `config` but for the rate, the seed and the length."""

    label: str
    optimizer: str
    config: Any

    @property
    def name(self) -> str:
        return f"{self.optimizer}_{self.label}".replace(" ", "_")

    def place(self, workdir: pathlib.Path, seed: int, rate: float) -> pathlib.Path:
        return workdir / f"{self.name}_seed{seed}_{rate:g}"


def networks(asked: Asked) -> list[Network]:
    """Of each optimizer the variants, the floor, and the ceiling's, 'at 0.25'."""
    from lissom.training.config import check, load_recipe, overridden

    found = []
    for optimizer in asked.rates:
        common = [("optim.name", optimizer), *PLAIN, *(FEW if asked.tiny else ()), *asked.pairs]
        size = [("model.size", "tiny")] if asked.tiny else []
        alone = overridden(load_recipe(f"{RECIPE}:plain"), [*common, *size])
        hyper = overridden(load_recipe(RECIPE), [*common, *size])
        configs = {name: overridden(hyper, VARIANTS[name].items()) for name in asked.variants} | {FLOOR: alone}
        configs |= {f"at {at:g}": overridden(alone, [(CONDITION, at)]) for at in grid_of(alone)}
        for config in configs.values():
            check(config)
        found += [Network(label, optimizer, config) for label, config in configs.items()]
    return found


def grid_of(config) -> Sequence[float]:
    """The conditions that a run of the config is judged at."""
    from lissom.training.building import build_objective

    return build_objective(config).grid


def tuned(network: Network, asked: Asked, workdir: pathlib.Path, merge: bool) -> tuple[Any, str | None]:
    """(the config with the best of the rates, what a reader must know of the choice)."""
    from lissom.training.config import overridden

    rates = rates_of(asked.rates[network.optimizer], asked.factors)
    configs = {rate: overridden(network.config, [(RATE, rate)]) for rate in rates}
    trials = {rate: final(config, asked, 0) for rate, config in configs.items()}
    place = lambda rate: network.place(workdir, 0, rate)
    best, note = sweeps.tuned(f"{network.label}, {network.optimizer}", trials, place, merge)
    return configs[best], note


def steps_to(run: pathlib.Path, loss: float) -> int | None:
    """The step of the first evaluation with at most that loss."""
    return next((entry["step"] for entry in tests_of(run) if (entry["loss"] or math.inf) <= loss), None)


def gradient_variances(config, run: pathlib.Path, batches: int) -> dict[str, float | None]:
    """{"first" | "last": gradient_variance with the parameters that the run began with, and ended with}."""
    import jax

    from lissom.training import sharding
    from lissom.training.building import assemble, fresh_state, load_dataset
    from lissom.training.runs import load_network

    dataset = load_dataset(config)
    facts = {**dataset.info, "kind": dataset.kind}
    assembly = assemble(config, facts, config.train.steps, sharding.make_mesh({"data": 1}))
    first = fresh_state(assembly, jax.random.split(jax.random.key(config.seed))[0])  # as train.py begins
    last = load_network(run)
    return {
        "first": gradient_variance(
            assembly, first["params"], first["stats"], first["frozen"], config, dataset, batches
        ),
        "last": gradient_variance(assembly, last.params, last.stats, last.frozen, config, dataset, batches),
    }


def gradient_variance(assembly, params, stats, frozen, config, dataset, batches: int) -> float | None:
    """sum_i Var g_i / |E g|^2 of the objective's gradient g over batches, conditions and noise."""
    import itertools

    import jax
    import jax.numpy as jnp

    from lissom import data

    @jax.jit
    def add(total, batch, number):
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        g, _, _ = assembly.objective.gradients(assembly.graph, params, stats, frozen, batch, key, number)
        return jax.tree.map(jnp.add, total, g), squared(g)

    squared = lambda tree: sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(tree))
    total, squares = jax.tree.map(jnp.zeros_like, params), []
    stream = data.train_batches(dataset, start_step=0, batch_size=config.data.batch_size, seed=config.seed + 1)
    for number, batch in enumerate(itertools.islice(stream, batches)):
        total, square = add(total, batch, number)
        squares.append(float(square))
    return relative_variance(float(squared(total)), squares)


def relative_variance(squared_sum: float, squares: Sequence[float]) -> float | None:
    """|sum_n g_n|^2 and the |g_n|^2 of n = 1 .. N -> S / (|m|^2 - S / N), with m their mean and S the sum of the
    variances, divided by N - 1; None where the divisor, the unbiased square of the mean, is not above 0."""
    count = len(squares)
    mean = squared_sum / count**2
    variance = max(0.0, (math.fsum(squares) - count * mean) / (count - 1))
    return variance / (mean - variance / count) if mean > variance / count else None


def rows_of(found: Sequence[Network], asked: Asked, workdir: pathlib.Path, merge: bool) -> list:
    """A row a label, optimizer and seed, the ceiling's networks in one."""
    rows = []
    for optimizer in asked.rates:
        chosen = {n.label: tuned(n, asked, workdir, merge) for n in found if n.optimizer == optimizer}
        for seed in range(asked.seeds):
            rows += rows_of_seed({n.label: n for n in found if n.optimizer == optimizer}, chosen, seed, asked, workdir)
    return rows


def rows_of_seed(found: Mapping[str, Network], chosen: Mapping, seed: int, asked: Asked, workdir: pathlib.Path) -> list:
    """Those of one optimizer and seed, of finished runs."""
    from lissom.eval import trained_by
    from lissom.evaluation.rows import Identity, Row, elsewhere, measure, provenance

    here, optimizer = provenance(), next(iter(found.values())).optimizer
    rate_of = lambda label: chosen[label][0].optim.learning_rate
    place = lambda label: found[label].place(workdir, seed, rate_of(label))
    last = {}
    for label in found:
        run = place(label)
        config = final(chosen[label][0], asked, seed)
        last[label] = None if trained(config, run, True) is None else tests_of(run)[-1]
    conditions, rows = grid_of(found[FLOOR].config), []

    def row(label, measurements, role, of):
        then = trained_by(place(of[0]))
        notes = [chosen[each][1] for each in of if chosen[each][1]]
        notes += [f"{each} diverged with seed {seed}" for each in of if last[each] is None]
        rates = {each: rate_of(each) for each in of}
        overrides = {"optim.learning_rate": rates[label] if label in rates else json.dumps(rates)}
        identity = Identity(RECIPE, f"mnist1d, noise as a condition, {optimizer}", seed, overrides, None, label, role)
        rows.append(Row(identity, here, tuple(measurements), elsewhere(then, here), tuple(notes)))

    for label in (*asked.variants, FLOOR):
        of_run = last[label] or {}
        told = [measure(name, of_run.get(name), conditions="mean") for name in ("loss", "accuracy")]
        told += [measure("loss", of_run.get(f"loss_at/{at:g}"), condition=at) for at in conditions]
        if last[label] and last[FLOOR]:
            told.append(measure("steps_to_loss", steps_to(place(label), last[FLOOR]["loss"]), of=FLOOR))
        if label != FLOOR and last[label]:
            values = gradient_variances(final(chosen[label][0], asked, seed), place(label), asked.batches)
            told += [measure("gradient_variance", value, parameters=at) for at, value in values.items()]
        row(label, told, "floor" if label == FLOOR else "variant", [label])
    ceilings = [f"at {at:g}" for at in conditions]
    told = []
    for name in ("loss", "accuracy"):
        values = [last[label][name] if last[label] else None for label in ceilings]
        told.append(measure(name, None if None in values else sum(values) / len(values), conditions="mean"))
        if name == "loss":
            told += [measure(name, value, condition=at) for at, value in zip(conditions, values, strict=True)]
    row(CEILING, told, "ceiling", ceilings)
    return rows


def final(config, asked: Asked, seed: int):
    """The config of a run."""
    from lissom.training.config import overridden

    every = max(1, asked.steps // asked.evaluations)
    return overridden(config, [("seed", seed), ("train.steps", asked.steps), ("evaluation.every", every)])


def run(asked: Asked, workdir: pathlib.Path, out: pathlib.Path | None, shard=(0, 1), merge: bool = False) -> list:
    """Trains, measures, writes and returns the rows; of a shard none."""
    from lissom.evaluation.tables import shown_text, tables, write_report

    found, (index, count) = networks(asked), shard
    if not merge:
        for network in found[index::count]:
            config, _ = tuned(network, asked, workdir, False)
            for seed in range(asked.seeds):
                trained(final(config, asked, seed), network.place(workdir, seed, config.optim.learning_rate), False)
        if count > 1:
            return []
    rows = rows_of(found, asked, workdir, True)
    print(shown_text(tables(rows), SHOWN))
    if out is not None:
        write_report(rows, out, plot=False, shown=SHOWN)
        print(f"written to {out}")
    return rows


def read(given: flags.FlagValues, pairs: Sequence[tuple[str, str]]) -> Asked:
    """What the flags say, or a UserError."""
    for name in given.variants:
        if name not in VARIANTS:
            raise UserError(f"--variants: {name!r} must be one of {', '.join(VARIANTS)}")
    for flag, values in (("variants", given.variants), ("optimizers", given.optimizers)):
        if not values or len(set(values)) < len(values):
            raise UserError(f"--{flag}={','.join(values)} must be one name or more, none twice")
    try:
        rates = {name: float(rate) for name, rate in (entry.split(":") for entry in given.rates)}
        factors = [float(fractions.Fraction(text)) for text in given.factors]
    except (ValueError, ZeroDivisionError):
        raise UserError("--rates are optimizer:number,..., and --factors numbers or fractions such as 1/3") from None
    if not factors or min(*factors, *rates.values()) <= 0:
        raise UserError("--rates and --factors must be above 0")
    for name in given.optimizers:
        if name not in rates:
            raise UserError(f"--optimizers: {name!r} needs a rate, --rates={name}:NUMBER")
    for name, least in (("steps", 4), ("evaluations", 1), ("seeds", 1), ("batches", 2)):
        if given[name].value < least:
            raise UserError(f"--{name}={given[name].value} must be at least {least}")
    if any(not key for key, _ in pairs):
        raise UserError(f"the recipe is {RECIPE}: --config.FIELD=VALUE changes it")
    for key, _ in pairs:
        if key in SET or key.startswith(("train.", "model.", "stages")):
            raise UserError(f"--config.{key} is what the script sets, or is not of all of its networks")
    steps, seeds, batches = given.steps, given.seeds, given.batches
    if given.tiny:
        steps, seeds, batches = min(steps, 8), min(seeds, 2), min(batches, 3)
    return Asked(
        given.variants,
        {name: rates[name] for name in given.optimizers},
        factors,
        steps,
        given.evaluations,
        seeds,
        batches,
        given.tiny,
        tuple(pairs),
    )


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_list("variants", list(VARIANTS), "of the parametrization")
    flags.DEFINE_list("optimizers", ["adamw", "sgd"], "names of OPTIMIZERS")
    flags.DEFINE_list("rates", ["adamw:1e-3", "sgd:3e-2"], "the middle learning rate of each optimizer")
    flags.DEFINE_list("factors", ["1/3", "1", "3"], "of that, tried for each network")
    flags.DEFINE_integer("steps", 3000, "of every network")
    flags.DEFINE_integer("evaluations", 30, "over these steps")
    flags.DEFINE_integer("seeds", 3, "seeds a network")
    flags.DEFINE_integer("batches", 100, "over which the gradient's variance is taken")
    flags.DEFINE_string("workdir", "runs/hypernetworks", "where the runs lie")
    flags.DEFINE_string("shard", "0/1", "i/n: this process's share of the networks")
    flags.DEFINE_bool("merge", False, "train nothing: read what the shards have finished")
    flags.DEFINE_bool("tiny", False, "few examples and steps")
    flags.DEFINE_string("out", None, f"where the rows and the table go, by default {OUT.relative_to(ROOT)}")
    with one_sentence():
        from lissom.eval import check_writable

        pairs = command_line.parse(argv)
        given = flags.FLAGS
        asked, shard = read(given, pairs), command_line.shard_of(given.shard)
        out = pathlib.Path(given.out) if given.out else None if given.tiny else OUT
        check_writable(given.workdir, "--workdir")
        if out is not None:
            check_writable(out, "--out")
        run(asked, pathlib.Path(given.workdir), out, shard, given.merge)


if __name__ == "__main__":
    main(sys.argv)
