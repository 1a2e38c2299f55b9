"""Judges what clustering the queries makes of trained features, on even episodes and on unkind ones.

    uv run scripts/transductive.py --runs=PATTERN,... [--candidates=10] [--concentration=2] [--choose=200]
        [--out=results/transductive]

Of every finished run on the dataset `episodes` whose network has features, a table a kind of run and a line a method
(models/transductive.py): k-means from the class means on, class means alone, soft k-means, Laplacian-regularised
prototypes, the same by their defaults, and means moved by optimal transport: once, as in OpTA, and so with a slack of
0.05. Columns are the accuracies on even test episodes, with each class's shots those of --candidates candidates that
lie farthest from their mean ("far shots"), and with the classes' shares of the queries from a Dirichlet distribution of
that --concentration ("uneven queries"); and the gain of each over the class means of the same network.

Soft k-means (its sharpness) and Laplacian-regularised prototypes (sharpness, lambda, neighbours) are those of the
highest accuracy on --choose episodes of training classes, chosen for each run apart; the rows say which. Training
classes are no validation classes: the network has learned them.
"""

import functools
import itertools
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags

from lissom.training.errors import UserError, one_sentence

NAME = "scripts/transductive.py"
SHARPNESS = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0)
STRENGTHS = (0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
NEIGHBOURS = (3, 5, 10)
SLACK = 0.05
MEANS = "class means"
SHOWN = ("accuracy", "accuracy_gain")
OWN = "even"
EVEN = {"support_candidates": 0, "query_concentration": 0.0}


class Features(NamedTuple):
    """Of a batch of episodes, centred: support [B, S, D] with its labels [B, S], queries [B, Q, D] with theirs."""

    support: Any
    labels: Any
    queries: Any
    asked: Any


class Run(NamedTuple):
    """A finished run, its config, and what its tables and those of its other seeds are called."""

    path: pathlib.Path
    config: Any
    label: str


class Judged(NamedTuple):
    """Of one network the features of training episodes, and of the test episodes of each kind."""

    ways: int
    training: list[Features]
    tests: dict[str, list[Features]]


def features_of(network, objective) -> Callable[[Any, int, int], list[Features]]:
    """of(source, count, batch): what the network makes of the first episodes of a source, so many at a time."""
    import jax
    import numpy as np

    from lissom.models import transductive
    from lissom.models.variables import merge

    graph, *state = network

    @jax.jit
    def of_batch(state, given):
        support, queries = objective.features(merge(type(network)(graph, *state)), given)
        return jax.vmap(transductive.centred)(support, queries)

    def of(source, count: int, batch: int) -> list[Features]:
        found = []
        for start in range(0, count, batch):
            episodes = [source[number] for number in range(start, min(start + batch, count))]
            given = {name: np.stack([episode[name] for episode in episodes]) for name in episodes[0]}
            support, queries = map(np.asarray, of_batch(state, given))
            found.append(Features(support, given["support_labels"], queries, given["labels"]))
        return found

    return of


def labelled(paths: Sequence[pathlib.Path]) -> list[Run]:
    """The runs. UserError where one has no episodes of classes, or two would be one line of a table."""
    from lissom.eval import task_name
    from lissom.training.runs import read_config
    from lissom.training.stages import final_config

    found: dict[tuple[str, int], Run] = {}
    for path in paths:
        config = final_config(read_config(path))
        name = config.data.name
        if name != "episodes":
            raise UserError(f"{path} is of the dataset {name!r}: this is about 'episodes', which have classes")
        label = f"features of {re.sub(r'_seed[0-9]+$', '', path.name)}, {task_name(config)}"
        if (label, config.seed) in found:
            other = found[label, config.seed].path
            raise UserError(f"{other} and {path} would be one line: they are of one name, task and seed")
        found[label, config.seed] = Run(path, config, label)
    return list(found.values())


def read(run: Run, unkind: dict[str, dict], choose: int, loaded: dict[str, dict]) -> Judged:
    """The features of a run; `loaded` keeps the episodes that runs share. UserError where it has none."""
    from flax import nnx

    from lissom.eval import task_name
    from lissom.models.variables import merge
    from lissom.training.building import build_objective, load_plain
    from lissom.training.meta.networks import has_features
    from lissom.training.runs import load_network

    network, objective = load_network(run.path), build_objective(run.config)
    if not has_features(nnx.eval_shape(lambda: merge(network))):
        raise UserError(f"the network of {run.path}, {run.config.model.name}, has no features")
    task = task_name(run.config)
    if task not in loaded:
        kinds = {OWN: {}} | unkind
        loaded[task] = {kind: load_plain(run.config, **EVEN | settings) for kind, settings in kinds.items()}
    sets = loaded[task]
    own, batch = sets[OWN], run.config.evaluation.batch_size
    of = features_of(network, objective)
    tests = {kind: of(dataset.test, len(dataset.test), batch) for kind, dataset in sets.items()}
    return Judged(own.info["classes"], of(own.train, min(choose, len(own.train)), batch), tests)


@functools.cache  # of several runs a method is compiled once
def right(method: Callable, ways: int) -> Callable[[Features], Any]:
    """The compiled share [B, ...] of each episode's queries that `method` of one episode, (support, labels, queries,
    ways) -> scores [..., Q, ways], says right."""
    import jax

    def one(given: Features):
        return (method(given.support, given.labels, given.queries, ways).argmax(-1) == given.asked).mean(-1)

    return jax.jit(jax.vmap(one))


def of_episodes(of_batch: Callable[[Features], Any], batches: Sequence[Features]):
    """What `right` says of every episode."""
    import numpy as np

    return np.concatenate([of_batch(batch) for batch in batches]).astype(np.float64)


@functools.cache
def by_settings(settings) -> Callable:
    """Laplacian-regularised prototypes by a `Clustering`."""
    from lissom.models.transductive import laplacian

    return lambda *given: laplacian(*given, settings)[0]


@functools.cache
def by_all(grid: Sequence[tuple[float, float]], neighbours: int) -> Callable:
    """The same by all (sharpness, strength) of a grid at once: scores [settings, Q, ways]."""
    import jax
    import jax.numpy as jnp

    from lissom.models.transductive import Clustering, laplacian

    def every(*given):
        of = lambda sharpness, strength: laplacian(*given, Clustering(sharpness, strength, neighbours))[0]
        return jax.vmap(of)(*jnp.array(grid).T)

    return every


def chosen(batches: Sequence[Features], ways: int, strengths: Sequence[float], neighbours: Sequence[int]):
    """The `Clustering` of the highest accuracy of a grid; of several as good ones the first."""
    from lissom.models.transductive import Clustering

    grid = tuple(itertools.product(SHARPNESS, strengths))
    found = []
    for near in neighbours:
        values = of_episodes(right(by_all(grid, near), ways), batches).mean(0)
        found += [(value, Clustering(*pair, near)) for value, pair in zip(values, grid, strict=True)]
    return max(found, key=lambda pair: pair[0])[1]


def rows_of(paths: Sequence[pathlib.Path], unkind: dict[str, dict], choose: int, say: Callable[[str], None]) -> list:
    """A row of every run and method."""
    from lissom.eval import overrides_of, trained_by
    from lissom.evaluation.rows import Identity, Row, elsewhere, measure, provenance
    from lissom.models import transductive
    from lissom.models.tallies import interval, moments
    from lissom.models.transductive import Clustering

    here, rows, loaded = provenance(), [], {}
    moved = {
        "optimal transport, one pass": (functools.partial(transductive.transported, passes=1), ""),
        "optimal transport": (transductive.transported, ""),
        "optimal transport with slack": (functools.partial(transductive.transported, slack=SLACK), ""),
    }
    for run in labelled(paths):
        judged = read(run, unkind, choose, loaded)
        soft = chosen(judged.training, judged.ways, (0.0,), NEIGHBOURS[:1])
        graph = chosen(judged.training, judged.ways, STRENGTHS, NEIGHBOURS)
        # Differences in the tables are to the first.
        methods = {
            "k-means": (transductive.k_means, ""),
            MEANS: (transductive.nearest_prototype, ""),
            "soft k-means": (by_settings(soft), f"sharpness {soft.sharpness:g}"),
            "Laplacian": (
                by_settings(graph),
                f"sharpness {graph.sharpness:g}, lambda {graph.strength:g}, {graph.neighbours} neighbours",
            ),
            "Laplacian, defaults": (by_settings(Clustering()), ""),
            **moved,
        }
        trained, seed = elsewhere(trained_by(run.path), here), run.config.seed
        found = {
            (name, kind): of_episodes(right(method, judged.ways), batches)
            for name, (method, _) in methods.items()
            for kind, batches in judged.tests.items()
        }
        told = []
        for name, (_, settings) in methods.items():
            measurements = []
            for kind in judged.tests:
                shares = found[name, kind]
                values = {"accuracy": shares.mean(), "accuracy_gain": (shares - found[MEANS, kind]).mean()}
                values |= interval("accuracy_interval", moments(shares))
                measurements += [measure(metric, value, episodes=kind) for metric, value in values.items()]
            identity = Identity(NAME, run.label, seed, overrides_of(run.config), variant=name)
            notes = (f"seed {seed}: {settings}, chosen on training classes",) if settings else ()
            rows.append(Row(identity, here, tuple(measurements), trained, notes))
            told.append(f"{name} {found[name, OWN].mean():.4f}")
        say(f"{run.path}: {', '.join(told)}")
    return rows


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_list("runs", [], "directories of finished runs, or patterns; runs of several seeds are one line")
    flags.DEFINE_integer("candidates", 10, "of which a class's shots are the farthest")
    flags.DEFINE_float("concentration", 2.0, "of the shares of the classes")
    flags.DEFINE_integer("choose", 200, "episodes of training classes, on which settings are chosen")
    flags.DEFINE_string("out", None, "where rows.jsonl and the tables go")
    with one_sentence():
        from lissom.eval import check_writable, given_runs
        from lissom.evaluation.tables import shown_text, tables, write_report

        runs = given_runs(argv, "transductive.py")
        given = flags.FLAGS
        if given.choose < 1:
            raise UserError(f"--choose={given.choose} must be at least 1")
        if given.candidates < 1 or given.concentration <= 0:
            raise UserError("--candidates and --concentration must be above 0: without them episodes are even")
        if given.out:
            check_writable(given.out, "--out")
        unkind = {
            "far shots": {"support_candidates": given.candidates},
            "uneven queries": {"query_concentration": given.concentration},
        }
        rows = rows_of(runs, unkind, given.choose, lambda text: print(text, file=sys.stderr))
        print(shown_text(tables(rows), SHOWN))
        if given.out:
            write_report(rows, given.out, plot=False, shown=SHOWN)


if __name__ == "__main__":
    main(sys.argv)
