"""When a byte-level decoder begins to be trained with few bits: in float at first, for a share of the run with weights
of four bits.

    (none)      a float stage with a cooldown of its own (the last fifth of it), then quantization-aware training that
                warms up again and cools down again
    fused       float at the peak rate, and one cooldown, all of it within quantization-aware training
    alone       weights of four bits from the beginning, and a cooldown in the last quarter
    float       without: its rows have it rounded afterwards

Paper: Dremov et al. 2025, arXiv:2509.22935 (compute-optimal quantization-aware training).
Command: uv run train.py --config=configs/language/qat_schedule.py:fused
Time: a minute on 2 CPU cores. Result: (results/qat_law, one seed a run) best shares follow f = exp(-a / ln S) with
    a = 4.15 to within 0.16 where the cooldown is fused, and hardly where it is not (the paper: a = 6.73); at equal
    tokens and the best share below 1 of each, fused beats separate in 8 of 9 cells, by 0.008 nats a byte on average.
results/qat_law: uv run scripts/qat_law.py --fused=16
Sweep: scripts/qat_law.py (shares, tokens, bits, widths)
"""

from lissom.configs.base import base, decoder, mode, tiny

MODES = ("fused", "alone", "float", "tiny")
COOLDOWN, REWARM = 0.2, 0.1  # shares of a stage


def stages(share: float, bits: str, *, fused: bool = False) -> tuple[dict, ...]:
    """`config.stages` whose last `share` trains with weights of so many bits ("int4"), a scale a channel; with 1.0 all
    of it does, and with 0.0 nothing."""
    qat = {"transforms": ({"name": "qat", "rules": ((".*", {"weights": bits}),)},)} if share else {}
    if share in (0.0, 1.0):
        # The cooldown of both is as long as that of a quarter of the run.
        return _stage("constant", 0.75, **qat), _cooldown("cooldown", 0.25, **qat)
    if fused:
        return _stage("float", 1 - share), _cooldown("qat", share, **qat)
    return (
        _stage("float", (1 - COOLDOWN) * (1 - share)),
        _cooldown("cooldown", COOLDOWN * (1 - share)),
        _cooldown("qat", share, **{"optim.warmup": REWARM}, **qat),
    )


def _stage(name: str, duration: float, **overrides) -> dict:
    overrides = {"optim.schedule": "constant", "optim.warmup": 0.1} | overrides
    return {"name": name, "duration": duration, "overrides": overrides, "schedule": "stage"}


def _cooldown(name: str, duration: float, **overrides) -> dict:
    return _stage(name, duration, **{"optim.schedule": "linear", "optim.warmup": 0.0} | overrides)


def get_config(arg: str = ""):
    arg = mode(arg, MODES)
    config = base()
    config.data.update({"name": "stdlib_text", "batch_size": 8, "kwargs": {"stdlib_text": {"length": 64}}})
    config.model.update(decoder(width=32, depth=2, heads=2))
    config.objective = "language_modelling"
    config.optim.update({"learning_rate": 1e-2, "weight_decay": 1e-2})
    config.train = {"steps": 3000}
    config.evaluation.update({"batch_size": 256, "latency_batches": (1, 16), "transforms": ({"name": "packed"},)})
    config.stages = stages({"alone": 1.0, "float": 0.0}.get(arg, 0.25), "int4", fused=arg == "fused")
    if arg == "float":
        rules = ((".*", {"weights": "int4"}),)
        config.evaluation.transforms = ({"name": "quantize", "rules": rules, "label": "int4"},)
    if arg == "tiny":
        config = tiny(config)
        with config.unlocked():
            config.data.kwargs.stdlib_text.test_size = 64
        config.stages = tuple({**stage, "duration": 1} for stage in config.stages)
    return config
