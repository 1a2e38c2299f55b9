"""Class-incremental learning: scikit-learn's digits, one class after the other, each example once, nothing kept.

Paper: DE&E, Wójcik et al. 2023, arXiv:2307.05399 (method and loss; features, data and size are ours).
Command: uv run train.py --config=configs/vision/digits_stream.py
Time: half a second on one CPU core, besides compiling. Result: accuracy on all ten classes behind the last one, five
seeds: 87.3 % +- 1.4, and 6.7 points forgotten; dense ensemble 78.9 and 12.2, single head with the same loss 77.4 and
12.2, as it is usually trained 66.6 and none, with a replay of five a class 79.8 and 2.7, on all classes at once 93.4.
Not of equal size: 64 linear experts against one.
Sweep: model.experts,model.k,model.temperature  data.classes_per_task=1,2,5  data.replay,data.replay_size

Sign descent (lion without momenta) moves no expert that was not asked.

results/digits_stream, where each variant has the best of its learning rates 3e-4, 1e-3, 3.3e-3, 1e-2, 3e-2, 1e-1 by the
accuracy at seeds 0 and 1, as far as it took to have a worse one on both sides (of the dense ensemble and of the single
head with the same loss the ends 1e-3 and 1e-1 are as good as what lies beside them; --tune would halve the stream):

    HEAD="model.experts=1 model.k=1"
    USUAL="$HEAD model.bound=0 objective_kwargs.classification.loss=cross_entropy optim.name=adamw"
    uv run scripts/compare.py --config=configs/vision/digits_stream.py --seeds=5 \
        --also="dense ensemble: model.k=64 optim.learning_rate=1e-3" \
        --also="single head, same loss: $HEAD optim.learning_rate=1e-1" \
        --also="single head: $USUAL optim.learning_rate=1e-3" \
        --also="single head, replay of 5 a class: $USUAL optim.learning_rate=1e-3 data.replay=0.5 data.replay_size=5" \
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
