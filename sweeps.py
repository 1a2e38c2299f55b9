"""What scripts with a grid of runs share: shares of several machines, runs that are trained once, rates that are tuned.

`compare.py`, whose variants are anybody's, has its own; these are for scripts that know their networks.
"""

import json
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from lissom.eval import check_writable, finished, read_metrics
from lissom.training import flags as command_line
from lissom.training.errors import UserError

DIVERGED = "diverged.json"
RATE = "optim.learning_rate"


def in_shares(grid: Callable[[], Sequence], train: Callable, report: Callable) -> None:
    """What a script with the flags --workdir, --out, --shard and --merge does with its grid of runs: train(runs,
    workdir) of its share and, where that is all of them or with --merge, report(runs, workdir, out)."""
    given = flags.FLAGS
    index, count = command_line.shard_of(given.shard)
    check_writable(given.workdir, "--workdir")
    check_writable(given.out, "--out")
    runs, workdir = grid(), pathlib.Path(given.workdir)
    if not given.merge:
        train(runs[index::count], workdir)
    if given.merge or count == 1:
        report(runs, workdir, pathlib.Path(given.out))


def trained(config, run: pathlib.Path, merge: bool = False) -> float | None:
    """The last test loss of a run, None of one that diverged; it is trained where it isn't finished. With `merge`
    nothing is, and a missing run is a UserError, as is one of another config."""
    from lissom.train import train
    from lissom.training.runs import check_same

    stopped = run / DIVERGED
    if stopped.is_file() or finished(run):
        check_same(run, config)
        return None if stopped.is_file() else tests_of(run)[-1]["loss"]
    if merge:
        raise UserError(f"--merge: the run {run} is not finished")
    print(f"{run.name}, {dict(config.train)}", file=sys.stderr)
    try:
        result = train(config, run)
    except UserError as error:
        if "the loss is" not in str(error):
            raise
        stopped.write_text(json.dumps({"said": str(error)}))
        return None
    if "loss" not in result:
        raise SystemExit(0)  # it was asked to stop
    return tests_of(run)[-1]["loss"]


def tests_of(run: pathlib.Path) -> list[dict[str, Any]]:
    """The evaluations of a run in their order."""
    return [entry for entry in read_metrics(run) if entry["kind"] == "test"]


def rates_of(middle: float, factors: Sequence[float]) -> list[float]:
    """The learning rates that are tried: each factor times the middle one."""
    return [float(f"{factor * middle:.3g}") for factor in factors]


def tuned(
    label: str, trials: Mapping[float, Any], place: Callable[[float], pathlib.Path], merge: bool = False
) -> tuple[float, str | None]:
    """(the learning rate with the lowest last test loss, what a reader must know of the choice), of {rate: config of a
    trial}, which lie at place(rate). Of a single rate nothing is trained; a UserError where all diverge."""
    if len(trials) == 1:
        return next(iter(trials)), None
    losses = {rate: trained(config, place(rate), merge) for rate, config in trials.items()}
    best = min(losses, key=lambda rate: math.inf if losses[rate] is None else losses[rate])
    if losses[best] is None:
        raise UserError(f"{label} diverged at every rate: {', '.join(f'{rate:g}' for rate in losses)}")
    print(f"{label}: learning rate {best:g} of {', '.join(map(str, losses))}", file=sys.stderr)
    edge = {min(losses): "smallest", max(losses): "largest"}.get(best)
    note = f"{label}: its learning rate {best:g} is the {edge} tried, so that one beyond may be better"
    return best, note if edge else None
