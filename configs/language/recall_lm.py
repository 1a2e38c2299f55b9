"""A decoder on multi-query associative recall: known answers, which only a far look-back can give.

Paper: Arora et al. 2023, Zoology, arXiv:2312.04927 (the task).
Command: uv run train.py --config=configs/language/recall_lm.py
Time: one to two minutes on one CPU core. Result: answers after 1,000 steps, equal parameters, three seeds, 40,000
answers (guessing one of the eight values that stand there 12.5 %, chance 3.1): attention, mla, cca, ccgqa and
block_sparse (strided, 54 % of the scores) 99.97 to 99.98 %, gqa (one key head) the same at two seeds and 14 at the
third, window (8 tokens) 7.3. Before commit e1b117f, with embeddings of 0.02, attention had 15.1 (of 20,000 sequences,
1,200 steps of 64).
results/recall_lm: uv run scripts/compare.py --config=configs/language/recall_lm.py --match=params \
    --config.evaluation.transforms="()" --vary=model.mixer=attention,gqa,mla,cca,ccgqa,window,block_sparse \
    --tune=optim.learning_rate=1e-3,3e-3,9e-3
Sweep: model.mixer=attention,gqa,mla,cca,ccgqa,window,block_sparse,token_elimination,meta_tokens,none
    model.mixer_kwargs.block_sparse.selector=strided,a_shape,random,page_bounds,pooled,oracle,learned_gate
    data.kwargs.sequences.pairs  data.meta_tokens=none,random (for meta_tokens, which is attention without)
"""

from lissom.configs.base import base, decoder, mode, tiny

RECALL = {"length": 64, "vocab_size": 64, "pairs": 8, "train_size": 50_000}
SELECTORS = {
    "strided": {},
    "a_shape": {"sink": 1, "window": 2},
    "random": {"density": 0.25},
    "pooled": {"density": 0.25},
    "oracle": {"density": 0.25},
    "learned_gate": {"density": 0.25},
    "page_bounds": {"pages": 4},
}


def get_config(arg: str = ""):
    config = base()
    config.data.update(
        {
            "name": "sequences",
            "batch_size": 32,
            "kwargs": {"sequences": {"task": "recall", **RECALL}},
        }
    )
    config.model.update(
        decoder(
            size="",
            width=64,
            depth=2,
            heads=2,
            mixer_kwargs={
                "attention": {},
                "gqa": {},
                "mla": {},
                "cca": {},
                "ccgqa": {"query_compression": 1, "cache_compression": 2},
                "window": {"window": 8},
                "block_sparse": {"selector": "strided", "selector_kwargs": SELECTORS, "block": 4},
                "token_elimination": {"keep": 0.5, "block": 4},
                "meta_tokens": {},
            },
        )
    )
    config.objective = "language_modelling"
    config.optim.update({"learning_rate": 3e-3, "weight_decay": 1e-2})
    config.train = {"steps": 1000}
    config.evaluation.update({"transforms": ({"name": "int8_weights"},)})
    if mode(arg, ("tiny",)):
        config = tiny(config)
        config.data.kwargs.sequences.update({"train_size": 500, "test_size": 500})
        config.model.update({"width": None, "depth": None, "heads": None})
    return config
