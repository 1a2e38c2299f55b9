"""What Read-ME's router learns from: which expert holds the channels that a token makes active."""

import jax
import jax.numpy as jnp

from lissom.training.errors import UserError
from lissom.training.objectives.base import reported
from lissom.training.objectives.language_modelling import LanguageModelling


class RouterTuning(LanguageModelling):
    """Mean over scored tokens of the cross-entropy of the router's softmax with

        target_e = softmax_e(mean over layers of overlap_e / temperature)

    where overlap_e is the share of a layer's most active channels that expert e has (`models.read_me.Carved`), of the
    tokens as the router sends them now. Only the router has a gradient. Judged like any language model, by the loss of
    the network behind the router.

    The paper takes the activations of the dense network; here they are those of the experts as they are by now, so that
    a router that is tuned a second time follows its experts, and channels in no expert have no part. How sharp the
    target is the paper leaves open.
    """

    def __init__(self, *, temperature: float = 0.02):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"objective.temperature={temperature} must be above 0")
        self.temperature = temperature

    def build(self, model, rngs):
        del rngs
        if not hasattr(model, "scores"):
            raise UserError("objective 'router_tuning' needs the transform 'read_me', whose router it tunes")
        return model

    def loss(self, module, batch, key, step):
        del step, key
        _, aux = module(batch["inputs"], compare=True)
        overlap = jax.lax.stop_gradient(aux["metrics"].pop("overlap").mean(0))
        target = jax.nn.softmax(overlap / self.temperature)
        scores = module.scores(batch["inputs"])
        weights = batch["weights"] * batch["mask"][:, None]
        mean = lambda values: (values * weights).sum() / jnp.maximum(weights.sum(), 1.0)
        loss = mean(-(target * jax.nn.log_softmax(scores)).sum(-1))
        agreement = mean(scores.argmax(-1) == overlap.argmax(-1))
        return loss, {"agreement": agreement, "overlap": mean(overlap.max(-1)), **reported(aux)}
