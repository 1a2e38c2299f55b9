"""How much each layer minds each option: tables [layers, options], which are taken to add up over the layers.

    curvature     mean of the Hessian's eigenvalues x squared error of rounding, of weights and of activations
                  (HAWQ-V2, Dong et al. 2019, arXiv:1911.03852)
    divergence    KL of the outputs of the network from those with one layer rounded (ZeroQ, Cai et al. 2020,
                  arXiv:2001.00281, on examples of its own making: `../distillation.py`)
    interactions  what two layers lose together beyond what each does alone (Schaefer et al. 2023, arXiv:2306.04879)

Passes over the examples are counted in `mixed.passes`; a product with the Hessian is one of them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lissom.compression.quantization.allocation.candidates import Mixed, Seen, recorded
from lissom.compression.quantization.allocation.hessians import estimator, traces
from lissom.compression.quantization.ranges import given
from lissom.compression.quantization.transforms import kernel_of, quantizable
from lissom.models.variables import Parts, merge

Loss = Callable[[nnx.Module, Mapping[str, Any]], jax.Array]
"""(network, batch) -> its mean loss."""


class Offset(Seen):
    """Adds to what a layer multiplies: what one differentiates by to know how it minds its input."""

    def __init__(self, offset: jax.Array):
        self.offset = offset

    def seen(self, x: jax.Array) -> jax.Array:
        return x + self.offset.astype(x.dtype)


def curvature(
    mixed: Mixed, loss: Loss, batches: Sequence[Mapping[str, Any]], key: jax.Array, samples: int = 16
) -> np.ndarray:
    """trace(H_i) / n_i ||Q(w_i) - w_i||^2, and for activations that are rounded the same of x_i, of which trace and
    error are means over the examples: batches are full, and of one size. A mean eigenvalue below 0, which rounding
    cannot gain from in earnest, counts as 0. The constant 1/2 of the expansion is left out."""
    kernels, state = _kernels(mixed), mixed.source[1:]
    estimate = estimator(functools.partial(_of_kernels, mixed, loss))
    keys = [jax.random.fold_in(key, number) for number in range(samples)]
    found, _ = traces(estimate(key, kernels, state, dict(batch)) for key in keys for batch in batches)
    mean = [float(found[path]) / kernels[path].size for path in mixed.paths]
    table = np.maximum(mean, 0.0)[:, None] * weight_errors(mixed)
    mixed.passes += samples
    if any(option.activations for option in mixed.options):
        table += _of_activations(mixed, loss, batches, keys)
    return table


def weight_errors(mixed: Mixed) -> np.ndarray:
    """||Q(w) - w||^2 [layers, options]."""

    def error(layer: nnx.Module, fake: Any) -> jax.Array:
        name, product = kernel_of(layer)
        kernel = getattr(layer, name)[...]
        return jnp.square(fake.weights(kernel, product.kernel_axes(kernel.ndim)) - kernel).sum()

    @jax.jit
    def errors(state: tuple) -> list[list[jax.Array]]:
        layers = quantizable(merge(Parts(mixed.parts.graph, *state))).values()
        return [[error(layer, fake) for fake in layer.quantizer.fakes] for layer in layers]

    return np.asarray(errors(mixed.parts[1:]))


def _kernels(mixed: Mixed) -> dict[str, jax.Array]:
    layers = quantizable(merge(mixed.source))
    return {path: getattr(layer, kernel_of(layer)[0])[...] for path, layer in layers.items()}


def _of_kernels(mixed: Mixed, loss: Loss, kernels: dict[str, jax.Array], state: tuple, batch: Mapping[str, Any]):
    """The loss as a function of the kernels."""
    network = merge(Parts(mixed.source.graph, *state))
    for path, layer in quantizable(network).items():
        getattr(layer, kernel_of(layer)[0])[...] = kernels[path]
    return loss(network, batch)


def _of_offsets(mixed: Mixed, loss: Loss, offsets: dict[str, jax.Array], state: tuple, batch: Mapping[str, Any]):
    """The loss as a function of what is added to the inputs of layers."""
    network = merge(Parts(mixed.source.graph, *state))
    for path, layer in quantizable(network).items():
        if path in offsets:
            layer.quantizer = nnx.data(Offset(offsets[path]))
    return loss(network, batch)


def _of_activations(mixed: Mixed, loss: Loss, batches: Sequence[Mapping], keys: Sequence[jax.Array]) -> np.ndarray:
    state, seen = mixed.source[1:], lambda inputs: recorded(merge(mixed.source), lambda _, x: x, inputs)
    estimate = estimator(functools.partial(_of_offsets, mixed, loss))
    errors = jax.jit(functools.partial(_activation_errors, mixed))
    table = np.zeros((len(mixed.paths), len(mixed.options)))
    for number, batch in enumerate(batches):
        shapes = jax.eval_shape(seen, given(batch))
        offsets = {path: jnp.zeros(x.shape, jnp.float32) for path, x in shapes.items()}
        # Other signs than those of the weights.
        own = [jax.random.fold_in(key, 1 + number) for key in keys]
        trace, _ = traces(estimate(key, offsets, state, dict(batch)) for key in own)
        error = errors(mixed.parts[1:], given(batch))
        for layer, path in enumerate(mixed.paths):
            if path in offsets:
                # The loss is a mean over the examples, so that its trace is the mean of theirs.
                bent = max(float(trace[path]) / offsets[path][0].size, 0.0)
                table[layer] += bent * np.asarray(error[path]) / len(batches)
    mixed.passes += len(keys) + 1
    return table


def _activation_errors(mixed: Mixed, state: tuple, inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    """{path: mean over the examples of ||Q(x) - x||^2 [options]}."""
    network = merge(Parts(mixed.parts.graph, *state))
    layers = quantizable(network)
    fakes = {path: list(layer.quantizer.fakes) for path, layer in layers.items()}
    products = {path: kernel_of(layer)[1] for path, layer in layers.items()}

    def error(path: str, x: jax.Array) -> jax.Array:
        axes = products[path].x_axes(x.ndim)
        rounded = [fake.activations(x, axes) for fake in fakes[path]]
        return jnp.stack([jnp.square(y - x).sum() / len(x) for y in rounded])

    return recorded(network, error, inputs)


def divergence(mixed: Mixed, batches: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """mean KL(p || p_ib) in nats, p the network's softmax and p_ib that with layer i rounded by option b alone."""
    table, of = np.zeros((len(mixed.paths), len(mixed.options))), divergence_of(mixed, batches)
    for layer, option in np.ndindex(*table.shape):
        table[layer, option] = of(mixed.single(layer, option))
    return table


