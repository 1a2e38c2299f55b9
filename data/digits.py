"""`digits`: 1,797 handwritten digits, 8x8 pixels, as they ship inside scikit-learn.

Source: the test part of UCI "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak, 1998); each pixel
counts the ink in a 4x4 block of a 32x32 bitmap, 0..16. Inputs are [8, 8, 1] float32 = count / 16.
"""

import importlib.util
from pathlib import Path

import numpy as np

from lissom.data.content import Content
from lissom.data.errors import nearest, require
from lissom.data.splits import stratified_split
from lissom.data.varying_noise import with_varying_noise

CONFIGS = ("stratified", "shifted")
TRAIN_SIZE = 1437


def digits(*, config: str = "stratified", noise_up_to: float = 0.0) -> Content:
    """1,437 training and 360 test digits, 10 classes.

    config: `stratified` (scikit-learn's `train_test_split` with `stratify` and `random_state=0`) or `shifted`
    (the first 1,437 against the last 360, which other people wrote: accuracy is several points lower).
    noise_up_to: the largest standard deviation of the noise of an image (`varying_noise.py`).
    """
    require(config in CONFIGS, f"digits has no config {config!r}{nearest(config, CONFIGS)}")
    spec = importlib.util.find_spec("sklearn")
    require(spec is not None, "digits needs scikit-learn, which holds its data: uv add scikit-learn")
    # Read as a file: importing scikit-learn costs 3 s.
    table = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype=np.int64)
    inputs = (table[:, :-1].reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    labels = table[:, -1].astype(np.int32)
    if config == "stratified":
        train, test = stratified_split(labels, train_size=TRAIN_SIZE, seed=0)
    else:
        train, test = np.split(np.arange(len(labels)), [TRAIN_SIZE])
    content = Content(
        kind="image",
        train={"inputs": inputs[train], "labels": labels[train]},
        test={"inputs": inputs[test], "labels": labels[test]},
        info={"classes": 10, "chance": 0.1},
    )
    return with_varying_noise(content, noise_up_to)
