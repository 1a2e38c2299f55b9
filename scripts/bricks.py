"""What groups of feed-forward channels are worth, for decoders that were trained dense: no training after the grouping.

    uv run scripts/bricks.py --runs='runs/compare/bricks_tuned/mode=dense_*' [--bricks=16] [--k=1,2,4,8]
        [--batches=8] [--restarts=100] --out=results/bricks

For each run and each way of grouping (`compression/bricks.py`: coactivation, weights, random), made on `batches`
training batches:

    loss, excess_loss        on the test set, with k of the bricks a token, by each router; `excess_loss` is less that
                             of the network as it was (variant "dense")
    router_agreement         of the k bricks that a router names, the share that the oracle names too, on `batches` test
                             batches; by chance k / bricks
    coactive                 of the co-activation of channels on the same, the share within bricks; a mean over layers
    specialisation           of the channels that tell a domain best, the share in one brick
                             (`compression/partitions.py`); a mean over domains and layers
    specialisation_drawn     the same of drawn partitions, a mean of `restarts`
    specialisation_excess    specialisation, less that of drawn ones, in standard deviations of those

A channel tells a domain by the mean of its |activation| over a test sequence.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from lissom.training.errors import UserError, one_sentence


def judge_of(config, batches):
    """network -> its mean test loss a token. Networks of one structure are compiled once."""
    import jax

    from lissom.models.variables import Parts, merge, split
    from lissom.training.building import build_objective
    from lissom.training.step import mean_over

    objective = build_objective(config)

    def judge(graph, state, batch):
        # Nothing random is judged.
        return objective.judge(merge(Parts(graph, *state)), batch, jax.random.key(0))

    run = jax.jit(judge, static_argnums=0)

    def loss(network) -> float:
        graph, *state = split(network)
        return mean_over(run(graph, state, batch) for batch in batches())["loss"]

    return loss


def sequences(network, batches) -> tuple:
    """({path: activity [sequences, H]}, domains one-hot [sequences, D]) of the examples of `batches`."""
    import numpy as np

    from lissom.compression.channels import recorded

    run, activity, domains = recorded(network, mean=True), {}, []
    for batch in batches:
        real = np.asarray(batch["mask"]) > 0
        for path, told in run(batch["inputs"]).items():
            activity.setdefault(path, []).append(np.asarray(told["activity"], np.float64)[real])
        domains.append(np.asarray(batch["domains"])[real])
    return {path: np.concatenate(parts) for path, parts in activity.items()}, np.concatenate(domains)


def agreement(network, watched) -> float:
    """The share of the bricks that the routers name which the oracle names too, on what the layers were given."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lissom.compression.transforms import layer_paths
    from lissom.models.bricks import Bricked

    found = []
    for path, layer in layer_paths(network, (Bricked,)).items():
        x = jnp.asarray(watched[path].inputs)[None]
        named, best = (
            jax.nn.one_hot(jax.lax.top_k(scores, layer.k)[1], scores.shape[-1]).sum(-2)
            for scores in (layer.scores(x), layer.activity(x))
        )
        found.append(float((named * best).sum(-1).mean()) / layer.k)
    return float(np.mean(found))


def apart(activity, domains, bricks: int, restarts: int, seed: int) -> tuple:
    """({path: how well each channel tells each domain [D, H]}, mean and standard deviation of the specialisation of
    drawn partitions)."""
    import numpy as np

    from lissom.compression.partitions import predictivity, random, specialisation

    rng = np.random.default_rng(seed)
    tells = {path: predictivity(layer, domains) for path, layer in activity.items()}
    once = lambda: np.mean(
        [specialisation(each, random(each.shape[1], bricks, rng), bricks) for each in tells.values()]
    )
    drawn = [once() for _ in range(restarts)]
    return tells, float(np.mean(drawn)), float(np.std(drawn))


