"""Times MAML's meta-gradient of many tasks in turns: tasks under one vmap, a Python loop over them, and torch.

    uv run scripts/meta_steps.py [--tasks=32] [--repeats=20] [--out=results/meta_steps]

Of the networks of configs/fewshot/sinusoid.py and glyphs.py, with their own episodes. `speedup` is the time of the line
/ that of the vmapped tasks. The loop runs the same compiled gradient a task at a time and adds up. With
LISSOM_REFERENCE_PYTHON, torch (torch.func over the tasks; a loop over them with autograd, as learn2learn has it) takes
its turns, on the same numbers; its gradients must agree. A second table is of convolutions whose kernels are mapped
over: as XLA has them, and as products of matrices (models/products.py). What MAML's orders, inner steps and remat cost
is asked of scripts/training_steps.py:

    uv run scripts/training_steps.py --config=configs/fewshot/glyphs.py --vary=objective=fomaml,maml
"""

import functools
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

from lissom.training import flags as command_line
from lissom.training.config import load_recipe, overridden
from lissom.training.errors import UserError, one_sentence

ROOT = pathlib.Path(__file__).parent.parent
RECIPES = {"mlp": "configs/fewshot/sinusoid.py", "conv4": "configs/fewshot/glyphs.py"}
ORDERS = {"second order": "maml", "first order": "fomaml"}
SETS = 2  # batches that are taken in turns
SHOWN = ("step_p50", "latency_spread", "speedup")
AGREE = 1e-2  # of the largest number of a gradient: float32 in another order, through five inner steps


class Problem:
    """The meta-gradient of one network and order: vmapped, and a task at a time."""

    def __init__(self, network: str, objective: str, tasks: int, tiny: bool):
        import jax
        import jax.numpy as jnp

        from lissom import data
        from lissom.training import sharding
        from lissom.training.building import assemble, load_dataset

        config = load_recipe(RECIPES[network] + (":tiny" if tiny else ""))
        config = overridden(config, [("objective", objective), ("data.batch_size", tasks)])
        dataset = load_dataset(config)
        facts = {**dataset.info, "kind": dataset.kind}
        assembly = assemble(config, facts, 10, sharding.make_mesh({"data": 1}))
        self.settings = config.objective_kwargs[objective].to_dict()
        self.params, self.stats, frozen = jax.jit(assembly.make)(jax.random.key(0))
        step = lambda step: data.train_batch(dataset, step=step, batch_size=tasks, seed=0)
        self.batches = [jax.tree.map(jnp.asarray, step(number)) for number in range(SETS)]
        self.single = [
            [jax.tree.map(lambda x, at=at: x[at : at + 1], batch) for at in range(tasks)] for batch in self.batches
        ]
        gradients = lambda params, stats, batch: assembly.objective.gradients(
            assembly.graph, params, stats, frozen, batch, jax.random.key(1), jnp.zeros((), jnp.int32)
        )[0]
        compiled = lambda batch: jax.jit(gradients).lower(self.params, self.stats, batch).compile()
        self.whole, self.each = compiled(self.batches[0]), compiled(self.single[0][0])
        add = lambda total, one: jax.tree.map(lambda a, b: a + b / tasks, total, one)
        self.add, self.zeros = jax.jit(add), jax.tree.map(jnp.zeros_like, self.params)

    def vmapped(self, number: int) -> Any:
        return self.whole(self.params, self.stats, self.batches[number % SETS])

    def loop(self, number: int) -> Any:
        total = self.zeros
        for batch in self.single[number % SETS]:
            total = self.add(total, self.each(self.params, self.stats, batch))
        return total


def torch_order(tree: Mapping[str, Any], network: str) -> list:
    """The leaves of parameters, or gradients, in the order in which torch is given them."""
    layers, norms = tree.get("layers", tree.get("convs")), tree.get("norms", {})
    found = []
    for number in sorted(layers):
        found += [layers[number]["kernel"]]
        found += [norms[number]["scale"], norms[number]["bias"]] if network == "conv4" else [layers[number]["bias"]]
    return [*found, tree["head"]["kernel"], tree["head"]["bias"]]


def rows_of(tasks: int, repeats: int, tiny: bool, worker: Any) -> list:
    """A row of every network, order and way."""
    from lissom.evaluation.latency import in_turns
    from lissom.evaluation.rows import Identity, Row, measure, provenance

    here, rows = provenance(), []
    for network in RECIPES:
        for order, objective in ORDERS.items():
            problem = Problem(network, objective, tasks, tiny)
            timers = {
                "vmapped": functools.partial(_timed, problem.vmapped),
                "a loop over tasks": functools.partial(_timed, problem.loop),
            }
            agree(problem.vmapped(0), problem.loop(0), "a loop over tasks")
            labels = _torch(worker, problem, network, order, timers) if worker else []
            for timer in timers.values():
                timer(0)
            times = in_turns(timers, repeats)
            for label in labels:
                worker.drop(label)
            for label, taken in times.items():
                found = [
                    measure("step_p50", taken.p50, tasks=tasks),
                    measure("latency_spread", taken.spread, tasks=tasks),
                    measure("speedup", taken.p50 / times["vmapped"].p50, tasks=tasks, reference="this line"),
                ]
                identity = Identity(RECIPES[network], f"meta-gradient, {network}, {order}", variant=label)
                rows.append(Row(identity, here, tuple(found)))
    return rows + _convolutions(tasks, repeats, here)


