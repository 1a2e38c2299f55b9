"""Judges block-sparse selectors on the attention of a trained decoder, with random, sink + window and oracle beside.

    uv run --extra pretrained scripts/judge_selectors.py [--checkpoint=smollm2] [--length=4096] [--texts=2]
        [--densities=0.1,0.2,0.4] [--selectors=pooled,oracle] [--latency=4096,8192,16384]

For every selector and density: recall of attention mass and error of the output on some layers' q, k, v of real tokens,
then the loss of the whole model with the selector in every layer. Texts are windows of held-out modules of Python's
standard library; settings are fitted, gates trained and assignments searched on modules of the training split. With
--latency: the time of one layer's selector and attention against dense attention. Rows that stand in --out are not
judged again.
"""

import collections
import functools
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from lissom.training import flags as command_line
from lissom.training.errors import UserError, one_sentence

CONTROLS = ("random", "a_shape", "oracle")
JUDGED = (
    *CONTROLS, "strided", "pooled", "vertical_slash", "per_head", "learned_gate", "representative_heads",
    "token_sparsity", "page_bounds", "streaming_pages",
)  # fmt: skip
RECIPE = "scripts/judge_selectors.py"
GATE_STEPS, GATE_RATE = 150, 1e-3
CALIBRATION_TEXTS = 4  # for gates; settings are fitted and assignments searched on the first


def settings_of(name: str, strength: float, length: int, block: int, kv_heads: int) -> dict[str, Any]:
    """Settings of a selector from one number in (0, 1] that its density rises with."""
    blocks = length // block
    if name in ("random", "oracle", "pooled", "learned_gate"):
        return {"density": strength}
    if name == "a_shape":
        return {"sink": 1, "window": max(1, round(strength * blocks))}
    if name == "strided":
        stride = max(1, round(1 / strength))
        # With more shards than heads no head sees some of the blocks, and the constructor asks to say so.
        return {"stride": stride, "local": 1, "gaps": stride > kv_heads}
    if name == "vertical_slash":
        # Three times as many columns as diagonals: a diagonal costs up to two blocks a row of blocks.
        most = max(1, round(strength * length / 8))
        return {"verticals": 3 * most, "slashes": most, "first": min(30, most), "recent": min(block, most)}
    if name == "representative_heads":
        return {"gamma": strength, "least": block}
    if name == "token_sparsity":
        return {"tau": strength, "recent": block}
    if name == "page_bounds":
        return {"pages": max(1, round(strength * blocks / 2))}
    raise UserError(f"--selectors={name}: there are {', '.join(JUDGED)}")


def fitted(name: str, density: float, calibration: Sequence, block: int) -> dict[str, Any]:
    """Settings with the largest density on the calibration layers that is not above `density`, by bisection; the
    sparsest there are where all are denser."""
    import jax

    from lissom.models.registry import construct
    from lissom.models.selectors import SELECTORS

    q, k = calibration[0].q, calibration[0].k
    facts = {"heads": q.shape[2], "kv_heads": k.shape[2], "head_dim": q.shape[3], "block": block}

    @functools.cache
    def density_of(settings: tuple) -> float:
        selector = construct(SELECTORS, name, {name: dict(settings)}, "selector", **facts)
        run = jax.jit(lambda q, k, raw: selector(q, k, 0, None, raw)[1]["density"])
        return float(sum(run(of.q, of.k, of.raw) for of in calibration) / len(calibration))

    def measured(strength: float) -> tuple[float, dict]:
        settings = settings_of(name, strength, q.shape[1], block, k.shape[2])  # near strengths may have the same
        return density_of(tuple(settings.items())), settings

    low, high = 0.0, 1.0
    best = measured(1 / 64)[1]
    for _ in range(7):
        middle = (low + high) / 2
        found, settings = measured(middle)
        if found <= density:
            low, best = middle, settings
        else:
            high = middle
    return best


