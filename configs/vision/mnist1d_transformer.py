"""A transformer on MNIST-1D, the set that separates local mixing from none: the first comparison.

A mode of `configs/few_bits.py` trains it for few bits (float: measured as rounded without training).

Paper: Greydanus & Kobak 2020, arXiv:2011.14439 (the data).
Command: uv run scripts/compare.py --config=configs/vision/mnist1d_transformer.py \
    --vary=model.mixer=attention,window,none --match=params --tune=optim.learning_rate=2e-3,6e-3,1.8e-2
results/mnist1d_transformer_few_bits: uv run scripts/compare.py --config=configs/vision/mnist1d_transformer.py \
    --config.model.mixer=window --config.model.width=32 --config.train.steps=600 --config.optim.learning_rate=6e-3 \
    --vary=mode=float,int8,int4,int2,int2_learned,fp4,fp4_all,reactnet --seeds=3
results/steps_mnist1d_transformer: uv run scripts/training_steps.py --config=configs/vision/mnist1d_transformer.py \
    --config.model.mixer=window --config.model.width=32 --repeats=20 \
    --vary=mode=float,int8,int4,int2_learned,fp4,fp4_all,reactnet
Time: about two minutes a run on 2 CPU cores. Result: see the table in README.md; of few bits: float 85.8 %,
int8 85.7, int4 80.8, int2 with learned scales 65.4, FP4 27.4 and with all its options 80.3 (600 steps).
Sweep: model.mixer=attention,window,none  model.ffn=mlp,swiglu  model.norm=layernorm,rmsnorm,none
"""

from lissom.configs import few_bits
from lissom.configs.base import base, mode, tiny


def get_config(arg: str = ""):
    arg = mode(arg, (*few_bits.NAMES, "tiny"))
    config = base()
    config.data.update({"name": "mnist1d", "batch_size": 100})
    config.model.update(
        {
            "name": "sequence_transformer",
            "size": "small",
            "patch": None,
            "mixer": "attention",
            "mixer_kwargs": {"attention": {}, "window": {"window": 5}},
            "ffn": "mlp",
            "ffn_kwargs": {},
            "norm": "layernorm",
            "norm_kwargs": {},
            "causal": False,
            "positions": True,
            "dropout": 0.0,
            "stack": None,
            "remat": False,
        }
    )
    config.optim.update({"learning_rate": 2e-3, "weight_decay": 1e-2})
    config.train = {"steps": 1500}
    config.evaluation.update({"transforms": ({"name": "int8_weights"},)})
    if arg in few_bits.NAMES:
        few_bits.apply(config, arg, ends="^(embed|head)$", warm_up=150, signed="all")
    return tiny(config) if arg == "tiny" else config
