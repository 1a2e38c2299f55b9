"""Bricks: a dense decoder whose feed-forward channels are put into groups, of which a token has a quarter, in one run.

Paper: Zhang et al. 2022, MoEfication, arXiv:2110.01786; Xiao et al. 2024, Configurable Foundation Models,
    arXiv:2409.02877.
Command: uv run train.py --config=configs/language/bricks.py (or :weights, :random, :dense behind the recipe: groups of
    channels with similar columns; drawn ones; no groups, trained in the same two stages)
Time: two minutes on one core. Result: losses of 2.697 ± 0.006 nats a token dense, 2.730 ± 0.006 by co-activation,
    2.744 ± 0.006 by weights, 2.764 ± 0.004 drawn (three seeds).
results/bricks_tuned: uv run scripts/compare.py --config=configs/language/bricks.py \
    --vary=mode=dense,coactivation,weights,random --tune=optim.learning_rate=3e-3,1e-2,3e-2
results/bricks: uv run scripts/bricks.py --runs='runs/compare/bricks_tuned/mode=dense_*' --out=results/bricks
Sweep: train.steps
"""

from lissom.configs.base import mode
from lissom.configs.language import domains_moe

WAYS = ("coactivation", "weights", "random")
MODES = (*WAYS, "dense", "tiny")
BRICKS, K = 16, 4


def get_config(arg: str = ""):
    chosen = mode(arg, MODES) or "coactivation"
    tiny = chosen == "tiny"
    config = domains_moe.get_config("tiny" if tiny else "")
    config.model.ffn = "swiglu"
    config.model.ffn_kwargs.swiglu.expansion = 12.0  # 256 channels
    made = {"name": "bricks", "bricks": BRICKS, "k": K, "by": "coactivation" if tiny else chosen}
    config.stages = (
        {"name": "dense", "duration": 1 if tiny else 0.8, "schedule": "stage"},
        {
            "name": "bricks",
            "duration": 2 if tiny else 0.2,
            # Without groups the second stage is the same otherwise.
            "overrides": {} if chosen == "dense" else {"transforms": (made,)},
            "optimizer": "reset",
            "schedule": "stage",
        },
    )
    return config