def trained_gates(calibration: Sequence, rope_theta: float, block: int, steps: int) -> list:
    """A learned gate for each layer, distilled from its attention on the calibration texts, one a step (Adam)."""
    import jax
    import optax
    from flax import nnx

    from lissom.models.selectors.learned_gate import LearnedGate, distillation_target, gate_kl
    from lissom.models.variables import Parts, merge, split

    q, k = calibration[0].q, calibration[0].k
    facts = {"heads": q.shape[2], "kv_heads": k.shape[2], "head_dim": q.shape[3], "block": block}
    optimizer, gates = optax.adam(GATE_RATE), []
    graph = split(LearnedGate(**facts, rope_theta=rope_theta, rngs=nnx.Rngs(0))).graph

    @jax.jit
    def train(params, of):
        # `LearnedGate.loss`, with the attention map of each text computed once.
        one = lambda part: distillation_target(part[0][None], part[1][None], block)[0]
        targets = jax.lax.map(one, (of.q, of.k))

        def loss(params, raw, target):
            return gate_kl(merge(Parts(graph, params, {}, {})).gate(*raw), target)

        def step(carry, number):
            params, opt = carry
            raw, target = jax.tree.map(lambda x: x[number % len(x)][None], (of.raw, targets))
            value, gradients = jax.value_and_grad(loss)(params, raw, target)
            updates, opt = optimizer.update(gradients, opt)
            return (optax.apply_updates(params, updates), opt), value

        (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), jax.numpy.arange(steps))
        return params, values

    for number, of in enumerate(calibration):
        params, values = train(split(LearnedGate(**facts, rope_theta=rope_theta, rngs=nnx.Rngs(number))).params, of)
        print(f"gate {number}: divergence {float(values[0]):.3f} -> {float(values[-1]):.3f}")
        gates.append(merge(Parts(graph, params, {}, {})))
    return gates


class Subject(NamedTuple):
    """A decoder and what its attention is judged with."""

    checkpoint: str
    model: Any
    names: Sequence[str]
    densities: Sequence[float]
    block: int
    steps: int  # of a gate's training
    provenance: Any  # of the code that this process read when it began

    @property
    def labels(self) -> list[str]:
        return ["dense", *(label_of(name, density) for density in self.densities for name in self.names)]

    @property
    def layers(self) -> list[int]:
        """Seven layers, evenly spread, whose heads are judged."""
        last = len(self.model.blocks) - 1
        return sorted({round(at * last / 6) for at in range(7)})


def selections(subject: Subject, wanted, length: int, count: int, layer: int | None = None) -> Iterator:
    """(label, density asked for, Selection) of the labels that are wanted, each made as it is asked for on `count`
    calibration texts: for all layers, or for one."""
    if not wanted:
        return
    import jax
    import jax.numpy as jnp

    from lissom.data.stdlib_text import TRAIN_MODULES
    from lissom.evaluation.selection import Selection, heads_of
    from lissom.models.selectors.search import search, streaming_heads

    names, densities, block = subject.names, subject.densities, subject.block
    text = jnp.concatenate(texts(subject.checkpoint, TRAIN_MODULES, count, length))
    calibration = heads_of(subject.model, text[:, :-1], None if layer is None else [layer])
    kv_heads = calibration[0].k.shape[2]
    gated = any(label_of("learned_gate", density) in wanted for density in densities)
    rope_theta = subject.model.blocks[0].mixer.rope_theta
    gates = trained_gates(calibration, rope_theta, block, subject.steps) if gated else None
    calibration = [jax.tree.map(lambda x: x[:1], of) for of in calibration]
    some = [calibration[at] for at in subject.layers] if layer is None else calibration
    for density in densities:
        fit = functools.cache(lambda name, density=density: fitted(name, density, some, block))
        for name in names:
            label = label_of(name, density)
            if label not in wanted:
                continue
            if name == "learned_gate":
                trained = [_with_density(gate, density) for gate in gates]
                yield label, density, Selection(name, {"density": density}, trained=trained)
            elif name == "per_head":
                patterns = ("a_shape", "vertical_slash", "pooled")
                around = lambda pattern, density=density: _around(pattern, density, length, block, kv_heads)
                wide = {pattern: _distinct([fit(pattern), *around(pattern)]) for pattern in patterns}
                found = []
                for of in calibration:
                    try:
                        assignment, _ = search(of.q, of.k, of.v, density=density, block=block, candidates=wide)
                    except ValueError as error:
                        raise UserError(f"--densities={density:g} for per_head: {error}") from error
                    found.append({"assignment": assignment})
                heads = collections.Counter(pattern for of in found for pattern, _ in of["assignment"])
                said = ", ".join(f"{pattern} {count}" for pattern, count in sorted(heads.items()))
                yield label, density, Selection(name, {"heads": said}, of_layers=found)
            elif name == "streaming_pages":
                settings = fit("page_bounds")
                # As many blocks a query as the other heads rank for it.
                sink = min(1, settings["pages"] - 1)
                local = {"sink": sink, "window": settings["pages"] - sink}
                found = [{**settings, **local, "streaming": streaming_heads(of.q, of.k, of.v, block=block, **local)}
                         for of in calibration]  # fmt: skip
                yield label, density, Selection("page_bounds", {**settings, **local}, of_layers=found)
            elif name in ("random", "oracle", "pooled") or ":" in name:
                yield label, density, Selection(name, {"density": density})
            else:
                yield label, density, Selection(name, fit(name))


