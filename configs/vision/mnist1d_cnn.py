"""The convolutional baseline of MNIST-1D: 94 % with 4,000 training examples, as the paper reports it.

Paper: Greydanus & Kobak 2020, arXiv:2011.14439.
Command: uv run train.py --config=configs/vision/mnist1d_cnn.py
Time: under a minute on 2 CPU cores. Result: not measured.
Sweep: model.channels  model.kernel  optim.learning_rate
"""

from lissom.configs.base import base, mode, tiny


def get_config(arg: str = ""):
    config = base()
    config.data.update({"name": "mnist1d", "batch_size": 100})
    config.model.update({"name": "cnn", "size": "mnist1d", "channels": None, "kernel": None, "dropout": 0.0})
    config.model.activation = "relu"
    config.optim.update({"learning_rate": 1e-2, "weight_decay": 1e-2})
    config.train = {"steps": 3000}
    config.evaluation.update({"transforms": ({"name": "int8_weights"},)})
    return tiny(config) if mode(arg, ("tiny",)) else config
