"""Families of dynamical systems: the context of an environment chooses one of several neural differential equations.

Paper: Nzoyem et al. 2025, MixER, arXiv:2502.05335.
Command: uv run scripts/compare.py --config=configs/dynamics/mixer.py --vary=model.gate=mixer,softmax \
    --also="one expert: model.gate=softmax model.experts=1"
Time: two minutes on one core.
Result: a mean squared error of 0.06 ± 0.05 with mixer, 0.06 ± 0.02 with softmax, 0.04 ± 0.01 of one expert (three
    seeds; the best rate of all is the largest tried).
results/mixer: the command with --tune=optim.learning_rate=1e-3,3e-3,9e-3
Sweep: model.gate=mixer,softmax  model.experts=1,3,6  model.context_size  model.gate_kwargs.mixer.every=1,10,100
    model.gate_kwargs.softmax.balance=0.0,0.01,0.1  data.kwargs.dynamics.train_size
    data.kwargs.dynamics.environments
"""

from lissom.configs.base import base, mode, tiny


def get_config(arg: str = ""):
    config = base()
    systems = {"environments": 8, "length": 32, "interval": 0.2, "train_size": 384}
    config.data.update({"name": "dynamics", "batch_size": 96, "kwargs": {"dynamics": systems}})
    config.model.update(
        {
            "name": "mixture_of_fields",
            "size": "small",
            "depth": 2,
            "experts": 6,
            "context_size": 24,
            "substeps": 1,
            "gate": "mixer",
            "gate_kwargs": {"mixer": {"every": 10, "iterations": 20}, "softmax": {"balance": 0.01}},
        }
    )
    config.objective = "trajectories"
    config.optim.learning_rate = 3e-3
    config.train = {"steps": 3000}
    if mode(arg, ("tiny",)):
        config = tiny(config)
        config.data.kwargs.dynamics.update({"environments": 2, "length": 6, "train_size": 48, "test_size": 24})
        config.model.update({"experts": 3, "context_size": 4})
        config.model.gate_kwargs.mixer.every = 2
    return config
