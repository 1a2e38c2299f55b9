"""Meta-attention: who sees whom, what it adds to plain attention, positions of meta-tokens; YaRN."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.compression.transforms import build_transforms, structured
from lissom.evaluation import memory
from lissom.models.block_transformer import BlockTransformer
from lissom.models.context import Context
from lissom.models.language import LanguageModel
from lissom.models.mixers.attention import Attention
from lissom.models.mixers.meta import MetaTokens
from lissom.models.positions import rotate, yarn_factors, yarn_temperature
from lissom.models.variables import merge, split
from lissom.ops.attention import masks
from lissom.training.errors import UserError

WIDTH, HEADS, TOKENS = 16, 4, 12
META = jnp.zeros((2, TOKENS), bool).at[:, jnp.array([1, 4, 5, 9])].set(True)
CAUSAL = Context(mask=masks.Causal())
MARKED = dataclasses.replace(CAUSAL, meta=META)


def mixer(**settings):
    return MetaTokens(WIDTH, heads=HEADS, rngs=nnx.Rngs(0), **settings)


def inputs(tokens=TOKENS, seed=1):
    return jax.random.normal(jax.random.key(seed), (2, tokens, WIDTH))


def changed(one, two):
    """The positions at which two outputs differ."""
    return np.flatnonzero(np.abs(one - two).max((0, 2)) > 1e-6).tolist()


# ---- meta-attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"kv_heads": 2, "qk_norm": True, "bias": True}, {"dropout": 0.3}])
def test_without_meta_tokens_it_is_attention(settings):
    """The same initial values, bit by bit: no marks; and marks, but no meta-attention."""
    plain, key = Attention(WIDTH, heads=HEADS, rngs=nnx.Rngs(0), **settings), jax.random.key(3)
    for train in (False, True):
        context = dataclasses.replace(CAUSAL, train=train)
        want = plain(inputs(), context, None, key)[0]
        np.testing.assert_array_equal(mixer(**settings)(inputs(), context, None, key)[0], want)
        marked = dataclasses.replace(MARKED, train=train)
        np.testing.assert_array_equal(mixer(meta_attention=False, **settings)(inputs(), marked, None, key)[0], want)
    nobody = dataclasses.replace(CAUSAL, meta=jnp.zeros_like(META))
    want = plain(inputs(), CAUSAL)[0]
    np.testing.assert_array_equal(mixer(**{**settings, "dropout": 0.0})(inputs(), nobody)[0], want)


def test_only_meta_tokens_get_something():
    """Of an output projection with a bias too."""
    layer = mixer(bias=True)
    layer.meta.o.bias[...] = jnp.ones(WIDTH)
    plain = Attention(WIDTH, heads=HEADS, bias=True, rngs=nnx.Rngs(0))
    assert changed(layer(inputs(), MARKED)[0], plain(inputs(), CAUSAL)[0]) == [1, 4, 5, 9]


def test_meta_attention_sees_meta_tokens_only():
    """What the second attention reads at position p changes it at meta-tokens from p on, if p is one, else nowhere."""
    layer, x = mixer(), inputs()
    among = lambda x: layer.among_meta(x, MARKED, None, None)[0]
    for place, reached in ((4, [4, 5, 9]), (5, [5, 9]), (3, []), (9, [9]), (11, [])):
        assert changed(among(x), among(x.at[:, place].add(3.0))) == reached


def test_meta_attention_by_its_equation():
    """Head by head in numpy, over the meta-tokens alone."""
    layer, x = mixer(rope_theta=0.0), inputs()
    h = Attention(WIDTH, heads=HEADS, rope_theta=0.0, rngs=nnx.Rngs(0))(x, CAUSAL)[0]
    places = np.flatnonzero(META[0])
    u = np.asarray(x + h)[0, places]
    u = u / np.sqrt(np.square(u).mean(-1, keepdims=True) + 1e-6)
    q, k, v = (np.einsum("tm,mhd->htd", u, getattr(layer.meta, name).kernel[...]) for name in ("q", "k", "v"))
    scores = np.where(np.tri(len(places), dtype=bool), q @ k.swapaxes(1, 2) / 2.0, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    z = (weights @ v).swapaxes(0, 1).reshape(len(places), -1) @ layer.meta.o.kernel[...]
    want = np.asarray(h)[0].copy()
    want[places] += z
    np.testing.assert_allclose(layer(x, MARKED)[0][0], want, atol=2e-6)


def test_a_layer_further_everybody_knows():
    """Logits of the token behind a meta-token change with its id only through the network: two layers are enough."""
    network = LanguageModel(vocab_size=11, width=16, depth=2, heads=4, mixer="meta_tokens", rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (2, TOKENS), 0, 11)
    with_marks, without = network(tokens, meta=META)[0], network(tokens)[0]
    assert changed(with_marks, without) == list(range(1, TOKENS))


@pytest.mark.parametrize("stack", ["loop", "scan"])
@pytest.mark.parametrize("settings", [{}, {"zero_positions": True}, {"meta_attention": False}], ids=str)
def test_cached_and_branched_is_whole(settings, stack):
    network = LanguageModel(
        vocab_size=11, width=16, depth=2, heads=4, mixer="meta_tokens", mixer_kwargs={"meta_tokens": settings},
        stack=stack, rngs=nnx.Rngs(0),
    )  # fmt: skip
    tokens = jax.random.randint(jax.random.key(1), (4, TOKENS), 0, 11)
    tokens = tokens.at[:, :6].set(jnp.repeat(tokens[::2, :6], 2, 0))
    meta = jnp.repeat(META, 2, 0)
    whole = network(tokens, meta=meta)[0]
    cache = network.extend(tokens[::2, :4], network.init_cache(2, 8), meta[::2, :4])[1]
    logits, cache = network.extend(tokens[::2, 4:6], cache, meta[::2, 4:6])
    np.testing.assert_allclose(logits, whole[::2, 4:6], atol=3e-6)
    cache, parts = network.branch(cache, 2, 6), []
    for a, b in ((6, 7), (7, 11)):
        logits, cache = network.extend(tokens[:, a:b], cache, meta[:, a:b])
        parts.append(logits)
    logits, cache = network.extend(tokens[:, 11:], cache)  # no meta-token is among them
    np.testing.assert_allclose(jnp.concatenate([*parts, logits], 1), whole[:, 6:], atol=3e-6)


def test_bytes():
    """Two caches of k and v, and a byte that says what is a meta-token."""
    of = lambda length: mixer().init_cache(1, length, jnp.float32)
    assert memory.cache_bytes_per_token(of, 64) == 2 * 2 * HEADS * 4 * 4 + 1
    of = lambda length: mixer(meta_attention=False).init_cache(1, length, jnp.float32)
    assert memory.cache_bytes_per_token(of, 64) == 2 * HEADS * 4 * 4


# ---- positions ---------------------------------------------------------------------------------------------------


def test_zeroed_positions_are_position_0_at_inference_only():
    zeroed, plain, x = mixer(zero_positions=True), mixer(), inputs()
    np.testing.assert_array_equal(zeroed(x, CAUSAL)[0], plain(x, CAUSAL)[0])
    training = dataclasses.replace(MARKED, train=True)
    np.testing.assert_array_equal(zeroed(x, training)[0], plain(x, training)[0])
    by_hand = dataclasses.replace(MARKED, positions=jnp.where(META, 0, jnp.arange(TOKENS)))
    np.testing.assert_array_equal(zeroed(x, MARKED)[0], plain(x, by_hand)[0])
    assert changed(zeroed(x, MARKED)[0], plain(x, MARKED)[0]) == list(range(1, TOKENS))


def test_learned_positions_are_left_out_at_inference_only():
    def network(**settings):
        return LanguageModel(
            vocab_size=11, width=16, depth=1, heads=4, learned_positions=TOKENS, rngs=nnx.Rngs(0), **settings
        )

    zeroed, plain = network(zero_meta_positions=True), network()
    tokens = jnp.ones((2, TOKENS), jnp.int32)
    np.testing.assert_array_equal(zeroed(tokens)[0], plain(tokens)[0])
    np.testing.assert_array_equal(zeroed(tokens, meta=META, train=True)[0], plain(tokens, meta=META, train=True)[0])
    embedded = zeroed._embedded(tokens, jnp.arange(TOKENS)[None], META)
    positions = plain._embedded(tokens, jnp.arange(TOKENS)[None], META) - plain.embed(tokens)
    want = plain.embed(tokens) + jnp.where(META[..., None], 0, positions)
    np.testing.assert_allclose(embedded, want, atol=1e-7)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: mixer(zero_positions=True, rope_theta=0.0), r"mixer\.zero_positions leaves out rotary angles"),
        (
            lambda: LanguageModel(vocab_size=4, width=8, depth=1, heads=1, zero_meta_positions=True, rngs=nnx.Rngs(0)),
            r"model\.zero_meta_positions is for learned_positions",
        ),
        (lambda: yarn_factors(7, 2.0, 64), r"size=7 must be even"),
        (lambda: yarn_factors(8, 0.5, 64), r"stretch=0\.5 must be at least 1"),
        (lambda: yarn_factors(8, 2.0, 64, slow=3.0, fast=2.0), r"slow=3\.0 below fast=2\.0"),
    ],
)
def test_bad_settings_give_a_sentence(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_yarn_factors_by_hand():
    """size 4, theta 100, length 8 pi: pair 0 turns 4 times, pair 1 0.4 times. Between 2 and 6 turns pair 0 is half
    kept: angles x (1 / 2 / 4 + 1 / 2) = 5 / 8."""
    length, theta = 8 * math.pi, 100.0
    np.testing.assert_allclose(yarn_factors(4, 4.0, length, theta=theta, slow=2.0, fast=6.0), (1.6, 4.0))


def test_yarn_at_its_limits():
    """No stretch changes nothing; bounds below all turns keep all pairs, bounds above them interpolate positions."""
    assert yarn_factors(16, 1.0, 64) == (1.0,) * 8
    assert yarn_temperature(1.0) == 1.0
    assert yarn_factors(16, 4.0, 64, slow=0.0, fast=1e-9) == (1.0,) * 8
    interpolated = yarn_factors(16, 4.0, 64, slow=1e6, fast=1e7)
    np.testing.assert_allclose(interpolated, (4.0,) * 8)
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 16))
    at = jnp.array([[4, 8, 12]])
    np.testing.assert_allclose(rotate(x, at, factors=interpolated), rotate(x, at // 4), atol=1e-5)
    factors = yarn_factors(64, 8.0, 4096)
    assert list(factors) == sorted(factors) and factors[0] == 1.0 and factors[-1] == 8.0


def transformed(network, **entry):
    transforms = build_transforms([entry])
    source = merge(split(network))
    return transforms[0][1].values(structured(network, transforms), source, ())


def network_of(mixer_name, settings=None, **more):
    return LanguageModel(
        vocab_size=11, width=16, depth=1, heads=2, mixer=mixer_name, mixer_kwargs={mixer_name: settings or {}},
        rngs=nnx.Rngs(0), **more,
    )  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"bias": True}, {"qk_norm": True}], ids=str)
def test_yarn_as_a_transform(settings):
    """The angles of `yarn_factors`, products times the temperature, in both attentions."""
    tokens = jax.random.randint(jax.random.key(1), (2, TOKENS), 0, 11)
    ours = transformed(network_of("meta_tokens", settings), name="yarn", stretch=4.0, length=64)
    factors = yarn_factors(8, 4.0, 64)
    theirs = network_of("meta_tokens", {**settings, "rope_factors": factors})
    for layer in (theirs.blocks[0].mixer, theirs.blocks[0].mixer.meta):
        project = layer.project

        def warmer(*args, project=project):
            q, *rest = project(*args)
            return (q * yarn_temperature(4.0), *rest)

        object.__setattr__(layer, "project", warmer)
    np.testing.assert_allclose(ours(tokens, meta=META)[0], theirs(tokens, meta=META)[0], atol=2e-6)


def test_transforms_of_positions_need_something_to_do():
    entries = {
        "zero_meta_positions": ("attention", {}, "no mixer 'meta_tokens' with rotary angles"),
        "yarn": ("attention", {"rope_theta": 0.0}, "no attention with rotary angles"),
    }
    for name, (kind, settings, words) in entries.items():
        more = {"stretch": 2.0, "length": 8} if name == "yarn" else {}
        with pytest.raises(UserError, match=words):
            transformed(network_of(kind, settings), name=name, **more)
    with pytest.raises(UserError, match=r"stretch=0\.5 must be at least 1"):
        build_transforms([{"name": "yarn", "stretch": 0.5, "length": 8}])
    with pytest.raises(UserError, match="mla has no rope_factors"):
        transformed(network_of("mla"), name="yarn", stretch=2.0, length=8)
    blocks = BlockTransformer(vocab_size=11, width=16, depth=2, heads=2, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="a block_transformer's positions are those of blocks"):
        transformed(blocks, name="yarn", stretch=2.0, length=8)
    with pytest.raises(UserError, match="a block_transformer takes no meta-tokens"):
        transformed(blocks, name="zero_meta_positions")
    for name, more in (("yarn", {"stretch": 2.0, "length": 8}), ("grouped_to_latent", {})):
        small = transformed(network_of("attention"), name="int8_weights")
        with pytest.raises(UserError, match=rf"{name}: .* is quantized already"):
            transformed(small, name=name, **more)


def test_zeroing_as_a_transform():
    tokens = jnp.ones((2, TOKENS), jnp.int32)
    ours = transformed(network_of("meta_tokens", learned_positions=TOKENS), name="zero_meta_positions")
    theirs = network_of("meta_tokens", {"zero_positions": True}, learned_positions=TOKENS, zero_meta_positions=True)
    np.testing.assert_array_equal(ours(tokens, meta=META)[0], theirs(tokens, meta=META)[0])
    assert not np.array_equal(
        ours(tokens, meta=META)[0], network_of("meta_tokens", learned_positions=TOKENS)(tokens, meta=META)[0]
    )
