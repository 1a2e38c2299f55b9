"""Flax NNX modules: layers and the networks made of them.

A network is picked by name: `MODELS` is the one visible dict, `NORMS`, `FFNS`, `SET_ENCODERS`, `ENVIRONMENT_GATES` and
`mixers.MIXERS` are those of its parts. Their values are "module:Class" strings, so that a config can be checked before
jax is imported, and a plug-in ("my_package.module:Class") is the same mechanism. `SIZES` names settings of each
network; a field of `config.model` that is set wins over them.
"""

MODELS = {
    "vit": "lissom.models.vit:VisionTransformer",
    "sequence_transformer": "lissom.models.sequence_classifier:SequenceTransformer",
    "cnn": "lissom.models.cnn:ConvNet",
    "mlp": "lissom.models.perceptron:Perceptron",
    "resnet": "lissom.models.resnet:ResNet",
    "biformer": "lissom.models.biformer:BiFormer",
    "language": "lissom.models.language:LanguageModel",
    "in_context": "lissom.models.in_context:InContextLearner",
    "set_clusterer": "lissom.models.set_clusterer:SetClusterer",
    "mixture_of_fields": "lissom.models.mixture_of_fields:MixtureOfFields",
    "block_transformer": "lissom.models.block_transformer:BlockTransformer",
    "keyed_experts": "lissom.models.keyed_experts:KeyedExperts",
    "hypernetwork": "lissom.models.hypernetworks.hypernetwork:Hypernetwork",
    "spiking": "lissom.models.spiking.network:SpikingNet",
    "spikeformer": "lissom.models.spiking.spikeformer:Spikeformer",
}

ENVIRONMENT_GATES = {
    "mixer": "lissom.models.environment_gates:MixerGate",
    "softmax": "lissom.models.environment_gates:SoftmaxGate",
}

SET_ENCODERS = {
    "umbc": "lissom.models.set_encoders:UMBC",
    "deep_sets": "lissom.models.set_encoders:DeepSets",
    "attention": "lissom.models.set_encoders:Attention",
}

NORMS = {
    "layernorm": "lissom.models.norms:LayerNorm",
    "rmsnorm": "lissom.models.norms:RMSNorm",
    "none": "lissom.models.norms:NoNorm",
}

FFNS = {
    "mlp": "lissom.models.ffn:MLP",
    "swiglu": "lissom.models.ffn:SwiGLU",
    "moe": "lissom.models.moe.layer:MoE",
    "none": "lissom.models.ffn:NoFFN",
}

# By standing in each named size they can be set one by one.
BLOCKS = {"block_length": 4, "prefix": 2, "block_depth": None, "random_padding": True}
KEYED = {
    "kernel": 3,
    "pool": 2,
    "temperature": 0.002,
    "cutoff": 0.3,
    "bound": 250.0,
    "key_loss": 1.0,
    "key_rate": 0.005,
    "train_keys": True,
}
SIZES = {
    "vit": {
        "tiny": {"width": 16, "depth": 2, "heads": 2, "patch": 4},
        "digits": {"width": 64, "depth": 4, "heads": 4, "patch": 2},
        "S/16": {"width": 384, "depth": 12, "heads": 6, "patch": 16},
        "B/16": {"width": 768, "depth": 12, "heads": 12, "patch": 16},
    },
    "sequence_transformer": {
        "tiny": {"width": 16, "depth": 2, "heads": 2, "patch": 4},
        "small": {"width": 64, "depth": 3, "heads": 4, "patch": 1},
    },
    "cnn": {
        "tiny": {"channels": (4, 4), "kernel": 3, "stride": 2},
        "mnist1d": {"channels": (25, 25, 25), "kernel": 5, "stride": 2},
        # Conv-4 of the few-shot literature, with strides in the place of pooling.
        "conv4": {"channels": (32, 32, 32, 32), "kernel": 3, "stride": 2, "batch_norm": True},
    },
    "mlp": {
        "tiny": {"hidden": (8,)},
        "sinusoid": {"hidden": (40, 40)},
    },
    "resnet": {
        "tiny": {"widths": (8, 16), "blocks": (1, 1)},
        "small": {"widths": (16, 32, 64), "blocks": (1, 1, 1)},
        "20": {"widths": (16, 32, 64), "blocks": (3, 3, 3)},
    },
    "biformer": {
        "tiny": {"widths": (8, 16), "depths": (1, 1), "heads": (2, 2), "stem": 1},
        "small": {"widths": (32, 64), "depths": (2, 2), "heads": (2, 4), "stem": 1},
        # BiFormer-T of the paper: heads of 32 features.
        "T": {"widths": (64, 128, 256, 512), "depths": (2, 2, 8, 2), "heads": (2, 4, 8, 16), "stem": 2},
    },
    "language": {
        "tiny": {"width": 16, "depth": 2, "heads": 4},
        "small": {"width": 128, "depth": 4, "heads": 4},
        "medium": {"width": 512, "depth": 8, "heads": 8},
        "smollm2-135M": {"width": 576, "depth": 30, "heads": 9},
    },
    "in_context": {
        "tiny": {"width": 16, "depth": 2, "heads": 2},
        "small": {"width": 64, "depth": 2, "heads": 4},
    },
    "set_clusterer": {
        "tiny": {"width": 16, "heads": 2},
        "small": {"width": 64, "heads": 4},
    },
    "mixture_of_fields": {
        "tiny": {"width": 8},
        "small": {"width": 64},
    },
    "keyed_experts": {
        "tiny": {"experts": 4, "k": 2, "filters": 4, **KEYED},
        "small": {"experts": 64, "k": 8, "filters": 32, **KEYED},
        # The largest ensemble of the authors' code.
        "large": {"experts": 1024, "k": 32, "filters": 32, **KEYED},
    },
    # The main network stands beside: a size is of both.
    "hypernetwork": {
        "tiny": {"hidden": (4, 8), "network": "cnn", "network_size": "tiny"},
        # The widths of the paper.
        "small": {"hidden": (16, 128), "network": "cnn", "network_size": "mnist1d"},
    },
    "spiking": {
        "tiny": {"widths": (4, 4), "strides": (2, 2)},
        "small": {"widths": (16, 32, 64), "strides": (1, 2, 2)},
        # As deep as spikes may have to vanish.
        "deep": {"widths": (16, 16, 16, 32, 32, 32, 64, 64, 64), "strides": (1, 1, 1, 2, 1, 1, 2, 1, 1)},
        # For examples without space.
        "dense": {"widths": (), "strides": (), "hidden": (128, 128)},
    },
    "spikeformer": {
        "tiny": {"widths": (4, 8), "depths": (1, 1), "strides": (2, 1), "convolutional": 1, "heads": 2},
        # An image of 8 x 8 has 4 x 4 tokens; larger ones want larger strides.
        "small": {"widths": (8, 24, 64), "depths": (1, 1, 2), "strides": (1, 2, 1), "convolutional": 2, "heads": 4},
    },
    "block_transformer": {
        "tiny": {"width": 16, "depth": 2, "heads": 4, **BLOCKS},
        "small": {"width": 128, "depth": 4, "heads": 4, **BLOCKS},
        "wide": {"width": 256, "depth": 4, "heads": 4, **BLOCKS},
        "medium": {"width": 512, "depth": 8, "heads": 8, **BLOCKS},
    },
}
