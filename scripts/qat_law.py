"""Which share of training should be quantization-aware, from a grid of small runs, and the laws fitted to them.

    uv run scripts/qat_law.py [--widths=16,32] [--bits=int2,int4] [--per_byte=10,30,100,300,1000]
        [--shares=0.1,0.25,0.5,0.75,0.9,1] [--fused=16] [--seeds=1] [--longest=8000] [--workdir=runs/qat_law]
        [--shard=0/2 | --merge] [--out=results/qat_law] [--config.FIELD=VALUE]

Each run is the decoder of configs/language/qat_schedule.py with a width of --widths (one layer of 16, two of others),
so many tokens per byte of its parameters as --per_byte says, and of them the share with weights of --bits. Those of the
widths --fused are trained with the fused cooldown too. Cells of less than 40 or more than --longest steps are left out,
and told. What is finished in --workdir is not trained again; a --shard trains its part and measures nothing; --merge
trains nothing.

Printed and written: the test loss of every run; the best share of each cell, and a of f = exp(-a / ln S) fitted to them
(evaluation/qat_law.py has the laws); the loss law, fitted without the cells of most tokens per byte of each width and
format, and its error on these, beside that of a law without the terms of quantization.
"""

import itertools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags

from lissom.training import flags as command_line
from lissom.training.errors import UserError, one_sentence

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECIPE = "configs/language/qat_schedule.py"
OUT = ROOT / "results" / "qat_law"
LEAST_STEPS = 40
COOLDOWNS = ("separate", "fused")
SET = ("model.width", "model.depth", "seed", "stages", "data.name", "objective")


class Run(NamedTuple):
    """One run of the grid and its config."""

    width: int
    parameters: int
    bits: str
    per_byte: float
    share: float
    cooldown: str
    seed: int
    config: Any

    @property
    def name(self) -> str:
        return f"{self.width}_{self.bits}_{self.per_byte:g}_{self.share:g}_{self.cooldown}_seed{self.seed}"

    @property
    def label(self) -> str:
        cell = f"{self.parameters:,} parameters, {self.bits}, {self.per_byte:g} tokens per byte"
        return f"{cell}, share {self.share:g}" + (", fused" if self.cooldown == "fused" else "")

    @property
    def tokens(self) -> int:
        (length,) = self.config.train.values()
        return length * self.config.data.batch_size * self.config.data.kwargs.stdlib_text.length


class Asked(NamedTuple):
    """What the flags say."""

    widths: Sequence[int]
    bits: Sequence[str]
    per_byte: Sequence[float]
    shares: Sequence[float]
    fused: Sequence[int]
    seeds: int
    longest: int
    pairs: Sequence[tuple[str, str]] = ()


def grid(asked: Asked, say=print) -> list[Run]:
    """All runs, those of a seed interleaved."""
    from lissom.configs.language import qat_schedule
    from lissom.training.building import load_dataset
    from lissom.training.config import check, load_recipe, overridden

    base = overridden(load_recipe(RECIPE), asked.pairs)
    dataset = load_dataset(base)
    facts = {**dataset.info, "kind": dataset.kind}
    a_step = base.data.batch_size * base.data.kwargs.stdlib_text.length
    found = []
    axes = (range(asked.seeds), asked.widths, asked.bits, asked.per_byte, asked.shares, COOLDOWNS)
    for seed, width, bits, per_byte, share, cooldown in itertools.product(*axes):
        if cooldown == "fused" and (share == 1 or width not in asked.fused):
            continue  # a share of 1 has no float stage
        depth = 1 if width <= 16 else 2
        sized = overridden(base, [("model.width", width), ("model.depth", depth), ("seed", seed)])
        parameters = parameters_of(sized, facts)
        steps = round(per_byte * parameters * int(bits.removeprefix("int")) / 8 / a_step)
        if not LEAST_STEPS <= steps <= asked.longest:
            if share == asked.shares[0] and seed == 0 and cooldown == COOLDOWNS[0]:
                say(f"left out: {parameters:,} parameters, {bits}, {per_byte:g} tokens per byte take {steps} steps")
            continue
        stages = qat_schedule.stages(share, bits, fused=cooldown == "fused")
        config = overridden(sized, [("train.steps", steps), ("stages", stages)])
        check(config)
        found.append(Run(width, parameters, bits, per_byte, share, cooldown, seed, config))
    if not found:
        raise UserError(f"no cell of the grid has between {LEAST_STEPS} and --longest={asked.longest} steps")
    return found


