"""Selectors on the heads of a decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.evaluation.selection import Selection, heads_of, loss_of
from lissom.models.context import Context
from lissom.models.language import LanguageModel
from lissom.ops.attention import Causal, attention
from lissom.training.objectives.base import cross_entropy

FACTS = {"vocab_size": 19, "width": 32, "depth": 2, "heads": 4, "stack": "loop"}
TOKENS = jax.random.randint(jax.random.key(1), (1, 65), 0, 19)
KINDS = {"plain": {"kv_heads": 2, "rope_theta": 500.0}, "normed": {"qk_norm": True}}


def model(kind="plain", **changes):
    return LanguageModel(**FACTS | changes, mixer_kwargs={"attention": KINDS[kind]}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind", KINDS)
def test_dense_and_all_blocks_give_the_models_own_loss(kind):
    network = model(kind)
    want = cross_entropy(network(TOKENS[:, :-1])[0], TOKENS[:, 1:])[:, 8:].mean()
    for selection in (None, Selection("a_shape", {"sink": 1, "window": 8})):
        loss, density = loss_of(network, selection, TOKENS, block=8, skip=8)
        assert float(loss) == pytest.approx(float(want), rel=1e-5)
        assert float(density) == 1.0
    loss, density = loss_of(network, Selection("a_shape", {"sink": 1, "window": 1}), TOKENS, block=8, skip=8)
    assert float(density) < 0.5 and abs(float(loss - want)) > 1e-5
    assert network.blocks[0].mixer.q.kernel.shape == (32, 4, 8)  # the model itself is as it was


def test_settings_of_each_layer():
    network = model()
    each = [{"sink": 1, "window": 1}, {"sink": 1, "window": 8}]
    one, two = (
        float(loss_of(network, Selection("a_shape", {}, of_layers=order), TOKENS, block=8, skip=0)[1])
        for order in (each, each[:1] * 2)
    )
    assert one == pytest.approx((1 + two) / 2)


def test_heads_are_what_attention_reads():
    network = model()
    heads = heads_of(network, TOKENS[:, :-1])
    (second,) = heads_of(network, TOKENS[:, :-1], [1])
    np.testing.assert_array_equal(second.q, heads[1].q)
    assert len(heads) == 2
    block, x = network.blocks[0], network.embed(TOKENS[:, :-1])
    y = attention(heads[0].q, heads[0].k, heads[0].v, mask=Causal())
    want = block.mixer(block.mixer_norm(x), Context(mask=Causal()))[0]
    np.testing.assert_allclose(block.mixer.o(y.reshape(1, 64, -1)), want, atol=1e-5)
    # The rotary angles of the first token are 0.
    np.testing.assert_allclose(heads[0].raw[0][:, 0], heads[0].q[:, 0], atol=1e-6)
    assert jnp.abs(heads[0].raw[0][:, 1] - heads[0].q[:, 1]).max() > 1e-3


def test_bad_models():
    with pytest.raises(ValueError, match="load it with stack='loop'"):
        heads_of(model(stack="scan"), TOKENS)
    with pytest.raises(ValueError, match="layers with the mixer 'attention', not WindowAttention"):
        heads_of(LanguageModel(**FACTS, mixer="window", rngs=nnx.Rngs(0)), TOKENS)
