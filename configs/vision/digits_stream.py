"""Class-incremental learning: scikit-learn's digits, one class after the other, each example once, nothing kept.

Paper: DE&E, Wójcik et al. 2023, arXiv:2307.05399 (method; features, data and size are ours).
Command: uv run train.py --config=configs/vision/digits_stream.py
Time: not measured. Result: not measured.
Sweep: model.experts,model.k,model.temperature  data.classes_per_task=1,2,5  data.replay,data.replay_size
"""

from lissom.configs.base import base, mode, tiny


def get_config(arg: str = ""):
    config = base()
    config.data.update({"name": "digits", "batch_size": 16, "order": "by_class"})
    config.model.update({"name": "keyed_experts", "size": "small"})
    config.train = {"epochs": 1}
    return tiny(config) if mode(arg, ("tiny",)) else config