def parameters_of(config, facts) -> int:
    """Of the network of a config, without building an array."""
    from flax import nnx

    from lissom.evaluation.memory import parameter_count
    from lissom.models.variables import split
    from lissom.training.building import build_network

    return parameter_count(split(nnx.eval_shape(lambda: build_network(config, facts, nnx.Rngs(0)))).params)


def trained(runs: Sequence[Run], workdir: pathlib.Path) -> None:
    """Trains what is not finished."""
    from lissom.eval import finished
    from lissom.train import train
    from lissom.training.runs import check_same

    for number, run in enumerate(runs):
        if finished(workdir / run.name):
            check_same(workdir / run.name, run.config)
        else:
            print(f"[{number + 1}/{len(runs)}] {run.name}", file=sys.stderr)
            if "loss" not in train(run.config, workdir / run.name):
                raise SystemExit(0)  # it was asked to stop


def rows_of(runs: Sequence[Run], workdir: pathlib.Path) -> list:
    """A row a run, of what it was trained to; a run that is missing is a UserError."""
    from lissom.eval import finished, read_metrics, trained_by
    from lissom.evaluation.rows import Identity, Row, measure
    from lissom.training.runs import check_same

    rows = []
    for run in runs:
        place = workdir / run.name
        if not finished(place):
            raise UserError(f"--merge: the run {place} is not finished")
        check_same(place, run.config)
        last = [entry for entry in read_metrics(place) if entry["kind"] == "test"][-1]
        identity = Identity(RECIPE, "stdlib_text", run.seed, variant=run.label)
        found = [measure("loss", last["loss"]), measure("train_tokens", run.tokens), measure("qat_share", run.share)]
        found += [measure("parameters", run.parameters, "compiled"), measure("tokens_per_byte", run.per_byte)]
        rows.append(Row(identity, trained_by(place), tuple(found)))
    return rows


def points(runs: Sequence[Run], rows: Sequence, cooldown: str) -> list:
    """Of one kind of cooldown, losses averaged over the seeds."""
    from lissom.evaluation.qat_law import Point

    losses: dict[tuple, list[float]] = {}
    for run, row in zip(runs, rows, strict=True):
        if run.cooldown == cooldown:
            key = (run.parameters, int(run.bits.removeprefix("int")), run.tokens, run.share)
            losses.setdefault(key, []).append(row.measurements[0].value)
    return [Point(*key, sum(found) / len(found)) for key, found in losses.items()]


