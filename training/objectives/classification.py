"""One label an example."""

import jax
import jax.numpy as jnp

from lissom.training.objectives.base import Objective, auxiliary, cross_entropy, reported, reported_sums

LOSSES = ("cross_entropy", "target_score")


class Classification(Objective):
    """Mean loss of batch["labels"] [B] plus the layers' own losses; evaluated by accuracy and cross-entropy.

        cross_entropy   -log softmax(logits)_y, with `label_smoothing`
        target_score    -logits_y: the score of the label is to rise, and no other is to fall: what was learned of other
                        classes is not unlearned (Wójcik et al. 2023, arXiv:2307.05399, by their code). It has no least
                        value unless scores are bounded

    class_accuracy: evaluation counts each class apart: `class_accuracy/c` in metrics.jsonl, of which the rows of a run
    by class have their `forgetting`.
    """

    kinds = ("image", "signal", "frames")

    def __init__(self, *, loss: str = "cross_entropy", label_smoothing: float = 0.0, class_accuracy: bool = False):
        where = "objective_kwargs.classification"
        if loss not in LOSSES:
            raise ValueError(f"{where}.loss={loss!r} must be one of {', '.join(LOSSES)}")
        if label_smoothing and loss != "cross_entropy":
            raise ValueError(f"{where}.label_smoothing={label_smoothing} is for loss='cross_entropy', not {loss!r}")
        self.kind, self.label_smoothing, self.class_accuracy = loss, label_smoothing, class_accuracy

    def loss(self, module, batch, key, step):
        del step
        logits, aux = module(batch["inputs"], train=True, key=key)
        if self.kind == "cross_entropy":
            task = cross_entropy(logits, batch["labels"], self.label_smoothing).mean()
        else:
            task = -jnp.take_along_axis(logits, batch["labels"][:, None], -1).mean()
        hits = (logits.argmax(-1) == batch["labels"]).mean()
        return task + auxiliary(aux), {"accuracy": hits, **reported(aux)}

    def judge(self, network, batch, key):
        del key
        logits, aux = network(batch["inputs"])
        mask, count = batch["mask"], batch["mask"].sum()
        hits = (logits.argmax(-1) == batch["labels"]) * mask
        sums = {
            "accuracy": (jnp.sum(hits), count),
            "loss": (jnp.sum(cross_entropy(logits, batch["labels"]) * mask), count),
            **reported_sums(aux, count),
        }
        if self.class_accuracy:
            of_class = jnp.stack([hits, mask], -1)
            sums["class_hits"] = (jax.ops.segment_sum(of_class, batch["labels"], logits.shape[-1]), count)
        return sums
