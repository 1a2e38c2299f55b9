"""A plain convolutional spiking network on scikit-learn's handwritten digits, and its dense twins.

Mode staged: trained at 5 time steps, and from there on at 4, 3, 2 and 1, a fifth of the run each, with neurons whose
leak and threshold are learned. Its control is the mode single: the same neurons at one step from the start.

Paper: trained by surrogate gradients (Neftci et al. 2019, arXiv:1901.09948); parametric leak (Fang et al. 2021,
    arXiv:2007.05785); BatchNorm of the membrane potential (MPBN, Guo et al. 2023, arXiv:2308.08359); fewer and fewer
    steps (IIR-SNN, Chowdhury et al. 2021, arXiv:2110.05929; there the first network is converted from a trained one).
Command: uv run train.py --config=configs/vision/digits_snn.py
Time: a minute on one CPU core. Result: (results/spiking_mnist1d, MNIST-1D, 40 epochs) 89.3, 92.8, 93.8 and 94.1 % at 1,
    2, 4 and 8 steps, its ReLU twin 96.3 %; see docs/spiking.md for what stages, norms and conversions came to.
Sweep: model.time_steps=1,2,4,8  model.neuron=if,lif,plif,alif,cuba  model.size=small,deep  model.batch_norm=True,False
    model.neuron_kwargs.lif.membrane_norm=none,channel,element  model.encoding=direct,rate,latency,phase
    model.decoding=mean,count,max_membrane,first_spike
    optim.learning_rate=5e-3,1.5e-2,4.5e-2 (on MNIST-1D the last was the best)
    (the dense twins: model.neuron=relu,clip_floor with model.time_steps=1)
"""

from lissom.configs.base import base, mode, stepwise, tiny


def get_config(arg: str = ""):
    config = base()
    config.data.update({"name": "digits", "batch_size": 64})
    config.model.update(stepwise(name="spiking", hidden=(), recurrent=False, kernel=3, batch_norm=True))
    config.model.neuron_kwargs.clip_floor = {"levels": 255}
    config.optim.update({"learning_rate": 5e-3, "weight_decay": 1e-2})
    config.train = {"epochs": 30}
    chosen = mode(arg, ("tiny", "staged", "single"))
    if chosen in ("staged", "single"):
        config.model.neuron, config.model.time_steps = "plif", 5 if chosen == "staged" else 1
        config.model.neuron_kwargs.plif = {"decay": 0.5, "threshold": 1.0, "learn_threshold": True}
    if chosen == "staged":
        config.stages = tuple(
            {
                "name": f"{steps} steps",
                "duration": 0.2,
                "overrides": {"model.time_steps": steps},
                "optimizer": "reset",
                "schedule": "stage",
            }
            for steps in (5, 4, 3, 2, 1)
        )
    return tiny(config) if chosen == "tiny" else config
