"""A decoder whose feed-forward layers are mixtures of experts, on six kinds of text that share one alphabet.

Paper: Shazeer et al. 2017, arXiv:1701.06538, and those of the gates (docs/moe.md).
Command: uv run train.py --config=configs/language/domains_moe.py
Time: 2 to 3 minutes on one core of a Xeon. Result: a loss of 2.77 ± 0.05 nats a token with top-2 of 8, 2.75 ± 0.01 of
    the dense network of equal active width, 2.67 ± 0.01 of the one of equal total width (three seeds).
results/domains_moe: uv run scripts/compare.py --config=configs/language/domains_moe.py \
    --vary=model.ffn_kwargs.moe.gate=top_k,noisy_top_k,sigmoid_bias,hash,expert_choice,soft,dselect_k,comet \
    --also="top_k, one expert: model.ffn_kwargs.moe.k=1 model.ffn_kwargs.moe.expansion=4.0" \
    --also="dense, equal active: model.ffn=swiglu" \
    --also="dense, equal total: model.ffn=swiglu model.ffn_kwargs.swiglu.expansion=16.0" \
    --tune=optim.learning_rate=3e-3,1e-2,3e-2
results/domains_moe_balance: with --vary=model.ffn_kwargs.moe.gate_kwargs.top_k.balance_sequences=None,1 \
    --config.model.ffn_kwargs.moe.gate_kwargs.top_k.balance=0.1 --tune=optim.learning_rate=3e-3,1e-2,3e-2
results/domains_allocation: uv run scripts/compare.py --config=configs/language/domains_moe.py \
    --config.model.ffn=swiglu --seeds=3
    and uv run scripts/allocate_bits.py --run='runs/compare/domains_moe/recipe_seed*' --activations=weights \
    --method=uniform,random,divergence,decoupled --domains=python,english --bytes=18000,24016,32000
Sweep: model.ffn_kwargs.moe.gate=top_k,noisy_top_k,sigmoid_bias,hash,expert_choice,soft,dselect_k,comet
    model.ffn_kwargs.moe.experts  model.ffn_kwargs.moe.k  model.ffn_kwargs.moe.shared
    model.ffn=moe,swiglu  data.kwargs.domain_text.levels
"""

from lissom.configs.base import base, decoder, mode, tiny

DOMAINS = ("python", "c", "english", "json", "arithmetic", "brackets")
GATES = ("top_k", "noisy_top_k", "sigmoid_bias", "hash", "expert_choice", "soft", "dselect_k", "comet")


def get_config(arg: str = ""):
    config = base()
    text = {"length": 64, "levels": 32, "train_size": 5500, "test_size": 256}
    config.data.update({"name": "domain_text", "batch_size": 48, "kwargs": {"domain_text": text}})
    config.model.update(
        decoder(
            width=32,
            depth=3,
            ffn="moe",
            # A token goes through the same hidden width in both: 2 experts of expansion 2.
            ffn_kwargs={
                "moe": {
                    "gate": "top_k",
                    "gate_kwargs": {name: {} for name in GATES}
                    | {"top_k": {"balance": 0.01, "balance_sequences": None}},
                    "experts": 8,
                    "k": 2,
                    "expansion": 2.0,
                    "gated": True,
                    "shared": 0,
                    "capacity": None,
                },
                "swiglu": {"expansion": 4.0},
            },
        )
    )
    config.objective = "language_modelling"
    config.optim.update({"learning_rate": 1e-2, "weight_decay": 1e-2})
    config.train = {"steps": 1000}
    config.evaluation.update(
        {
            "batch_size": 128,
            "latency_batches": (1, 48),
            "data": tuple({"tested": name} for name in DOMAINS),
        }
    )
    if mode(arg, ("tiny",)):
        config = tiny(config)
        config.model.update({"width": None, "depth": None})
        config.data.kwargs.domain_text.update({"train_size": 16, "test_size": 4, "length": 32})
        config.evaluation.data = config.evaluation.data[:2]
    return config
