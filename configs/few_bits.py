"""Ways of training a network for few bits, by name, for recipes that compare them.

    float                   as it is
    int8, int4, int2        weights and activations of so many bits; ranges of activations frozen behind a warm-up
    int4_learned, int2_learned    scales are learned (LSQ)
    int4_clipped            activations are clipped at a learned number (PACT)
    int4_weights, int2_weights    weights alone, a scale a channel
    fp4, fp4_*              the three products of training in E2M1, groups of 16 with UE4M3 scales; and one option more
                            or another: FP4_OPTIONS, and fp4_all, which has rotation, tensor scales and random rounding
    fp4_forward             the forward product alone
    bnn, xnor, ...          signs, by an operator (compression/quantization/binary.py)

The first and the last layer have 8 bits; those of fp4 FP8 numbers, and in networks of signs they stay as they are.
`signed` says whose activations may be below 0: of none, of the "ends" (nothing behind a relu is), or of "all" layers.
"""

import ml_collections

from lissom.configs.base import mode

BINARY = ("bnn", "xnor", "dorefa", "bireal", "xnor++", "reactnet", "recu", "fda", "irnet", "insta", "insta_plus")
FP4 = {"format": "fp4_e2m1", "per": 16, "scale_format": "ue4m3"}
FP8 = {"weights": "fp8_e4m3", "activations": {"format": "fp8_e4m3", "per": "row"}}
ALL = {"tensor_scale": True, "rotation": 16, "stochastic": True}
FP4_OPTIONS = {
    "fp4": {},
    "fp4_rotation": {"rotation": 16},
    "fp4_tensor_scale": {"tensor_scale": True},
    "fp4_stochastic": {"stochastic": True},
    "fp4_e8m0": {"scale_format": "e8m0"},
    "fp4_ue5m3": {"scale_format": "ue5m3"},
    "fp4_differentiable": {"gradient": "differentiable"},
    "fp4_through_scale": {"through_scale": True},
    "fp4_all": ALL,
    "fp4_forward": {"forward": True},
}
INTEGERS = ("int8", "int4", "int2", "int4_learned", "int2_learned", "int4_clipped", "int4_weights", "int2_weights")
NAMES = ("float", *INTEGERS, *FP4_OPTIONS, *BINARY)


def apply(config: ml_collections.ConfigDict, name: str, *, ends: str, warm_up: int, signed: str = "") -> None:
    """Sets the transforms of training and those of evaluation: a float network is measured as int8, int4 and int2
    besides, the others as they are stored. ends: a pattern of the first and the last layer ("": none has a
    product that could be of signs); warm_up: steps in which ranges are measured."""
    config.transforms = transforms(name, ends=ends, warm_up=warm_up, signed=signed)
    if name == "float":
        names = ("int8", "int4", "int2")
        config.evaluation.transforms = tuple(rounded(bits, ends=ends, signed=signed) for bits in names)
    else:
        config.evaluation.transforms = ({"name": "packed"},)


def transforms(name: str, *, ends: str, warm_up: int, signed: str = "") -> tuple[dict, ...]:
    """`config.transforms`."""
    mode(signed, ("ends", "all"))
    if name == "float":
        return ()
    if name in BINARY:
        skipped = ((ends, {"skip": True}),) if ends else ()
        return ({"name": "binarize", "rules": (*skipped, (".*", {"operator": name}))},)
    first = {"weights": "int8", "activations": {"format": "int8" if signed else "uint8", "warm_up": warm_up}}
    if name in FP4_OPTIONS:
        first, inner = FP8, _fp4(**FP4_OPTIONS[name])
    else:
        inner = _integers(name, warm_up, "int" if signed == "all" else "uint")
    return ({"name": "qat", "rules": ((ends, first), (".*", inner))},)


def rounded(name: str, *, ends: str, signed: str = "") -> dict:
    """The entry of `evaluation.transforms` that rounds a network as int8, int4 or int2 without training."""
    (qat,) = transforms(name, ends=ends, warm_up=0, signed=signed)
    return {**qat, "name": "quantize", "label": name}


def _integers(name: str, warm_up: int, kind: str) -> dict:
    bits, _, way = mode(name, INTEGERS).partition("_")
    if way == "weights":
        return {"weights": bits}
    activations = {"format": kind + bits.removeprefix("int")}
    if way == "learned":
        return {"weights": {"format": bits, "range": "learned"}, "activations": {**activations, "range": "learned"}}
    if way == "clipped":
        if kind == "int":
            raise ValueError(f"{name} is for activations that are not below 0")
        return {"weights": bits, "activations": {**activations, "range": "clipped"}}
    return {"weights": bits, "activations": {**activations, "warm_up": warm_up}}


def _fp4(
    *,
    rotation: int = 0,
    stochastic: bool = False,
    gradient: str = "",
    through_scale: bool = False,
    forward: bool = False,
    **scales,
) -> dict:
    operand = {**FP4, **scales}
    kept = operand | ({"gradient": gradient} if gradient else {}) | ({"through_scale": True} if through_scale else {})
    rule = {"weights": kept, "activations": kept}
    if not forward:
        rule["gradients"] = {**operand, "stochastic": stochastic}
    return {**rule, "rotation": rotation} if rotation else rule
