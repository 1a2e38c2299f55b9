"""What a budget of random trials is worth to each gate of a mixture of experts, where the right routing is known.

    uv run scripts/gate_trials.py [--gates=top_k,noisy_top_k,sigmoid_bias,hash,dselect_k,comet] [--trials=32]
        [--steps=1500] [--seeds=3] [--tiny] [--out=results/gate_trials]

Data: `lissom.data.task_clusters`, four clusters of four regression tasks of 4,096 training examples. A network is a
linear layer, a mixture of eight experts of eight hidden units, of which an example has two, and a linear layer; each
gate also with the local search of COMET over the first tenth of the steps ("+ search"). A trial draws its learning rate
from 1e-3 to 3e-2, the weight of its gate's loss (`balance`, `entropy`) and that of the search's entropy from 1e-3 to
1e-1, all log-uniform, and its own initial values; other settings of gates are their defaults. The trial of the least
validation loss is chosen.

    trial_loss    mean squared error of the chosen one of n trials on test data, expected over all draws of n of them,
                  as a share of the targets' variance
    purity        test examples of the cluster that their heaviest expert has most of: mean of all trials, and ("best")
                  of the chosen one of all

"known clusters" (ceiling) gives each cluster two experts of its own, "no clusters" (floor) the same two to all. In
training dselect_k, comet and all that is searched compute all experts; afterwards all have two.

--out gets rows.jsonl and the table. --tiny checks the script itself, on few examples, trials and steps; it writes to a
given --out only.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from lissom.training import flags as command_line
from lissom.training.errors import UserError, one_sentence

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAME = "scripts/gate_trials.py"
OUT = ROOT / "results" / "gate_trials"
GATES = ("top_k", "noisy_top_k", "sigmoid_bias", "hash", "dselect_k", "comet")
WIDTH, EXPERTS, HIDDEN, BATCH, K = 16, 8, 8, 256, 2
CLUSTERS = 4
FIXED = {"known clusters": "ceiling", "no clusters": "floor"}
WEIGHTED = {"top_k": "balance", "noisy_top_k": "balance", "dselect_k": "entropy", "comet": "entropy"}
BUDGETS = (1, 2, 4, 8, 16, 32)
NAMES = ("rate", "gate_weight", "search_weight")
RATES, WEIGHTS = (1e-3, 3e-2), (1e-3, 1e-1)


def make_network(gate: str, inputs: int, steps: int, rngs):
    """gate: a name, or one of FIXED. Losses of the gate and of the search come with weight 1; search: its steps, or
    0."""
    import jax.numpy as jnp
    from flax import nnx

    from lissom.models.context import Context
    from lissom.models.linear import Linear
    from lissom.models.moe import GATES as KINDS
    from lissom.models.moe.experts import Experts
    from lissom.models.moe.forms import everyone
    from lissom.models.moe.local_search import LocalSearch, dense
    from lissom.models.moe.routing import Choices, Everyone
    from lissom.models.registry import construct

    class Network(nnx.Module):
        def __init__(self):
            self.inner = Linear(inputs, WIDTH, axes=(None, None), rngs=rngs)
            self.outer = Linear(WIDTH, 1, axes=(None, None), rngs=rngs)
            settings = {gate: {WEIGHTED[gate]: 1.0}} if gate in WEIGHTED else {}
            if gate == "top_k":  # the batch is one sequence here
                settings[gate]["balance_sequences"] = 1
            kinds = {"width": WIDTH, "experts": EXPERTS, "k": K, "rngs": rngs}
            self.gate = None if gate in FIXED else construct(KINDS, gate, settings, "gate", **kinds)
            self.experts = Experts(WIDTH, HIDDEN, experts=EXPERTS, gated=False, dtype="float32", rngs=rngs)
            self.search = LocalSearch(EXPERTS, steps=steps, temperatures=(0.1, 1e-3), entropy=1.0) if steps else None

        def __call__(self, x, task, cluster, train, soft, key):
            """x [N, D] -> (predictions [N], weights of experts [N, E], losses). `soft`: whether the search goes on."""
            h = self.inner(x)[None]
            losses = {}
            if self.gate is None:
                own = cluster if gate == "known clusters" else 0 * cluster
                chosen = jnp.stack([2 * own, 2 * own + 1], -1)[None]
                routing = Choices(chosen, jnp.full(chosen.shape, 0.5))
            else:
                routing, aux = self.gate(h, Context(train=train, tokens=task[None]), key)
                losses = dict(aux["losses"])
            if self.search is not None:
                routing = self.search.soft(routing, h.shape[:2]) if soft else self.search.hard(routing)
                losses |= self.search.losses() if soft else {}
            weights = dense(routing, h.shape[:2], EXPERTS)
            y = h + everyone(self.experts.kernels, h, Everyone(weights))
            return self.outer(y)[0, :, 0], weights[0], losses

    return Network()


def trained(gate: str, search: int, steps: int, train, trials: int, seed: int):
    """The networks of all trials, stacked, as (graph, state)."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    from lissom.models.variables import Parts, merge, split, stats_of

    rng = np.random.default_rng(seed)
    drawn = lambda low, high: jnp.asarray(np.exp(rng.uniform(np.log(low), np.log(high), trials)), jnp.float32)
    rates, gate_weights, search_weights = drawn(*RATES), drawn(*WEIGHTS), drawn(*WEIGHTS)
    make = lambda key: make_network(gate, train.inputs.shape[1], search, nnx.Rngs(params=key))
    graph = split(nnx.eval_shape(lambda: make(jax.random.key(0)))).graph
    arrays = {name: jnp.asarray(value) for name, value in train._asdict().items()}
    tx, falling = optax.scale_by_adam(), optax.cosine_decay_schedule(1.0, steps)

    def step(carry, number, soft, key, rate, gate_weight, search_weight):
        (params, stats, frozen), moments = carry
        at_key, gate_key = jax.random.split(jax.random.fold_in(key, number))
        at = jax.random.randint(at_key, (BATCH,), 0, len(arrays["targets"]))
        batch = {name: value[at] for name, value in arrays.items()}

        def loss(params):
            module = merge(Parts(graph, params, stats, frozen))
            y, _, losses = module(batch["inputs"], batch["task"], batch["cluster"], True, soft, gate_key)
            if soft:
                module.search.step()
            of_search = losses.pop("search_entropy", 0.0)
            whole = jnp.square(y - batch["targets"]).mean()
            return whole + gate_weight * sum(losses.values()) + search_weight * of_search, stats_of(module)

        grads, stats = jax.grad(loss, has_aux=True)(params)
        updates, moments = tx.update(grads, moments)
        scale = -rate * falling(number)
        params = jax.tree.map(lambda p, u: p + scale * u, params, updates)
        return ((params, stats, frozen), moments), None

    def one(key, *drawn):
        parts = split(make(key))
        carry = (parts[1:], tx.init(parts.params))
        for soft, numbers in ((True, jnp.arange(search)), (False, jnp.arange(search, steps))):
            if len(numbers):
                further = functools.partial(step, soft=soft, key=key, **dict(zip(NAMES, drawn, strict=True)))
                carry = jax.lax.scan(further, carry, numbers)[0]
        return carry[0]

    keys = jax.random.split(jax.random.key(seed), trials)
    return graph, jax.jit(jax.vmap(one))(keys, rates, gate_weights, search_weights)


