"""What the encoders of sets hold in memory, and how far the estimated gradient of UMBC lies from the gradient.

    uv run scripts/set_memory.py [--sizes=64,256,1024,4096,16384] [--chunk=64] [--draws=200] [--seeds=3] [--tiny]
        [--out=results/set_memory]

Networks of the recipe configs/sets/gaussian_mixtures.py, at their initial values. Memory (compiled): temporaries, and
with arguments and results the peak, of the gradient of a training batch of 8 sets, for each set size and each of UMBC
with one gradient chunk, UMBC with all, UMBC with all and remat, Deep Sets whole and with one gradient chunk, and full
attention. Gradient (measured), for each seed, on 8 sets of 1,024 points and for each share of chunks: `draws` estimates
g of the gradient G of the parameters in front of the sums.

    gradient_noise   sqrt(mean |g - G|^2) / |G|
    gradient_bias    |mean g - G| / |G|; beside it (modelled) gradient_noise / sqrt(draws), which it is on average where
                     there is no bias; and with `scaled` False that of estimates without the factor N / n

--out gets rows.jsonl and the table. --tiny checks the script itself; it writes to a given --out only.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from lissom.training import flags as command_line
from lissom.training.errors import UserError, one_sentence

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECIPE = "configs/sets/gaussian_mixtures.py"
OUT = ROOT / "results" / "set_memory"
SHOWN = ("train_peak_memory", "gradient_noise", "gradient_bias")
SETS = 8
VARIANTS = {
    "umbc": ("umbc", {"gradient_chunks": 1}, False),
    "umbc, gradient of all chunks": ("umbc", {"gradient_chunks": None}, False),
    "umbc, gradient of all chunks, remat": ("umbc", {"gradient_chunks": None}, True),
    "deep_sets": ("deep_sets", {}, False),
    "deep_sets, gradient of one chunk": ("deep_sets", {"gradient_chunks": 1}, False),
    "attention": ("attention", {}, False),
}


def network_of(elements: int, encoder: str, settings: dict[str, Any], remat: bool, seed: int = 0, tiny: bool = False):
    """(objective, the split network) of the recipe for sets of that many elements."""
    from flax import nnx

    from lissom.models.variables import split
    from lissom.training.building import build_network, build_objective
    from lissom.training.config import load_recipe, overridden

    config = load_recipe(RECIPE + (":tiny" if tiny else ""))
    keys = [(f"model.encoder_kwargs.{encoder}.{key}", value) for key, value in settings.items()]
    config = overridden(config, [("model.encoder", encoder), ("model.remat", remat), *keys])
    facts = {"input_shape": (elements, 2), "classes": 4}
    return build_objective(config), split(build_network(config, facts, nnx.Rngs(seed)))


def memory(elements: int, variant: str, chunk: int, tiny: bool) -> list:
    """Measurements of one compiled gradient."""
    import jax

    from lissom.data.gaussian_mixtures import gaussian_mixtures
    from lissom.evaluation.memory import step_memory
    from lissom.evaluation.rows import measure

    encoder, settings, remat = VARIANTS[variant]
    settings = {**settings, "chunk": chunk} if "gradient_chunks" in settings else settings
    objective, parts = network_of(elements, encoder, settings, remat, tiny=tiny)
    one = gaussian_mixtures(size=elements, train_size=1, test_size=1).train
    batch = {name: jax.ShapeDtypeStruct((SETS, *leaf.shape[1:]), leaf.dtype) for name, leaf in one.items()}
    of = lambda params, batch, key: objective.gradients(*parts._replace(params=params), batch, key, 0)[::2]
    found = step_memory(jax.jit(of).lower(parts.params, batch, jax.random.key(0)).compile())
    at = {"elements": elements, "batch": SETS}
    return [measure(name, found.get(name), "compiled", **at) for name in ("train_temporaries", "train_peak_memory")]


def bias(elements: int, chunk: int, draws: int, seed: int, tiny: bool) -> list:
    """Measurements of the estimates of one network on one batch, for half of the chunks, a quarter, and so on."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lissom.data.gaussian_mixtures import gaussian_mixtures
    from lissom.evaluation.rows import measure
    from lissom.models.set_chunks import chunk_count
    from lissom.models.variables import flatten

    batch = gaussian_mixtures(size=elements, train_size=SETS, test_size=1, seed=seed).train
    count, out = chunk_count(elements, chunk), []

    def gradient(chunks):
        objective, parts = network_of(
            elements, "umbc", {"chunk": chunk, "gradient_chunks": chunks}, False, seed=seed, tiny=tiny
        )

        @jax.jit
        def of(key):
            grads = flatten(objective.gradients(*parts, batch, key, 0)[0])
            own = [path for path in grads if path.startswith(("elements", "encoder/k", "encoder/v"))]
            return jnp.concatenate([grads[path].ravel() for path in own])

        return lambda key: np.asarray(of(key), np.float64)

    exact = gradient(None)(jax.random.key(0))
    norm = np.linalg.norm(exact)
    chunks = count // 2
    while chunks >= 1:
        of, keys = gradient(chunks), jax.random.split(jax.random.key(seed + 1), draws)
        found = np.stack([of(key) for key in keys])
        share = {"share": chunks / count, "elements": elements, "draws": draws}
        noise = np.sqrt(np.square(found - exact).sum(1).mean()) / norm
        mean = found.mean(0)
        out += [
            measure("gradient_noise", noise, **share),
            measure("gradient_bias", noise / np.sqrt(draws), "modelled", scaled=True, **share),
            measure("gradient_bias", np.linalg.norm(mean - exact) / norm, scaled=True, **share),
            measure("gradient_bias", np.linalg.norm(mean * chunks / count - exact) / norm, scaled=False, **share),
        ]
        chunks //= 2
    return out


