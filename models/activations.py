"""Functions of single numbers between the layers of convolutional networks, by name.

relu        max(x, 0)
hard_tanh   x within -1 and 1
none        x: for layers that round what they are given, such as to its sign, which after relu is 1 everywhere
"""

from collections.abc import Callable

import jax

from lissom.models.registry import nearest

FUNCTIONS = {"relu": jax.nn.relu, "hard_tanh": jax.nn.hard_tanh, "none": lambda x: x}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """ValueError where there is none of that name."""
    if name not in FUNCTIONS:
        raise ValueError(f"model.activation={name!r} must be one of {', '.join(FUNCTIONS)}{nearest(name, FUNCTIONS)}")
    return FUNCTIONS[name]
