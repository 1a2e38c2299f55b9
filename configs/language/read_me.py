"""Read-ME: a dense decoder, carved into an expert a domain behind one router for all layers, in one run.

Paper: Cai et al. 2024, arXiv:2410.19123.
Command: uv run train.py --config=configs/language/read_me.py (or :dense, :small behind the recipe: the network that is
    carved, trained all the time; a dense one of the width that a carved one has active)
Time: a minute on one core. Result: a loss of 2.84 ± 0.01 nats a token, 2.78 ± 0.03 of :small, 2.75 ± 0.01 of :dense
    (three seeds).
results/read_me: uv run scripts/compare.py --config=configs/language/read_me.py --vary=mode=small,read_me,dense \
    --tune=optim.learning_rate=3e-3,1e-2,3e-2
Sweep: train.steps
"""

from lissom.configs.base import mode
from lissom.configs.language import domains_moe

SHARE = 0.5
CARVED = {"name": "read_me", "experts": len(domains_moe.DOMAINS), "share": SHARE, "common": 0.25}
MODES = ("read_me", "dense", "small", "tiny")


def stages(dense: float, router: float, experts: float) -> tuple:
    """A dense network, and behind it the router and the experts in turns; shares of the run, or steps."""
    carved = {"transforms": (CARVED,)}
    # Without a gradient a parameter would still decay.
    routing = {**carved, "objective": "router_tuning", "optim.decay": r"^router/.*kernel$"}
    tuning = {**carved, "optim.decay": r"^network/.*(kernel|table)$"}
    stage = lambda name, duration, overrides: {
        "name": name,
        "duration": duration,
        "overrides": overrides,
        "optimizer": "reset",
        "schedule": "stage",
    }
    return (
        stage("dense", dense, {}),
        stage("router", router, routing),
        stage("experts", experts, tuning),
        stage("router again", router, routing),
        stage("experts again", experts, tuning),
    )


def get_config(arg: str = ""):
    chosen = mode(arg, MODES) or "read_me"
    config = domains_moe.get_config("tiny" if chosen == "tiny" else "")
    config.model.ffn = "swiglu"
    config.objective_kwargs = {"router_tuning": {"temperature": 0.02}}
    if chosen == "small":
        config.model.ffn_kwargs.swiglu.expansion *= SHARE
    if chosen == "tiny":
        config.stages = stages(1, 1, 1)[:3]
    if chosen == "read_me":
        config.stages = stages(0.5, 0.1, 0.15)
    return config
