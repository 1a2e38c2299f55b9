"""The decoder of labelled examples: what it sees, what its cache gives, how large that is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.evaluation import memory
from lissom.models.bounds import UnsupportedForm
from lissom.models.in_context import InContextLearner


def network(**settings):
    made = InContextLearner(
        **{"features": 7, "classes": 3, "width": 16, "depth": 2, "heads": 2, **settings}, rngs=nnx.Rngs(0)
    )
    made.head.kernel[...] = jax.random.normal(jax.random.key(5), made.head.kernel.shape)
    return made


def examples(length=9, batch=2):
    return jax.random.normal(jax.random.key(1), (batch, length, 7))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixer": "lstm", "mixer_kwargs": {"lstm": {"hidden": 6}}},
        {"mixer": ("window", "lstm"), "mixer_kwargs": {"window": {"window": 3}}, "stack": "scan"},
        {"mixer": "attention", "mixer_kwargs": {"attention": {"rope_theta": 0.0}}, "learned_positions": 12},
    ],
    ids=str,
)
def test_continued_is_whole(settings):
    """Example by example, and in chunks; two continuations of five examples are as if each were a sequence."""
    made, x = network(**settings), examples()
    whole = made(x)[0]
    assert whole.shape == (2, 9, 3)
    for cuts in ([1] * 9, [5, 1, 3], [9]):
        cache, parts = made.init_cache(2, 9), []
        for part in jnp.split(x, np.cumsum(cuts)[:-1], 1):
            logits, cache = made.extend(part, cache)
            parts.append(logits)
        np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-5)
        assert cache["length"].tolist() == [9, 9]
    cache = made.branch(made.extend(x[:1, :5], made.init_cache(1, 9))[1], 2, 4)
    logits, _ = made.extend(jnp.concatenate([x[:1, 5:], x[1:, 5:]]), cache)
    np.testing.assert_allclose(logits[0], whole[0, 5:], atol=2e-5)
    mixed = made(jnp.concatenate([x[:1, :5], x[1:, 5:]], 1))[0]
    np.testing.assert_allclose(logits[1], mixed[0, 5:], atol=2e-5)


@pytest.mark.parametrize("mixer", ["attention", "lstm"])
def test_a_label_is_said_by_the_examples_before_alone(mixer):
    made, x = network(mixer=mixer), examples()
    one, two = made(x)[0], made(x.at[:, 5:].set(3.0))[0]
    np.testing.assert_allclose(one[:, :5], two[:, :5], atol=1e-6)
    earlier = made(x.at[:, 0].set(3.0))[0]
    assert (np.abs(earlier - one).max((0, 2)) > 1e-6).all()  # the first example reaches every prediction


def test_it_begins_without_an_opinion():
    made = InContextLearner(features=7, classes=3, width=16, depth=1, heads=2, rngs=nnx.Rngs(0))
    assert not made(examples())[0].any()


def test_what_a_prediction_knows_has_a_size():
    """Bytes of float32 numbers and of int32 lengths, one a layer and one of all: attention 2 x 16 an example and layer,
    lstm 2 x 6 a layer."""
    size = lambda length, **settings: memory.cache_bytes(lambda n: network(**settings).init_cache(1, n), length)
    assert [size(length) for length in (1, 9)] == [4 * (2 * 2 * 16 + 3), 4 * (9 * 2 * 2 * 16 + 3)]
    lstm = {"mixer": "lstm", "mixer_kwargs": {"lstm": {"hidden": 6}}}
    assert [size(length, **lstm) for length in (1, 9)] == [4 * (2 * 2 * 6 + 3)] * 2


def test_positions_are_learned_where_they_are_asked_for():
    """Of other tokens in another order, attention without any position knows no more than which there are."""
    blind = {"mixer_kwargs": {"attention": {"rope_theta": 0.0}}}
    x = examples()
    swapped = x.at[:, :2].set(x[:, 1::-1])
    last = lambda made: np.abs(made(x)[0][:, -1] - made(swapped)[0][:, -1]).max()
    assert last(network(**blind, depth=1)) < 1e-5 < 1e-3 < last(network(**blind, depth=1, learned_positions=9))
    with pytest.raises(UnsupportedForm, match=r"9 tokens are more than model\.learned_positions=8"):
        network(learned_positions=8)(x)
    with pytest.raises(ValueError, match=r"a cache of 9 tokens is longer than model\.learned_positions=8"):
        network(learned_positions=8).init_cache(1, 9)
    with pytest.raises(ValueError, match=r"learned_positions=-1 must be 0"):
        network(learned_positions=-1)


def test_bad_settings_give_a_sentence():
    with pytest.raises(ValueError, match=r"model\.width=0 must be at least 1"):
        network(width=0)