def fitted(found: Sequence) -> tuple[str, list]:
    """(what is printed, measurements) of the laws."""
    from lissom.evaluation import qat_law
    from lissom.evaluation.rows import measure

    best = qat_law.best_shares(found)
    per_byte = {point.cell: point.per_byte for point in found if point.cell in best}
    lines = ["| parameters | bits | tokens per byte | best share |", "|---|---|---|---|"]
    lines += [f"| {n:,} | {bits} | {per_byte[n, bits, d]:.3g} | {best[n, bits, d]:.2f} |" for n, bits, d in best]
    told = []
    above_one = [cell for cell in best if per_byte[cell] > 1]  # of the others the law says nothing
    if above_one:
        a, error = qat_law.fit_share([per_byte[cell] for cell in above_one], [best[cell] for cell in above_one])
        of_paper = [qat_law.share_law(per_byte[cell], qat_law.PAPER_A) - best[cell] for cell in above_one]
        error_of_paper = (sum(x * x for x in of_paper) / len(of_paper)) ** 0.5
        lines += ["", f"f = exp(-a / ln S): a = {a:.3f}, root mean square error of f {error:.3f}; with the paper's "
                  f"a = {qat_law.PAPER_A} {error_of_paper:.3f}"]  # fmt: skip
        told += [measure("share_law_a", a), measure("share_law_error", error)]
    most = {}
    for point in found:
        key = (point.parameters, point.bits)
        most[key] = max(most.get(key, 0), point.tokens)
    held_out = [point for point in found if point.tokens == most[point.parameters, point.bits]]
    known = [point for point in found if point not in held_out]
    try:
        laws = {whole: qat_law.fit_law(known, whole=whole) for whole in (True, False)}
    except ValueError as error:
        return "\n".join([*lines, "", f"No loss law: {error}"]), told
    for whole, law in laws.items():
        name = "with the terms of quantization" if whole else "Chinchilla's terms and that of few bits"
        inside, outside = (100 * qat_law.relative_error(law, some) for some in (known, held_out))
        lines.append(f"loss law, {name}: mean error {inside:.2f} % of {len(known)} runs, {outside:.2f} % held out")
        told.append(measure("law_error", outside / 100, law="whole" if whole else "plain", runs="held out"))
        told.append(measure("law_error", inside / 100, law="whole" if whole else "plain", runs="fitted"))
    lines.append(", ".join(f"{n} {v:.3g}" for n, v in zip(qat_law.NAMES, laws[True].values, strict=True)))
    off = [abs(laws[True].best_share(*cell) - best[cell]) for cell in best]
    if off:
        lines.append(f"shares that the loss law calls best: off by {sum(off) / len(off):.2f} on average")
    return "\n".join(lines), told


def compared(fused: Sequence, separate: Sequence) -> str:
    """What is printed of the two kinds of cooldown."""
    from lissom.evaluation import qat_law

    lines = [
        "| bits | share | cells | fused is lower in | loss, fused less separate, mean [nats] |",
        "|---|---|---|---|---|",
    ]
    line = lambda offs: f"{len(offs)} | {sum(off < 0 for off in offs)} | {sum(offs) / len(offs):+.4f} |"
    each = qat_law.differences(fused, separate)
    lines += [f"| {bits} | {share:g} | {line(offs)}" for (bits, share), offs in each.items()]
    if best := qat_law.best_differences(fused, separate):
        lines.append(f"| all | the best below 1 of each | {line(best)}")
    return "\n".join(lines)


