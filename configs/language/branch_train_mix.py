"""Branch-Train-MiX: a decoder, a copy of it a domain, and a mixture of experts made of the copies, in one run.

Paper: Sukhbaatar et al. 2024, arXiv:2403.07816.
Command: uv run train.py --config=configs/language/branch_train_mix.py (or :upcycle, :average, :ensemble, :dense behind
    the recipe: without branches; the copies' mean instead of a mixture; without a last stage; one stage)
Time: 2 minutes on one core of a Xeon. Result: 2.83 ± 0.01 nats a token, as the mean of the copies (2.84 ± 0.01); dense
    2.75 ± 0.01, upcycled 2.68 ± 0.01, the copies side by side 3.07 (three seeds, equal tokens).
results/branch_train_mix: uv run scripts/compare.py --config=configs/language/branch_train_mix.py \
    --vary=mode=dense,mix,upcycle,average,ensemble --tune=optim.learning_rate=3e-3,1e-2,3e-2
Sweep: train.steps  model.ffn_kwargs.moe.k
"""

from lissom.configs.base import mode
from lissom.configs.language import domains_moe

DOMAINS = len(domains_moe.DOMAINS)
MODES = ("mix", "upcycle", "average", "ensemble", "dense", "tiny")


def stage(name: str, duration: float, converter: str = "", **overrides) -> dict:
    """A stage with its own optimizer and its own schedule."""
    return {
        "name": name,
        "duration": duration,
        "overrides": {key.replace("__", "."): value for key, value in overrides.items()},
        "optimizer": "reset",
        "schedule": "stage",
        "converter": f"lissom.compression.branches:{converter}" if converter else "",
    }


def stages(how: str, seed: float, branch: float, rest: float) -> tuple:
    """The stages of each mode, which all see as many tokens; shares of the run, or steps."""
    copies = {"transforms": ({"name": "branches", "count": DOMAINS},), "objective": "branch_training"}
    ends = {
        "mix": (stage("branch", branch, **copies), stage("mix", rest, "mixed", model__ffn="moe")),
        "upcycle": (stage("mix", branch + rest, "upcycled", model__ffn="moe"),),
        "average": (stage("branch", branch, **copies), stage("average", rest, "averaged")),
        "ensemble": (stage("branch", branch + rest, **copies),),
    }
    return (stage("seed", seed), *ends[how]) if how in ends else ()


def get_config(arg: str = ""):
    chosen = mode(arg, MODES) or "mix"
    config = domains_moe.get_config("tiny" if chosen == "tiny" else "")
    config.model.ffn = "swiglu"
    # An expert is as wide as the layer that it was.
    expansion = config.model.ffn_kwargs.swiglu.expansion
    config.model.ffn_kwargs.moe.update({"experts": DOMAINS, "k": 2, "expansion": expansion})
    config.stages = stages("mix", 1, 1, 1) if chosen == "tiny" else stages(chosen, 0.2, 0.5, 0.3)
    return config
