"""The decoder: continuations that share a prompt, learned positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.models.language import LanguageModel
from tests.cases import slow

MIXERS = [
    ("attention", {}),
    ("gqa", {"kv_heads": 2}),
    ("ccgqa", {}),
    ("mla", {}),
    ("window", {"window": 4}),
    ("neighborhood", {"window": 3, "dilation": 2}),
    ("token_elimination", {"block": 4}),
    ("lstm", {"hidden": 6}),
    ("none", {}),
]


def model(mixer="attention", settings=None, **more):
    return LanguageModel(
        vocab_size=11, width=16, depth=2, heads=4, mixer=mixer, mixer_kwargs={mixer: settings or {}},
        rngs=nnx.Rngs(0), **more,
    )  # fmt: skip


def tokens(batch, length, seed=1):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 11)


@pytest.mark.parametrize("stack", ["loop", slow("scan")])
@pytest.mark.parametrize(("mixer", "settings"), MIXERS, ids=[name for name, _ in MIXERS])
def test_continuations_of_a_prompt_are_exact(mixer, settings, stack):
    """Two prompts, three continuations each, token by token and in a chunk: as if each were a sequence of its own."""
    network = model(mixer, settings, stack=stack)
    prompt, rest = tokens(2, 7), tokens(6, 5, seed=2)
    whole = network(jnp.concatenate([jnp.repeat(prompt, 3, 0), rest], 1))[0][:, 7:]
    cache = network.extend(prompt, network.init_cache(2, 9))[1]
    cache, parts = network.branch(cache, 3, 6), []
    for part in (rest[:, :1], rest[:, 1:2], rest[:, 2:]):
        logits, cache = network.extend(part, cache)
        parts.append(logits)
    assert cache["length"].tolist() == [12] * 6
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=3e-6)


def test_a_tree_of_continuations_is_exact():
    """A prompt, two branches of three tokens, two of each of these."""
    network = model("gqa", {"kv_heads": 2})
    root, middle, leaves = tokens(1, 5), tokens(2, 3, seed=2), tokens(4, 2, seed=3)
    paths = jnp.concatenate([jnp.repeat(root, 4, 0), jnp.repeat(middle, 2, 0), leaves], 1)
    cache = network.extend(root, network.init_cache(1, 5))[1]
    cache = network.extend(middle, network.branch(cache, 2, 3))[1]
    logits, _ = network.extend(leaves, network.branch(cache, 2, 2))
    np.testing.assert_allclose(logits, network(paths)[0][:, 8:], atol=3e-6)


def test_a_shared_prompt_is_kept_once():
    """Four layers' worth of numbers: 2 x 100 prompt tokens, and 8 tokens for each of 50 continuations."""
    network = model()
    cache = network.extend(tokens(1, 100), network.init_cache(1, 100))[1]
    numbers = sum(x.size for x in jax.tree.leaves(network.branch(cache, 50, 8)) if x.ndim == 4)
    assert numbers == 2 * 2 * 16 * (100 + 50 * 8)


def test_prompts_of_different_length():
    network = model()
    long, short = tokens(1, 9), tokens(1, 4, seed=5)
    caches = [network.extend(prompt, network.init_cache(1, 9))[1] for prompt in (long, short)]
    cache = network.branch(jax.tree.map(lambda *x: jnp.concatenate(x), *caches), 2, 3)
    rest = tokens(4, 3, seed=6)
    logits, _ = network.extend(rest, cache)
    for number, prompt in enumerate((long, long, short, short)):
        whole = network(jnp.concatenate([prompt, rest[number : number + 1]], 1))[0]
        np.testing.assert_allclose(logits[number], whole[0, -3:], atol=3e-6)


def test_learned_positions():
    """Cached is whole, the order of the first tokens tells, and there are no more than were asked for."""
    network = model("attention", {"rope_theta": 0.0}, learned_positions=8)
    x = tokens(2, 8)
    whole = network(x)[0]
    cache, parts = network.init_cache(2, 8), []
    for part in jnp.split(x, [3, 4], 1):
        logits, cache = network.extend(part, cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=3e-6)
    swapped = x.at[:, :2].set(x[:, 1::-1])
    assert np.abs(network(swapped)[0][:, -1] - whole[:, -1]).max() > 1e-5
    with pytest.raises(ValueError, match=r"9 tokens are more than model\.learned_positions=8"):
        network(tokens(1, 9))
    with pytest.raises(ValueError, match="learned_positions=-1 must be 0"):
        model(learned_positions=-1)


def test_numbers_of_continuations_are_checked():
    network = model()
    with pytest.raises(ValueError, match=r"branch\.ways=0 must be at least 1"):
        network.branch(network.init_cache(1, 4), 0, 4)


def test_no_cache_is_longer_than_learned_positions():
    network = LanguageModel(vocab_size=11, width=16, depth=1, heads=2, learned_positions=8, rngs=nnx.Rngs(0))
    network.init_cache(1, 8)
    with pytest.raises(ValueError, match=r"a cache of 9 tokens is longer than model\.learned_positions=8"):
        network.init_cache(1, 9)


def test_the_stream_begins_with_unit_variance():
    """So do tied logits; `embedding_multiplier` says otherwise, of tokens and learned positions alike."""
    make = lambda **settings: LanguageModel(vocab_size=512, width=64, depth=1, heads=2, rngs=nnx.Rngs(0), **settings)
    x = jnp.arange(512)[None]
    network = make()
    np.testing.assert_allclose(np.std(network.embed(x)), 1, rtol=0.02)
    np.testing.assert_allclose(np.std(network(x)[0]), 1, rtol=0.1)
    rows = network.embed.table[...]
    np.testing.assert_allclose(make(embedding_multiplier=2.5).embed(x)[0], 2.5 * rows, rtol=1e-6)
    np.testing.assert_array_equal(make(embedding_multiplier=1.0).embed(x)[0], rows)
    placed = make(learned_positions=512, embedding_multiplier=3.0)
    np.testing.assert_allclose(placed.table(x)[0], 3 * placed.table.table[...], rtol=1e-6)
    for bad in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="must be above 0, or None"):
            make(embedding_multiplier=bad)