def label_of(name: str, density: float) -> str:
    return f"{name} {density:g}"


def _around(name: str, density: float, length: int, block: int, kv_heads: int) -> list[dict]:
    """For heads on which the fitted settings come out sparser, or denser, than on the mean of the heads."""
    strengths = (min(1.0, density * by) for by in (2, 1.4, 0.7, 1 / 2, 1 / 8, 1 / 32))
    return [settings_of(name, strength, length, block, kv_heads) for strength in strengths]


def _distinct(choices: Sequence[dict]) -> list[dict]:
    return list({tuple(settings.items()): settings for settings in choices}.values())


def _with_density(gate, density: float):
    from lissom.models.variables import merge, split

    copy = merge(split(gate))
    copy.density = density
    return copy


def judge(model, text, selection, heads: Mapping[int, tuple], block: int, skip: int) -> list:
    """Measurements of one selection on one text [1, T + 1]; None: dense. heads: {layer: (Heads, whole attention)}."""
    import numpy as np

    from lissom.evaluation.rows import measure
    from lissom.evaluation.selection import loss_of
    from lissom.models.selectors.quality import judged_by_program

    loss, density = loss_of(model, selection, text, block=block, skip=skip)
    found = [measure("loss", float(loss), tokens=text.shape[1] - 1 - skip), measure("density", float(density))]
    if selection is None:
        return found
    values: dict[str, list] = {"recall": [], "error": []}
    for layer, (of, whole) in heads.items():
        facts = {"heads": of.q.shape[2], "kv_heads": of.k.shape[2], "head_dim": of.q.shape[3], "block": block}
        numbers = judged_by_program(selection.of(layer, **facts), of.q, of.k, of.v, raw=of.raw, whole=whole)
        for name in values:
            values[name].append(np.asarray(numbers[name]))
    about = {"layers": len(heads)}
    found.append(measure("mass_recall", float(np.mean(values["recall"])), **about))
    found.append(measure("output_error", float(np.mean(values["error"])), **about))
    return found


def latency(inputs: Sequence, cases: Sequence, block: int, repeats: int) -> tuple[dict[str, Any], dict[str, float]]:
    """({label: Latency}, {label: density of the program}) of one layer's selection and attention on the `Heads` of
    texts, dense attention among them, in turns. `cases` are selections for that layer alone.

    A program has room for the largest selection: that of `token_sparsity`, whose number of tokens follows the text, is
    cut at the share whose square is the density that was asked for."""
    import jax

    from lissom.evaluation.latency import measure_interleaved
    from lissom.ops.attention import Causal, attention

    of = inputs[0]
    facts = {"heads": of.q.shape[2], "kv_heads": of.k.shape[2], "head_dim": of.q.shape[3], "block": block}
    programs: dict[str, Callable] = {"dense": jax.jit(lambda q, k, v, raw: attention(q, k, v, mask=Causal()))}
    densities = {"dense": 1.0}
    for label, density, selection in cases:
        if selection.name == "token_sparsity":
            selection = selection._replace(settings={**selection.settings, "capacity": density**0.5})
        selector = selection.of(0, **facts)

        def run(q, k, v, raw, selector=selector):
            mask, info = selector(q, k, 0, None, raw)
            return selector.attend(q, k, v, mask, info)

        programs[label] = jax.jit(run)
        count = jax.jit(lambda q, k, raw, selector=selector: selector(q, k, 0, None, raw)[1]["density"])
        listed = sum(float(count(of.q, of.k, of.raw)) for of in inputs) / len(inputs)
        densities[label] = density if selection.name == "token_sparsity" else listed  # it computes its whole room
    times = measure_interleaved({name: (run, inputs) for name, run in programs.items()}, repeats=repeats)
    return times, densities


def with_excess(rows: Sequence) -> list:
    """The rows, each with the loss that its selection costs: its own less that of dense attention on the same text."""
    import dataclasses

    from lissom.evaluation.rows import measure

    found = {}
    for row in rows:
        loss = next((m for m in row.measurements if m.name == "loss"), None)
        found[row.identity.task, row.identity.seed, row.identity.label] = loss

    def added(row):
        own, dense = (found.get((row.identity.task, row.identity.seed, name)) for name in (row.identity.label, "dense"))
        if row.identity.label == "dense" or own is None or dense is None:
            return row
        others = tuple(m for m in row.measurements if m.name != "excess_loss")
        excess = measure("excess_loss", own.value - dense.value, **own.conditions)
        return dataclasses.replace(row, measurements=(*others, excess))

    return [added(row) for row in rows]


