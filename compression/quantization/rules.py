"""What a rule of a transform says of a layer, read from its plain settings.

    {"weights": "int4", "activations": {"format": "int8", "range": "frozen", "warm_up": 200}}
    {"weights": FP4, "activations": FP4, "gradients": {**FP4, "stochastic": True}, "rotation": 16}

with FP4 = {"format": "fp4_e2m1", "per": 16, "scale_format": "ue4m3"}. A text alone is the format.
docs/quantization.md lists the settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lissom.compression.quantization.formats import FORMATS
from lissom.compression.quantization.products import Operand, Rule
from lissom.compression.quantization.scaling import Scheme
from lissom.models.registry import nearest

RANGES = {
    "weights": ("absmax", "learned"),
    "activations": ("dynamic", "frozen", "learned", "clipped"),
    "gradients": ("dynamic",),
}
OF_SCHEME = tuple(field.name for field in fields(Scheme) if field.name != "by_row")
OF_OPERAND = ("stochastic", "through_scale", "gradient")


@dataclass(frozen=True)
class Rounding:
    """Of one side of a layer: how it is rounded, and where its range comes from. warm_up: calls of training in which a
    "frozen" range is measured; initial: what a "clipped" one begins with; exact_first: so many tokens at the beginning
    of a sequence stay as they are, and out of the range."""

    operand: Operand
    range: str
    warm_up: int = 0
    initial: float = 6.0
    exact_first: int = 0

    @property
    def scheme(self) -> Scheme:
        return self.operand.scheme


@dataclass(frozen=True)
class LayerRule:
    """None: that side stays as it is. gradients: both products of the backward pass are rounded, the gradient as it
    says, the other operand as it is forward."""

    weights: Rounding | None = None
    activations: Rounding | None = None
    gradients: Rounding | None = None

    @property
    def bits(self) -> int:
        """Of the wider operand of the product forward; a float counts as 16."""
        return max(16 if side is None else side.scheme.numbers.bits for side in (self.weights, self.activations))

    @property
    def three(self) -> Rule:
        """Of the three products of training, where gradients are rounded."""
        x, w, d_y = (
            None if side is None else side.operand for side in (self.activations, self.weights, self.gradients)
        )
        return Rule(forward=(x, w), by_inputs=(d_y, w), by_weights=(x, d_y))


def layer_rule(settings: Mapping[str, Any]) -> LayerRule:
    """ValueError names the setting that does not fit."""
    settings = dict(settings)
    rotation = settings.pop("rotation", 0)
    if "skip" in settings:
        raise ValueError("skip=True stands alone in a rule, and there is no skip=False: leave it out")
    for name in settings:
        if name not in RANGES:
            known = (*RANGES, "rotation", "skip")
            raise ValueError(f"a rule has no {name!r}: it takes {', '.join(known)}{nearest(name, known)}")
    if "weights" not in settings:
        raise ValueError("a rule says how weights are rounded: it needs 'weights' (or skip=True)")
    sides = {name: _rounding(name, given, rotation) for name, given in settings.items()}
    if rotation and "activations" not in sides:
        raise ValueError("rotation turns both operands of a product: it needs 'activations'")
    if rotation and not sides["activations"].scheme.numbers.signed:
        raise ValueError("rotation makes numbers of either sign: activations need a signed format")
    anew = all(sides[name].range in ("absmax", "dynamic") for name in ("weights", "activations") if name in sides)
    if "gradients" in sides and not anew:
        raise ValueError("gradients go with ranges that are taken anew: weights 'absmax', activations 'dynamic'")
    if "gradients" in sides and sides.get("activations") and sides["activations"].exact_first:
        raise ValueError("gradients round all rows of a product: exact_first goes without them")
    return LayerRule(**sides)


def _rounding(side: str, given: str | Mapping[str, Any], rotation: int) -> Rounding:
    given = {"format": given} if isinstance(given, str) else dict(given)
    options = ("stochastic",) if side == "gradients" else OF_OPERAND
    known = (*OF_SCHEME, *options, "range", *(("warm_up", "initial", "exact_first") if side == "activations" else ()))
    for name in given:
        if name not in known:
            raise ValueError(f"{side} have no {name!r}: known are {', '.join(known)}{nearest(name, known)}")
    formats = [name for name, format in FORMATS.items() if format.signed or side == "activations"]
    if given.get("format") not in FORMATS:
        raise ValueError(f"{side}: format={given.get('format')!r} must be one of {', '.join(formats)}")
    try:
        return _checked(side, given, rotation)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{side}: {error}") from error


def _checked(side: str, given: dict[str, Any], rotation: int) -> Rounding:
    signed = FORMATS[given["format"]].signed
    if side != "activations" and not signed:
        raise ValueError(f"{given['format']} has nothing below 0: it is of activations")
    usual = RANGES[side][0]
    if side == "activations":
        per = given.get("per", "row" if given.get("range", "frozen") == "dynamic" else "tensor")
        usual = "frozen" if per == "tensor" else "dynamic"
        if per == "channel":
            raise ValueError("per='channel' is for weights; scales of activations are per 'tensor', 'row' or a number")
        given["per"] = "channel" if per == "row" else per
        if given.get("tensor_scale"):
            given["by_row"] = True
    found = given.pop("range", usual)
    if found not in RANGES[side]:
        raise ValueError(f"range={found!r} must be one of {', '.join(RANGES[side])}{nearest(found, RANGES[side])}")
    if "initial" in given and found != "clipped":
        raise ValueError(f"initial={given['initial']} is of range='clipped', not of {found!r}")
    warm_up, initial = given.pop("warm_up", 0), given.pop("initial", 6.0)
    if warm_up and found != "frozen":
        raise ValueError(f"warm_up={warm_up} is of range='frozen', not of {found!r}")
    if type(warm_up) is not int or warm_up < 0:
        raise ValueError(f"warm_up={warm_up} must be a whole number, at least 0")
    exact_first = given.pop("exact_first", 0)
    if type(exact_first) is not int or exact_first < 0:
        raise ValueError(f"exact_first={exact_first} must be a whole number, at least 0")
    if exact_first and found not in ("frozen", "dynamic"):
        raise ValueError(f"exact_first={exact_first} goes with a range of magnitudes, frozen or dynamic, not {found!r}")
    if not initial > 0:
        raise ValueError(f"initial={initial} must be above 0")
    options = {name: given.pop(name) for name in OF_OPERAND if name in given}
    if options.get("stochastic") and side != "gradients":
        raise ValueError("stochastic=True is for gradients: forward it would make the answers random")
    scheme = Scheme(**given)
    if side == "activations" and (found == "dynamic") == (scheme.per == "tensor"):
        raise ValueError(
            "range='dynamic' goes with per='row' or a number, and the others with per='tensor': with a dynamic range "
            "of a whole batch one example's answer would depend on the others"
        )
    if side == "activations" and found != "dynamic" and (scheme.scale_format != "float32" or scheme.tensor_scale):
        raise ValueError(f"range={found!r} has one float32 scale: scale_format and tensor_scale are of dynamic ones")
    if found == "learned" and (scheme.scale_format != "float32" or not isinstance(scheme.per, str)):
        raise ValueError("a learned scale is a float32 number a tensor or a channel")
    if found == "clipped" and signed:
        raise ValueError(f"range='clipped' is for what is not below 0: an unsigned format, not {scheme.format}")
    if found in ("learned", "clipped") and (scheme.clip < 1 or "through_scale" in options or "gradient" in options):
        raise ValueError(f"range={found!r} goes without clip, through_scale and gradient")
    if found == "frozen" and options.get("through_scale"):
        raise ValueError("through_scale=True is for a range that is taken of what is rounded, not for a frozen one")
    return Rounding(Operand(scheme, rotation=rotation, **options), found, warm_up, float(initial), exact_first)
