"""Reptile: the initial parameters move towards those that tasks are solved by."""

import jax
import jax.numpy as jnp

from lissom.models.variables import Parts, merge
from lissom.training.errors import UserError
from lissom.training.meta.gradient_based import MAML
from lissom.training.meta.inner import adapted
from lissom.training.meta.networks import TaskNetwork, a_network_a_task, check_state, task_loss, together


class Reptile(MAML):
    """theta <- theta + epsilon mean over tasks of (phi - theta), phi theta after inner_steps on the task (Nichol et al.
    2018, arXiv:1803.02999). No gradient goes through the inner loop: (theta - phi) / (inner_rate inner_steps) is handed
    to the outer optimizer as if it were one (section 6.2 of the paper does so with Adam), which for one step and the
    whole task is the gradient of its loss.

    In training a task is its support and its queries together, as the paper, which has no queries then, asks for more
    shots than in the test; each step takes `inner_batch` of its examples, drawn anew (0: all). In evaluation it adapts
    to the support as the others do.
    """

    def __init__(self, *, inner_batch: int = 10, second_order: bool = False, **settings):
        if second_order:
            raise ValueError("objective.second_order=True means nothing to 'reptile', whose inner loop has no gradient")
        if inner_batch < 0:
            raise ValueError(f"objective.inner_batch={inner_batch} must be at least 1, or 0: all examples of a task")
        if settings.get("remat", "none") != "none":
            raise ValueError(f"objective.remat={settings['remat']!r}: 'reptile' has no backward pass through its steps")
        super().__init__(second_order=False, **settings)
        self.inner_batch = inner_batch

    def gradients(self, graph, params, stats, frozen, batch, key, step):
        del step
        module = merge(Parts(graph, params, stats, frozen))
        check_state(module, self.statistics_of)
        network, params, stats = TaskNetwork.of(module, self.statistics_of, self.method)
        mine, others = self.chosen(params)
        joined = lambda name: jnp.concatenate([batch[f"support_{name}"], batch[name]], 1)
        inputs, targets = joined("inputs"), joined("labels")
        size = inputs.shape[1]
        if self.inner_batch > size:
            raise UserError(
                f"config.objective_kwargs.reptile.inner_batch={self.inner_batch} is more than the {size} examples of a "
                "task, its support and its queries"
            )

        def task(inputs, targets, key):
            def loss(mine, key):
                pick, key = jax.random.split(key)
                rows = jax.random.choice(pick, size, (self.inner_batch or size,), replace=False)
                outputs, new = network.support(together(mine, others), stats, inputs[rows], key, True)
                return task_loss(outputs, targets[rows]), new

            steps, last = jax.random.split(key)
            first = lambda mine, key: loss(mine, key)[0]
            found = adapted(first, mine, self.optimizer(params), self.inner_steps, steps, second_order=False)
            after, new = loss(found, last)
            return found, after, new

        with a_network_a_task():
            found, losses, new = jax.vmap(task)(inputs, targets, jax.random.split(key, len(inputs)))
        scale = 1 / (self.inner_rate * self.inner_steps)
        towards = jax.tree.map(lambda a, b: scale * (a - b.mean(0)), mine, found)
        still = jax.tree.map(jnp.zeros_like, others)
        if self.statistics_of == "running":
            stats = jax.tree.map(lambda leaf: leaf.mean(0), new)
        return together(towards, still), stats, {"loss": losses.mean()}
