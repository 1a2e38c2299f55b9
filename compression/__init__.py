"""What changes a trained model: makes it smaller, or another form of itself, or gives it other positions. A transform
has two halves and is driven by settings or by path rules."""

TRANSFORMS = {
    "qat": "lissom.compression.quantization.transforms:Qat",
    "binarize": "lissom.compression.quantization.transforms:Binarize",
    "packed": "lissom.compression.quantization.transforms:PackedLayers",
    "quantize": "lissom.compression.quantization.transforms:Quantize",
    "int8_weights": "lissom.compression.weight_only:Int8Weights",
    "branches": "lissom.compression.branches:Branches",
    "bricks": "lissom.compression.bricks:Bricks",
    "read_me": "lissom.compression.read_me:ReadMe",
    "fold_norms": "lissom.compression.folding:FoldNorms",
    "to_spiking": "lissom.compression.spiking:ToSpiking",
    "yarn": "lissom.compression.positions:Yarn",
    "zero_meta_positions": "lissom.compression.positions:ZeroMetaPositions",
    "grouped_to_latent": "lissom.compression.grouped_to_latent:GroupedToLatent",
}
