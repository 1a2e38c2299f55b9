"""A byte-level decoder on the source text of Python's standard library; held-out modules are the test.

A mode of `configs/few_bits.py` trains it for few bits (float: measured as rounded without training).

Paper: Vaswani et al. 2017, arXiv:1706.03762, with rotary positions, RMSNorm and SwiGLU.
Command: uv run train.py --config=configs/language/stdlib_lm.py --config.train.steps=2000
Time: about four minutes for 2,000 steps on 2 CPU cores. Result: bits a byte after 300 steps, equal parameters, three
seeds, all best at a rate of 6e-3 (bigram 3.51): cca 2.237, ccgqa 2.245, window (of 32) 2.329, gqa 2.363, attention
2.366, mla 2.417, block_sparse (strided, 30 % of the scores) 2.560. Bytes cached a token: 2,176, 1,088, none, 2,048,
4,096, 1,184, 4,096. Attention with embeddings that are not multiplied: 2.570 (results/stdlib_embedding:
docs/attention.md).
results/stdlib_lm: uv run scripts/compare.py --config=configs/language/stdlib_lm.py --config.train.steps=300 \
    --vary=model.mixer=attention,gqa,mla,cca,ccgqa,window,block_sparse --match=params \
    --tune=optim.learning_rate=2e-3,6e-3,1.8e-2 --config.evaluation.transforms="()"
What follows was measured before commit e1b117f, when embeddings began at 0.02.
Of attention so trained: rotary positions 3.03, none 3.41, learned 3.46, both 2.97 (300 steps are few for a table);
with qk_norm 2.82.
results/stdlib_positions, results/stdlib_qk_norm: with --tune=optim.learning_rate=2e-3,6e-3,1.8e-2, no transforms, and
    --vary=model.mixer_kwargs.attention.rope_theta=10000.0,0.0 --vary=model.learned_positions=0,128, or
    --vary=model.mixer_kwargs.attention.qk_norm=False,True
Of four heads with four, two, one for the keys: 3.02, 3.00, 2.90 (not separated), with 4,096, 2,048, 1,088 bytes cached
a token.
results/stdlib_gqa: as results/stdlib_lm, with --tune=optim.learning_rate=2e-3,6e-3,1.8e-2, no transforms,
    --config.model.mixer=gqa and --vary=model.mixer_kwargs.gqa.kv_heads=4,2,1
block_transformer against language, 200 steps of 8 x 256 bytes: 3.313 and 3.312 bits a byte, and 15,900 and 2,100 tokens
a second in 32 sequences of 2,048 tokens.
results/block_transformer: uv run scripts/compare.py --config=configs/language/stdlib_lm.py --config.train.steps=200 \
    --config.data.kwargs.stdlib_text.length=256 --config.data.batch_size=8 --config.evaluation.transforms="()" \
    --config.evaluation.latency_batches="(1,32)" --config.evaluation.latency_repeats=10 \
    --config.evaluation.decode_length=2048 --vary=model.name=language,block_transformer \
    --tune=optim.learning_rate=2e-3,6e-3,1.8e-2
Of few bits, 300 steps of 8 sequences, as stored: float32 2.643, int8 2.644, int4 2.733 (2.862 without training), int2
with learned scales 3.004, weights alone of int4 2.656, FP4 with all options 2.681 and with none 3.827, signs (reactnet)
3.279.
results/stdlib_few_bits: uv run scripts/compare.py --config=configs/language/stdlib_lm.py --config.train.steps=300 \
    --config.data.batch_size=8 --config.model.ffn_kwargs.swiglu.expansion=2.625 \
    --vary=mode=float,int8,int4,int2,int2_learned,int4_weights,int2_weights,fp4,fp4_all,bnn,reactnet \
    --tune=optim.learning_rate=2e-3,6e-3,1.8e-2 --seeds=3
results/stdlib_fp4: the same with \
    --vary=mode=fp4,fp4_rotation,fp4_tensor_scale,fp4_stochastic,fp4_ue5m3,fp4_e8m0,fp4_all
results/steps_stdlib_lm: uv run scripts/training_steps.py --config=configs/language/stdlib_lm.py --repeats=12 \
    --config.data.batch_size=8 --config.model.ffn_kwargs.swiglu.expansion=2.625 \
    --vary=mode=float,int8,int4,int4_weights,int2_learned,fp4,fp4_all,reactnet
Sweep: model.mixer=attention,gqa,mla,cca,ccgqa,window,block_sparse,token_elimination,meta_tokens,none
    model.mixer_kwargs.block_sparse.selector=
    strided,a_shape,random,page_bounds,pooled,oracle,learned_gate,vertical_slash,representative_heads,token_sparsity
    (docs/selectors.md says which of them see later tokens: their training loss does too)
    data.meta_tokens=none,random (for meta_tokens, which is attention without)
    model.size=tiny,small,medium  data.kwargs.stdlib_text.length
    model.name=language,block_transformer (Ho et al. 2024, arXiv:2406.02657), and behind model.name=block_transformer
    model.size=tiny,small,wide,medium  model.block_length=2,4,8  model.prefix=1,2  model.random_padding=True,False
"""

from lissom.configs import few_bits
from lissom.configs.base import base, decoder, mode, tiny

# About a quarter of the scores at 128 tokens and blocks of 8; the papers' settings are for contexts 100 times as long.
SELECTORS = {
    "strided": {},
    "a_shape": {"sink": 1, "window": 2},
    "random": {"density": 0.25},
    "pooled": {"density": 0.25},
    "oracle": {"density": 0.25},
    "learned_gate": {"density": 0.25},
    "vertical_slash": {"verticals": 8, "slashes": 8, "probe": 16, "first": 1, "recent": 1},
    "representative_heads": {"gamma": 0.9, "least": 16},
    "page_bounds": {"pages": 4},
    "token_sparsity": {"tau": 0.9, "probes": 16},
}


def get_config(arg: str = ""):
    arg = mode(arg, (*few_bits.NAMES, "tiny"))
    config = base()
    config.data.update({"name": "stdlib_text", "batch_size": 16, "kwargs": {"stdlib_text": {"length": 128}}})
    config.model.update(
        decoder(
            mixer_kwargs={
                "attention": {},
                "gqa": {"kv_heads": 2},
                "mla": {},
                "cca": {},
                "ccgqa": {},
                "window": {"window": 32},
                "block_sparse": {"selector": "strided", "selector_kwargs": SELECTORS, "block": 8},
                "token_elimination": {"keep": 0.5, "block": 8},
                "meta_tokens": {},
            },
        )
    )
    config.objective = "language_modelling"
    config.optim.update({"learning_rate": 2e-3, "weight_decay": 1e-2})
    config.train = {"steps": 1000}
    config.evaluation.update({"batch_size": 50, "latency_batches": (1, 16), "transforms": ({"name": "int8_weights"},)})
    if arg in few_bits.NAMES:
        # The table is both ends, and no layer whose product could be of signs.
        ends = "" if arg in few_bits.BINARY else "^embed$"
        few_bits.apply(config, arg, ends=ends, warm_up=50, signed="all")
    if arg == "tiny":
        config = tiny(config)
        with config.unlocked():
            config.data.kwargs.stdlib_text.update({"length": 128, "test_size": 64})
    return config
