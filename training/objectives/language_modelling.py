"""The next token."""

import jax.numpy as jnp

from lissom.models.registry import settings_of
from lissom.training.objectives.base import Objective, auxiliary, cross_entropy, reported, reported_sums


class LanguageModelling(Objective):
    """Mean cross-entropy over the positions that batch["weights"] [B, T] scores, plus `z_loss` x mean(log Z)^2
    (Chowdhery et al. 2022, arXiv:2204.02311) and the layers' own losses. Evaluated by loss (nats a scored token) and
    accuracy (share of scored tokens whose argmax is right). Where the data has meta-tokens, batch["meta"] bool [B, T]
    goes to the network; their weights are 0. Where it names domains, batch["domains"] [B, D] goes to a network that
    takes them, when it is judged."""

    kinds = ("tokens",)

    def __init__(self, *, z_loss: float = 0.0):
        self.z_loss = z_loss

    def weight(self, batch):
        return (batch["weights"] * batch["mask"][:, None]).sum()

    def loss(self, module, batch, key, step):
        del step
        logits, aux = module(batch["inputs"], train=True, key=key, **_marks(batch))
        weights = batch["weights"] * batch["mask"][:, None]
        count = jnp.maximum(weights.sum(), 1.0)
        task = (cross_entropy(logits, batch["labels"]) * weights).sum() / count
        total = task + auxiliary(aux)
        if self.z_loss:
            log_z = jnp.log(jnp.sum(jnp.exp(logits - logits.max(-1, keepdims=True)), -1)) + logits.max(-1)
            total = total + self.z_loss * (jnp.square(log_z) * weights).sum() / count
        hits = ((logits.argmax(-1) == batch["labels"]) * weights).sum() / count
        return total, {"accuracy": hits, **reported(aux)}

    def judge(self, network, batch, key):
        del key
        logits, aux = network(batch["inputs"], **_marks(batch), **_domains(network, batch))
        weights = batch["weights"] * batch["mask"][:, None]
        hits = (logits.argmax(-1) == batch["labels"]) * weights
        return {
            "loss": (jnp.sum(cross_entropy(logits, batch["labels"]) * weights), weights.sum()),
            "accuracy": (jnp.sum(hits), weights.sum()),
            **reported_sums(aux, weights.sum()),
        }


def _marks(batch):
    """Which tokens are meta-tokens, for the network; nothing where the data has none."""
    return {"meta": batch["meta"]} if "meta" in batch else {}


def _domains(network, batch):
    """The domains of the sequences, for what layers count; rows that only fill a batch up are of none."""
    if "domains" not in batch or "domains" not in settings_of(type(network).__call__):
        return {}
    return {"domains": batch["domains"] * batch["mask"][:, None]}
