"""What the README promises of the first command; run by hand with -m slow."""

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_digits_vit_reaches_97_percent(seed, tmp_path):
    from lissom.train import train
    from lissom.training.config import load_recipe, overridden

    config = overridden(load_recipe("configs/vision/digits_vit.py"), [("seed", seed), ("mesh.data", 1)])
    assert train(config, tmp_path)["accuracy"] >= 0.97
