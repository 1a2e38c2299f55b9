"""A small vision transformer on scikit-learn's handwritten digits: the first command.

Paper: Dosovitskiy et al. 2020, arXiv:2010.11929 (the architecture; the size is ours).
Command: uv run train.py --config=configs/vision/digits_vit.py
Time: half a minute on 2 CPU cores. Result: at least 97 % at seeds 0 to 2 (tests/test_accuracy.py).
Sweep: model.mixer=attention,window,none  model.ffn=mlp,swiglu  optim.learning_rate
"""

from lissom.configs.base import base, mode, tiny


def get_config(arg: str = ""):
    config = base()
    config.data.update({"name": "digits", "batch_size": 32, "augment": ("noise",)})
    config.model.update(
        {
            "name": "vit",
            "size": "digits",
            "mixer": "attention",
            "mixer_kwargs": {"attention": {"rope_theta": 100.0}, "window": {"window": 5, "rope_theta": 100.0}},
            "ffn": "mlp",
            "ffn_kwargs": {},
            "norm": "layernorm",
            "norm_kwargs": {},
            "dropout": 0.0,
            "stack": None,
            "remat": False,
        }
    )
    config.objective_kwargs = {"classification": {"label_smoothing": 0.1}}
    config.optim.update({"learning_rate": 1e-3, "weight_decay": 0.3})
    config.train = {"epochs": 30}
    config.evaluation.update({"transforms": ({"name": "int8_weights"},)})
    return tiny(config) if mode(arg, ("tiny",)) else config
