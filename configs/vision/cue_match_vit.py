"""A transformer on cue_match: an image whose class only a far, content-addressed link gives.

Paper: Zhu et al. 2023, BiFormer, arXiv:2303.08810 (routing); Hassani et al. 2023, arXiv:2204.07143 (neighbourhoods).
Command: uv run scripts/compare.py --config=configs/vision/cue_match_vit.py --match=params \
    --vary=model.mixer=attention,none,window,neighborhood,bilevel --tune=optim.learning_rate=2e-3,6e-3,1.8e-2
Time: 50 to 75 seconds a run on a CPU core that others shared. Result: (results/cue_match_vit, equal parameters, three
seeds, 5,000 images; chance 25 %, a linear classifier 32.5) attention 98.4 %, none, window, neighborhood and bilevel
with 2 of 9 regions 24.3 to 25.0.
results/cue_match_top_k: with --config.model.mixer=bilevel --vary=model.mixer_kwargs.bilevel.top_k=9,4,2,1 in place of
that --vary, 99.4 % with all regions, 45.7 +- 36 with four (one seed of three learns it), 24.7 with two, 24.4 with one.
Which regions are chosen gets no gradient: the link must be found by those that happen to be let through.
The cue and its item lie at least three rows or columns apart. One layer suffices for who sees so far; the window
(raster order) and the neighbourhood do not reach it, but for a window at the end of a row, which goes on in the next.
Sweep: model.mixer=none,window,neighborhood,bilevel,attention  model.mixer_kwargs.bilevel.top_k=1,2,4,9 (of 9 regions)
"""

from lissom.configs.base import base, mode, tiny


def get_config(arg: str = ""):
    config = base()
    images = {"dims": 2, "length": 36, "gap": 3, "items": 4, "key_bits": 4, "train_size": 50000}
    config.data.update({"name": "cue_match", "batch_size": 64, "kwargs": {"cue_match": images}})
    config.model.update(
        {
            "name": "vit",
            "size": "",
            "width": 64,
            "depth": 1,
            "heads": 4,
            "patch": 1,
            "mixer": "bilevel",
            "mixer_kwargs": {
                "attention": {"rope_theta": 0.0},
                "window": {"window": 2, "rope_theta": 0.0},
                "neighborhood": {"window": 3, "rope_theta": 0.0},
                "bilevel": {"regions": 3, "top_k": 2, "local": 3},
            },
            "ffn": "mlp",
            "ffn_kwargs": {},
            "norm": "layernorm",
            "norm_kwargs": {},
            "dropout": 0.0,
            "stack": None,
            "remat": False,
        }
    )
    config.optim.update({"learning_rate": 6e-3, "weight_decay": 1e-2})
    config.train = {"steps": 1000}
    if mode(arg, ("tiny",)):
        config = tiny(config)
        config.model.update({"width": None, "depth": None, "heads": None, "patch": 1})
        config.data.kwargs.cue_match.update({"train_size": 200, "test_size": 100})
    return config
