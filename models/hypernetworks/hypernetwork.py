"""A network whose parameters are a function of a condition: the default and the magnitude-invariant parametrization."""

import math
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models import MODELS, SIZES, products
from lissom.models.bounds import UnsupportedForm, at_least_one
from lissom.models.linear import Linear
from lissom.models.registry import construct, nearest, required, resolve, settings_of
from lissom.models.tallies import TALLIES
from lissom.models.variables import Param, flatten, logical_axes, map_paths, merge, path_name, split

SLOPE = 0.01  # of the leaky relu below 0
MIDDLE = 0.5
FACTS = ("input_shape", "classes")
# Kaiming's, by the outputs of a layer: the norm of what comes in is that of what goes out, of each predicted tensor.
HIDDEN_INIT = nnx.initializers.variance_scaling(2 / (1 + SLOPE**2), "fan_out", "normal")
HEAD_INIT = nnx.initializers.variance_scaling(1.0, "fan_out", "normal")


def raw(condition: jax.Array) -> jax.Array:
    """gamma [..., C] itself."""
    return condition


def cosine(condition: jax.Array) -> jax.Array:
    """[cos(pi gamma / 2), sin(pi gamma / 2)] [..., 2 C]: of norm sqrt(C) whatever gamma is, and another for each gamma
    in [0, 1]."""
    angle = math.pi / 2 * condition
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


CODES: dict[str, Callable[[jax.Array], jax.Array]] = {"raw": raw, "cosine": cosine}
WIDENED = {"raw": 1, "cosine": 2}  # numbers of a code for one of a condition
HEAD_INITS = ("fan_out", "main")