def divergence_of(mixed: Mixed, batches: Sequence[Mapping[str, Any]]) -> Callable[[np.ndarray], float]:
    """choice -> mean KL of the network from the one that is rounded so, over the examples, or the tokens, that count; a
    pass each, and one for the network."""
    exact = [jax.nn.log_softmax(mixed.run(mixed.choice(), batch).astype(jnp.float32)) for batch in batches]
    mixed.passes += 1

    def of(choice: np.ndarray) -> float:
        mixed.passes += 1
        found = [
            _divergence(p, mixed.run(choice, batch), _counted(batch, p.shape[:-1]))
            for p, batch in zip(exact, batches, strict=True)
        ]
        # A KL is not below 0; what rounding in float32 makes so is none.
        return max(float(sum(total for total, _ in found) / sum(count for _, count in found)), 0.0)

    return of


@jax.jit
def _divergence(p: jax.Array, outputs: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum, count)."""
    kl = (jnp.exp(p) * (p - jax.nn.log_softmax(outputs.astype(jnp.float32)))).sum(-1)
    return (kl * counted).sum(), counted.sum()


def _counted(batch: Mapping[str, Any], shape: tuple[int, ...]) -> jax.Array:
    """Which outputs count: not those of rows that fill a batch up, nor of positions that do not score."""
    mask = jnp.asarray(batch.get("mask", np.ones(shape[:1], np.float32)))
    weights = jnp.asarray(batch["weights"]) if "weights" in batch else 1.0
    return jnp.broadcast_to(mask.reshape(-1, *(1,) * (len(shape) - 1)) * weights, shape)


def interactions(mixed: Mixed, value: Callable[[np.ndarray], float], option: int) -> tuple[np.ndarray, np.ndarray]:
    """(alone [layers], together [layers, layers]): value of one layer at `option`, the others exact, less that of none;
    and of two, less those of each alone, with 0 on the diagonal. `value` of a choice is what is lost, such as the loss
    on examples."""
    layers = len(mixed.paths)
    whole = value(mixed.choice())
    alone = np.asarray([value(mixed.single(layer, option)) - whole for layer in range(layers)])
    together = np.zeros((layers, layers))
    for i in range(layers):
        for j in range(i):
            both = value(mixed.choice({mixed.paths[i]: option, mixed.paths[j]: option})) - whole
            together[i, j] = together[j, i] = both - alone[i] - alone[j]
    return alone, together


def augmented(table: np.ndarray, alone: np.ndarray, together: np.ndarray) -> np.ndarray:
    """A table of sensitivities whose layers also carry half of what they lose with others.

        table'_ib = table_ib c_i,    c_i = max(1 + sum_j together_ij / 2 / max(|alone_i|, mean |alone|), 0.1)

    The paper's abstract says that interactions are added and not how; this is our choice: what the losses of pairs
    show beyond those of single layers, shared between the two, scales what the Hessian says of the layer, at every
    option alike. The floor keeps a layer that others relieve from being free."""
    size = np.maximum(np.abs(alone), np.abs(alone).mean() or 1.0)
    return table * np.maximum(1 + together.sum(1) / 2 / size, 0.1)[:, None]
