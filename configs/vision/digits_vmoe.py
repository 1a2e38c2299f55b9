"""A small vision transformer on handwritten digits whose every other feed-forward layer is a mixture of experts.

Paper: Riquelme et al. 2021, V-MoE, arXiv:2106.05974 (noisy top-2, experts as wide as the layer they stand for, a
    capacity, and of what it drops the patches of the least weight first; the size is ours).
Command: uv run train.py --config=configs/vision/digits_vmoe.py (or :soft behind the recipe: Soft MoE, Puigcerver et al.
    2023, arXiv:2308.00951, which drops nothing)
Time: half a minute on one core. Result: 97.1 ± 0.6 %, 97.7 ± 0.4 of :soft, 98.4 ± 0.4 of the dense transformer (360
    test images, three seeds).
results/digits_vmoe: uv run scripts/compare.py --config=configs/vision/digits_vmoe.py \
    --vary="model.ffn=mlp,('mlp','moe')" \
    --also="soft: mode=soft" --tune=optim.learning_rate=3e-4,1e-3,3e-3
Sweep: model.ffn=mlp,('mlp','moe')  model.ffn_kwargs.moe.gate=noisy_top_k,top_k,expert_choice
    model.ffn_kwargs.moe.capacity=0.5,1.0,1.5  model.ffn_kwargs.moe.priority=True,False
"""

from lissom.configs.base import mode
from lissom.configs.vision import digits_vit


def get_config(arg: str = ""):
    chosen = mode(arg, ("soft", "tiny"))
    config = digits_vit.get_config("tiny" if chosen == "tiny" else "")
    with config.unlocked(), config.ignore_type():
        config.model.ffn = ("mlp", "moe")
        config.model.ffn_kwargs = {
            "moe": {
                "gate": "noisy_top_k",
                "gate_kwargs": {"noisy_top_k": {"balance": 0.01}, "soft": {"slots": 4}},
                "experts": 8,
                "k": 2,
                "expansion": 4.0,
                "gated": False,
                "capacity": 1.05,
                "priority": True,
            }
        }
        if chosen == "soft":
            config.model.ffn_kwargs.moe.update({"gate": "soft", "capacity": None, "priority": False})
    config.evaluation.transforms = ()
    return config
