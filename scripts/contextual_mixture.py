"""What contexts that an operator marks are worth to a mixture of linear experts.

    uv run scripts/contextual_mixture.py [--sizes=50,150,500] [--overlap=0.5] [--margin=0.1] [--noise=1.0]
        [--restarts=10] [--seeds=5] [--tiny] [--out=results/contextual_mixture]

Data: `lissom.data.regimes`, three regimes one after the other, the operator's contexts as trapezoids over time, which
only fitting is told. For each size of the training set and each seed, on 5,000 samples of another draw:

    ridge                one linear regression
    EM mixture           three experts, no context: the restart with the highest objective
    contextual mixture   the same with the operator's contexts
    known regimes        the same with the true regime of each training sample (ceiling)

    rmse             of the mean that is predicted from the inputs
    adjusted_rand    of the likeliest expert and the true regime; given the inputs, and given inputs and targets

--out gets rows.jsonl and the table. --tiny checks the script itself; it writes to a given --out only.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from lissom.training import flags as command_line
from lissom.training.errors import UserError, one_sentence

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAME = "scripts/contextual_mixture.py"
OUT = ROOT / "results" / "contextual_mixture"
SHOWN = ("rmse", "adjusted_rand")
COUNT = 3
RIDGE = 1e-2


def scores(name: str, train, test, restarts: int, seed: int) -> list[tuple[str, float, dict]]:
    """(metric, value, conditions) of one method, fitted to `train` and measured on `test`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lissom.models import contextual_mixture as cm
    from lissom.models.mixtures import adjusted_rand

    contexts = {
        "ridge": np.ones((len(train.targets), 1)),
        "EM mixture": np.ones((len(train.targets), COUNT)),
        "contextual mixture": train.possibilities,
        "known regimes": np.eye(COUNT)[train.regime],
    }[name]
    keys = jax.random.split(jax.random.key(seed), restarts)
    # One expert is a ridge regression: its gate says 1.
    fits = [cm.fit(train.inputs, train.targets, contexts, ridge=RIDGE, key=key) for key in keys]
    best = max(fits, key=lambda fit: float(fit.history[-1]))
    rmse = jnp.sqrt(jnp.square(cm.predict(best, test.inputs) - test.targets).mean())
    found = [("rmse", float(rmse), {})]
    if contexts.shape[1] > 1:
        given = {
            "inputs": cm.gates(best, test.inputs),
            "inputs and targets": cm.responsibilities(best, test.inputs, test.targets),
        }
        for what, shares in given.items():
            value = adjusted_rand(shares.argmax(-1)[None], jnp.asarray(test.regime)[None], COUNT)[0]
            found.append(("adjusted_rand", float(value), {"given": what}))
    return found


METHODS = {"ridge": "variant", "EM mixture": "variant", "contextual mixture": "variant", "known regimes": "ceiling"}


def run(
    sizes: Sequence[int],
    *,
    overlap: float = 0.5,
    margin: float = 0.1,
    noise: float = 1.0,
    restarts: int = 10,
    seeds: int = 5,
    tiny: bool = False,
    out: pathlib.Path | None = None,
) -> list:
    """Measures, writes and returns the rows."""
    for name, value in (("--restarts", restarts), ("--seeds", seeds)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    if not sizes or min(sizes) < 2 * COUNT:
        raise UserError(f"--sizes={','.join(map(str, sizes))} must hold one number or more, each at least {2 * COUNT}")
    from lissom.data.errors import DataError
    from lissom.data.regimes import regimes
    from lissom.eval import check_writable
    from lissom.evaluation.rows import Identity, Row, measure, provenance, write_rows
    from lissom.evaluation.tables import write_report

    out = OUT if out is None and not tiny else out
    if out is not None:
        check_writable(out, "--out")
    settings = {"count": COUNT, "overlap": overlap, "margin": margin, "noise": noise}
    here, rows = provenance(), []
    for seed in range(seeds):
        try:
            test = regimes(size=300 if tiny else 5000, seed=seed, draw=1, **settings)
            trained = {size: regimes(size=size, seed=seed, draw=0, **settings) for size in sizes}
        except DataError as error:
            raise UserError(str(error)) from error
        for name, role in METHODS.items():
            found = [
                measure(metric, value, samples=size, **conditions)
                for size, train in trained.items()
                for metric, value, conditions in scores(name, train, test, restarts, seed)
            ]
            task = f"regimes(margin={margin}, noise={noise}, overlap={overlap})"
            rows.append(Row(Identity(NAME, task, seed, variant=name, role=role), here, tuple(found)))
            print(f"{name}, seed {seed}: " + ", ".join(f"{m.name} {dict(m.conditions)}: {m.value:.3f}" for m in found))
            if out is not None:  # after each: what a run that is stopped has measured is kept
                write_rows(out / "rows.jsonl", rows)
    if out is not None:
        write_report(rows, out, plot=False, shown=SHOWN)
    return rows


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_list("sizes", ["50", "150", "500"], "samples of the training set")
    flags.DEFINE_float("margin", 0.1, "how far contexts reach beyond their regimes, as a share of a regime's time")
    flags.DEFINE_float("overlap", 0.5, "standard deviation of inputs / distance of neighbouring regimes' centres")
    flags.DEFINE_float("noise", 1.0, "standard deviation of the targets about their rule")
    flags.DEFINE_integer("restarts", 10, "starts of EM, of which the best is taken")
    flags.DEFINE_integer("seeds", 5, "rules and draws of samples")
    flags.DEFINE_bool("tiny", False, "few test samples")
    flags.DEFINE_string("out", None, f"the directory of the rows and the table, by default {OUT.relative_to(ROOT)}")
    with one_sentence():
        if command_line.parse(argv, recipe=False):
            raise UserError("--config is no flag of contextual_mixture.py, which takes no recipe")
        given = flags.FLAGS
        if not all(size.isdigit() for size in given.sizes):
            raise UserError(f"--sizes={','.join(given.sizes)} must be whole numbers")
        run(
            [int(size) for size in given.sizes],
            overlap=given.overlap,
            margin=given.margin,
            noise=given.noise,
            restarts=given.restarts,
            seeds=given.seeds,
            tiny=given.tiny,
            out=pathlib.Path(given.out) if given.out else None,
        )


if __name__ == "__main__":
    main(sys.argv)
