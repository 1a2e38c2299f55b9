"""Bricks: a layer that is whole with all of them, routers that find the active ones, and what a partition is by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.compression.bricks import Bricks, watch
from lissom.compression.transforms import structured
from lissom.models.context import Context
from lissom.models.ffn import SwiGLU
from lissom.models.language import LanguageModel
from lissom.models.variables import Param, flatten, split
from lissom.training.errors import UserError

TOKENS = jax.random.randint(jax.random.key(0), (4, 6), 0, 11)
BATCH = {"inputs": TOKENS}
X = jax.random.normal(jax.random.key(2), (2, 5, 12))


def network(**settings):
    return LanguageModel(vocab_size=11, width=12, depth=2, heads=2, rngs=nnx.Rngs(0), **settings)


def bricked(data=(BATCH,), **settings):
    steps = {"router_steps": 20} if settings.get("router", "learned") == "learned" else {}
    transform = Bricks(**{"bricks": 4, "k": 2, **steps, **settings})
    return transform.values(transform.structure(network()), network(), iter(data))


@pytest.mark.parametrize("by", ["coactivation", "weights", "random"])
@pytest.mark.parametrize("router", ["learned", "centre", "oracle"])
def test_all_bricks_are_the_layer(by, router):
    np.testing.assert_allclose(bricked(by=by, router=router, k=4)(TOKENS)[0], network()(TOKENS)[0], atol=1e-5)


def test_a_token_has_the_bricks_that_its_router_names():
    """With the oracle, by hand: of a layer's 32 channels, 4 bricks of 8, those of the two bricks of most activity."""
    layer, dense = bricked(router="oracle").blocks[0].ffn, network().blocks[0].ffn
    inner, channels = np.asarray(dense.inner(X)), np.asarray(layer.channels[...])
    most = np.argsort(-np.abs(inner)[..., channels].sum(-1), -1)[..., :2]
    kept = np.zeros_like(inner)
    for b, t in np.ndindex(2, 5):
        own = channels[most[b, t]].ravel()
        kept[b, t, own] = inner[b, t, own]
    y, aux = layer(X, Context())
    np.testing.assert_allclose(y, kept @ np.asarray(dense.down.kernel[...]), atol=1e-5)
    assert aux["metrics"]["max_load"] >= 1
    assert sorted(channels.ravel().tolist()) == list(range(32))


def test_a_centre_is_the_mean_of_the_columns_of_a_gate():
    layer, dense = bricked(router="centre").blocks[1].ffn, network().blocks[1].ffn
    columns = np.asarray(dense.gate.kernel[...])[:, np.asarray(layer.channels[...])[2]]
    centre = (columns / np.linalg.norm(columns, axis=0)).mean(1)
    expected = X @ centre / np.linalg.norm(centre)
    np.testing.assert_allclose(layer.scores(X)[..., 2], expected, atol=1e-5)


def test_a_taught_router_finds_the_active_bricks():
    """More often than one that was hardly taught, on what it was taught on."""
    seen = jnp.asarray(watch(network(), [BATCH])["blocks/0/ffn"].inputs)[None]

    def agreement(steps):
        layer = bricked(router_steps=steps, by="weights").blocks[0].ffn
        first = lambda scores: np.asarray(scores.argmax(-1))
        return (first(layer.scores(seen)) == first(layer.activity(seen))).mean()

    assert agreement(400) > 0.9 > agreement(1) + 0.2


def test_channels_that_act_together_lie_together():
    """Half of the tokens drive the even channels, the others the odd ones."""
    transform = Bricks(bricks=2, k=1, active=0.5)
    layer = SwiGLU(12, rngs=nnx.Rngs(0))
    activity = np.random.default_rng(0).random((64, 32))
    activity[:32, ::2] += 2
    activity[32:, 1::2] += 2
    parts = transform.partition(layer, activity, np.random.default_rng(0))
    assert len(set(parts[::2])) == len(set(parts[1::2])) == 1 and parts[0] != parts[1]


def test_watching_is_what_the_layers_do():
    watched = watch(network(), [BATCH, BATCH])["blocks/1/ffn"]
    assert watched.inputs.shape == (48, 12) and watched.activity.shape == (48, 32)
    inner = network().blocks[1].ffn.inner(jnp.asarray(watched.inputs))
    np.testing.assert_allclose(watched.activity, np.abs(inner), atol=1e-5)


def test_layers_of_different_sizes():
    """As a block transformer's, whose two decoders see other tokens."""
    module = network(ffn=("swiglu", "mlp"))
    assert set(watch(module, [BATCH])) == {"blocks/0/ffn"}


def test_routers_do_not_learn():
    module = bricked()
    trained = flatten(split(module).params)
    assert trained and not any("learned" in name for name in trained)
    assert isinstance(module.blocks[0].ffn.experts.inner.kernel, Param)


def test_decoding_goes_on_where_reading_ended():
    module = bricked()
    whole, cache = module(TOKENS)[0], module.init_cache(4, 6)
    first, cache = module.extend(TOKENS[:, :4], cache)
    second, _ = module.extend(TOKENS[:, 4:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bricks": 5}, r"bricks=5 must divide the 32 channels"),
        ({"bricks": 0}, r"bricks=0 must be at least 1"),
        ({"k": 5}, r"k=5 must be at least 1 and at most bricks=4"),
        ({"by": "colour"}, r"by='colour' is none of coactivation"),
        ({"active": 0.0}, r"active=0.0 must be above 0"),
        ({"router": "none"}, r"router='none' is none of learned"),
        ({"by": "random", "active": 0.2}, r"active=0.2 is of by='coactivation'"),
        ({"router_steps": 0}, r"router_steps=0 must be at least 1"),
        ({"router": "centre", "router_steps": 5}, r"are of router='learned', not of 'centre'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        structured(network(), [("bricks", Bricks(**{"bricks": 4, "k": 2, **settings}))])


def test_no_such_layers_and_no_data():
    with pytest.raises(UserError, match="are made of gated feed-forward layers"):
        Bricks(bricks=4, k=2).structure(network(ffn="mlp"))
    shared = network(ffn="moe", ffn_kwargs={"moe": {"shared": 1}})
    with pytest.raises(UserError, match="ffn/shared is part of another layer"):
        Bricks(bricks=4, k=2).structure(shared)
    with pytest.raises(UserError, match="there is none here"):
        bricked(data=())