def judged(graph, states, data) -> tuple:
    """(mean squared error as a share of the targets' variance, purity) [trials] each."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lissom.models.tallies import purity
    from lissom.models.variables import Parts, merge

    inputs, targets, task, cluster = (jnp.asarray(value) for value in data)

    @jax.jit
    @jax.vmap
    def run(state):
        y, weights, _ = merge(Parts(graph, *state))(inputs, task, cluster, False, False, None)
        use = jax.ops.segment_sum(jax.nn.one_hot(weights.argmax(-1), EXPERTS), cluster, CLUSTERS)
        return jnp.square(y - targets).mean() / targets.var(), use

    errors, uses = run(states)
    return np.asarray(errors), np.array([purity(np.asarray(use))["purity"] for use in uses])


def run(
    gates: Sequence[str] = GATES,
    *,
    trials: int = 32,
    steps: int = 1500,
    seeds: int = 3,
    tiny: bool = False,
    out: pathlib.Path | None = None,
) -> list:
    """Measures, writes and returns the rows."""
    if unknown := [gate for gate in gates if gate not in GATES]:
        raise UserError(f"--gates: {unknown[0]!r} is none of {', '.join(GATES)}")
    for name, value, least in (("trials", trials, 1), ("steps", steps, 10), ("seeds", seeds, 1)):
        if value < least:
            raise UserError(f"--{name}={value} must be at least {least}")
    from lissom.data.task_clusters import task_clusters
    from lissom.eval import check_writable
    from lissom.evaluation.rows import Identity, Row, measure, provenance, write_rows
    from lissom.evaluation.tables import write_report
    from lissom.evaluation.trials import expected_best

    out = OUT if out is None and not tiny else out
    trials, steps = (min(trials, 2), min(steps, 20)) if tiny else (trials, steps)
    if out is not None:
        check_writable(out, "--out")
    variants = [(gate, gate + end, search) for gate in gates for end, search in (("", 0), (" + search", steps // 10))]
    here, rows = provenance(), []
    for seed in range(seeds):
        sizes = (256, 256, 256) if tiny else (4096, 4096, 8192)
        draws = [task_clusters(seed=seed, draw=n, size=size, clusters=CLUSTERS) for n, size in enumerate(sizes)]
        for gate, label, search in [*((name, name, 0) for name in FIXED), *variants]:
            graph, states = trained(gate, search, steps, draws[0], trials, seed)
            chosen_by, _ = judged(graph, states, draws[1])
            values, pure = judged(graph, states, draws[2])
            budgets = [budget for budget in BUDGETS if budget <= trials]
            found = [
                measure("trial_loss", expected_best(chosen_by, values, budget), trials=budget) for budget in budgets
            ]
            found.append(measure("purity", float(pure.mean()), of="mean"))
            found.append(measure("purity", expected_best(chosen_by, pure, trials), of="best"))
            role, overrides = FIXED.get(gate, "variant"), {"trials": trials, "steps": steps}
            identity = Identity(NAME, "task_clusters", seed, overrides, variant=label, role=role)
            rows.append(Row(identity, here, tuple(found)))
            print(f"{label}, seed {seed}: " + ", ".join(f"{m.value:.3f}" for m in found))
            if out is not None:  # after each: what a run that is stopped has measured is kept
                write_rows(out / "rows.jsonl", rows)
    if out is not None:
        write_report(rows, out, plot=False)
    return rows


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_list("gates", list(GATES), "names of models.moe.GATES")
    flags.DEFINE_integer("trials", 32, "draws of rates and weights")
    flags.DEFINE_integer("steps", 1500, f"of {BATCH} examples")
    flags.DEFINE_integer("seeds", 3, "draws of tasks")
    flags.DEFINE_bool("tiny", False, "few examples")
    flags.DEFINE_string("out", None, f"the directory of the rows and the table, by default {OUT.relative_to(ROOT)}")
    with one_sentence():
        if command_line.parse(argv, recipe=False):
            raise UserError("--config is no flag of gate_trials.py, which takes no recipe")
        given = flags.FLAGS
        out = pathlib.Path(given.out) if given.out else None
        run(given.gates, trials=given.trials, steps=given.steps, seeds=given.seeds, tiny=given.tiny, out=out)


if __name__ == "__main__":
    main(sys.argv)
