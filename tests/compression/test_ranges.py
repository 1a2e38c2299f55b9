"""What ranges of activations are measured on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.compression.quantization.ranges import Range, calibrate
from lissom.compression.quantization.transforms import Qat
from lissom.models.cnn import ConvNet


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(("training", "episodes"), [(True, False), (True, True), (False, False), (False, True)])
def test_ranges_behind_a_norm_whose_averages_no_training_has_moved(moved, training, episodes):
    """They are of what is normalised by the batch, where that is what comes: in training, and in tasks. Averages that
    moved are used, and so are all where a network is judged on single examples; they stay."""
    module = ConvNet(
        input_shape=(6, 6, 1), classes=3, channels=(4, 4), kernel=3, stride=1, batch_norm=True, rngs=nnx.Rngs(0)
    )
    x = 10 * jax.random.normal(jax.random.key(1), (5, 6, 6, 1))
    if moved:
        for norm in module.norms:
            norm.var[...] = jnp.full(4, 9.0)
    rules = [("convs/1", {"weights": "int8", "activations": "int8"})]
    transform = Qat(rules=rules, batches=1)
    batch = {"inputs": x[None], "support_inputs": x[None]} if episodes else {"inputs": x}
    rounded, data = transform.structure(module), iter([batch, batch])
    found = transform.values(rounded, module, data) if training else calibrate(rounded, data, 1)
    assert len(list(data)) == 1  # so many batches, and no more
    (measured,) = (node for _, node in nnx.iter_graph(found) if isinstance(node, Range))
    y = module.convs[0](x)
    by_batch = (training or episodes) and not moved
    mean, var = (y.mean((0, 1, 2)), y.var((0, 1, 2))) if by_batch else (0.0, 9.0 if moved else 1.0)
    np.testing.assert_allclose(measured.seen[...], ((y - mean) / jnp.sqrt(var + 1e-5)).max(), rtol=1e-4)
    for norm in found.norms:
        assert norm.by_batch is None and norm.momentum == 0.9
        np.testing.assert_array_equal(norm.mean[...], 0.0)
        np.testing.assert_array_equal(norm.var[...], 9.0 if moved else 1.0)