def run(
    sizes: Sequence[int],
    *,
    chunk: int = 64,
    draws: int = 200,
    seeds: int = 3,
    tiny: bool = False,
    out: pathlib.Path | None = None,
) -> list:
    """Measures, writes and returns the rows."""
    for name, value, least in (("--chunk", chunk, 1), ("--draws", draws, 2), ("--seeds", seeds, 1)):
        if value < least:
            raise UserError(f"{name}={value} must be at least {least}")
    if not sizes or min(sizes) < 1:
        raise UserError(f"--sizes={','.join(map(str, sizes))} must hold one number or more, each at least 1")
    from lissom.eval import check_writable
    from lissom.evaluation.rows import Identity, Row, provenance, write_rows
    from lissom.evaluation.tables import write_report

    elements = 32 if tiny else 1024
    if chunk * 2 > elements:
        raise UserError(f"--chunk={chunk} must be at most {elements // 2}: the gradient is that of {elements} points")
    out = OUT if out is None and not tiny else out
    if out is not None:
        check_writable(out, "--out")
    here, rows = provenance(), []

    def add(variant, seed, measurements):
        recipe = f"{RECIPE}:tiny" if tiny else RECIPE
        identity = Identity(recipe, "memory and gradient of set encoders", seed, variant=variant)
        rows.append(Row(identity, here, tuple(measurements)))
        said = ", ".join(
            f"{m.name} {' '.join(f'{k}={v}' for k, v in m.conditions.items())}: {m.value:.4g} {m.unit}"
            for m in measurements
            if m.value is not None
        )
        print(f"{variant}: {said}")
        if out is not None:  # after each: what a run that is stopped has measured is kept
            write_rows(out / "rows.jsonl", rows)

    for variant in VARIANTS:
        add(variant, None, [m for size in sizes for m in memory(size, variant, chunk, tiny)])
    for seed in range(seeds):
        add("umbc", seed, bias(elements, chunk, draws, seed, tiny))
    if out is not None:
        write_report(rows, out, plot=False, shown=SHOWN)
    return rows


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_list("sizes", ["64", "256", "1024", "4096", "16384"], "elements of a set")
    flags.DEFINE_integer("chunk", None, "elements a chunk, by default 64 (8 with --tiny)")
    flags.DEFINE_integer("draws", 200, "estimates of the gradient for each share of chunks")
    flags.DEFINE_integer("seeds", 3, "networks and batches that the gradient is estimated of")
    flags.DEFINE_bool("tiny", False, "the smallest network")
    flags.DEFINE_string("out", None, f"the directory of the rows and the table, by default {OUT.relative_to(ROOT)}")
    with one_sentence():
        if command_line.parse(argv, recipe=False):
            raise UserError("--config is no flag of set_memory.py, which takes no recipe")
        given = flags.FLAGS
        if not all(size.isdigit() for size in given.sizes):
            raise UserError(f"--sizes={','.join(given.sizes)} must be whole numbers")
        out = pathlib.Path(given.out) if given.out else None
        sizes = [int(size) for size in given.sizes]
        chunk = (8 if given.tiny else 64) if given.chunk is None else given.chunk
        run(sizes, chunk=chunk, draws=given.draws, seeds=given.seeds, tiny=given.tiny, out=out)


if __name__ == "__main__":
    main(sys.argv)
