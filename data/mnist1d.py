"""`mnist1d`: ten 1-D templates, padded, shifted, sheared and drowned in correlated noise; 40 samples long.

Source: Greydanus & Kobak, "Scaling Down Deep Learning with MNIST-1D" (2020), the package mnist1d's
`make_dataset`. Separates capacity and locality at a size that trains in seconds on a CPU. Inputs are [40, 1],
standardised over the whole draw. Published test accuracies at 4,000 / 1,000: linear 32 %, MLP 68 %, GRU 91 %,
CNN 94 %.
"""

import importlib.util
from types import SimpleNamespace

import numpy as np

from lissom.data.content import Content
from lissom.data.errors import require

ANCHORS = {"linear": 0.32, "mlp": 0.68, "gru": 0.91, "cnn": 0.94}


def mnist1d(
    *, train_size: int = 4000, test_size: int = 5000, seed: int = 42, shuffle_sequence: bool = False
) -> Content:
    """Signals [40, 1], 10 classes.

    train_size, test_size: any; their sum must be a multiple of 10. One draw of train_size + test_size signals
    is cut in two, so no signal is in both. `train_size=4000, test_size=1000, seed=42` is the published
    dataset; the default has 5,000 test signals, since 1,000 are too few to tell two methods apart.
    seed: of the generator (numpy's global one, which is put back afterwards).
    shuffle_sequence: one fixed permutation of the 40 samples, which takes locality away.
    """
    require(
        importlib.util.find_spec("mnist1d") is not None,
        "mnist1d needs the package mnist1d, its generator: uv sync --extra datasets",
    )
    total = train_size + test_size
    require(
        train_size > 0 and test_size > 0 and total % 10 == 0,
        f"mnist1d: train_size + test_size must be a multiple of 10, got {train_size} + {test_size}",
    )
    from mnist1d.data import get_dataset_args, make_dataset

    arguments = get_dataset_args(as_dict=True) | {
        "num_samples": total,
        "train_split": 1.0,  # cut below: the generator's own int(n * fraction) can lose one to rounding
        "seed": seed,
        "shuffle_seq": shuffle_sequence,
    }
    state = np.random.get_state()
    try:
        made = make_dataset(SimpleNamespace(**arguments))
    finally:
        np.random.set_state(state)
    inputs, labels = made["x"][..., None].astype(np.float32), made["y"].astype(np.int32)
    return Content(
        kind="signal",
        train={"inputs": inputs[:train_size], "labels": labels[:train_size]},
        test={"inputs": inputs[train_size:], "labels": labels[train_size:]},
        info={"classes": 10, "chance": 0.1, "anchors": ANCHORS},
    )
