"""A trained network whose layers can each be had as they are, or rounded in one of several ways, chosen at each call.

    mixed = Mixed(network, [Option("int2", "int8"), Option("int4", "int8"), Option("int8", "int8")], batches)
    mixed.choice({"head": 2})        int32 [layers]: an option of each, or EXACT
    mixed.run(choice, inputs)        the outputs; one program for every choice
    mixed.sizes                      bytes [layers, options], as they are stored
    mixed.calibration_seconds        in which ranges were measured
    mixed.entry(choice, "mine")      what `config.evaluation.transforms` needs to have it stored so

Ranges of activations are measured on the batches (`made`: the settings of `quantize` that say how these were, where
they are not of the training data), and so is whether a layer sees numbers below 0: where it sees none, its activations
have an unsigned format.
"""

import functools
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lissom.compression.quantization.quantizers import Fake
from lissom.compression.quantization.ranges import calibrate, given
from lissom.compression.quantization.rules import layer_rule
from lissom.compression.quantization.transforms import check_exact_first, kernel_of, quantizable
from lissom.models.products import Quantizer
from lissom.models.variables import Frozen, Parts, merge, split

EXACT = -1


@dataclass(frozen=True)
class Option:
    """A format of weights (a scale a channel) and one of activations ("": they stay as they are), of which so many
    tokens at the beginning of a sequence are exact."""

    weights: str
    activations: str = ""
    exact_first: int = 0

    def settings(self, signed: bool) -> dict[str, Any]:
        """The rule of `qat` and `quantize` for a layer that sees numbers below 0, or none."""
        if not self.activations:
            return {"weights": self.weights}
        unsigned = self.activations.startswith("int") and not signed
        activations = {"format": "u" * unsigned + self.activations}
        if self.exact_first:
            activations["exact_first"] = self.exact_first
        return {"weights": self.weights, "activations": activations}


class Candidates(Quantizer):
    """The quantizer of one layer. `chosen`: the option by which the next call rounds, or EXACT."""

    def __init__(self, fakes: Sequence[Fake]):
        self.fakes = nnx.List(fakes)
        self.chosen = Frozen(jnp.asarray(EXACT, jnp.int32), out_sharding=())

    def __call__(self, product: Any, x: jax.Array, kernel: Any) -> jax.Array:
        return product(self._inputs(product, x), self.kernel(product, kernel).astype(x.dtype))

    def kernel(self, product: Any, kernel: Any) -> jax.Array:
        if self._observing:
            return kernel[...]
        return self._chosen(lambda: kernel[...], lambda fake: fake.kernel(product, kernel))

    def rounding(self, product: Any) -> Callable:
        return functools.partial(self._inputs, product)

    def rows_of(self, table: Any, index: jax.Array) -> jax.Array:
        return self._chosen(lambda: table[...][index], lambda fake: fake.rows_of(table, index))

    def _inputs(self, product: Any, x: jax.Array) -> jax.Array:
        for fake in self._observing:
            fake.inputs(product, x)
        if self._observing:
            return x
        return self._chosen(lambda: x, lambda fake: fake.activations(x, product.x_axes(x.ndim)))

    @property
    def _observing(self) -> list[Fake]:
        return [fake for fake in self.fakes if fake.observing]

    def _chosen(self, exact: Callable, rounded: Callable) -> jax.Array:
        ways = [exact, *(functools.partial(rounded, fake) for fake in self.fakes)]
        return jax.lax.switch(self.chosen[...] + 1, ways)


class Seen(Quantizer):
    """Computes the product as it is, of what `seen` makes of x."""

    def seen(self, x: jax.Array) -> jax.Array:
        raise NotImplementedError

    def __call__(self, product: Any, x: jax.Array, kernel: Any) -> jax.Array:
        return product(self.seen(x), kernel[...].astype(x.dtype))

    def kernel(self, product: Any, kernel: Any) -> jax.Array:
        del product
        return kernel[...]

    def rounding(self, product: Any) -> Callable:
        del product
        return self.seen

    def rows_of(self, table: Any, index: jax.Array) -> jax.Array:
        return table[...][index]


class Recorder(Seen):
    """Tells `note` of x, and leaves it as it is."""

    def __init__(self, note: Callable[[jax.Array], None]):
        self.note = note

    def seen(self, x: jax.Array) -> jax.Array:
        self.note(x)
        return x


def recorded(network: nnx.Module, function: Callable[[str, jax.Array], Any], inputs: Mapping[str, Any]) -> dict:
    """{path: function(path, x)} of what each layer multiplies; of one that is called several times the last counts.
    Changes the network: call it within the trace in which that was merged."""
    found: dict[str, Any] = {}
    for path, layer in quantizable(network).items():
        layer.quantizer = nnx.data(Recorder(lambda x, path=path: found.__setitem__(path, function(path, x))))
    network(**inputs)
    return found


