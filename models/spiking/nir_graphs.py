"""Plain spiking networks as graphs of NIR (Pedersen et al. 2024, "Neuromorphic intermediate representation", Nature
Communications 15, 8122), and back. Needs the package `nir`.

NIR's neurons are differential equations, which leaves the step to who runs them. Here it is forward Euler with step dt,
after which the potential is compared:

    LIF        tau dv/dt = v_leak - v + R I             v += dt / tau (v_leak - v + R I)
    IF         dv/dt = R I                              v += dt R I
    CubaLIF    tau_syn di/dt = -i + w_in I              i += dt / tau_syn (-i + w_in I), and with the new i
               tau_mem dv/dt = v_leak - v + R i         v += dt / tau_mem (v_leak - v + R i)
    spike where v > v_threshold, then v = v_reset

so that `decay` is 1 - dt / tau, v_leak and v_reset are 0, and R (w_in) is what makes dt / tau R = 1: a LIF neuron of
this house has no resistance. Its comparison is h >= threshold: v_threshold is the next smaller float32.

What NIR has no word for is refused: soft resets and none, an initial potential, adaptive thresholds, a membrane_norm
(folded it is a threshold a channel or neuron, which NIR has, unless the scale of a single neuron is below 0), a decay
of 1 beside a leaking current. Recurrent layers, which it has, are not written yet. BatchNorm is folded into weights and
bias. NIR's convolutions come channel first and are padded alike on both sides; where 'SAME' pads more behind, the
kernel gets zeros in front. The mean over places and the head behind it are one Affine over all places. The encoding,
the decoding and the number of steps belong to who runs the graph: its input is what the first layer sees at a step, its
output what the last one gives.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lissom.models.registry import construct
from lissom.models.spiking import ACTIVATIONS
from lissom.models.spiking.layers import SpikingLayer
from lissom.models.spiking.network import SpikingNet
from lissom.models.spiking.neurons import ALIF, CUBA, IF, Neuron


def needed_nir():
    """The package, or one sentence about how to get it."""
    try:
        import nir
    except ImportError as error:
        raise ValueError("graphs of NIR need the package nir: uv sync --extra nir") from error
    return nir


# ---- to NIR ------------------------------------------------------------------------------------------------


def to_nir(network: SpikingNet, *, dt: float = 1.0):
    """The `nir.NIRGraph` of a network; ValueError for what NIR, or this, can't say."""
    nir, space = needed_nir(), network.layers[0].before
    if dt <= 0:
        raise ValueError(f"dt={dt} must be above 0")
    if any(layer.back is not None for layer in network.layers):
        raise ValueError("recurrent layers are not written to NIR")
    nodes: list[Any] = [nir.Input(input_type=np.array([network.layers[0].inputs, *space]))]
    for layer in network.layers:
        weights, bias = folded(layer)
        if layer.before:
            nodes.append(_conv(nir, layer, weights, bias))
        else:
            if space:
                nodes.append(_flatten(nir, layer_inputs=weights.shape[0] // _places(space), space=space))
                weights, space = _channels_first(weights, space), ()
            nodes.append(nir.Affine(weight=weights.T, bias=bias))
        space = layer.after
        nodes.append(_neuron(nir, layer.neuron, (layer.outputs, *space), dt))
    if network.head is not None:
        kernel, bias = _numbers(network.head.kernel), _numbers(network.head.bias)
        if space:
            nodes.append(_flatten(nir, layer_inputs=len(kernel), space=space))
            kernel = np.repeat(kernel / _places(space), _places(space), 0)
        nodes.append(nir.Affine(weight=kernel.T, bias=bias))
    nodes.append(nir.Output(output_type=nodes[-1].output_type["output"]))
    return nir.NIRGraph.from_list(nodes)


def folded(layer: SpikingLayer) -> tuple[np.ndarray, np.ndarray]:
    """float64 (weights, bias) of a layer with its BatchNorm as it is in evaluation."""
    weights = _numbers(layer.weights.kernel)
    if layer.norm is None:
        return weights, _numbers(layer.weights.bias)
    mean, var, scale, bias = (_numbers(getattr(layer.norm, name)) for name in ("mean", "var", "scale", "bias"))
    factor = scale / np.sqrt(var + layer.norm.epsilon)
    return weights * factor, bias - mean * factor


def _numbers(variable) -> np.ndarray:
    return np.asarray(variable[...], np.float64)


def _places(space: Sequence[int]) -> int:
    return int(np.prod(space))


def _flatten(nir, layer_inputs: int, space: Sequence[int]):
    # Types of NIR have no batch: all axes are flattened.
    return nir.Flatten(input_type=np.array([layer_inputs, *space]), start_dim=0, end_dim=-1)


def _channels_first(weights: np.ndarray, space: Sequence[int]) -> np.ndarray:
    """[space x C, out] -> [C x space, out]."""
    return np.moveaxis(weights.reshape(_places(space), -1, weights.shape[-1]), 1, 0).reshape(weights.shape)


def _padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """In front and behind, of a 'SAME' convolution."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _conv(nir, layer: SpikingLayer, weights: np.ndarray, bias: np.ndarray):
    pads = [_padding(size, layer.kernel, layer.stride) for size in layer.before]
    weights = np.moveaxis(weights, (-1, -2), (0, 1))  # [out, in, *kernel]
    weights = np.pad(weights, [(0, 0), (0, 0), *((behind - front, 0) for front, behind in pads)])
    behind, n = tuple(behind for _, behind in pads), len(pads)
    if n > 2:
        raise ValueError(f"NIR has convolutions over 1 and 2 axes, not over {n}")
    kinds = {"dilation": 1, "groups": 1, "weight": weights, "bias": bias}
    if n == 1:
        node = nir.Conv1d(input_shape=layer.before[0], stride=layer.stride, padding=behind[0], **kinds)
    else:
        node = nir.Conv2d(input_shape=layer.before, stride=(layer.stride,) * 2, padding=behind, **kinds)
    if tuple(node.output_type["output"]) != (layer.outputs, *layer.after):
        # nir takes the kernel's first size for both.
        raise ValueError(f"nir finds no shape for a kernel {weights.shape[2:]} on {layer.before} with padding {behind}")
    return node


def _neuron(nir, neuron: Neuron, shape: tuple[int, ...], dt: float):
    if not isinstance(neuron, Neuron) or isinstance(neuron, ALIF):
        raise ValueError(f"NIR has no neuron like {type(neuron).__name__}: export if, lif, plif or cuba")
    if neuron.reset != "hard":
        raise ValueError(f"NIR resets potentials to a value, and neuron.reset={neuron.reset!r} does not")
    if neuron.initial:
        raise ValueError(f"NIR starts potentials at 0, and neuron.initial={neuron.initial} does not")
    if neuron.norm is not None or (neuron.signs is not None and (neuron.signs[...] < 0).any()):
        raise ValueError("NIR compares potentials one way, and neuron.membrane_norm may turn that around")
    limits = np.broadcast_to(np.asarray(neuron.limit(), np.float32), (*shape[1:], shape[0]))
    below = np.nextafter(np.moveaxis(limits, -1, 0), np.float32(-np.inf)).astype(np.float64)
    whole = lambda value: np.full(shape, value, np.float64)
    kinds = {"v_threshold": below, "v_reset": whole(0)}
    if isinstance(neuron, IF):
        return nir.IF(r=whole(1 / dt), **kinds)
    rates = neuron.rates()
    tau = _time_constant("decay", rates["decay"], dt)
    if isinstance(neuron, CUBA):
        syn = _time_constant("current_decay", rates["current_decay"], dt)
        more = {"tau_mem": whole(tau), "tau_syn": whole(syn), "w_in": whole(syn / dt)}
        return nir.CubaLIF(**more, r=whole(tau / dt), v_leak=whole(0), **kinds)
    return nir.LIF(tau=whole(tau), r=whole(tau / dt), v_leak=whole(0), **kinds)


def _time_constant(name: str, decay, dt: float) -> float:
    decay = float(np.ravel(decay)[0])
    if decay >= 1:
        raise ValueError(f"NIR has no leak without a time constant, and neuron.{name}={decay:g} has none")
    return dt / (1 - decay)


# ---- from NIR ----------------------------------------------------------------------------------------------


def from_nir(graph, *, dt: float = 1.0, input_shape: Sequence[int] | None = None, **settings) -> SpikingNet:
    """The network of a graph that `to_nir` could have made with this dt: a chain of convolutions and Affine nodes with
    neurons behind them of one kind, alike within a layer but for their thresholds, or an Affine alone at the end.
    `settings` of `SpikingNet` say what no graph does: time_steps, encoding, decoding. input_shape: that of the
    examples, where the encoding makes of them what the graph sees (frames, delta). ValueError for any other graph."""
    nir, nodes = needed_nir(), _chain(graph)
    layers, neurons, head, flat = [], [], None, None
    shape = tuple(int(size) for size in nodes[0].output_type["output"])
    if input_shape is None:
        input_shape = (*shape[1:], shape[0])
    for node, following in itertools.pairwise(nodes[1:]):
        if isinstance(node, nir.Flatten):
            flat = shape
        elif isinstance(node, nir.Conv1d | nir.Conv2d):
            layers.append(_same_convolution(node, shape[1:]))
        elif isinstance(node, nir.Affine | nir.Linear):
            found = _affine(node, flat, last=following is nodes[-1])
            layers, head, flat = ([*layers, found], head, None) if following is not nodes[-1] else (layers, found, None)
        elif isinstance(node, nir.IF | nir.LIF | nir.CubaLIF) and len(neurons) < len(layers):
            neurons.append(_population(nir, node, dt))
        else:
            raise ValueError(f"a {type(node).__name__} has no place in a plain spiking network")
        shape = tuple(int(size) for size in node.output_type["output"])
    if len(neurons) != len(layers) or not layers:
        raise ValueError(f"{len(layers)} layers have {len(neurons)} populations of neurons behind them")
    if len({population.name for population in neurons}) > 1:
        raise ValueError("the neurons of a plain spiking network are of one kind, and these differ between layers")
    return _assembled(layers, neurons, head, input_shape, shape[0], settings)


def _chain(graph) -> list:
    """The nodes from the input to the output, each with one in front and one behind."""
    following = dict(graph.edges)
    starts = [name for name in graph.nodes if name not in following.values()]
    if len(following) != len(graph.edges) or len(starts) != 1 or len(graph.edges) != len(graph.nodes) - 1:
        raise ValueError("a plain spiking network is a chain, and this graph has branches or loops")
    names = starts
    while names[-1] in following:
        names.append(following[names[-1]])
    return [graph.nodes[name] for name in names]


def _same_convolution(node, space: tuple[int, ...]) -> dict[str, Any]:
    """Kernel, stride and weights [*kernel, in, out] of the 'SAME' convolution that a node is."""
    whole = lambda value: tuple(int(v) for v in np.ravel(value)) * (len(space) if np.size(value) == 1 else 1)
    if isinstance(node.padding, str | bytes) or node.groups != 1 or set(whole(node.dilation)) != {1}:
        raise ValueError("convolutions are read with padding in numbers, without groups and dilation")
    weights, strides, pads = np.asarray(node.weight, np.float64), set(whole(node.stride)), whole(node.padding)
    for kernel in range(1, max(weights.shape[2:]) + 1):  # the smallest that loses nothing
        found = [_padding(size, kernel, stride) for size in space for stride in strides]
        fronts = [behind - front for front, behind in found]
        right = [behind for _, behind in found] == list(pads) and len(strides) == 1
        if right and [kernel + front for front in fronts] == list(weights.shape[2:]):
            inner = (slice(None), slice(None), *(slice(front, None) for front in fronts))
            if np.count_nonzero(weights) == np.count_nonzero(weights[inner]):
                weights = np.moveaxis(weights[inner], (0, 1), (-1, -2))
                return {"kernel": kernel, "stride": strides.pop(), "weights": weights, "bias": np.asarray(node.bias)}
    raise ValueError(f"a kernel {weights.shape[2:]} with padding {pads} on {space} is no 'SAME' convolution")


def _affine(node, flat: tuple[int, ...] | None, last: bool) -> dict[str, Any]:
    """Weights [in, out] of a node, whose inputs are `flat` [C, *space] where it stands behind a Flatten. The last one
    of a network without dense layers is a head on the mean over places: its weights are the same at all of them."""
    weights = np.asarray(node.weight, np.float64).T
    bias = np.asarray(node.bias, np.float64) if hasattr(node, "bias") else np.zeros(weights.shape[1])
    if flat is None:
        return {"kernel": None, "weights": weights, "bias": bias}
    by_place = weights.reshape(flat[0], -1, weights.shape[1])
    if last:
        if (by_place != by_place[:, :1]).any():
            raise ValueError("the last Affine differs between places, and a plain network's is one of their mean")
        return {"kernel": None, "weights": by_place[:, 0] * by_place.shape[1], "bias": bias}
    return {"kernel": None, "weights": np.moveaxis(by_place, 0, 1).reshape(weights.shape), "bias": bias}


class _Population(NamedTuple):
    """`settings` of the kind `name` of ACTIVATIONS; limits: thresholds [*space, C] where neurons have their own; gain:
    what their currents are multiplied by."""

    name: str
    settings: dict[str, float]
    limits: np.ndarray | None
    gain: float


def _population(nir, node, dt: float) -> _Population:
    one = lambda name: _alike(name, getattr(node, name))
    if one("v_reset") or (not isinstance(node, nir.IF) and one("v_leak")):
        raise ValueError("neurons are read whose v_reset and v_leak are 0")
    limits = np.nextafter(np.moveaxis(np.asarray(node.v_threshold, np.float32), 0, -1), np.float32(np.inf))
    # XLA takes what is smaller than any normal number for 0, and a threshold of 0 fires at rest.
    tiny = np.finfo(np.float32).tiny
    limits = np.where((limits > 0) & (limits < tiny), tiny, limits)
    settings = {}
    # Learned thresholds are above 0; those of a folded norm need not be.
    if np.ptp(limits) == 0 and limits.flat[0] > 0:
        settings, limits = {"threshold": float(limits.flat[0])}, None
    if isinstance(node, nir.IF):
        return _Population("if", settings, limits, dt * one("r"))
    if isinstance(node, nir.LIF):
        return _Population("lif", {**settings, "decay": 1 - dt / one("tau")}, limits, dt / one("tau") * one("r"))
    settings |= {"decay": 1 - dt / one("tau_mem"), "current_decay": 1 - dt / one("tau_syn")}
    gain = dt / one("tau_syn") * one("w_in") * dt / one("tau_mem") * one("r")
    return _Population("cuba", settings, limits, gain)


def _alike(name: str, values) -> float:
    if np.ptp(values):
        raise ValueError(f"{name} differs between the neurons of a layer, and a plain network has one")
    return float(np.ravel(values)[0])


def _assembled(layers, neurons, head, input_shape: Sequence[int], classes: int, settings) -> SpikingNet:
    convolutions = [layer for layer in layers if layer["kernel"]]
    dense = [layer["weights"].shape[1] for layer in layers[len(convolutions) :]]
    kernels = {layer["kernel"] for layer in convolutions} or {3}
    if len(kernels) > 1:
        raise ValueError(f"a plain spiking network has one size of kernel, and these are {sorted(kernels)}")
    name = neurons[0].name
    network = SpikingNet(
        input_shape=input_shape,
        classes=classes,
        widths=[layer["weights"].shape[-1] for layer in convolutions],
        strides=[layer["stride"] for layer in convolutions],
        kernel=kernels.pop(),
        hidden=dense if head is not None else dense[:-1],
        neuron=name,
        neuron_kwargs={name: neurons[0].settings},
        batch_norm=False,
        rngs=nnx.Rngs(0),
        **settings,
    )
    if (head is None) != (network.head is None):
        has = "spikes" if head is None else "numbers"
        raise ValueError(f"the graph gives {has}, which model.decoding={settings.get('decoding', 'mean')!r} can't read")
    for layer, read, population in zip(network.layers, layers, neurons, strict=True):
        shape = {"channels": layer.outputs, "space": layer.after}
        layer.neuron = construct(
            ACTIVATIONS, name, {name: population.settings}, "neuron", is_field=False, **shape, rngs=nnx.Rngs(0)
        )
        if population.limits is not None:
            layer.neuron.hold(_by_channel(population.limits))
        _fill(layer.weights, read["weights"] * population.gain, read["bias"] * population.gain)
    if head is not None:
        _fill(network.head, head["weights"], head["bias"])
    return network


def _by_channel(limits: np.ndarray) -> jax.Array:
    """[*space, C] as [C], where all places have the same."""
    by_place = limits.reshape(-1, limits.shape[-1])
    return jnp.asarray(limits if np.ptp(by_place, 0).any() else by_place[0])


def _fill(module, weights: np.ndarray, bias: np.ndarray) -> None:
    if module.kernel.shape != weights.shape:
        raise ValueError(f"a layer of weights {list(module.kernel.shape)} can't have those of {list(weights.shape)}")
    module.kernel[...], module.bias[...] = jnp.asarray(weights, jnp.float32), jnp.asarray(bias, jnp.float32)
