"""What a step of a mixture of experts costs beside that of a dense layer of as many active FLOPs.

    uv run scripts/moe_layer.py [--widths=128,256,512] [--tokens=2048] [--experts=8] [--repeats=20] [--tiny]
        [--out=results/moe_layer]

A step is one layer in training: output, gradient by the parameters, gradient by the input, on random inputs in
sequences of 128 tokens. The dense layer is SwiGLU of expansion 4; mixtures have `experts` of expansion 2, of which a
token has two (or expansion 4 and one, or expansion 1 and four). All are timed in turns. `speedup` is the dense layer's
median time / the mixture's: at least 1 / 1.3 is the goal. `dselect_k` and `comet` compute all experts in training.

--out gets rows.jsonl and the table. --tiny checks the script itself; it writes to a given --out only.
"""

import pathlib
import sys
from collections.abc import Callable, Sequence

from absl import flags

from lissom.training import flags as command_line
from lissom.training.errors import UserError, one_sentence

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "moe_layer"
SHOWN = ("latency_p50", "latency_spread", "speedup", "train_temporaries", "parameters")
DENSE = "dense"
LENGTH = 128
TWO = {"k": 2, "expansion": 2.0}
VARIANTS = {
    DENSE: None,
    "top_k": {"gate": "top_k", **TWO},
    "top_k, one expert": {"gate": "top_k", "k": 1, "expansion": 4.0},
    "top_k, four experts": {"gate": "top_k", "k": 4, "expansion": 1.0},
    "top_k, capacity 1.25": {"gate": "top_k", **TWO, "capacity": 1.25},
    "noisy_top_k": {"gate": "noisy_top_k", **TWO},
    "sigmoid_bias": {"gate": "sigmoid_bias", **TWO},
    "hash": {"gate": "hash", **TWO},
    "expert_choice": {"gate": "expert_choice", **TWO},
    # 128 tokens at one place of the sequences, or of one sequence, make as many slots as two experts a token.
    "soft": {"gate": "soft", **TWO},
    "dselect_k": {"gate": "dselect_k", **TWO},
    "comet": {"gate": "comet", **TWO},
}


