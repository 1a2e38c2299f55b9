"""The transforms by which a network gets few bits: trained with (`qat`), rounded as it is (`quantize`), stored
(`packed`)."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from lissom.compression.quantization.quantizers import Fake
from lissom.compression.quantization.ranges import calibrate
from lissom.compression.quantization.rules import LayerRule, layer_rule
from lissom.compression.quantization.stored import Packed, Stored
from lissom.compression.transforms import Transform, layer_paths, match_rules, replace_layers
from lissom.models.linear import Conv, Embedding, Linear
from lissom.models.products import Convolution, Dense, Logits
from lissom.training.errors import UserError

KINDS = (Linear, Conv, Embedding)


def kernel_of(layer: nnx.Module) -> tuple[str, Any]:
    """(name of the layer's kernel, its product)."""
    if isinstance(layer, Embedding):
        return "table", Logits()
    return "kernel", Convolution(layer.stride) if isinstance(layer, Conv) else Dense()


class Qat(Transform):
    """Layers whose operands are rounded as `rules` say, (path pattern, settings) pairs of which the first match counts
    (`rules.py`; docs/compression.md): quantization-aware training. Layers that no rule matches stay as they are, and
    {"skip": True} leaves those alone that it matches. A network that was trained before gets the ranges of its
    activations from `batches` batches.

    UserError names the rule that matches no layer, or does not fit one.
    """

    name = "qat"

    def __init__(self, *, rules: Sequence[tuple[str, Mapping]], batches: int = 8):
        if batches < 1:
            raise ValueError(f"batches={batches} must be at least 1")
        if not rules:
            raise ValueError("rules is empty: it would leave the network as it is")
        self.rules, self.batches = rules, batches

    def structure(self, module: nnx.Module) -> nnx.Module:
        parsed: dict[int, LayerRule | None] = {}
        for number, entry in enumerate(self.rules):
            try:
                _, settings = entry
                parsed[number] = None if dict(settings) == {"skip": True} else self.read(settings)
            except (TypeError, ValueError) as error:
                raise UserError(f"transform {self.name!r}, rules[{number}] {entry!r}: {error}") from error
        numbered = [(pattern, {"number": number}) for number, (pattern, _) in enumerate(self.rules)]
        matched = match_rules(numbered, layer_paths(module, KINDS), self.name)

        def change(path: str, layer: nnx.Module) -> nnx.Module:
            rule = parsed[matched[path]["number"]] if path in matched else None
            if rule is not None:
                if layer.quantizer is not None:
                    raise UserError(f"transform {self.name!r}: {path} is quantized already")
                name, product = kernel_of(layer)
                kernel = getattr(layer, name)[...]
                try:
                    layer.quantizer = nnx.data(Fake(rule, kernel, product.kernel_axes(kernel.ndim)))
                except ValueError as error:
                    raise UserError(f"transform {self.name!r}: {path}: {error}") from error
            return layer

        return replace_layers(module, KINDS, change)

    def read(self, settings: Mapping[str, Any]) -> LayerRule:
        return layer_rule(settings)

    def values(self, module: nnx.Module, source: nnx.Module, data: Iterable[dict]) -> nnx.Module:
        del source
        return calibrate(module, data, self.batches)


class PackedLayers(Transform):
    """What `qat` trained, as it is stored and read: codes of the promised bits with their scales, and products of
    integers where weights and activations are integers. UserError where nothing was trained by `qat`, or a range of
    activations was never measured."""

    def structure(self, module: nnx.Module) -> nnx.Module:
        if not any(isinstance(layer.quantizer, Fake) for layer in layer_paths(module, KINDS).values()):
            raise ValueError("it stores what the transform 'qat' trained, and there is no such layer")
        return replace_layers(module, KINDS, pack)


def pack(path: str, layer: nnx.Module, *, measured: bool = True) -> nnx.Module:
    """The layer as it is stored, in place; one that is not quantized stays as it is. `measured`: a range of activations
    that is not known is a UserError."""
    fake = layer.quantizer
    if isinstance(fake, Fake):
        name, product = kernel_of(layer)
        kernel = getattr(layer, name)[...]
        scale = None if fake.range is None else fake.range.scale
        if measured and scale is not None and not isinstance(scale, jax.core.Tracer) and not scale > 0:
            raise UserError(
                f"the range of the activations of {path} was never measured: give them a warm_up that fits into "
                "training, or start from a trained network"
            )
        weights = fake.rule.weights
        scaled = fake.scaled(kernel, product.kernel_axes(kernel.ndim))
        setattr(layer, name, nnx.data(Packed(scaled, weights.scheme, product, weights.operand.rotation)))
        layer.quantizer = nnx.data(Stored(fake.rule, scale))
    return layer


class Quantize(Qat):
    """A trained network rounded as it is: the layers of `qat`, ranges of activations from `batches` batches, stored as
    by `packed`. Rules that train (learned scales, gradients) are errors."""

    name = "quantize"

    def read(self, settings):
        rule = layer_rule(settings)
        ranges = [side.range for side in (rule.weights, rule.activations) if side is not None]
        if "learned" in ranges or rule.gradients is not None:
            raise ValueError("learned ranges and rounded gradients are of training: use the transform 'qat'")
        return rule

    def structure(self, module: nnx.Module) -> nnx.Module:
        return replace_layers(super().structure(module), KINDS, functools.partial(pack, measured=False))

    def values(self, module: nnx.Module, source: nnx.Module, data: Iterable[dict]) -> nnx.Module:
        del module  # packed with ranges that were not known
        rounded = calibrate(super().structure(source), data, self.batches)
        return replace_layers(rounded, KINDS, pack)
