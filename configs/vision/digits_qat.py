"""Quantization-aware training of a small residual network on scikit-learn's handwritten digits.

    (none)      int8 weights and activations
    int4        int4, the first and the last layer int8
    int2        int2 weights and activations of learned scales, the first and the last layer int8
    fp4         all three products of training in FP4 (E2M1, groups of 16 with UE4M3 scales, a scale a tensor, Hadamard
                rotation, gradients rounded at random), the first and the last layer in FP8
    binary      signs of weights and activations by ReActNet's operator, the first and the last layer in float32; no
                relu, behind which every sign is 1

Paper: Abdolrashidi et al. 2021, arXiv:2105.03536 (int8, int4: ranges frozen behind a warm-up); Esser et al. 2020,
    arXiv:1902.08153 (int2: LSQ); Hu et al. 2025, arXiv:2509.17791 (fp4); Liu et al. 2020,
    arXiv:2003.03488 (binary).
Command: uv run train.py --config=configs/vision/digits_qat.py:int4
Time: about two minutes on 2 CPU cores. Result: not measured.
Sweep: optim.learning_rate  model.size=tiny,small,20
"""

from lissom.configs import few_bits
from lissom.configs.base import mode
from lissom.configs.vision import digits_resnet

WAYS = {"": "int8", "int4": "int4", "int2": "int2_learned", "fp4": "fp4_all", "binary": "reactnet"}
"""Mode -> that of digits_resnet.py."""


def get_config(arg: str = ""):
    arg = mode(arg, (*tuple(WAYS)[1:], "tiny"))
    if arg != "tiny":
        return digits_resnet.get_config(WAYS[arg])
    config = digits_resnet.get_config("tiny")
    few_bits.apply(config, "int8", ends=digits_resnet.ENDS, warm_up=1, signed="ends")
    return config
