"""A convolutional spiking network on the event streams of moving digits; class = digit x direction.

Mode spikeformer: a spike-driven transformer (Yao et al. 2024, arXiv:2404.03663) of twice as many parameters.

Paper: convolutions and leaky neurons on binned events, as in Eshraghian et al. 2021, arXiv:2109.12894, and the projects
    on DVS recordings that follow it; data and sizes are ours.
Command: uv run train.py --config=configs/events/moving_digits_csnn.py
Time: about five minutes on one CPU core. Result: (results/spiking_events, 16 x 16 pixels in 8 frames, 8 epochs, three
    seeds) 50.9 ± 1.1 % of 40 classes, 25.2 ± 0.7 with frames in random order; a CNN of stacked frames 56.3 ± 0.9.
Sweep: data.kwargs.moving_digits.control=none,shuffled,single  data.kwargs.moving_digits.binning=counts,binary,surface
    model.neuron=lif,plif,alif,cuba
    (on the same frames: mode spikeformer, and a CNN, model.neuron=relu, frame by frame or with model.encoding=stacked
    all at once; the letters of a pen: data.name=pen_strokes)
"""

from lissom.configs.base import base, mode, stepwise, tiny
from lissom.configs.vision import digits_spikeformer


def get_config(arg: str = ""):
    config = base()
    config.data.update(
        {
            "name": "moving_digits",
            "batch_size": 64,
            "kwargs": {
                "moving_digits": {
                    "classes_of": "digit_direction",
                    "motion": "linear",
                    "size": 24,
                    "steps": 16,
                    "binning": "counts",
                    "control": "none",
                    "train_size": 10000,
                    "test_size": 5000,
                }
            },
        }
    )
    config.model.update(
        stepwise(
            name="spiking",
            strides=(2, 2, 2),
            hidden=(),
            recurrent=False,
            kernel=3,
            neuron_kwargs={"lif": {"decay": 0.8, "threshold": 1.0}},
            batch_norm=True,
            encoding="frames",
            time_steps=0,
        )
    )
    config.optim.update({"learning_rate": 5e-3, "weight_decay": 1e-2})
    config.train = {"epochs": 10}
    chosen = mode(arg, ("tiny", "spikeformer"))
    if chosen == "spikeformer":
        # Narrow where the maps are large: all of it is computed for every frame.
        sizes = {"widths": (8, 16, 32), "depths": (1, 1, 1), "strides": (2, 2, 1), "convolutional": 2, "heads": 4}
        kept = {name: config.model[name] for name in ("neuron_kwargs", "encoding", "time_steps")}
        config.model = digits_spikeformer.get_config().model
        config.model.update(sizes | kept)
    if chosen == "tiny":
        config.data.kwargs.moving_digits.update({"size": 16, "steps": 5, "train_size": 96, "test_size": 64})
        config.model.strides = (2, 2)
        return tiny(config)
    return config