def texts(checkpoint: str, modules: tuple[str, ...], count: int, length: int) -> list:
    """`count` windows [1, length + 1] of the modules' tokens. Where window i stands does not depend on the count: at
    1/2, 1/4, 3/4, 1/8, ... of the text."""
    import jax.numpy as jnp
    import numpy as np

    from lissom.training.pretrained_text import module_tokens

    tokens, _ = module_tokens(checkpoint, modules)
    last = len(tokens) - length - 1
    if last < 0:
        raise UserError(f"--length={length} is longer than the text of {len(tokens)} tokens")
    halves = [(2 * i + 1) / 2**n for n in range(1, 12) for i in range(2 ** (n - 1))]
    starts = (np.array(halves[:count]) * last).astype(int)
    return [jnp.asarray(tokens[at : at + length + 1])[None] for at in starts]


def run(
    checkpoint: str,
    out: pathlib.Path,
    *,
    length: int,
    count: int,
    densities: Sequence[float],
    names: Sequence[str],
    lengths: Sequence[int],
    block: int = 64,
    steps: int = GATE_STEPS,
    repeats: int = 7,
) -> list:
    """Judges and times; writes rows.jsonl as it goes, and the table in the end. Returns all rows of `out`."""
    from lissom.eval import check_writable
    from lissom.evaluation.rows import provenance, read_rows
    from lissom.evaluation.tables import write_report

    check_writable(out, "--out")
    subject = Subject(checkpoint, opened(checkpoint, length), names, densities, block, steps, provenance())
    file = out / "rows.jsonl"
    found = read_rows(file) if file.is_file() else []
    to_time = untimed(subject, found, lengths, out)  # what is wrong with these is said before hours of judging
    judge_texts(subject, found, file, length, count)
    found = with_excess(found)
    write_report(found, out, x="density", y="excess_loss")
    for at in to_time:
        # All times of a length or none: they are compared within one run.
        found += times_of(subject, at, repeats)
        write_report(found, out, x="density", y="excess_loss")
    return found


def opened(checkpoint: str, length: int):
    """The decoder, of which every layer can be judged on texts of that length."""
    from lissom.data.errors import DataError
    from lissom.data.stdlib_text import TEST_MODULES
    from lissom.evaluation.selection import check_layers
    from lissom.models.pretrained import load
    from lissom.models.pretrained.errors import CheckpointError

    try:
        model = load(checkpoint, stack="loop", tokenizer=False).model
        texts(checkpoint, TEST_MODULES, 1, length)
        check_layers(model)
    except UserError:
        raise
    except (CheckpointError, DataError, ValueError) as error:
        raise UserError(f"--checkpoint={checkpoint}: {error}") from error
    return model


def row_of(subject: Subject, task: str, label: str, seed: int | None, settings: Mapping, measurements: Sequence):
    from lissom.evaluation.rows import Identity, Row

    return Row(Identity(RECIPE, task, seed, settings, variant=label), subject.provenance, tuple(measurements))


