"""Prototypical networks: an embedding in which the nearest class mean is the answer."""

import jax
import jax.numpy as jnp

from lissom.models import transductive
from lissom.training.meta.episodic import Episodic
from lissom.training.meta.networks import headless, one_network


class PrototypicalNetworks(Episodic):
    """p(class n | x) = softmax_n(-||f(x) - c_n||^2), c_n the mean of the class's support f (Snell et al. 2017,
    arXiv:1703.05175). f is the network without its head.

    Of targets that are no classes, on which the paper is silent, every example of the support is the prototype of its
    own: the answer is the mean of the support's targets with the weights softmax_i(-||f(x) - f(x_i)||^2), a kernel
    regression in the embedding.
    """

    method = "features"
    mapping = staticmethod(one_network)

    def __init__(self, *, statistics: str = "running"):
        super().__init__(statistics=statistics)

    def structure(self, model):
        return headless(model)

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
