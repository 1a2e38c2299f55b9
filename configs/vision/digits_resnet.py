"""A small residual network with BatchNorm on scikit-learn's handwritten digits.

A mode of `configs/few_bits.py` trains it for few bits (float: measured as rounded without training); for signs it has
no relu.

Paper: He et al. 2015, arXiv:1512.03385.
Command: uv run train.py --config=configs/vision/digits_resnet.py
Time: about a minute on 2 CPU cores. Result: not measured.
Sweep: model.size=tiny,small,20  optim.learning_rate
"""

from lissom.configs import few_bits
from lissom.configs.base import base, mode, tiny

ENDS = "^(stem|head)$"


def get_config(arg: str = ""):
    arg = mode(arg, (*few_bits.NAMES, "tiny"))
    config = base()
    config.data.update({"name": "digits", "batch_size": 128})
    config.model.update({"name": "resnet", "size": "small", "activation": "none" if arg in few_bits.BINARY else "relu"})
    config.optim.update({"learning_rate": 5e-3, "weight_decay": 1e-2})
    config.train = {"epochs": 30}
    config.evaluation.update({"transforms": ({"name": "int8_weights"},)})
    if arg in few_bits.NAMES:
        # Pictures are not below 0.
        few_bits.apply(config, arg, ends=ENDS, warm_up=60)
    return tiny(config) if arg == "tiny" else config