def judge_texts(subject: Subject, found: list, file: pathlib.Path, length: int, count: int) -> None:
    """Judges what has no row in `found` yet, and adds its rows there and to the file."""
    import jax

    from lissom.data.stdlib_text import TEST_MODULES
    from lissom.evaluation.rows import append_row
    from lissom.evaluation.selection import heads_of
    from lissom.models.selectors.quality import whole_of

    task = f"{subject.checkpoint}: attention to {length} tokens of stdlib_text"
    done = {(row.identity.label, row.identity.seed) for row in found if row.identity.task == task}
    wanted = {label for label in subject.labels if any((label, seed) not in done for seed in range(count))}
    if not wanted:
        return
    windows = texts(subject.checkpoint, TEST_MODULES, count, length)
    whole, layers = jax.jit(whole_of), subject.layers
    heads = [
        {
            layer: (of, whole(of.q, of.k, of.v))
            for layer, of in zip(layers, heads_of(subject.model, text[:, :-1], layers))
        }
        for text in windows
    ]
    every = [("dense", 1.0, None)] if "dense" in wanted else []
    rest = selections(subject, wanted - {"dense"}, length, CALIBRATION_TEXTS)
    for label, density, selection in itertools.chain(every, rest):
        for seed, text in enumerate(windows):
            if (label, seed) in done:
                continue
            values = judge(subject.model, text, selection, heads[seed], subject.block, length // 2)
            settings = {} if selection is None else {"density": density, **selection.settings}
            found.append(row_of(subject, task, label, seed, settings, values))
            append_row(file, found[-1])
            print(f"{label}, text {seed}: " + ", ".join(f"{m.name} {m.value:.4f}" for m in values), flush=True)
        # A process has room for 65,530 memory maps (Linux), and the programs of all selections take more.
        jax.clear_caches()


def timing_of(subject: Subject, length: int) -> str:
    """The task of the rows with the times of one length."""
    return f"{subject.checkpoint}: prefill of layer {len(subject.model.blocks) // 2}, {length} tokens"


def untimed(subject: Subject, found: Sequence, lengths: Sequence[int], out: pathlib.Path) -> list[int]:
    """The lengths that have no times yet."""
    from lissom.data.stdlib_text import TEST_MODULES

    left = []
    for length in lengths:
        timed = {row.identity.label for row in found if row.identity.task == timing_of(subject, length)}
        if timed >= set(subject.labels):
            continue
        if timed:
            raise UserError(f"--out={out} has other times of {length} tokens, and times are compared within one run: "
                            "give another --out, or the same selectors and densities")  # fmt: skip
        texts(subject.checkpoint, TEST_MODULES, 2, length)
        left.append(length)
    return left


def times_of(subject: Subject, length: int, repeats: int) -> list:
    """Rows of the times of one layer with each selection, and dense, on two texts."""
    from lissom.data.stdlib_text import TEST_MODULES
    from lissom.evaluation.rows import measure
    from lissom.evaluation.selection import heads_of

    layer = len(subject.model.blocks) // 2
    windows = texts(subject.checkpoint, TEST_MODULES, 2, length)
    inputs = [heads_of(subject.model, text[:, :-1], [layer])[0] for text in windows]
    # One text for the gate: what it lists, not how much, depends on how well it is trained.
    chosen = list(selections(subject, set(subject.labels), length, 1, layer))
    settings = {label: {"density": density, **selection.settings} for label, density, selection in chosen}
    times, densities = latency(inputs, chosen, subject.block, repeats)
    rows = []
    for label, taken in times.items():
        about = {"length": length, "repeats": repeats}
        values = [measure("latency_p50", taken.p50, **about), measure("latency_p90", taken.p90, **about),
                  measure("speedup", times["dense"].p50 / taken.p50, reference="dense", **about),
                  measure("density", densities[label], length=length)]  # fmt: skip
        rows.append(row_of(subject, timing_of(subject, length), label, None, settings.get(label, {}), values))
        print(f"{label}, {length} tokens: {taken.p50:.3f} s", flush=True)
    return rows


def main(argv: list[str]) -> None:
    flags.DEFINE_string("checkpoint", "smollm2", "as models.pretrained.load takes it")
    flags.DEFINE_integer("length", 4096, "tokens of a text")
    flags.DEFINE_integer("texts", 2, "held-out texts")
    flags.DEFINE_list("densities", ["0.1", "0.2", "0.4"], "shares of the scores")
    flags.DEFINE_list("selectors", list(JUDGED), f"of {', '.join(JUDGED)}; or my_package.module:Class with `density`")
    flags.DEFINE_list("latency", [], "lengths at which one layer is timed")
    flags.DEFINE_string("out", "runs/selectors", "rows.jsonl and the table; those of Lissom lie in results/selectors")
    with one_sentence():
        if command_line.parse(argv, recipe=False):
            raise UserError("--config is no flag of judge_selectors.py, which takes no recipe")
        given = flags.FLAGS
        run(
            given.checkpoint,
            pathlib.Path(given.out),
            length=at_least(given.length, 128, "--length"),
            count=at_least(given.texts, 1, "--texts"),
            densities=[share(text) for text in given.densities],
            names=[known(name) for name in given.selectors],
            lengths=[at_least(text, 128, "--latency") for text in given.latency],
        )


def at_least(text, least: int, flag: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise UserError(f"{flag}={text} must be a whole number of at least {least}")
    return number


def share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise UserError(f"--densities={text} must be numbers above 0 and at most 1")
    return number


def known(name: str) -> str:
    if ":" in name:
        from lissom.models.registry import check_settings, resolve
        from lissom.models.selectors import SELECTORS

        try:
            check_settings(resolve(SELECTORS, name, "selector"), {"density": 0.5}, f"selector {name!r}")
        except ValueError as error:
            raise UserError(f"--selectors={name}: {error}") from error
    elif name not in JUDGED:
        raise UserError(f"--selectors={name}: there are {', '.join(JUDGED)}")
    return name


if __name__ == "__main__":
    main(sys.argv)
