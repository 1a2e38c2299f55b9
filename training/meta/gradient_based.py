"""Meta-learners whose inner loop is gradient descent: MAML, its first-order form, ANIL, Meta-SGD."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import nnx

from lissom.models.registry import construct, nearest
from lissom.models.variables import Param, flatten, logical_axes, map_paths, path_name, split
from lissom.training import OPTIMIZERS
from lissom.training.meta.episodic import Episodic
from lissom.training.meta.inner import REMAT, adapted
from lissom.training.meta.networks import note_of_frozen, parts, task_loss, together

RATES = "inner_rates"  # of the network: no inner loop changes them
# What the inner directions have by default: descent is plain, and Adam's root has a slope where a gradient is 0.
INNER = {"sgd": {"momentum": 0.0}, "adamw": {"eps_root": 1e-12}}


class MAML(Episodic):
    """Model-agnostic meta-learning (Finn et al. 2017, arXiv:1703.03400): the initial parameters are learned,

        phi = U(...U(theta)),  U(p) = p - inner_rate grad L_support(p);    min_theta  mean over tasks of L_query(phi)

    inner: a name of `OPTIMIZERS` or package.module:function, which gives the direction of the inner steps; its settings
    are in inner_kwargs (defaults: `INNER`). inner_steps: in training; test_steps: in evaluation (None: as
    many). second_order: whether the gradient goes through the inner gradients. parameters: a pattern of the paths of
    those that the inner loop changes. remat: what the backward pass computes again (`inner.py`).

    The paper's inner steps use the whole support; so do these.
    """

    def __init__(
        self,
        *,
        inner: str = "sgd",
        inner_kwargs: Mapping | None = None,
        inner_rate: float = 0.1,
        inner_steps: int = 5,
        test_steps: int | None = None,
        second_order: bool = True,
        parameters: str = "",
        remat: str = "none",
        statistics: str = "support",
    ):
        super().__init__(statistics=statistics)
        for name, value in (("inner_steps", inner_steps), ("test_steps", test_steps)):
            if value is not None and value < 1:
                raise ValueError(f"objective.{name}={value} must be at least 1")
        if inner_rate <= 0:
            raise ValueError(f"objective.inner_rate={inner_rate} must be above 0")
        if remat not in REMAT:
            raise ValueError(f"objective.remat={remat!r} must be one of {', '.join(REMAT)}{nearest(remat, REMAT)}")
        try:
            self.parameters = re.compile(parameters)
        except re.error as error:
            raise ValueError(f"objective.parameters={parameters!r} is no pattern: {error}") from error
        self.inner_steps, self.test_steps = inner_steps, test_steps or inner_steps
        self.inner_rate, self.second_order, self.remat = inner_rate, second_order, remat
        kwargs = {**INNER, **{name: {**INNER.get(name, {}), **given} for name, given in (inner_kwargs or {}).items()}}
        self.direction = construct(OPTIMIZERS, inner, kwargs, "optimizer", is_field=False)

    def structure(self, model):
        names = list(flatten(split(model).params))
        if not any(self.parameters.search(name) for name in names):
            raise ValueError(
                f"objective.parameters={self.parameters.pattern!r} matches none of {', '.join(names[:6])} ..."
            )
        return model

    def notes(self, network):
        return (*super().notes(network), *note_of_frozen(network))

    def chosen(self, params: Any) -> tuple[Any, Any]:
        """(the parameters that the inner loop changes, the others)."""
        return parts(params, self.is_mine)

    def is_mine(self, name: str) -> bool:
        """Whether the inner loop changes the parameter of that path."""
        return not name.startswith(f"{RATES}/") and bool(self.parameters.search(name))

    def optimizer(self, params: Any) -> optax.GradientTransformation:
        """The inner optimizer."""
        del params
        return optax.chain(self.direction, optax.scale(-self.inner_rate))

    def adapt(self, network, params, stats, inputs, targets, key, train=False):
        inner, last = jax.random.split(key)
        found = self.descend(network, params, stats, inputs, targets, inner, train)
        if network.statistics != "support" or not jax.tree.leaves(stats):
            return found, stats
        return found, network.support(found, stats, inputs, last, train)[1]

    def descend(self, network, params, stats, inputs, targets, key, train: bool) -> Any:
        """The inner loop: the parameters behind it."""
        mine, others = self.chosen(params)

        def loss(mine, key):
            outputs, _ = network.support(together(mine, others), stats, inputs, key, train)
            return task_loss(outputs, targets)

        steps = self.inner_steps if train else self.test_steps
        order = {"second_order": self.second_order, "remat": self.remat}
        return together(adapted(loss, mine, self.optimizer(params), steps, key, **order), others)

    def answer(self, network, adapted, inputs, key, train=False):
        return network.queries(*adapted, inputs, key, train)


class FirstOrderMAML(MAML):
    """MAML whose inner gradients are taken for constants: of plain descent the meta-gradient is that of the queries at
    the adapted parameters (Finn et al. 2017, section 5.2; FOMAML of Nichol et al. 2018, arXiv:1803.02999)."""

    def __init__(self, *, second_order: bool = False, **settings):
        if second_order:
            raise ValueError("objective.second_order=True is the objective 'maml', not 'fomaml'")
        if settings.get("remat", "none") != "none":
            raise ValueError(f"objective.remat={settings['remat']!r}: 'fomaml' has no backward pass through its steps")
        super().__init__(second_order=False, **settings)


class ANIL(MAML):
    """Almost no inner loop: the head alone is adapted (Raghu et al. 2019, arXiv:1909.09157)."""

    def __init__(self, *, parameters: str = "^head/", **settings):
        super().__init__(parameters=parameters, **settings)


class InnerRates(nnx.Module):
    """A rate for every number of every parameter that the inner loop changes, under the parameter's name."""

    def __init__(self, values: Mapping[str, jax.Array], axes: Mapping[str, tuple]):
        for name, value in values.items():
            setattr(self, attribute(name), Param(value, out_sharding=axes[name]))


def attribute(name: str) -> str:
    """What the rate of a parameter is called: not by an ending that weight decay is for."""
    return f"{name.replace('/', '.')}.rate"


class MetaSGD(MAML):
    """MAML with a learned rate for every parameter: p - alpha * grad, alpha drawn even in 0.5 .. 1.5 x inner_rate at
    first and of any sign later (Li et al. 2017, arXiv:1707.09835, which takes one inner step). The rates belong to the
    network and are exported with it."""

    def __init__(self, *, inner_steps: int = 1, **settings):
        super().__init__(inner_steps=inner_steps, **settings)

    def structure(self, model):
        model = super().structure(model)
        found, axes = split(model).params, logical_axes(model)
        named = {path_name(path): names for path, names in axes.items()}
        mine = {name: leaf for name, leaf in flatten(found).items() if self.is_mine(name)}
        # Fixed draws: a network has one random key, and it is drawn from already.
        draw = lambda n, leaf: (
            self.inner_rate * jax.random.uniform(jax.random.key(n), leaf.shape, minval=0.5, maxval=1.5)
        )
        rates = {name: draw(n, leaf) for n, (name, leaf) in enumerate(sorted(mine.items()))}
        model.inner_rates = nnx.data(InnerRates(rates, named))
        return model

    def optimizer(self, params):
        rates = params[RATES]

        def update(gradients, state, given=None):
            directions, state = self.direction.update(gradients, state, given)
            scaled = map_paths(lambda name, leaf: None if leaf is None else -rates[attribute(name)] * leaf, directions)
            return scaled, state

        return optax.GradientTransformation(self.direction.init, update)
