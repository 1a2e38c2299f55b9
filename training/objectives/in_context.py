"""The label of each example of a sequence, by the examples before."""

import jax.numpy as jnp

from lissom.training.objectives.base import Objective, auxiliary, cross_entropy, reported, reported_sums


class InContext(Objective):
    """Mean cross-entropy of batch["labels"] [B, T] over all positions, plus the layers' own losses (Kirsch et al. 2022,
    arXiv:2212.04458, equation 2).

    Evaluated by loss and accuracy, means over the positions of a sequence and then over the sequences, and by
    first_accuracy and last_accuracy, of the first and the last position. What is learned within a sequence is the last
    less the first: memorised tasks have none of it.
    """

    kinds = ("stream",)

    def loss(self, module, batch, key, step):
        del step
        logits, aux = module(batch["inputs"], train=True, key=key)
        hits = logits.argmax(-1) == batch["labels"]
        told = {"accuracy": hits.mean(), "last_accuracy": hits[:, -1].mean()}
        return cross_entropy(logits, batch["labels"]).mean() + auxiliary(aux), {**told, **reported(aux)}

    def judge(self, network, batch, key):
        del key
        logits, aux = network(batch["inputs"])
        hits = (logits.argmax(-1) == batch["labels"]).astype(jnp.float32)
        values = {
            "loss": cross_entropy(logits, batch["labels"]).mean(-1),
            "accuracy": hits.mean(-1),
            "first_accuracy": hits[:, 0],
            "last_accuracy": hits[:, -1],
        }
        mask = batch["mask"]
        sums = {name: (jnp.sum(value * mask), mask.sum()) for name, value in values.items()}
        return {**sums, **reported_sums(aux, mask.sum())}
