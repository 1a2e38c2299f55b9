"""The transforms by which a network gets few bits: trained with (`qat`, `binarize`), rounded as it is
(`quantize`), stored (`packed`)."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from lissom.compression.quantization.binary import OPERATORS, Binary
from lissom.compression.quantization.distillation import EXAMPLES, check_distillable, examples
from lissom.compression.quantization.quantizers import Fake
from lissom.compression.quantization.ranges import calibrate, has_ranges
from lissom.compression.quantization.rules import LayerRule, layer_rule
from lissom.compression.transforms import Transform, layer_paths, match_rules, replace_layers
from lissom.models.linear import Conv, DepthwiseConv, Embedding, Linear, StackedLinear
from lissom.models.products import Convolution, Dense, Depthwise, Logits, Stacked
from lissom.models.registry import check_name, nearest
from lissom.training.errors import UserError

KINDS = (Linear, Conv, DepthwiseConv, StackedLinear, Embedding)
TRAINED = (Fake, Binary)


def kernel_of(layer: nnx.Module) -> tuple[str, Any]:
    """(name of the layer's kernel, its product)."""
    match layer:
        case Embedding():
            return "table", Logits()
        case Conv():
            return "kernel", Convolution(layer.stride)
        case DepthwiseConv():
            return "kernel", Depthwise()
        case StackedLinear():
            return "kernel", Stacked()
        case _:
            return "kernel", Dense()


def quantizable(module: nnx.Module) -> dict[str, Any]:
    """{path: layer} of those that `qat` and `quantize` can round."""
    return _layers(module, KINDS)


def check_exact_first(module: nnx.Module, rules: Iterable[LayerRule | None]) -> None:
    """ValueError where first tokens are to stay exact and the network does not tell its layers where tokens stand."""
    exact = [rule for rule in rules if rule and rule.activations and rule.activations.exact_first]
    if exact and not getattr(module, "places_tokens", False):
        raise ValueError(f"exact_first is for the network 'language', and not for a {type(module).__name__}")


class Qat(Transform):
    """Layers whose operands are rounded as `rules` say, (path pattern, settings) pairs of which the first match counts
    (`rules.py`; docs/quantization.md): quantization-aware training. Layers that no rule matches stay as they are, and
    {"skip": True} leaves those alone that it matches. A network that was trained before gets the ranges of its
    activations from `batches` batches.

    UserError names the rule that matches no layer, or does not fit one.
    """

    name = "qat"
    knows_quantizers = True

    def __init__(self, *, rules: Sequence[tuple[str, Mapping]], batches: int = 8):
        if batches < 1:
            raise ValueError(f"batches={batches} must be at least 1")
        _check_rules(rules)
        self.rules, self.batches = rules, batches

    def structure(self, module: nnx.Module) -> nnx.Module:
        parsed: dict[int, LayerRule | None] = {}
        for number, (pattern, settings) in enumerate(self.rules):
            try:
                parsed[number] = None if dict(settings) == {"skip": True} else self.read(settings)
            except ValueError as error:
                where = f"transform {self.name!r}, rules[{number}] {(pattern, dict(settings))!r}"
                raise UserError(f"{where}: {error}") from error
        try:
            check_exact_first(module, parsed.values())
        except ValueError as error:
            raise UserError(f"transform {self.name!r}: {error}") from error
        numbered = [(pattern, {"number": number}) for number, (pattern, _) in enumerate(self.rules)]
        matched = match_rules(numbered, quantizable(module), self.name)

        def quantizer(path: str, kernel: jax.Array, product: Any) -> Fake | None:
            rule = parsed[matched[path]["number"]] if path in matched else None
            return None if rule is None else Fake(rule, kernel, product)

        return _with_quantizers(module, KINDS, quantizer, self.name)

    def read(self, settings: Mapping[str, Any]) -> LayerRule:
        return layer_rule(settings)

    def values(self, module: nnx.Module, source: nnx.Module, data: Iterable[dict]) -> nnx.Module:
        del source
        return calibrate(module, data, self.batches, training=True)


class Binarize(Transform):
    """Layers whose product is of signs, trained with an operator of `OPERATORS` (binary.py): `rules` are (path pattern,
    {"operator": name}) pairs of which the first match counts. Layers that no rule matches stay as they are, and
    {"skip": True} leaves those alone that it matches; the first and the last layer usually are.

    UserError names the rule that matches no layer, or does not fit one.
    """

    knows_quantizers = True

    def __init__(self, *, rules: Sequence[tuple[str, Mapping]]):
        _check_rules(rules)
        self.rules = rules

    def structure(self, module: nnx.Module) -> nnx.Module:
        for pattern, settings in self.rules:
            if dict(settings) != {"skip": True} and set(settings) != {"operator"}:
                raise UserError(f"transform 'binarize': the rule {pattern!r} has {dict(settings)}: it takes operator")
            check_name(OPERATORS, settings.get("operator", "bnn"), "operator")
        matched = match_rules(self.rules, _layers(module, (Linear, Conv)), "binarize")

        def quantizer(path: str, kernel: jax.Array, product: Any) -> Binary | None:
            operator = matched.get(path, {}).get("operator")
            return None if operator is None else Binary(operator, kernel, product)

        return _with_quantizers(module, (Linear, Conv), quantizer, "binarize")


def _layers(module: nnx.Module, kinds: tuple[type, ...]) -> dict[str, Any]:
    """{path: layer} of those whose product is computed by the layer."""
    return {path: node for path, node in layer_paths(module, kinds).items() if not getattr(node, "kernel_alone", False)}


def _check_rules(rules: Sequence[tuple[str, Mapping]]) -> None:
    """ValueError where they are no (pattern, settings) pairs, or none of them changes anything."""
    for number, entry in enumerate(rules):
        if not (isinstance(entry, tuple | list) and len(entry) == 2 and isinstance(entry[1], Mapping)):
            raise ValueError(f"rules[{number}] is {entry!r}: a rule is a pair (pattern of paths, settings)")
    if all(dict(settings) == {"skip": True} for _, settings in rules):
        raise ValueError("rules name nothing to change: the network would stay as it is")


def _with_quantizers(module: nnx.Module, kinds: tuple[type, ...], make: Callable, what: str) -> nnx.Module:
    """Layers with the quantizer make(path, kernel, product), those where it is None as they are."""

    def change(path: str, layer: nnx.Module) -> nnx.Module:
        name, product = kernel_of(layer)
        try:
            quantizer = make(path, getattr(layer, name)[...], product)
        except ValueError as error:
            raise UserError(f"transform {what!r}: {path}: {error}") from error
        if quantizer is not None:
            if layer.quantizer is not None:
                raise UserError(f"transform {what!r}: {path} is quantized already")
            layer.quantizer = nnx.data(quantizer)
        return layer

    return replace_layers(module, kinds, change)


class PackedLayers(Transform):
    """What `qat` and `binarize` trained, as it is stored and read: codes of the promised bits with their scales, and
    products of integers where weights and activations are integers, of bits where both are signs. UserError where there
    is no such layer, or a range of activations was never measured."""

    knows_quantizers = True

    def structure(self, module: nnx.Module) -> nnx.Module:
        if not any(isinstance(layer.quantizer, TRAINED) for layer in layer_paths(module, KINDS).values()):
            raise ValueError("it stores what the transforms 'qat' and 'binarize' trained, and there is no such layer")
        return replace_layers(module, KINDS, pack)


def pack(path: str, layer: nnx.Module, *, measured: bool = True) -> nnx.Module:
    """The layer as it is stored, in place; one that is not quantized stays as it is. `measured`: a range of activations
    that is not known is a UserError."""
    if isinstance(layer.quantizer, TRAINED):
        name, product = kernel_of(layer)
        kernel, quantizer = layer.quantizer.stored(getattr(layer, name)[...], product)
        scale = None if getattr(quantizer, "scale", None) is None else quantizer.scale[...]
        # Rows of a table are read without activations: where it has no other use, none were ever seen.
        needed = measured and scale is not None and not isinstance(layer, Embedding)
        if needed and not isinstance(scale, jax.core.Tracer) and not scale > 0:
            raise UserError(
                f"the range of the activations of {path} was never measured, or not to the end of its warm_up: give it "
                "one that fits into training, or start from a trained network; layers within a loop of a network need "
                "a dynamic or a learned range"
            )
        setattr(layer, name, nnx.data(kernel))
        layer.quantizer = nnx.data(quantizer)
    return layer


class Quantize(Qat):
    """A trained network rounded as it is: the layers of `qat`, ranges of activations from `batches` batches, stored as
    by `packed`. Rules that train (learned scales, gradients) are errors.

    examples: whose batches they are, of the "training" data, or without data "distilled" from the statistics of
    BatchNorm (ZeroQ) or "noise", with inputs of the mean and standard deviation `input_statistics`; `seed`: of what is
    drawn for them. label: what tables call it.
    """

    name = "quantize"

    def __init__(
        self,
        *,
        rules: Sequence[tuple[str, Mapping]],
        batches: int = 8,
        examples: str = "training",
        seed: int = 0,
        input_statistics: tuple[float, float] = (0.0, 1.0),
        label: str = "",
    ):
        super().__init__(rules=rules, batches=batches)
        if examples not in EXAMPLES:
            raise ValueError(f"examples={examples!r} must be one of {', '.join(EXAMPLES)}{nearest(examples, EXAMPLES)}")
        number = lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        two = isinstance(input_statistics, tuple | list) and len(input_statistics) == 2
        if not (two and all(map(number, input_statistics)) and input_statistics[1] > 0):
            raise ValueError(f"input_statistics={input_statistics!r} must be a mean and a standard deviation above 0")
        if examples == "training" and (seed, tuple(input_statistics)) != (0, (0.0, 1.0)):
            raise ValueError("seed and input_statistics are for examples that are made, not for those of training")
        self.examples, self.seed, self.input_statistics = examples, seed, tuple(input_statistics)
        self.label = label

    def read(self, settings):
        rule = layer_rule(settings)
        ranges = [side.range for side in (rule.weights, rule.activations) if side is not None]
        if "learned" in ranges or rule.gradients is not None:
            raise ValueError("learned ranges and rounded gradients are of training: use the transform 'qat'")
        return rule

    def structure(self, module: nnx.Module) -> nnx.Module:
        if self.examples == "distilled":
            check_distillable(module)
        if self.examples != "training" and getattr(module, "places_tokens", False):
            raise UserError(f"transform {self.name!r}: examples={self.examples!r} are real numbers, not tokens")
        rounded = super().structure(module)
        if self.examples != "training" and not has_ranges(rounded):
            told = f"examples={self.examples!r} are for ranges of activations, and no rule has any"
            raise UserError(f"transform {self.name!r}: {told}")
        return replace_layers(rounded, KINDS, functools.partial(pack, measured=False))

    def values(self, module: nnx.Module, source: nnx.Module, data: Iterable[dict]) -> nnx.Module:
        del module  # packed with ranges that were not known
        made = {"seed": self.seed, "input_statistics": self.input_statistics}
        try:
            found = examples(self.examples, source, data, self.batches, **made)
        except ValueError as error:
            raise UserError(f"transform {self.name!r}: {error}") from error
        return replace_layers(calibrate(super().structure(source), found, self.batches), KINDS, pack)
