"""What recipes of small few-shot tasks share: every objective that learns from tasks, for a perceptron."""

from typing import Any

BASELINE = "one network, fine-tuned: objective=supervised"


def apply(config, *, inner: dict[str, Any], implicit: dict[str, Any] | None = None) -> None:
    """Sets the network, the objectives and how they are evaluated. `inner`: the inner loop of all that have one;
    `implicit`: what differs for `imaml`, whose inner problem is to be solved."""
    solved = {"inner_steps": 16, "proximity": 2.0, "damping": 100.0, "solver_steps": 5}
    config.model.update({"name": "mlp", "size": "sinusoid", "activation": "relu"})
    config.objective = "maml"
    config.objective_kwargs = {
        "maml": {**inner, "remat": "none"},
        "fomaml": inner,
        "anil": {**inner, "remat": "none"},
        "meta_sgd": {**inner, "inner_steps": 1, "remat": "none"},
        "imaml": {**inner, **solved, **(implicit or {})},
        "reptile": {**inner, "inner_batch": 10},
        "protonet": {},
        "supervised": {**inner, "classes": False},
    }
    config.log.every = 500
    config.evaluation.update({"batch_size": 250, "latency_batches": (1, 32), "baselines": (BASELINE,)})
