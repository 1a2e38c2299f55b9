"""How often a cache of a few experts has the one that is wanted, for decoders that were trained.

    uv run scripts/expert_cache.py --runs='runs/compare/read_me/*' --runs='runs/compare/domains_moe/gate=top_k_*'
        [--shares=0.34,0.5,0.84] [--windows=4,16,64] [--tokens=20000] --out=results/expert_cache

Requests are those of test sequences, one after the other, token by token. A network of Read-ME wants one expert a token
for all layers; a mixture of experts in each layer as many as its gate names, layer by layer, and an expert of one layer
is another than that of the next. Its requests are known a layer ahead at best, so `lookahead`, which knows the next
tokens, is simulated for Read-ME alone. `share` is that of all experts which the cache holds, rounded down to whole ones
(one at least): `held` says how many of all there are. Cost is not simulated: a miss of Read-ME loads an expert of every
layer.

Rows: `hit_rate` for each run, share and policy (lru, lookahead with its window in tokens, belady: what no cache beats).
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from lissom.training.errors import UserError, one_sentence


def requests_of(parts, batches, tokens: int) -> tuple[list[int], int, int]:
    """(experts in the order of their requests, how many experts there are, requests a token) of a network on at least
    one batch, and no more than so many tokens. UserError for a network that routes no tokens."""
    import jax
    import numpy as np
    from flax import nnx

    from lissom.compression.transforms import replace_layers
    from lissom.models.moe.choosing_experts import Soft
    from lissom.models.moe.layer import MoE, Telling
    from lissom.models.read_me import PreGated
    from lissom.models.variables import merge, split

    network = merge(parts)
    if isinstance(network, PreGated):
        experts = network.router.scores.kernel.shape[-1]
        run = jax.jit(lambda inputs: merge(parts).scores(inputs).argmax(-1)[..., None, None])
        layers = 1
    else:
        mixtures = [node for _, node in nnx.iter_graph(network) if isinstance(node, MoE)]
        if not mixtures:
            raise UserError("it has no experts that tokens are brought to")
        if any(isinstance(mixture.gate, Soft) for mixture in mixtures):
            raise UserError("its gate brings mixtures of tokens to experts, so that all are wanted")
        experts, layers = mixtures[0].gate.experts, len(mixtures)
        told = split(replace_layers(network, (MoE,), lambda _, layer: Telling(layer)))
        run = jax.jit(lambda inputs: merge(told)(inputs)[1]["metrics"]["chosen"].transpose(1, 2, 0, 3))
    found, seen = [], 0
    for batch in batches:
        chosen = np.asarray(run(batch["inputs"]))[batch["mask"] > 0]  # [B, T, layers, k]
        named = (chosen >= 0) & (chosen < experts)
        numbers = chosen + experts * np.arange(layers)[:, None]
        found += numbers[named].tolist()
        seen += chosen.shape[0] * chosen.shape[1]
        if seen >= tokens:
            break
    if not found:
        raise UserError("its experts were wanted by no token")
    each = max(1, round(len(found) / seen))
    return found[: tokens * each], experts * layers, each


def measurements(requests: Sequence[int], experts: int, each: int, shares, windows, ahead: bool) -> list:
    """The hit rates of one run."""
    from lissom.evaluation.expert_cache import hit_rate
    from lissom.evaluation.rows import measure

    found = []
    for share in shares:
        capacity = max(1, int(share * experts))
        at = {"share": share, "held": f"{capacity} of {experts}"}
        policies = [("lru", 0, {}), ("belady", float("inf"), {})]
        if ahead:
            policies += [("lookahead", window * each, {"window": window}) for window in windows]
        for policy, window, conditions in policies:
            rate = hit_rate(requests, capacity, window=window)
            found.append(measure("hit_rate", rate, policy=policy, **at, **conditions))
    return found


def run(
    runs: Sequence[pathlib.Path | str],
    *,
    shares: Sequence[float] = (0.34, 0.5, 0.84),
    windows: Sequence[int] = (4, 16, 64),
    tokens: int = 20_000,
    out: pathlib.Path | None = None,
) -> list:
    """Measures, writes and returns the rows; a run without experts is left out and said so."""
    if not shares or not all(0 < share <= 1 for share in shares):
        raise UserError(f"--shares={','.join(map(str, shares))} must be above 0 and at most 1")
    if any(window < 1 for window in windows):
        raise UserError(f"--windows={','.join(map(str, windows))} must be at least 1 token each")
    if tokens < 1:
        raise UserError(f"--tokens={tokens} must be at least 1")
    from lissom import data
    from lissom.compression.artefacts import structure_of
    from lissom.eval import check_writable, overrides_of, task_name
    from lissom.evaluation.rows import Identity, Row, provenance
    from lissom.evaluation.tables import write_report
    from lissom.models.read_me import PreGated
    from lissom.models.variables import merge
    from lissom.training.building import load_dataset
    from lissom.training.runs import load_network, read_config
    from lissom.training.stages import final_config

    if out is not None:
        check_writable(out, "--out")
    here, rows = provenance(), []
    for path in runs:
        given = read_config(path)
        config, parts = final_config(given), load_network(path, structure_of)
        dataset = load_dataset(config)
        batches = data.eval_batches(dataset, batch_size=config.evaluation.batch_size)
        try:
            requests, experts, each = requests_of(parts, batches, tokens)
        except UserError as error:
            print(f"skipped {path}: {error}", file=sys.stderr)
            continue
        ahead = isinstance(merge(parts), PreGated)
        found = measurements(requests, experts, each, shares, windows, ahead)
        variant = pathlib.Path(path).name.partition("_seed")[0]
        task = f"expert cache, {task_name(config)}"
        identity = Identity(config.recipe, task, config.seed, overrides_of(given), variant=variant)
        rows.append(Row(identity, here, tuple(found)))
        print(f"{variant}, seed {config.seed}: " + ", ".join(f"{dict(m.conditions)}: {m.value:.3f}" for m in found))
    if not rows:
        raise UserError(f"none of {len(runs)} runs has experts")
    if out is not None:
        write_report(rows, out, plot=False)
    return rows


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_multi_string("runs", [], "directories of runs, or patterns; each may hold several")
    flags.DEFINE_list("shares", ["0.34", "0.5", "0.84"], "of all experts, that the cache holds")
    flags.DEFINE_list("windows", ["4", "16", "64"], "tokens that lookahead knows beforehand")
    flags.DEFINE_integer("tokens", 20_000, "of the test set")
    flags.DEFINE_string("out", None, "the directory of the rows and the table")
    with one_sentence():
        from lissom.eval import given_runs

        runs, given = given_runs(argv, "expert_cache.py"), flags.FLAGS
        try:
            shares, windows = [float(share) for share in given.shares], [int(window) for window in given.windows]
        except ValueError as error:
            raise UserError(f"--shares and --windows hold numbers: {error}") from error
        out = pathlib.Path(given.out) if given.out else None
        run(runs, shares=shares, windows=windows, tokens=given.tokens, out=out)


if __name__ == "__main__":
    main(sys.argv)
