"""Branches that learn apart, each the next token of its own domain."""

import jax.numpy as jnp

from lissom.models.registry import settings_of
from lissom.training.errors import UserError
from lissom.training.objectives.base import auxiliary, cross_entropy, reported
from lissom.training.objectives.language_modelling import LanguageModelling


class BranchTraining(LanguageModelling):
    """sum_b of the mean cross-entropy of branch b over the batch's tokens of domain b, so that a branch has the
    gradients of a run of its own, on as many sequences as the batch has of its domain. A branch whose domain is not in
    the batch has none. What is logged as `loss` is the mean over the domains of the batch.

    For a network behind the transform `branches`, without losses of its layers, with as many branches as the data has
    domains, and sequences of one domain each. The optimizer is one: `optim.clip_norm` bounds the norm of all branches
    together. Micro-batches of a step count alike, whatever domains they have. It is judged as an ensemble, which does
    not know the domain.
    """

    def __init__(self):
        super().__init__()

    def prepare(self, facts):
        if "domains" not in facts:
            raise UserError("objective 'branch_training' needs data that names domains, such as 'domain_text'")
        self._domains = len(facts["domains"])

    def build(self, model, rngs):
        del rngs
        if "branch" not in settings_of(type(model).__call__) or model.count != self._domains:
            raise UserError(
                "objective 'branch_training' needs transforms=({'name': 'branches', 'count': "
                f"{self._domains}}},): a branch for each domain of the data"
            )
        return model

    def weight(self, batch):
        del batch
        return 1.0

    def loss(self, module, batch, key, step):
        del step
        domains = batch["domains"] * batch["mask"][:, None]
        logits, aux = module(batch["inputs"], branch=batch["domains"].argmax(-1), train=True, key=key)
        weights = batch["weights"] * batch["mask"][:, None]
        tokens = weights.sum(-1) @ domains
        mean = lambda values: (values * weights).sum(-1) @ domains / jnp.maximum(tokens, 1.0)
        losses = mean(cross_entropy(logits, batch["labels"]))
        here = jnp.maximum((tokens > 0).sum(), 1)
        hits = mean(logits.argmax(-1) == batch["labels"]).sum() / here
        return losses.sum() + auxiliary(aux), {"loss": losses.sum() / here, "accuracy": hits, **reported(aux)}
