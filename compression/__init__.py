"""What changes a model to make it smaller. A transform has two halves and is driven by path rules."""

TRANSFORMS = {
    "int8_weights": "lissom.compression.weight_only:Int8Weights",
}
