"""What becomes of a system."""

import jax.numpy as jnp

from lissom.training.objectives.base import Objective, auxiliary, reported, reported_sums


class Trajectories(Objective):
    """Mean squared error of the states [B, T, D] that the network says for the first ones and the environments, but for
    the first, which is given; plus the layers' own losses. batch["inputs"] [B, T, D], batch["environment"] [B].

        sum_btd (x_btd - y_btd)^2 / (B (T - 1) D)    over t > 0

    Evaluated by loss and by trajectory_error, which is the same: `dynamics` gives the states of every family the
    variance 1, so that it is a fraction of the variance, and the family's mean has an error of 1. What the network
    counts by batch["families"] [B, F] it is given when it is judged alone.
    """

    kinds = ("trajectory",)

    def loss(self, module, batch, key, step):
        del step
        states, aux = module(batch["inputs"], batch["environment"], train=True, key=key)
        error = _errors(states, batch["inputs"]).mean()
        return error + auxiliary(aux), {"trajectory_error": error, **reported(aux)}

    def judge(self, network, batch, key):
        del key
        # Rows that only fill a batch up are of no family.
        families = batch["families"] * batch["mask"][:, None]
        states, aux = network(batch["inputs"], batch["environment"], families)
        mask = batch["mask"]
        error = jnp.sum(_errors(states, batch["inputs"]) * mask), mask.sum()
        return {"loss": error, "trajectory_error": error, **reported_sums(aux, mask.sum())}


def _errors(states, inputs):
    """[B], means over times and features."""
    return jnp.square(states[:, 1:] - inputs[:, 1:]).mean((1, 2))
