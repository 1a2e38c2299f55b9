"""What the generated datasets of events share: bounds of their settings, and one random stream an example."""

from collections.abc import Callable

import numpy as np

from lissom.data.errors import require

Splits = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def check_drawn(name: str, *, size: int, noise: float, train_size: int, test_size: int, seed: int) -> None:
    """One sentence for a setting that dataset `name` cannot be drawn with."""
    require(16 <= size <= 128, f"{name}: size must be in 16..128, got {size}")
    require(0 <= noise <= 100, f"{name}: noise must be in 0..100 events a pixel, got {noise}")
    require(train_size > 0 and test_size > 0, f"{name}: train_size and test_size must be above 0")
    require(seed >= 0, f"{name}: seed must be at least 0, got {seed}")


def drawn_splits(
    example: Callable[[np.random.Generator, int, int], tuple[np.ndarray, int]], sizes: tuple[int, int], seed: int
) -> Splits:
    """The training and the test split, of so many examples (frames, label) = example(rng, split, index), whose rng
    depends on (seed, split, index) alone."""

    def drawn(split: int, count: int) -> dict[str, np.ndarray]:
        pairs = [example(np.random.default_rng([seed, split, index]), split, index) for index in range(count)]
        frames, labels = zip(*pairs, strict=True)
        return {"inputs": np.stack(frames), "labels": np.array(labels, np.int32)}

    return drawn(0, sizes[0]), drawn(1, sizes[1])
