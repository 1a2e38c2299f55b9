"""Times a step of training of variants of one recipe, in turns in one process: what a technique costs beside the first.

    uv run scripts/training_steps.py --config=configs/vision/mnist1d_qat.py --vary=mode=float,int8,int4,fp4
        [--also="name: field=value field=value"] [--repeats=30] [--out=FOLDER]

A step is the one that train.py compiles, of the run's last stage, on batches of the training data, from fresh
parameters; the time runs from its call until all of its results are there. Nothing is kept of what is learned.
`speedup` is the median time of the first variant / that of the variant. compare.py's train_seconds hold the data, logs
and checkpoints too, and whatever the machine did in those minutes.
"""

import itertools
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from absl import flags

from lissom.training import flags as command_line
from lissom.training.errors import UserError, one_sentence
from lissom.training.variants import config_of, grid

SHOWN = ("step_p50", "latency_spread", "speedup", "train_temporaries", "train_flops", "compile_seconds")
BATCHES = 4  # that are taken in turns
WARM_UP = 3


class Step(NamedTuple):
    """`sample(number)`: the seconds of one; it goes on from where the last one ended."""

    sample: Callable[[int], float]
    compile_seconds: float
    memory: Mapping[str, float]
    flops: float | None


def step_of(config) -> Step:
    """The compiled step of a config, of its last stage, with what it needs."""
    import jax

    from lissom.compression.artefacts import structure_of
    from lissom.evaluation import costs
    from lissom.evaluation.memory import step_memory
    from lissom.training import sharding
    from lissom.training.building import fresh_state
    from lissom.training.setup import set_up

    setup = set_up(config, structure_of)
    last = setup.plan[-1]
    batches = list(itertools.islice(setup.batches(last, 0), BATCHES))
    key = jax.device_put(jax.random.key(config.seed), sharding.replicated(setup.mesh))
    start = time.perf_counter()
    traced, where = setup.traced(-1, key)
    with sharding.on_mesh(setup.mesh):
        compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    placed = [sharding.put_batch(batch, where) for batch in batches]
    state = fresh_state(setup.assemblies[-1], key)
    frozen = state.pop("frozen")
    now = {"state": state}
    del state  # each step is given the last one's

    def sample(number: int) -> float:
        start = time.perf_counter()
        now["state"], metrics = jax.block_until_ready(compiled(now["state"], frozen, placed[number % BATCHES], key))
        taken = time.perf_counter() - start
        del metrics  # behind the clock
        return taken

    return Step(sample, seconds, step_memory(compiled), costs.count_jaxpr(traced.jaxpr).flops)


def rows_of(configs: Mapping[str, Any], repeats: int) -> list:
    """A row of each variant."""
    from lissom.evaluation.latency import in_turns
    from lissom.evaluation.rows import Identity, Row, measure, provenance

    steps = {label: step_of(config) for label, config in configs.items()}
    for step in steps.values():
        for number in range(WARM_UP):
            step.sample(number)
    times = in_turns({label: step.sample for label, step in steps.items()}, repeats)
    here, first, rows = provenance(), next(iter(configs)), []
    for label, config in configs.items():
        at, taken = {"batch": config.data.batch_size}, times[label]
        found = [
            measure("step_p50", taken.p50, **at),
            measure("latency_spread", taken.spread, **at),
            measure("speedup", times[first].p50 / taken.p50, **at, reference=first),
            measure("train_temporaries", steps[label].memory.get("train_temporaries"), "compiled", **at),
            measure("train_flops", steps[label].flops, "compiled", **at, steps=1),
            measure("compile_seconds", steps[label].compile_seconds),
        ]
        task = f"a step of training on {config.data.name}"
        rows.append(
            Row(Identity(config.recipe.partition(":")[0], task, config.seed, variant=label), here, tuple(found))
        )
    return rows


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_multi_string("vary", [], "field=value,value: an axis of the grid; may be given several times")
    flags.DEFINE_multi_string("also", [], "'name: field=value field=value': one more variant, behind those of --vary")
    flags.DEFINE_integer("repeats", 30, "timed steps of each variant")
    flags.DEFINE_string("out", None, "where rows.jsonl and the table go")
    with one_sentence():
        pairs = command_line.parse(argv)
        _, config = command_line.config_from(pairs)
        given = flags.FLAGS
        if given.repeats < 2:
            raise UserError(f"--repeats={given.repeats} must be at least 2")
        variants = grid(given.vary, given.also)
        configs = {v.label: config_of(v, config, command_line.modes_of(pairs)) for v in variants}
        from lissom.eval import check_writable
        from lissom.evaluation.tables import shown_text, tables, write_report

        if given.out:
            check_writable(given.out, "--out")
        rows = rows_of(configs, given.repeats)
        print(shown_text(tables(rows), SHOWN))
        if given.out:
            write_report(rows, given.out, plot=False, shown=SHOWN)


if __name__ == "__main__":
    main(sys.argv)
