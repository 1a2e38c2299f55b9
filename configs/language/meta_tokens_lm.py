"""A decoder with meta-tokens and meta-attention on known answers, judged at the length of training and at twice it.

Paper: Shah et al. 2025, Language Modeling with Learned Meta-Tokens, arXiv:2509.16278.
Command: uv run train.py --config=configs/language/meta_tokens_lm.py (list_recall; or :copy, :parity behind the recipe)
Time: 38 seconds on one CPU core (:copy; :parity half to two minutes, list_recall two to six). Result: three seeds,
learning rates tuned; neither meta-tokens nor meta-attention is better anywhere. :parity of 16 bits (of 32): 96.5 %
(75.0), with meta-tokens 96.6 (54.8), with both 96.3 (65.6), chance 50. list_recall of 15 tokens (of 30): 67 +- 30
(29.7), since two of three seeds learn which list is asked, 41.2 (24.0), 41.8 (24.7), chance 8.3. :copy, before commit
e1b117f, chance 6.7 %, the best learning rate of all four the largest tried: all copy 16 tokens without a mistake. Of 32
tokens plain attention gets 8.3 % +- 2.9 (one seed 11.7), with meta-tokens 7.0, with meta-attention 7.1, with both 6.8;
stretched by YaRN 6.9, 6.8, 6.8, 6.7, and 78 to 99 of the 16 (not separated from 100).
results/meta_tokens_copy, _parity, _list (the recipe with :copy, :parity, without a mode), the three variants, and as a
    fourth the parameters of meta-attention without meta-tokens:
    uv run scripts/compare.py --config=configs/language/meta_tokens_lm.py:copy --vary=data.meta_tokens=none,pauses \
    --vary=model.mixer_kwargs.meta_tokens.meta_attention=False,True --tune=optim.learning_rate=1e-3,3e-3,9e-3
Sweep: data.meta_tokens=none,pauses,random (random is for any tokens)
    data.meta_fraction  model.mixer_kwargs.meta_tokens.meta_attention
"""

from lissom.configs.base import base, decoder, mode, tiny

# Each with its steps.
LISTS = {"length": 15, "items": 2, "questions": 2, "names": 8, "vocab_size": 24, "train_size": 100_000}
TASKS = {"list_recall": (LISTS, 2000), "copy": ({"length": 32}, 300), "parity": ({"length": 16}, 1000)}


def get_config(arg: str = ""):
    chosen = mode(arg, ("tiny", *TASKS))
    task = chosen if chosen in TASKS else "list_recall"
    settings, steps = TASKS[task]
    length = settings["length"]
    config = base()
    config.data.update(
        {
            "name": "sequences",
            "batch_size": 64,
            "meta_tokens": "pauses",
            "kwargs": {"sequences": {"task": task, **settings}},
        }
    )
    config.model.update(
        decoder(
            size="",
            width=64,
            depth=3,
            heads=2,
            mixer="meta_tokens",
            mixer_kwargs={"attention": {}, "meta_tokens": {"meta_attention": True}},
        )
    )
    config.objective = "language_modelling"
    config.optim.update({"learning_rate": 3e-3, "weight_decay": 1e-2})
    config.train = {"steps": steps}
    # No pair of a sequence this short turns 32 times: with the paper's bound all would be interpolated. With this one
    # the fastest is not.
    yarn = {"name": "yarn", "stretch": 2.0, "length": length, "fast": 2.0}
    config.evaluation.update({"data": ({"length": 2 * length},), "transforms": (yarn, {"name": "zero_meta_positions"})})
    if chosen == "tiny":
        config = tiny(config)
        config.data.kwargs.sequences.update({"train_size": 500, "test_size": 500})
        config.model.update({"width": None, "depth": None, "heads": None})
    return config
