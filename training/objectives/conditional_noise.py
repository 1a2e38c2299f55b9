"""Classification under noise whose strength is a condition that the network may know."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lissom.models.registry import settings_of
from lissom.training.errors import UserError
from lissom.training.objectives.base import Objective, auxiliary, cross_entropy, reported, reported_sums

WHERE = "objective_kwargs.conditional_noise"


class ConditionalNoise(Objective):
    """Mean cross-entropy of batch["labels"] [B] of noisy inputs, plus the layers' own losses.

        x~ = x + gamma `largest` z        z standard normal, gamma in [0, 1] the condition of the example

    Training draws `groups` conditions a batch, uniform in [0, 1], each for as many examples in a row, and noise anew
    for each example and step. Judged is every test example at each condition of `grid`: accuracy and loss are means
    over the grid, `accuracy_at/c` and `loss_at/c` (in metrics.jsonl) those of one condition. z of a test example is
    drawn by its own numbers, once for all conditions: every network is judged on the same noise.

    condition: instead, training and test are at this one, a hypernetwork's too. A network whose call takes no condition
    is not given it: trained on all of them it knows none of them, trained on one it needs none.

    A task of our own for `models/hypernetworks/` (arXiv:2304.07645): its condition is one number, and networks of
    single conditions can be trained beside those of all.
    """

    kinds = ("image", "signal")

    def __init__(
        self,
        *,
        largest: float = 2.0,
        groups: int = 4,
        grid: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        condition: float | None = None,
    ):
        if not largest > 0:
            raise ValueError(f"{WHERE}.largest={largest} must be above 0")
        if groups < 1:
            raise ValueError(f"{WHERE}.groups={groups} must be at least 1")
        if not grid or not all(0 <= value <= 1 for value in grid):
            raise ValueError(f"{WHERE}.grid={tuple(grid)} must hold one number or more, each in [0, 1]")
        if condition is not None and not 0 <= condition <= 1:
            raise ValueError(f"{WHERE}.condition={condition} must lie in [0, 1]")
        self.largest, self.groups, self.condition = largest, groups if condition is None else 1, condition
        self.grid = tuple(grid) if condition is None else (condition,)

    def notes(self, network):
        if not _is_conditional(network):
            return ()
        return ("times are of one condition for all examples of a call, in which its weights are predicted",)

    def loss(self, module, batch, key, step):
        del step
        inputs, labels = batch["inputs"], batch["labels"]
        if len(inputs) % self.groups:
            raise UserError(
                f"config.{WHERE}.groups={self.groups} must divide the {len(inputs)} examples of a batch, or micro-batch"
            )
        condition_key, noise_key, key = jax.random.split(key, 3)
        shape = (self.groups, 1)
        conditions = (
            jax.random.uniform(condition_key, shape) if self.condition is None else jnp.full(shape, self.condition)
        )
        strength = self.largest * jnp.repeat(conditions[:, 0], len(inputs) // self.groups)
        noisy = _with_noise(inputs, strength, jax.random.normal(noise_key, inputs.shape))
        logits, aux = module(noisy, **_given(module, conditions), train=True, key=key)
        hits = (logits.argmax(-1) == labels).mean()
        return cross_entropy(logits, labels).mean() + auxiliary(aux), {"accuracy": hits, **reported(aux)}

    def judge(self, network, batch, key):
        del key  # noise that a run's seed chose would not be that of another run
        inputs, labels, mask = batch["inputs"], batch["labels"], batch["mask"]
        noise, count, sums = noise_of(inputs), mask.sum(), {}
        for at in self.grid:
            noisy = _with_noise(inputs, jnp.full(len(inputs), self.largest * at), noise)
            logits, aux = network(noisy, **_given(network, jnp.full((1, 1), at)))
            found = {
                "accuracy": jnp.sum((logits.argmax(-1) == labels) * mask),
                "loss": jnp.sum(cross_entropy(logits, labels) * mask),
            }
            told = {name: value for name, (value, _) in reported_sums(aux, count).items()}
            for name, value in {**found, **told}.items():
                sums[name] = sums.get(name, 0) + value / len(self.grid)
            sums |= {f"{name}_at/{at:g}": value for name, value in found.items()}
        return {name: (value, count) for name, value in sums.items()}


def noise_of(inputs: jax.Array) -> jax.Array:
    """inputs [B, ...] -> z of the same shape, standard normal, of each example by its numbers alone."""
    words = jax.lax.bitcast_convert_type(inputs.astype(jnp.float32), jnp.uint32).reshape(len(inputs), -1)
    # Sums of whole numbers are the same in any order, and so on any number of devices.
    seeds = jnp.sum(words * (2 * jnp.arange(words.shape[1], dtype=jnp.uint32) + 1), -1, dtype=jnp.uint32)
    draw = lambda seed: jax.random.normal(jax.random.fold_in(jax.random.key(0), seed), inputs.shape[1:])
    return jax.vmap(draw)(seeds)


def _with_noise(inputs: jax.Array, strength: jax.Array, noise: jax.Array) -> jax.Array:
    return inputs.astype(jnp.float32) + strength.reshape(-1, *(1,) * (inputs.ndim - 1)) * noise


def _is_conditional(network) -> bool:
    return "condition" in settings_of(type(network).__call__)


def _given(network, conditions: jax.Array) -> dict[str, jax.Array]:
    return {"condition": conditions} if _is_conditional(network) else {}