class Hypernetwork(nnx.Module):
    """inputs [G n, ...] in G groups, condition gamma [G, C] in [0, 1] -> the main network's output for the inputs of
    each group, with the parameters that are predicted for its condition.

        theta(gamma) = theta_0 + h(e(gamma))       for every tensor theta of the main network that `predicted` matches
        h(e) = W_theta s(... s(W_1 s(W_0 e + b_0) + b_1) ...)        s(z) = max(z, 0.01 z), without norms

                            code    e(gamma)                                 residual   theta_0 begins as
        default             raw     gamma                                    False      0: it is the bias of W_theta
        magnitude-invariant cosine  [cos(pi gamma / 2), sin(pi gamma / 2)]   True       the main network begins alone

    Gonzalez Ortiz et al. 2023, "Magnitude Invariant Parametrizations Improve Hypernetwork Learning", arXiv:2304.07645.
    Where biases are 0, as they begin, h(a e) = a h(e) for a > 0: the default's weights, and with them its activations
    and gradients, grow with the condition. The code's norm is the same for every condition, and theta_0 is of none. The
    paper tries both parts alone, which any other pair of `code` and `residual` does.

    hidden: widths of h (the paper's are 16 and 128); predicted: a pattern of paths of the main network's parameters
    ("convs/0/kernel"), the others are trained as they are. network, network_size: names of `MODELS` and `SIZES`;
    network_kwargs: settings on top, by the name. `dtype` is the main network's; its parameters are predicted in
    float32.

    From the authors' code (github.com/JJGO/hyperlight), since of the paper we had no more than the abstract and
    summaries: kernels of h begin normal with Kaiming's variance by fan-out, 2 / (1.0001 outputs), and biases at 0. Each
    predicted tensor of N numbers is a layer of its own, of variance 1 / N, as in an early version (in the later one all
    are one layer); theta_0 is the bias of that layer, as in the later version (the early one had both). So all
    variants have the same parameters, but for what reads the wider code. Chosen here: a main network begins as it does
    alone, where the authors' begins with Kaiming's variances; a batch has as many conditions as its caller likes, where
    the authors' has one.

    By that every predicted tensor begins with a norm of about |e|, where one of a main network alone has a larger one
    (a kernel about the root of 1 or 2 x outputs). head_init "main" is not the paper's: kernels W_theta are multiplied
    with the norm that theta has in a main network that begins alone, so that it is as large at |e| = 1 (which the
    variances of Chang et al. 2020, arXiv:2312.08399, reach by formulas); "fan_out" is the above. It tells what the
    default suffers from the condition's magnitude from what it suffers from weights that begin too small.

    A group's weights are predicted once, and the main network is mapped over the groups. A main network that carries
    statistics is refused: activations differ from condition to condition, and so do their statistics, of which one set
    would be kept. Without a condition it is 0.5 in every coordinate, for all inputs: what latencies are measured of.
    ValueError for a condition outside of [0, 1] where its values are known (outside of a traced program): map it first.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        classes: int,
        hidden: Sequence[int],
        network: str,
        network_size: str | None = None,
        network_kwargs: Mapping | None = None,
        conditions: int = 1,
        code: str = "cosine",
        residual: bool = True,
        predicted: str = "",
        head_init: str = "fan_out",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        at_least_one("model", hidden=hidden, conditions=conditions)
        if code not in CODES:
            raise ValueError(f"model.code={code!r} must be one of {', '.join(CODES)}{nearest(code, CODES)}")
        if head_init not in HEAD_INITS:
            raise ValueError(f"model.head_init={head_init!r} must be one of {', '.join(HEAD_INITS)}")
        facts = {"input_shape": input_shape, "classes": classes, "dtype": dtype}
        main = _main_network(network, network_size, network_kwargs, facts, rngs)
        parts = split(main)
        if parts.stats:
            raise ValueError(
                f"model.network={network!r} must carry no statistics, and it has {_first(parts.stats)}: "
                "one set of them would stand for all conditions"
            )
        self.names = _matched(predicted, flatten(parts.params))
        if not residual:
            zeroed = lambda name, leaf: jnp.zeros_like(leaf) if name in self.names else leaf
            main = merge(parts._replace(params=map_paths(zeroed, parts.params)))
        self.network = main
        axes = {path_name(path): names for path, names in logical_axes(main).items()}
        layers, inputs = [], conditions * WIDENED[code]
        for width in hidden:
            layers.append(Linear(inputs, width, axes=(None, None), init=HIDDEN_INIT, rngs=rngs))
            inputs = width
        self.layers = nnx.List(layers)
        shapes = {name: leaf.shape for name, leaf in flatten(parts.params).items()}
        self.heads = nnx.List(
            Linear(inputs, shapes[name], axes=(None, *axes[name]), bias=False, init=HEAD_INIT, rngs=rngs)
            for name in self.names
        )
        if head_init == "main":
            alone = flatten(parts.params)
            for name, head in zip(self.names, self.heads, strict=True):
                head.kernel[...] *= jnp.linalg.norm(alone[name])
        self.conditions, self.code, self.residual = conditions, code, residual

    def weights(self, condition: jax.Array) -> dict[str, jax.Array]:
        """condition [G, C] -> {path in the main network: float32 [G, *shape]} of what is predicted."""
        if condition.ndim != 2 or condition.shape[1] != self.conditions:
            raise UnsupportedForm(
                f"the condition of a group is {self.conditions} numbers, [groups, {self.conditions}], and this one is "
                f"{list(condition.shape)}"
            )
        if not isinstance(condition, jax.core.Tracer) and not ((condition >= 0) & (condition <= 1)).all():
            raise ValueError("a condition must lie in [0, 1]: map it there first")
        z = CODES[self.code](condition.astype(jnp.float32))
        for layer in self.layers:
            z = jax.nn.leaky_relu(layer(z), SLOPE)
        # theta_0 is what reads like the parameter: a transform may have stored it in fewer bits.
        base = {name: getattr(*_place(self.network, name))[...] for name in self.names}
        return {name: base[name] + head(z) for name, head in zip(self.names, self.heads, strict=True)}

    def __call__(
        self,
        inputs: jax.Array,
        condition: jax.Array | None = None,
        *,
        train: bool = False,
        key: jax.Array | None = None,
    ):
        parts = split(self.network)
        if parts.stats:
            raise UnsupportedForm(
                f"the main network of a hypernetwork carries no statistics, and this one has {_first(parts.stats)}"
            )
        predicted = self.weights(jnp.full((1, self.conditions), MIDDLE) if condition is None else condition)
        groups = 1 if condition is None else len(condition)
        if len(inputs) % groups:
            raise UnsupportedForm(f"{len(inputs)} examples can't be {groups} groups of one condition each")

        def run(predicted, inputs, key):
            main = merge(parts)
            for name, leaf in predicted.items():
                setattr(*_place(main, name), Param(leaf))
            return main(inputs, train=train, key=key)

        if groups == 1:  # a plain call: mapped, its convolutions would be products of windows
            return run({name: leaf[0] for name, leaf in predicted.items()}, inputs, key)
        keys = None if key is None else jax.random.split(key, groups)
        with products.as_matrices():
            grouped = inputs.reshape(groups, -1, *inputs.shape[1:])
            output, aux = jax.vmap(run, in_axes=(0, 0, None if key is None else 0))(predicted, grouped, keys)
        output = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), output)
        return output, {kind: _over_groups(told) for kind, told in aux.items()}


def _place(network: nnx.Module, name: str) -> tuple[nnx.Module, str]:
    """'convs/0/kernel' -> (the layer convs[0], 'kernel')."""
    *path, last = name.split("/")
    for part in path:
        network = network[int(part)] if part.isdigit() else getattr(network, part, None)
    if getattr(network, last, None) is None:
        raise UnsupportedForm(f"a hypernetwork predicts {name}, which its main network does not have any more")
    return network, last


def _first(tree: dict) -> str:
    return next(iter(flatten(tree)))


def _over_groups(told: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What each group's call tells, as of one call: tallies are summed, losses and metrics are means."""
    return {name: value.sum(0) if name in TALLIES else value.mean(0) for name, value in told.items()}


