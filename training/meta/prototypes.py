"""An embedding in which the nearest class mean is the answer: prototypical networks, and what else learns features."""

from typing import Any

import jax
import jax.numpy as jnp

from lissom.models import transductive
from lissom.models.variables import Tree
from lissom.training.meta.episodic import Episodic
from lissom.training.meta.networks import TaskNetwork, headless, one_network


def unit_means(
    network: TaskNetwork, params: Tree, stats: Tree, inputs: jax.Array, targets: jax.Array, key: jax.Array, train: bool
) -> Any:
    """What `nearest_unit_mean` needs of a support: params, stats and the class means [ways, D] of its features, each
    divided by its norm."""
    found, stats = network.support(params, stats, inputs, key, train)
    return params, stats, transductive.prototypes(transductive.unit(found), targets, network.ways)


def nearest_unit_mean(
    network: TaskNetwork, adapted: Any, inputs: jax.Array, key: jax.Array, train: bool
) -> tuple[jax.Array, Tree]:
    """(-||f(x) / ||f(x)|| - c_n||^2 [n, ways], new stats) (Wang et al. 2019, arXiv:1911.04623)."""
    params, stats, centres = adapted
    found, stats = network.queries(params, stats, inputs, key, train)
    return -transductive.squared_distances(transductive.unit(found), centres), stats


class Headless(Episodic):
    """The network is an embedding: it has no head, and no support changes its parameters."""

    method = "features"
    mapping = staticmethod(one_network)

    def __init__(self, *, statistics: str = "running"):
        super().__init__(statistics=statistics)

    def structure(self, model):
        return headless(model)


class FeatureExtractor(Headless):
    """What learns features without episodes, by a `loss` of its own: an episode is answered by the nearest class mean
    of the features, which are divided by their norms."""

    def loss(self, module, batch, key, step):
        raise NotImplementedError

    def adapt(self, network, params, stats, inputs, targets, key, train=False):
        return unit_means(network, params, stats, inputs, targets, key, train)

    def answer(self, network, adapted, inputs, key, train=False):
        return nearest_unit_mean(network, adapted, inputs, key, train)


class PrototypicalNetworks(Headless):
    """p(class n | x) = softmax_n(-||f(x) - c_n||^2), c_n the mean of the class's support f (Snell et al. 2017,
    arXiv:1703.05175). f is the network without its head.

    Of targets that are no classes, on which the paper is silent, every example of the support is the prototype of its
    own: the answer is the mean of the support's targets with the weights softmax_i(-||f(x) - f(x_i)||^2), a kernel
    regression in the embedding.
    """

    def adapt(self, network, params, stats, inputs, targets, key, train=False):
        found, stats = network.support(params, stats, inputs, key, train)
        return params, stats, found, targets

    def answer(self, network, adapted, inputs, key, train=False):
        params, stats, support, targets = adapted
        found, stats = network.queries(params, stats, inputs, key, train)
        if jnp.issubdtype(targets.dtype, jnp.integer):
            return transductive.nearest_prototype(support, targets, found, network.ways), stats
        weights = jax.nn.softmax(-transductive.squared_distances(found, support), -1)
        return weights @ targets, stats
