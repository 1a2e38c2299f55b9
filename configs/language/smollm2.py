"""SmolLM2-135M-Instruct, tuned on the source text of Python's standard library; held-out modules are the test.

Mode `domains`: on source text and on English by turns (`domain_tokens`), and judged on each; rounded to int8 in three
ways without training besides: with a scale a layer for activations, the first token exact, or a scale a token.

Paper: SmolLM2: When Smol Goes Big, 2025, arXiv:2502.02737. `transforms` and `model.mixer` change it in front of the
    tuning: TransMLA (arXiv:2502.07864) is `--config.transforms="({'name': 'grouped_to_latent'},)"`.
Command: uv run --extra pretrained train.py --config=configs/language/smollm2.py
Time: about 4 s a step of 512 tokens on 2 CPU cores, and minutes to read the text and to judge. Result: after 30 steps,
three seeds, on 16,384 held-out tokens: 2.072 nats a token as it is (at a rate of 1e-4, the largest tried), 2.077 behind
grouped_to_latent (at 3e-5), not separated; 57.0 and 56.8 % of the tokens.
results/smollm2: uv run --extra pretrained scripts/compare.py --config=configs/language/smollm2.py \
    --vary="transforms=(),({'name':'grouped_to_latent'},)" --tune=optim.learning_rate=1e-5,3e-5,1e-4 \
    --config.train.steps=30 --config.evaluation.transforms="()"
Mode `domains`, 20 steps: 45.8 % of the tokens; int8 with a range a layer 35.7, with the first token exact 40.9, with a
scale a token 45.2.
results/smollm2_int8: uv run --extra pretrained scripts/compare.py --config=configs/language/smollm2.py:domains \
    --config.train.steps=20 --config.optim.learning_rate=1e-4 --seeds=3
results/smollm2_allocation: of its first run, uv run --extra pretrained scripts/allocate_bits.py \
    --run=runs/compare/smollm2_domains/recipe_seed0 --method=uniform,random,decoupled --domains=python,english \
    --options=int4,int8 --activations=none --batches=1 --bytes=80000000,100000000
Sweep: transforms  model.mixer=gqa,window,block_sparse  optim.learning_rate  train.steps
"""

from lissom.configs.base import base, mode, tiny

CHECKPOINT = "smollm2"
DOMAINS = ("python", "english")
ROUNDED = {"a layer": {}, "a layer, first token exact": {"exact_first": 1}, "a token": {"per": "row"}}
HEADS = {"kv_heads": 3, "rope_theta": 100_000.0}


def int8(label: str, **activations):
    """The entry of `evaluation.transforms` that rounds all layers."""
    rule = {"weights": "int8", "activations": {"format": "int8", **activations}}
    return {"name": "quantize", "rules": ((".*", rule),), "label": f"int8, {label}"}


def get_config(arg: str = ""):
    config = base()
    config.data.update(
        {
            "name": "lissom.training.pretrained_text:stdlib_tokens",
            "batch_size": 1,
            "kwargs": {"stdlib_tokens": {"checkpoint": CHECKPOINT, "length": 512, "test_windows": 32}},
        }
    )
    # What models.pretrained.llama.language_settings says of the checkpoint.
    config.model.update(
        {
            "name": "language",
            "size": "smollm2-135M",
            "mixer": "gqa",
            "mixer_kwargs": {
                "gqa": HEADS,
                "window": {**HEADS, "window": 256},
                "block_sparse": {**HEADS, "selector": "vertical_slash"},
            },
            "ffn": "swiglu",
            "ffn_kwargs": {"swiglu": {"expansion": 4.0}},
            "norm": "rmsnorm",
            "norm_kwargs": {"rmsnorm": {"epsilon": 1e-5}},
            "tied": True,
            "embedding_multiplier": 1.0,
            "dropout": 0.0,
            # Layer by layer, as transforms want it.
            "stack": "loop",
            "remat": False,
        }
    )
    config.init_from = (f"pretrained:{CHECKPOINT}",)
    config.objective = "language_modelling"
    config.optim.update({"learning_rate": 3e-5, "weight_decay": 0.0})
    config.train = {"steps": 100}
    config.evaluation.update({"batch_size": 4, "latency_batches": (1,), "latency_repeats": 5})
    arg = mode(arg, ("domains", "tiny"))
    if arg == "domains":
        with config.unlocked():
            config.data.name = "lissom.training.pretrained_text:domain_tokens"
            config.data.kwargs = {"domain_tokens": {"checkpoint": CHECKPOINT, "length": 128, "domains": DOMAINS}}
        config.data.batch_size = 4
        config.evaluation.data = tuple({"tested": name} for name in DOMAINS)
        config.evaluation.transforms = tuple(int8(label, **settings) for label, settings in ROUNDED.items())
    if arg == "tiny":
        # Without the checkpoint: bytes, and fresh weights.
        config = tiny(config)
        config.data.name = "stdlib_text"
        with config.unlocked():
            config.data.kwargs = {"stdlib_text": {"length": 128, "test_size": 64}}
        for settings in config.model.mixer_kwargs.values():
            settings.kv_heads = 2
        config.init_from = ()
    return config