def layer_of(variant: str, width: int, tokens: int, experts: int):
    """The layer of that name; `soft` has as many slots as two experts a token need."""
    from flax import nnx

    from lissom.models.ffn import SwiGLU
    from lissom.models.moe.layer import MoE

    settings = VARIANTS[variant]
    if settings is None:
        return SwiGLU(width, expansion=4.0, rngs=nnx.Rngs(0))
    if variant == "soft":
        settings = {**settings, "gate_kwargs": {"soft": {"slots": max(1, 2 * min(LENGTH, tokens) // experts)}}}
    return MoE(width, experts=experts, **settings, rngs=nnx.Rngs(0))


def step_of(layer, width: int, tokens: int) -> tuple[Callable, list[tuple]]:
    """(the compiled step, inputs to rotate)."""
    import jax
    import jax.numpy as jnp

    from lissom.models.context import Context
    from lissom.models.variables import merge, split
    from lissom.training.objectives.base import auxiliary

    parts, shape = split(layer), (max(1, tokens // LENGTH), min(LENGTH, tokens))

    def loss(params, x, numbers, key, direction):
        y, aux = merge(parts._replace(params=params))(x, Context(train=True, tokens=numbers), key)
        return jnp.vdot(y, direction) / y.size + auxiliary(aux)

    def arguments(seed):
        first, second, third, key = jax.random.split(jax.random.key(seed), 4)
        x, direction = (jax.random.normal(key, (*shape, width)) for key in (first, second))
        return parts.params, x, jax.random.randint(third, shape, 0, 256), key, direction

    inputs = [arguments(seed) for seed in range(4)]
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*inputs[0]).compile(), inputs


def measurements(width: int, tokens: int, experts: int, repeats: int) -> dict[str, list]:
    """{variant: what was measured of it}."""
    from lissom.evaluation.latency import measure_interleaved
    from lissom.evaluation.memory import parameter_count, step_memory
    from lissom.evaluation.rows import measure
    from lissom.models.variables import split

    layers = {variant: layer_of(variant, width, tokens, experts) for variant in VARIANTS}
    steps = {variant: step_of(layer, width, tokens) for variant, layer in layers.items()}
    times = measure_interleaved(steps, repeats=repeats)
    at = {"width": width, "tokens": tokens}
    found = {}
    for variant, (step, _) in steps.items():
        taken = times[variant]
        found[variant] = [
            measure("latency_p50", taken.p50, **at),
            measure("latency_spread", taken.spread, **at),
            measure("speedup", times[DENSE].p50 / taken.p50, **at, reference=DENSE),
            measure("train_temporaries", step_memory(step).get("train_temporaries"), "compiled", **at),
            measure("parameters", parameter_count(split(layers[variant]).params), "compiled", **at),
        ]
    return found


def run(
    widths: Sequence[int],
    *,
    tokens: int = 2048,
    experts: int = 8,
    repeats: int = 20,
    tiny: bool = False,
    out: pathlib.Path | None = None,
) -> list:
    """Measures, writes and returns the rows."""
    for name, value, least in (("--tokens", tokens, 1), ("--repeats", repeats, 2)):
        if value < least:
            raise UserError(f"{name}={value} must be at least {least}")
    if tokens > LENGTH and tokens % LENGTH:
        raise UserError(f"--tokens={tokens} must be a multiple of {LENGTH}, the length of a sequence")
    if experts < 4 or experts & (experts - 1):
        raise UserError(f"--experts={experts} must be a power of 2 from 4 on: the gates with trees need it")
    if not widths or min(widths) < 1:
        raise UserError(f"--widths={','.join(map(str, widths))} must hold one number or more, each at least 1")
    from lissom.eval import check_writable
    from lissom.evaluation.rows import Identity, Row, provenance
    from lissom.evaluation.tables import write_report

    out = OUT if out is None and not tiny else out
    if out is not None:
        check_writable(out, "--out")
    found: dict[str, list] = {variant: [] for variant in VARIANTS}
    for width in widths:
        for variant, entries in measurements(width, tokens, experts, repeats).items():
            found[variant] += entries
            said = ", ".join(f"{m.name} {m.value:.4g} {m.unit}" for m in entries if m.value is not None)
            print(f"{variant}, width {width}: {said}")
    here, task = provenance(), f"a step of a feed-forward layer, {experts} experts"
    rows = [Row(Identity("scripts/moe_layer.py", task, variant=v), here, tuple(m)) for v, m in found.items()]
    if out is not None:
        write_report(rows, out, plot=False, shown=SHOWN)
    return rows


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_list("widths", ["128", "256", "512"], "features of a token")
    flags.DEFINE_integer("tokens", 2048, "tokens of a step")
    flags.DEFINE_integer("experts", 8, "experts of a mixture")
    flags.DEFINE_integer("repeats", 20, "timed steps of each layer")
    flags.DEFINE_bool("tiny", False, "checks the script: widths of 16, 64 tokens")
    flags.DEFINE_string("out", None, f"the directory of the rows and the table, by default {OUT.relative_to(ROOT)}")
    with one_sentence():
        if command_line.parse(argv, recipe=False):
            raise UserError("--config is no flag of moe_layer.py, which takes no recipe")
        given = flags.FLAGS
        if not all(width.isdigit() for width in given.widths):
            raise UserError(f"--widths={','.join(given.widths)} must be whole numbers")
        out = pathlib.Path(given.out) if given.out else None
        widths, tokens = ([16], 64) if given.tiny else ([int(width) for width in given.widths], given.tokens)
        run(widths, tokens=tokens, experts=given.experts, repeats=given.repeats, tiny=given.tiny, out=out)


if __name__ == "__main__":
    main(sys.argv)
