"""One recipe a (network, objective, transform) family: what resume, reload and meshes are tested on.

A recipe that only sets other values of a family listed here needs no line.
"""

FAMILIES = {
    "vit": ("vision/digits_vit", {}),
    "resnet": ("vision/digits_resnet", {}),
    "keyed_experts": ("vision/digits_stream", {}),
    "cnn": ("vision/mnist1d_cnn", {}),
    "hypernetwork": ("vision/mnist1d_hypernetwork", {}),
    "sequence": ("vision/mnist1d_transformer", {}),
    "sequence_scan": ("vision/mnist1d_transformer", {"model.stack": "scan", "model.dropout": 0.1}),
    "sets": ("sets/gaussian_mixtures", {}),
    "in_context": ("fewshot/gpicl", {}),
    "in_context_lstm": ("fewshot/gpicl", {"model.mixer": "lstm"}),
    "dynamics": ("dynamics/mixer", {}),
    "meta": ("fewshot/sinusoid", {}),
    "meta_sgd": ("fewshot/sinusoid", {"objective": "meta_sgd"}),
    "episodes": ("fewshot/glyphs", {"objective": "protonet"}),
    "base_classes": ("fewshot/glyphs", {"objective": "supervised"}),
    "contrastive": ("fewshot/glyphs", {"objective": "beclr"}),
    "language": ("language/recall_lm", {}),
    "meta_tokens": ("language/meta_tokens_lm", {}),
    "branches": (
        "language/domains_moe",
        {
            "model.ffn": "swiglu",
            "transforms": ({"name": "branches", "count": 6},),
            "objective": "branch_training",
        },
    ),
    "read_me": (
        "language/domains_moe",
        {"model.ffn": "swiglu", "transforms": ({"name": "read_me", "experts": 6},)},
    ),
    "bricks": (
        "language/domains_moe",
        # A width of 24 has 64 channels in its feed-forward layers; tiny's 16 has 43, a prime.
        {"model.width": 24, "model.ffn": "swiglu", "transforms": ({"name": "bricks", "bricks": 4, "k": 2},)},
    ),
    "spiking": (
        "vision/digits_snn",
        {
            "model.neuron": "plif",
            "model.neuron_kwargs": {"plif": {"membrane_norm": "channel", "learn_threshold": True}},
        },
    ),
    "spikeformer": ("vision/digits_spikeformer", {}),
    "block_transformer": ("language/recall_lm", {"model.name": "block_transformer"}),
}
