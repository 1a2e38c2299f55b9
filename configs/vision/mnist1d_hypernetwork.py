"""A hypernetwork: the weights of a convolutional network as a function of how noisy its inputs are.

Paper: Gonzalez Ortiz et al. 2023, Magnitude Invariant Parametrizations Improve Hypernetwork Learning, arXiv:2304.07645.
Command: uv run scripts/hypernetworks.py
Time: half a minute (without a hypernetwork) to one and a half a run of 2,000 steps on one busy core.
Result: loss, mean over five conditions, 2,000 steps, three seeds, each at its best of five rates: under SGD the default
learns nothing (2.304), and with the cosine code alone one seed of three neither; with the residual 1.278, with both
1.270, and the default with first weights as large as those of the main network 1.310. Under Adam default 1.261, scaled
1.268, code 1.242, residual 1.278, both 1.272. The main network alone, which knows no condition, 1.438 and 1.405; a
network a condition 1.267 and 1.281.
results/hypernetworks: uv run scripts/hypernetworks.py --rates=adamw:1e-3,sgd:3e-2 --factors=1/9,1/3,1,3,9 \
    --steps=2000 --evaluations=20
Modes: default, the parametrization without both of its parts; plain, the main network alone, which knows no condition.
Sweep: model.code=raw,cosine  model.residual=False,True  model.hidden  model.predicted=head,kernel,convs
    model.head_init=fan_out,main  model.network_kwargs.cnn.channels  optim.name=adamw,sgd  optim.learning_rate
    objective_kwargs.conditional_noise.groups=1,4,20  objective_kwargs.conditional_noise.condition=0.5
"""

from lissom.configs.base import base, mode, tiny


def get_config(arg: str = ""):
    config = base()
    config.data.update({"name": "mnist1d", "batch_size": 100})
    chosen = mode(arg, ("tiny", "default", "plain"))
    if chosen == "plain":
        config.model.update({"name": "cnn", "size": "mnist1d", "channels": None, "kernel": None, "dropout": 0.0})
    else:
        parts = {"code": "raw", "residual": False} if chosen == "default" else {"code": "cosine", "residual": True}
        config.model.update({"name": "hypernetwork", "size": "small", "hidden": None, **parts, "predicted": ""})
        config.model.update({"head_init": "fan_out", "network": None, "network_size": None, "network_kwargs": {}})
    config.objective = "conditional_noise"
    config.objective_kwargs = {"conditional_noise": {"largest": 2.0, "groups": 4}}
    config.optim.update({"learning_rate": 1e-3, "schedule": "constant", "warmup": 0.0})
    config.train = {"steps": 3000}
    config.evaluation.floor = False  # trivial methods would be judged on signals without noise
    return tiny(config) if chosen == "tiny" else config
