"""Class-incremental learning: scikit-learn's digits, one class after the other, each example once, nothing kept.

Paper: DE&E, Wójcik et al. 2023, arXiv:2307.05399 (method and loss; features, data and size are ours).
Command: uv run train.py --config=configs/vision/digits_stream.py
Time: not measured. Result: not measured.
Sweep: model.experts,model.k,model.temperature  data.classes_per_task=1,2,5  data.replay,data.replay_size

Sign descent (lion without momenta) moves no expert that was not asked. The comparison, with the single head on all
classes at once as the ceiling:

    HEAD="model.experts=1 model.k=1"
    USUAL="$HEAD model.bound=0 objective_kwargs.classification.loss=cross_entropy optim.name=adamw"
    uv run scripts/compare.py --config=configs/vision/digits_stream.py --seeds=5 \
        --also="dense ensemble: model.k=64" \
        --also="single head, same loss: $HEAD" \
        --also="single head: $USUAL" \
        --also="single head, replay of 5 a class: $USUAL data.replay=0.5 data.replay_size=5" \
        --also="single head, all classes at once: $USUAL data.order=shuffled"
"""

from lissom.configs.base import base, mode, tiny


def get_config(arg: str = ""):
    config = base()
    config.data.update({"name": "digits", "batch_size": 16, "order": "by_class"})
    config.model.update({"name": "keyed_experts", "size": "small"})
    config.objective_kwargs = {"classification": {"loss": "target_score", "class_accuracy": True}}
    config.optim.update(
        {
            "name": "lion",
            "optim_kwargs": {"lion": {"b1": 0.0, "b2": 0.0}},
            "learning_rate": 1e-2,
            "schedule": "constant",
            "warmup": 0.0,
        }
    )
    config.train = {"epochs": 1}
    return tiny(config) if mode(arg, ("tiny",)) else config
