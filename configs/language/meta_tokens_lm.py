"""A decoder with meta-tokens and meta-attention on known answers, judged at the length of training and at twice it.

Paper: Shah et al. 2025, Language Modeling with Learned Meta-Tokens, arXiv:2509.16278.
Command: uv run train.py --config=configs/language/meta_tokens_lm.py (list_recall; or :copy, :parity behind the recipe)
Time: about nine minutes on 2 CPU cores that others shared. Result: not measured.
The three variants, and as a fourth the parameters of meta-attention without meta-tokens:
    uv run scripts/compare.py --config=configs/language/meta_tokens_lm.py --vary=data.meta_tokens=none,pauses \
    --vary=model.mixer_kwargs.meta_tokens.meta_attention=False,True
Sweep: data.meta_tokens=none,pauses,random (random is for any tokens)
    data.meta_fraction  model.mixer_kwargs.meta_tokens.meta_attention
"""

from lissom.configs.base import base, mode, tiny

TASKS = {
    "list_recall": {"length": 32, "items": 2},
    "copy": {"length": 64},
    "parity": {"length": 64},
}


def get_config(arg: str = ""):
    chosen = mode(arg, ("tiny", *TASKS))
    task = chosen if chosen in TASKS else "list_recall"
    length = TASKS[task]["length"]
    config = base()
    config.data.update(
        {
            "name": "sequences",
            "batch_size": 64,
            "meta_tokens": "pauses",
            "kwargs": {"sequences": {"task": task, **TASKS[task]}},
        }
    )
    config.model.update(
        {
            "name": "language",
            "size": "",
            "width": 64,
            "depth": 3,
            "heads": 2,
            "mixer": "meta_tokens",
            "mixer_kwargs": {"attention": {}, "meta_tokens": {"meta_attention": True}},
            "ffn": "swiglu",
            "ffn_kwargs": {},
            "norm": "rmsnorm",
            "norm_kwargs": {},
            "tied": True,
            "learned_positions": 0,
            "dropout": 0.0,
            "stack": None,
            "remat": False,
        }
    )
    config.objective = "language_modelling"
    config.optim.update({"learning_rate": 3e-3, "weight_decay": 1e-2})
    config.train = {"steps": 3000}
    # No pair of a sequence this short turns 32 times: with the paper's bound all would be interpolated.
    yarn = {"name": "yarn", "stretch": 2.0, "length": length, "fast": 4.0}
    config.evaluation.update({"data": ({"length": 2 * length},), "transforms": (yarn, {"name": "zero_meta_positions"})})
    if chosen == "tiny":
        config = tiny(config)
        config.model.update({"width": None, "depth": None, "heads": None})
    return config
