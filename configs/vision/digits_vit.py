"""A small vision transformer on scikit-learn's handwritten digits: the first command.

Paper: Dosovitskiy et al. 2020, arXiv:2010.11929 (the architecture; the size is ours).
Command: uv run train.py --config=configs/vision/digits_vit.py
Time: about a minute on 2 CPU cores. Result: see the table in README.md.
Sweep: model.mixer=attention,window,none  model.ffn=mlp,swiglu  optim.learning_rate
"""

from lissom.configs.base import base, mode, tiny


def get_config(arg: str = ""):
    config = base()
    config.data.update({"name": "digits", "batch_size": 128})
    config.model.update(
        {
            "name": "vit",
            "size": "digits",
            "mixer": "attention",
            "mixer_kwargs": {"attention": {"rope_theta": 0.0}, "window": {"window": 5, "rope_theta": 0.0}},
            "ffn": "mlp",
            "ffn_kwargs": {},
            "norm": "layernorm",
            "norm_kwargs": {},
            "dropout": 0.0,
            "stack": None,
            "remat": False,
        }
    )
    config.optim.update({"learning_rate": 2e-3, "weight_decay": 1e-2})
    config.train = {"epochs": 60}
    config.evaluation.update({"transforms": ({"name": "int8_weights"},)})
    return tiny(config) if mode(arg, ("tiny",)) else config
