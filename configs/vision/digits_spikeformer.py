"""A spike-driven transformer (Meta-SpikeFormer) on scikit-learn's handwritten digits.

Mode vit: a vision transformer of nearly as many parameters, trained alike.

Paper: Yao et al. 2024, arXiv:2404.03663 (the architecture; the size is ours).
Command: uv run train.py --config=configs/vision/digits_spikeformer.py
Time: two minutes on one CPU core. Result: (results/spikeformer, 10 epochs, 2 steps, three seeds) 93.2 to 95.8 % for the
    four attentions, 92.2 % for mode vit; a linear classifier has 96.7 %.
Sweep: model.attention=sdsa1,sdsa2,sdsa3,sdsa4  model.shortcut=membrane,vanilla,spike  model.time_steps=1,2,4
    model.attention_threshold=2,4,8  model.neuron=if,lif,plif,alif,cuba  model.convolutional=0,1,2
    (28 x 28 pixels: data.name=mnist5k with model.strides=2,2,2)
"""

from lissom.configs.base import base, mode, stepwise, tiny
from lissom.configs.vision import digits_vit


def get_config(arg: str = ""):
    config = base()
    config.data.update({"name": "digits", "batch_size": 64, "augment": ("noise",)})
    config.model.update(
        stepwise(
            name="spikeformer",
            stem=3,
            kernel=5,
            separable=2,
            expansion=4,
            attention="sdsa3",
            attention_threshold=None,
            shortcut="membrane",
        )
    )
    config.optim.update({"learning_rate": 2e-3, "weight_decay": 1e-2})
    config.train = {"epochs": 15}
    chosen = mode(arg, ("tiny", "vit"))
    if chosen == "vit":
        config.model = digits_vit.get_config().model
    return tiny(config) if chosen == "tiny" else config
