"""A BiFormer-style pyramid on glyphs: letters of many scripts, tested in fonts that were not trained on.

Paper: Zhu et al. 2023, BiFormer, arXiv:2303.08810 (two stages, for small pictures).
Command: uv run scripts/compare.py --config=configs/vision/glyphs_biformer.py \
    --vary=model.mixer=attention,none,window,neighborhood,bilevel --tune=optim.learning_rate=2e-3,6e-3,1.8e-2
Time: one to four minutes a run on one CPU core. Result: after 400 steps, three seeds, equal widths: none 60.8 %,
neighborhood 49.1, attention 42.6, bilevel 42.2, window 38.0, each +- 4 to 9 and not separated from attention; below
1-nearest neighbour on pixels (71.3): 1.3 epochs are early for fonts that were not seen.
results/glyphs_biformer: the command.
Letters of 24 x 24 pixels are 12 x 12, then 6 x 6 tokens, and their 9 regions 4 x 4, then 2 x 2 of them.
Sweep: model.mixer=none,window,neighborhood,bilevel,attention  model.mixer_kwargs.bilevel.top_k=1,2,4,9 (of 9 regions)
"""

from lissom.configs.base import base, mode, tiny


def get_config(arg: str = ""):
    config = base()
    held_out = ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic")
    glyphs = {"size": 24, "classes": 100, "test_fonts": held_out}
    config.data.update({"name": "glyphs", "batch_size": 64, "kwargs": {"glyphs": glyphs}})
    config.model.update(
        {
            "name": "biformer",
            "size": "small",
            "mixer": "bilevel",
            "mixer_kwargs": {
                "attention": {"rope_theta": 0.0},
                "window": {"window": 9, "rope_theta": 0.0},
                "neighborhood": {"window": 5, "rope_theta": 0.0},
                "bilevel": {"regions": 3, "top_k": 2},
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
    config.optim.update({"learning_rate": 6e-3, "weight_decay": 5e-2})
    config.train = {"steps": 400}
    if mode(arg, ("tiny",)):
        config = tiny(config)
        config.data.kwargs.glyphs.update({"train_size": 200, "test_size": 100})
    return config
