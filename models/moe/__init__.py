"""Mixtures of experts: one layer is a gate, a way of bringing tokens to experts, and the experts.

`layer.MoE` is the feed-forward "moe" (`models.FFNS`); `GATES` is the visible dict of what chooses.
"""

GATES = {
    "top_k": "lissom.models.moe.gates:TopK",
    "noisy_top_k": "lissom.models.moe.gates:NoisyTopK",
    "sigmoid_bias": "lissom.models.moe.gates:SigmoidBias",
    "hash": "lissom.models.moe.gates:Hash",
    "expert_choice": "lissom.models.moe.choosing_experts:ExpertChoice",
    "soft": "lissom.models.moe.choosing_experts:Soft",
    "dselect_k": "lissom.models.moe.trees:DSelectK",
    "comet": "lissom.models.moe.trees:Comet",
}