def of_run(source, config, dataset, bricks: int, ks: Sequence[int], batches: int, restarts: int) -> dict:
    """{variant: measurements} of one trained network."""
    import itertools

    import numpy as np

    from lissom import data
    from lissom.compression import partitions
    from lissom.compression.bricks import WAYS, Bricks, watch
    from lissom.compression.transforms import applied, layer_paths, structured
    from lissom.evaluation.rows import measure
    from lissom.models.bricks import ROUTERS, Bricked
    from lissom.models.variables import merge, split

    entry = {"bricks": bricks, "k": 1, "batches": batches, "seed": config.seed}
    structured(merge(split(source)), [("bricks", Bricks(**entry))])  # says what is wrong in one sentence
    test = lambda: data.eval_batches(dataset, batch_size=config.evaluation.batch_size)
    endless = data.train_batches(dataset, start_step=0, batch_size=config.data.batch_size, seed=config.seed)
    train, held = list(itertools.islice(endless, batches)), list(itertools.islice(test(), batches))
    if "domains" not in train[0]:
        raise UserError(f"channels are told apart by domains, and the data {config.data.name!r} has none")
    loss_of = judge_of(config, test)
    dense = loss_of(source)
    found = {"dense": [measure("loss", dense)]}
    watched = watch(source, held)
    tells, mean, deviation = apart(*sequences(source, test()), bricks, restarts, config.seed)
    for way, router in itertools.product(WAYS, ROUTERS):
        transforms = [("bricks", Bricks(**entry, by=way, router=router))]
        network = applied(merge(split(source)), transforms, iter(train))
        layers = layer_paths(network, (Bricked,))
        measured = found.setdefault(way, [])
        for k in ks:
            for layer in layers.values():
                layer.k = k
            loss, at = loss_of(network), {"router": router, "k": k}
            measured += [measure("loss", loss, **at), measure("excess_loss", loss - dense, **at)]
            if router != "oracle":
                measured.append(measure("router_agreement", agreement(network, watched), **at))
        if router != ROUTERS[0]:
            continue  # the bricks are the same
        coactive, special = [], []
        for path, layer in layers.items():
            channels = np.asarray(layer.channels[...])
            parts = np.argsort(channels.reshape(-1)) // channels.shape[1]
            graph = partitions.coactivation(partitions.active(watched[path].activity, transforms[0][1].active))
            coactive.append(partitions.within(graph, parts))
            special.append(partitions.specialisation(tells[path], parts, bricks))
        measured += [
            measure("coactive", float(np.mean(coactive))),
            measure("specialisation", float(np.mean(special))),
            measure("specialisation_drawn", mean),
        ]
        if deviation:
            measured.append(measure("specialisation_excess", (float(np.mean(special)) - mean) / deviation))
    return found


def run(
    runs: Sequence[pathlib.Path | str],
    *,
    bricks: int = 16,
    ks: Sequence[int] = (1, 2, 4, 8),
    batches: int = 8,
    restarts: int = 100,
    out: pathlib.Path | None = None,
) -> list:
    """Measures, writes and returns the rows."""
    if bricks < 2:
        raise UserError(f"--bricks={bricks} must be at least 2")
    if not ks or not all(1 <= k <= bricks for k in ks):
        raise UserError(f"--k={','.join(map(str, ks))} must be at least 1 and at most --bricks={bricks}")
    if batches < 1 or restarts < 2:
        raise UserError(f"--batches={batches} must be at least 1 and --restarts={restarts} at least 2")
    from lissom.eval import check_writable, overrides_of, task_name
    from lissom.evaluation.rows import Identity, Row, provenance, write_rows
    from lissom.evaluation.tables import write_report
    from lissom.models.variables import merge
    from lissom.training.building import load_dataset
    from lissom.training.runs import load_network, read_config
    from lissom.training.stages import final_config

    if out is not None:
        check_writable(out, "--out")
    here, rows, settings = provenance(), [], {"bricks": bricks, "batches": batches, "restarts": restarts}
    for path in runs:
        given = read_config(path)
        config = final_config(given)
        dataset = load_dataset(config)
        source = merge(load_network(path))
        for variant, found in of_run(source, config, dataset, bricks, ks, batches, restarts).items():
            task, overrides = f"bricks, {task_name(config)}", overrides_of(given) | settings
            rows.append(Row(Identity(config.recipe, task, config.seed, overrides, variant=variant), here, tuple(found)))
            print(f"{path}, {variant}: " + ", ".join(f"{m.name} {m.value:.3f}" for m in found if not m.conditions))
        if out is not None:  # after each: what a run that is stopped has measured is kept
            write_rows(out / "rows.jsonl", rows)
    if out is not None:
        write_report(rows, out, plot=False)
    return rows


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_multi_string("runs", [], "directories of runs of dense networks, or patterns; each may hold several")
    flags.DEFINE_integer("bricks", 16, "of each layer")
    flags.DEFINE_list("k", ["1", "2", "4", "8"], "bricks a token")
    flags.DEFINE_integer("batches", 8, "training batches that layers are watched on")
    flags.DEFINE_integer("restarts", 100, "partitions that are drawn for comparison")
    flags.DEFINE_string("out", None, "the directory of the rows and the table")
    with one_sentence():
        from lissom.eval import given_runs

        runs, given = given_runs(argv, "bricks.py"), flags.FLAGS
        try:
            ks = [int(k) for k in given.k]
        except ValueError as error:
            raise UserError(f"--k holds whole numbers: {error}") from error
        out = pathlib.Path(given.out) if given.out else None
        run(runs, bricks=given.bricks, ks=ks, batches=given.batches, restarts=given.restarts, out=out)


if __name__ == "__main__":
    main(sys.argv)
