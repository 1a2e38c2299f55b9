"""A small residual network with BatchNorm on scikit-learn's handwritten digits.

Paper: He et al. 2015, arXiv:1512.03385.
Command: uv run train.py --config=configs/vision/digits_resnet.py
Time: about a minute on 2 CPU cores. Result: not measured.
Sweep: model.size=tiny,small,20  optim.learning_rate
"""

from lissom.configs.base import base, mode, tiny


def get_config(arg: str = ""):
    config = base()
    config.data.update({"name": "digits", "batch_size": 128})
    config.model.update({"name": "resnet", "size": "small", "activation": "relu"})
    config.optim.update({"learning_rate": 5e-3, "weight_decay": 1e-2})
    config.train = {"epochs": 30}
    config.evaluation.update({"transforms": ({"name": "int8_weights"},)})
    return tiny(config) if mode(arg, ("tiny",)) else config
