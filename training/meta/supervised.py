"""What needs no meta-learning: a network that is trained on all tasks at once."""

import jax.numpy as jnp
from flax import nnx

from lissom.models.linear import Linear
from lissom.training.errors import UserError
from lissom.training.meta.episodic import hits
from lissom.training.meta.gradient_based import MAML
from lissom.training.meta.networks import TaskNetwork, a_network_a_task, headless, note, one_network, task_loss
from lissom.training.meta.prototypes import nearest_unit_mean, unit_means
from lissom.training.objectives.base import auxiliary, cross_entropy, reported


class WithClasses(nnx.Module):
    """A network without its head, and a head for all training classes."""

    def __init__(self, network: nnx.Module, classes: int, rngs: nnx.Rngs):
        self.network = network
        self.classes = Linear(network.feature_size, classes, axes=("mlp", "classes"), rngs=rngs)


class Supervised(MAML):
    """The baseline of every meta-learner, on the same batches of episodes, their tasks forgotten.

    Of classes: cross-entropy of all training classes, supports and queries alike; an episode is answered by the nearest
    class mean of the features, which are divided by their norms (Chen et al. 2019, arXiv:1904.04232; Wang et al. 2019,
    arXiv:1911.04623). `single`: its batches are single examples of all classes, as those papers have it, and
    `data.batch_size` counts these; a batch of episodes has examples of few classes. `classes=False`: one network for
    all tasks, by their own targets or labels, which is then fine-tuned on the support by the inner loop (the
    pretraining baseline of Finn et al. 2017, arXiv:1703.03400).
    """

    def __init__(self, *, classes: bool = True, single: bool = False, statistics: str = "running", **settings):
        if single and not classes:
            raise ValueError("objective.single=True is of classes, whose examples are given one by one")
        if classes and settings:
            name = next(iter(settings))
            raise ValueError(
                f"objective.{name}={settings[name]!r} is of the fine-tuning, which classes=True has none of"
            )
        for name in ("second_order", "remat", "test_steps"):
            if name in settings:
                raise ValueError(
                    f"objective.{name}={settings[name]!r}: 'supervised' has no inner loop in training, and fine-tunes "
                    "in inner_steps"
                )
        super().__init__(statistics=statistics, **settings)
        self.of_classes, self.single = classes, single
        self.path = ("network",) if classes else ()
        self.method = "features" if classes else "outputs"
        self.mapping = one_network if classes else a_network_a_task

    def prepare(self, facts):
        if self.of_classes and "train_classes" not in facts:
            raise UserError(
                "objective 'supervised' learns classes that tasks share, and the tasks of this data share none: set "
                "config.objective_kwargs.supervised.classes=False"
            )
        self._classes = facts.get("train_classes")

    def notes(self, network):
        return note(network, self.statistics_of) if self.of_classes else super().notes(network)

    def structure(self, model):
        return headless(model) if self.of_classes else super().structure(model)

    def build(self, model, rngs):
        return WithClasses(model, self._classes, rngs) if self.of_classes else model

    def loss(self, module, batch, key, step):
        del step
        if self.single:
            return self._loss_of_classes(module, batch["inputs"], batch["labels"], key)
        flat = lambda name: batch[name].reshape(-1, *batch[name].shape[2:])
        inputs = jnp.concatenate([flat("support_inputs"), flat("inputs")])
        targets = jnp.concatenate([flat("support_labels"), flat("labels")])
        if not self.of_classes:
            outputs, aux = module(inputs, train=True, key=key)
            error = task_loss(outputs, targets)
            right = hits(outputs, targets)
            told = {"mse": error} if right is None else {"accuracy": right}
            return error + auxiliary(aux), {**told, **reported(aux)}
        numbered = lambda name: jnp.take_along_axis(batch["classes"], batch[name], 1).reshape(-1)
        labels = jnp.concatenate([numbered("support_labels"), numbered("labels")])
        return self._loss_of_classes(module, inputs, labels, key)

    def _loss_of_classes(self, module, inputs, labels, key):
        logits = module.classes(module.network.features(inputs, train=True, key=key))
        return cross_entropy(logits, labels).mean(), {"accuracy": hits(logits, labels)}

    def adapt(self, network: TaskNetwork, params, stats, inputs, targets, key, train=False):
        if not self.of_classes:
            return super().adapt(network, params, stats, inputs, targets, key, train)
        return unit_means(network, params, stats, inputs, targets, key, train)

    def answer(self, network: TaskNetwork, adapted, inputs, key, train=False):
        if not self.of_classes:
            return super().answer(network, adapted, inputs, key, train)
        return nearest_unit_mean(network, adapted, inputs, key, train)