def _timed(function: Callable, number: int) -> float:
    import time

    import jax

    start = time.perf_counter()
    jax.block_until_ready(function(number))
    return time.perf_counter() - start


def agree(ours: Any, theirs: Any, who: str) -> None:
    """Raises UserError where two trees of gradients are not the same."""
    import jax
    import numpy as np

    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        apart, size = np.abs(np.asarray(one) - np.asarray(other)).max(), np.abs(np.asarray(one)).max()
        if apart > AGREE * max(size, 1e-3):
            raise UserError(f"the gradients of {who} are not ours: {apart:.3g} apart, of {size:.3g}")


def _torch(worker: Any, problem: Problem, network: str, order: str, timers: dict) -> list[str]:
    """Adds torch's two ways; returns the labels that are to be dropped behind them."""
    import numpy as np

    names = ("support_inputs", "support_labels", "inputs", "labels")
    given = [np.asarray(leaf) for leaf in torch_order(problem.params, network)]
    inputs = [[*(np.asarray(batch[name]) for name in names), *given] for batch in problem.batches]
    labels = []
    for name, vmapped in (("torch.func", True), ("torch, a loop over tasks", False)):
        settings = {key: problem.settings[key] for key in ("inner_steps", "inner_rate")}
        options = {"device": "cpu", "network": network, "second_order": order == "second order", "vmapped": vmapped}
        label = worker.prepare("torch_maml", {**settings, **options}, inputs)
        agree(torch_order(problem.vmapped(0), network), worker.outputs(label), name)
        timers[name] = functools.partial(worker.run, label)
        labels.append(label)
    return labels


def _convolutions(tasks: int, repeats: int, here: Any) -> list:
    """A 3 x 3 convolution of 20 examples of 10 x 10 with 32 channels, of as many kernels as tasks."""
    import jax

    from lissom.evaluation.latency import in_turns
    from lissom.evaluation.rows import Identity, Row, measure
    from lissom.models.products import Convolution

    product = Convolution(stride=1)
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernels = jax.random.normal(keys[0], (tasks, 20, 10, 10, 32)), jax.random.normal(keys[1], (tasks, 3, 3, 32, 32))
    matrices = lambda x, k: product.result(product.rows(x, k) @ product.matrix(k), x, k)
    ways = {"a product of matrices a kernel": matrices, "XLA's grouped convolution": product}
    timers = {}
    for label, function in ways.items():
        slope = jax.jit(jax.vmap(jax.grad(lambda k, x, f=function: jax.numpy.square(f(x, k)).sum(), argnums=(0, 1))))
        timers[label] = functools.partial(_timed, lambda _, slope=slope: slope(kernels, x))
        timers[label](0)
    times = in_turns(timers, repeats)
    first, rows = next(iter(times.values())), []
    for label, taken in times.items():
        found = (
            measure("step_p50", taken.p50, tasks=tasks),
            measure("latency_spread", taken.spread, tasks=tasks),
            measure("speedup", taken.p50 / first.p50, tasks=tasks, reference="this line"),
        )
        identity = Identity(
            "scripts/meta_steps.py", "a convolution and its gradient, kernels mapped over", variant=label
        )
        rows.append(Row(identity, here, found))
    return rows


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_integer("tasks", 32, "tasks of a batch")
    flags.DEFINE_integer("repeats", 20, "timed gradients of each way")
    flags.DEFINE_bool("tiny", False, "the recipes' tiny mode, for tests")
    flags.DEFINE_string("out", None, "where rows.jsonl and the table go")
    with one_sentence():
        if command_line.parse(argv, recipe=False):
            raise UserError("meta_steps.py takes no --config: it is about the recipes of configs/fewshot/")
        given = flags.FLAGS
        for name, least in (("tasks", 1), ("repeats", 2)):
            if given[name].value < least:
                raise UserError(f"--{name}={given[name].value} must be at least {least}")
        from lissom.eval import check_writable
        from lissom.evaluation.benchmarks.worker import VARIABLE, ReferenceWorker, WorkerError
        from lissom.evaluation.tables import shown_text, tables, write_report

        if given.out:
            check_writable(given.out, "--out")
        worker, python = None, os.environ.get(VARIABLE)
        try:
            if python:
                cores = len(os.sched_getaffinity(0))
                worker = ReferenceWorker(python, ROOT / "scripts" / "reference_worker.py", threads=cores)
            rows = rows_of(given.tasks, given.repeats, given.tiny, worker)
        except WorkerError as error:
            raise UserError(str(error)) from error
        finally:
            if worker is not None:
                worker.close()
        print(shown_text(tables(rows), SHOWN))
        if given.out:
            write_report(rows, given.out, plot=False, shown=SHOWN)


if __name__ == "__main__":
    main(sys.argv)