def _matched(pattern: str, names: Mapping[str, jax.Array]) -> tuple[str, ...]:
    """Those that the pattern finds, in order; the empty one finds all."""
    try:
        found = tuple(name for name in names if re.search(pattern, name))
    except re.error as error:
        raise ValueError(f"model.predicted={pattern!r} must be a pattern: {error}") from error
    if not found:
        raise ValueError(f"model.predicted={pattern!r} must match a parameter, of {', '.join(names)}")
    return found


def _main_network(name: str, size: str | None, kwargs: Mapping | None, facts: Mapping, rngs: nnx.Rngs) -> nnx.Module:
    if name == "hypernetwork":
        raise ValueError("model.network='hypernetwork' must be a network without conditions")
    main, kwargs = resolve(MODELS, name, "network"), dict(kwargs or {})
    known, own = SIZES.get(name, {}), name if name in MODELS else name.rpartition(":")[2]
    if size is not None and size not in known:
        raise ValueError(f"model.network_size={size!r} must be one of {', '.join(known) or 'none'}, of {name!r}")
    taken = settings_of(main)
    # Layers apart: a head predicts each of them.
    settings = {**known.get(size, {}), **({"stack": "loop"} if "stack" in taken else {}), **kwargs.get(own, {})}
    if settings.get("stack", "loop") != "loop":
        raise ValueError(f"model.network_kwargs.{own}.stack={settings['stack']!r} must be 'loop'")
    fixed = {key: value for key, value in facts.items() if key in taken}
    missing = required(main, {**settings, **fixed})
    if missing:
        raise ValueError(
            f"model.network={name!r} must be made of {', '.join(FACTS)} and settings: it needs {missing[0]}"
        )
    try:
        return construct(MODELS, name, {**kwargs, own: settings}, "network", **fixed, rngs=rngs)
    except ValueError as error:
        raise ValueError(f"{error} (of the main network: model.network_kwargs.{own})") from error
