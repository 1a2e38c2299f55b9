"""What changes a trained model: makes it smaller, or another form of itself, or gives it other positions. A transform
has two halves and is driven by settings or by path rules."""

TRANSFORMS = {
    "int8_weights": "lissom.compression.weight_only:Int8Weights",
    "branches": "lissom.compression.branches:Branches",
    "bricks": "lissom.compression.bricks:Bricks",
    "read_me": "lissom.compression.read_me:ReadMe",
    "yarn": "lissom.compression.positions:Yarn",
    "zero_meta_positions": "lissom.compression.positions:ZeroMetaPositions",
    "fold_spikeformer": "lissom.compression.folding_spikeformer:FoldSpikeformer",
    "grouped_to_latent": "lissom.compression.grouped_to_latent:GroupedToLatent",
}
