"""The optimizer chain: clip -> direction -> decoupled weight decay -> learning rate.

    update = -lr(step) (direction(clip(g)) + weight_decay x p)      decay on parameters whose path `decay` matches

A direction takes its settings from `config.optim.optim_kwargs.<name>`; accumulation is not here but in the step.
"""

import re
from collections.abc import Callable

import jax.numpy as jnp
import optax

from lissom.models.registry import construct, resolve
from lissom.models.variables import map_paths
from lissom.training import OPTIMIZERS, SCHEDULES


def adamw(
    *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0
) -> optax.GradientTransformation:
    """Adam's direction m / (sqrt(v + eps_root) + eps) (Kingma & Ba 2014, arXiv:1412.6980; decay decoupled as in
    Loshchilov & Hutter 2017). With an eps_root above 0 it has a derivative where a gradient is 0."""
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, eps_root=eps_root)


def sgd(*, momentum: float = 0.9, nesterov: bool = False) -> optax.GradientTransformation:
    """Gradient with heavy-ball or Nesterov momentum."""
    return optax.trace(decay=momentum, nesterov=nesterov) if momentum else optax.identity()


def lion(*, b1: float = 0.9, b2: float = 0.99) -> optax.GradientTransformation:
    """Sign of an interpolated momentum (Chen et al. 2023, arXiv:2302.06675)."""
    return optax.scale_by_lion(b1=b1, b2=b2)


def cosine(fraction: jnp.ndarray) -> jnp.ndarray:
    """1 -> 0 along half a cosine (Loshchilov & Hutter 2016, arXiv:1608.03983); fraction of the run after warm-up."""
    return 0.5 * (1 + jnp.cos(jnp.pi * fraction))


def linear(fraction: jnp.ndarray) -> jnp.ndarray:
    """1 -> 0 along a line."""
    return 1 - fraction


def constant(fraction: jnp.ndarray) -> jnp.ndarray:
    """1 throughout."""
    return jnp.ones_like(fraction)


def learning_rate(optim, total: int, offset: int = 0) -> Callable:
    """count -> learning rate at step count + offset: a line from 0 over the first `warmup` of the steps, then the named
    schedule."""
    shape = resolve(SCHEDULES, optim.schedule, "schedule")
    warm = round(optim.warmup * total)
    rate, floor = optim.learning_rate, optim.final_fraction

    def schedule(step):
        step = jnp.asarray(step, jnp.float32) + offset
        fraction = jnp.clip((step - warm) / max(total - warm, 1), 0.0, 1.0)
        decayed = floor + (1 - floor) * shape(fraction)
        return rate * jnp.minimum((step + 1) / max(warm, 1), decayed) if warm else rate * decayed

    return schedule


def build_optimizer(optim, total: int, offset: int = 0) -> optax.GradientTransformation:
    """The chain that `config.optim` describes for a run (or a stage) of `total` steps; `offset` is the step that the
    optimizer's own count, which starts at 0 where its state is fresh, begins at."""
    decayed = re.compile(optim.decay)

    def mask(params):
        return map_paths(lambda path, _: bool(decayed.search(path)), params)

    links = [optax.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm else []
    links.append(construct(OPTIMIZERS, optim.name, optim.optim_kwargs, "optimizer"))
    if optim.weight_decay:
        links.append(optax.add_decayed_weights(optim.weight_decay, mask=mask))
    return optax.chain(*links, optax.scale_by_learning_rate(learning_rate(optim, total, offset)))