def report(runs: Sequence[Run], workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Rows, table, laws and the picture under `out`."""
    from lissom.evaluation.rows import Identity, Row, write_rows
    from lissom.evaluation.tables import shown_text, tables

    rows = rows_of(runs, workdir)
    texts, laws = [], []
    found = {cooldown: points(runs, rows, cooldown) for cooldown in dict.fromkeys(run.cooldown for run in runs)}
    for cooldown, of_kind in found.items():
        text, told = fitted(of_kind)
        texts.append(f"### Cooldown: {cooldown}\n\n{text}\n")
        laws.append(Row(Identity(RECIPE, "stdlib_text", variant=f"laws, {cooldown}"), rows[0].provenance, tuple(told)))
    if len(found) == 2:
        texts.append(f"### Fused less separate, at equal tokens\n\n{compared(found['fused'], found['separate'])}\n")
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "rows.jsonl", [*rows, *laws])
    text = shown_text(tables(rows)) + "\n" + "\n".join(texts)
    (out / "table.md").write_text(text)
    curves(runs, rows, out / "shares.png")
    print("\n".join(texts))
    print(f"written to {out}")


def curves(runs: Sequence[Run], rows: Sequence, place: pathlib.Path) -> None:
    """Loss over the share, a curve a number of tokens, a panel a width, format and cooldown."""
    from lissom.evaluation.plots import Curve, curve_plot
    from lissom.evaluation.statistics import summarize

    values: dict[str, dict[str, dict[float, list[float]]]] = {}
    for run, row in zip(runs, rows, strict=True):
        panel = f"{run.parameters:,} parameters, {run.bits}, {run.cooldown}"
        curve = values.setdefault(panel, {}).setdefault(f"S = {run.per_byte:g}", {})
        curve.setdefault(run.share, []).append(row.measurements[0].value)
    spread = lambda found: summarize(found).sd or 0.0
    panels = {
        panel: [
            Curve(name, tuple((f, sum(v) / len(v), 0.0, spread(v)) for f, v in sorted(found.items())))
            for name, found in of_panel.items()
        ]
        for panel, of_panel in values.items()
    }
    curve_plot(panels, place, x_label="share of quantization-aware training", y_label="test loss [nats a byte]")


def read(given: flags.FlagValues, pairs: Sequence[tuple[str, str]]) -> Asked:
    """What the flags say, or a UserError."""
    numbers = {}
    for flag, kind in (("widths", int), ("per_byte", float), ("shares", float), ("fused", int)):
        try:
            numbers[flag] = [kind(text) for text in given[flag].value]
        except ValueError:
            raise UserError(f"--{flag}={','.join(given[flag].value)} must be numbers") from None
        if (flag != "fused" and not numbers[flag]) or min(numbers[flag], default=1) <= 0:
            raise UserError(f"--{flag} must be numbers above 0")
    if max(numbers["shares"]) > 1:
        raise UserError("--shares are at most 1")
    for bits in given.bits:
        if bits not in ("int2", "int4", "int8"):
            raise UserError(f"--bits: {bits!r} must be one of int2, int4, int8")
    if given.seeds < 1:
        raise UserError(f"--seeds={given.seeds} must be at least 1")
    if any(not key for key, _ in pairs):
        raise UserError(f"the recipe is {RECIPE}: --config.FIELD=VALUE changes it")
    for key, _ in pairs:
        if key in SET or key.startswith("train."):
            raise UserError(f"--config.{key} is what the grid sets: give --widths, --per_byte, --shares or --seeds")
    if other := set(numbers["fused"]) - set(numbers["widths"]):
        raise UserError(f"--fused={min(other)} is none of the --widths")
    grids = (numbers["widths"], given.bits, numbers["per_byte"], numbers["shares"], numbers["fused"])
    return Asked(*grids, given.seeds, given.longest, tuple(pairs))


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_list("widths", ["16", "32"], "of the decoder")
    flags.DEFINE_list("bits", ["int2", "int4"], "formats of the weights")
    flags.DEFINE_list("per_byte", ["10", "30", "100", "300", "1000"], "tokens per byte of the parameters")
    flags.DEFINE_list("shares", ["0.1", "0.25", "0.5", "0.75", "0.9", "1"], "of the tokens, with few bits")
    flags.DEFINE_list("fused", [], "widths that are trained with the fused cooldown too")
    flags.DEFINE_integer("seeds", 1, "seeds a run")
    flags.DEFINE_integer("longest", 8000, "steps of the longest run")
    flags.DEFINE_string("workdir", "runs/qat_law", "where the runs lie")
    flags.DEFINE_string("shard", "0/1", "i/n: this process's share of the runs")
    flags.DEFINE_bool("merge", False, "train nothing: read what the shards have finished")
    flags.DEFINE_string("out", str(OUT), "where rows.jsonl, table.md and shares.png go")
    with one_sentence():
        from lissom.sweeps import in_shares

        pairs = command_line.parse(argv)
        asked = read(flags.FLAGS, pairs)
        in_shares(lambda: grid(asked), trained, report)


if __name__ == "__main__":
    main(sys.argv)