class Mixed:
    """See above. ValueError of a network that is quantized already or has no first tokens that could stay exact, and
    where there are no layers, options or batches."""

    def __init__(
        self,
        network: nnx.Module,
        options: Sequence[Option],
        batches: Iterable[Mapping[str, Any]],
        made: Mapping[str, Any] | None = None,
    ):
        self.batches, self.options, self.made = list(batches), tuple(options), dict(made or {})
        layers = quantizable(network)
        if any(layer.quantizer is not None for layer in layers.values()):
            raise ValueError("the network is quantized already")
        self.paths = tuple(layers)
        if not (self.paths and self.options and self.batches):
            raise ValueError("an allocation needs layers, options and batches of examples")
        self.source = split(network)
        least = self._least()
        self.signed = tuple(least[path] < 0 for path in self.paths)
        copy = merge(self.source)
        for (_, layer), settings in zip(quantizable(copy).items(), self.settings, strict=True):
            rules = [layer_rule(rule) for rule in settings]
            check_exact_first(network, rules)
            name, product = kernel_of(layer)
            kernel = getattr(layer, name)[...]
            layer.quantizer = nnx.data(Candidates([Fake(rule, kernel, product) for rule in rules]))
        start = time.perf_counter()
        self.parts, self.passes = split(calibrate(copy, self.batches, len(self.batches))), 0
        jax.block_until_ready(self.parts.stats)
        self.calibration_seconds = time.perf_counter() - start
        self._run = jax.jit(self._outputs)
        self.sizes = self._sizes()

    @property
    def settings(self) -> list[list[dict[str, Any]]]:
        """Of each layer the rule of each option."""
        return [[option.settings(signed) for option in self.options] for signed in self.signed]

    def choice(self, chosen: Mapping[str, int] | None = None) -> np.ndarray:
        """An option for each layer that is named, by its path; the others stay exact."""
        return np.asarray([(chosen or {}).get(path, EXACT) for path in self.paths], np.int32)

    def single(self, layer: int, option: int) -> np.ndarray:
        return self.choice({self.paths[layer]: option})

    def at(self, choice: jax.Array, state: tuple) -> nnx.Module:
        """The network of a choice, to be called within a trace. state: parameters, statistics and what is frozen, of
        `parts`."""
        network = merge(Parts(self.parts.graph, *state))
        for number, layer in enumerate(quantizable(network).values()):
            layer.quantizer.chosen[...] = choice[number]
        return network

    def run(self, choice: np.ndarray, batch: Mapping[str, Any]) -> jax.Array:
        return self._run(jnp.asarray(choice), self.parts[1:], given(batch))

    def _outputs(self, choice: jax.Array, state: tuple, inputs: dict) -> jax.Array:
        return self.at(choice, state)(**inputs)[0]

    def _sizes(self) -> np.ndarray:
        """Codes, scales and ranges, int64 [layers, options]."""

        def stored(layer: nnx.Module, fake: Fake) -> int:
            name, product = kernel_of(layer)
            both = nnx.eval_shape(lambda: nnx.List(fake.stored(getattr(layer, name)[...], product)))
            return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(both)))

        layers = quantizable(merge(self.parts)).values()
        return np.asarray([[stored(layer, fake) for fake in layer.quantizer.fakes] for layer in layers])

    @functools.cached_property
    def fixed(self) -> int:
        """Bytes of everything that is no kernel of these layers: biases, norms."""
        network = merge(self.source)
        kernels = sum(getattr(layer, kernel_of(layer)[0])[...].nbytes for layer in quantizable(network).values())
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves((self.source.params, self.source.frozen)))
        return whole - kernels

    def rules(self, choice: Sequence[int]) -> tuple[tuple[str, dict[str, Any]], ...]:
        """Of `qat` and `quantize`: layers with the same settings share one."""
        alike: dict[str, tuple[list[str], dict[str, Any]]] = {}
        for path, settings, at in zip(self.paths, self.settings, choice, strict=True):
            alike.setdefault(repr(settings[at]), ([], settings[at]))[0].append(re.escape(path))
        return tuple((f"^({'|'.join(paths)})$", settings) for paths, settings in alike.values())

    def entry(self, choice: Sequence[int], label: str) -> dict[str, Any]:
        rules = self.rules(choice)
        return {"name": "quantize", "rules": rules, "batches": len(self.batches), **self.made, "label": label}

    def _least(self) -> dict[str, float]:
        def smallest(state, inputs):
            network = merge(Parts(self.source.graph, *state))
            return recorded(network, lambda _, x: x.min(), inputs)

        smallest, least = jax.jit(smallest), dict.fromkeys(self.paths, math.inf)
        for batch in self.batches:
            found = smallest(self.source[1:], given(batch))
            least = {path: min(least[path], float(found.get(path, math.inf))) for path in self.paths}
        return least
