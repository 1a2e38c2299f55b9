"""The decoder over blocks and the one within: what each token sees, the cache, the steps that skip the blocks."""

import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.evaluation import memory
from lissom.models import SIZES
from lissom.models.block_transformer import PAD, BlockTransformer
from lissom.models.language import LanguageModel
from lissom.models.mixers.attention import Attention
from lissom.models.variables import Parts, map_paths, merge, split
from lissom.training.objectives.base import cross_entropy
from tests.cases import some

MIXERS = [
    ("attention", {}),
    ("gqa", {"kv_heads": 2}),
    ("ccgqa", {}),
    ("mla", {}),
    ("window", {"window": 3}),
    ("none", {}),
]
SHAPES = [(4, 2, 4), (4, 1, 2), (1, 2, 2), (2, 3, 2), (8, 2, 2)]  # block_length, prefix, depth


def model(mixer="attention", settings=None, seed=0, **more):
    more = {"width": 16, "depth": 2, "heads": 4, **more}
    kwargs = {mixer: settings} if settings else None
    return BlockTransformer(vocab_size=11, mixer=mixer, mixer_kwargs=kwargs, rngs=nnx.Rngs(seed), **more)


def tokens(batch, length, seed=1):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 11)


@nnx.jit
def whole_of(network, x, padding=None):
    return network(x, padding=padding)[0]


@nnx.jit
def extend(network, x, cache):
    return network.extend(x, cache)


def in_chunks(network, x, cuts, cache):
    parts = []
    for part in jnp.split(x, cuts, 1):
        logits, cache = extend(network, part, cache)
        parts.append(logits)
    return jnp.concatenate(parts, 1), cache


# ---- what a token sees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, 0, 2])
def test_the_past_is_seen_and_the_future_is_not(padding):
    network, x = model(), tokens(1, 14)
    padding = None if padding is None else jnp.array([padding])
    call = lambda x: whole_of(network, x, padding)[0]
    whole = call(x)
    for t in range(14):
        differs = jnp.any(call(x.at[0, t].set((x[0, t] + 1) % 11)) != whole, 1).tolist()
        assert differs == [False] * t + [True] * (14 - t)


def test_other_blocks_are_seen_through_the_context_only():
    """Where the context says nothing, a prediction of x_t changes with the tokens of its own block in front of it."""
    network, x = model(), tokens(1, 13)
    network.expand.kernel[...] = jnp.zeros_like(network.expand.kernel[...])
    whole = whole_of(network, x)[0]
    for t in range(13):
        differs = np.flatnonzero(jnp.any(whole_of(network, x.at[0, t].set((x[0, t] + 1) % 11))[0] != whole, 1))
        # Token 0 ends the first block, tokens 1 to 4 are the second; the last of a block goes to the context alone.
        assert differs.tolist() == [p for p in range(t, 13) if (p + 3) // 4 == (t + 3) // 4 and t % 4 and p % 4]


def test_a_block_is_its_tokens_side_by_side():
    network = model()
    assert network.lookup.multiplier == 2  # sqrt(16 / 4)
    table, pad = 2 * network.lookup.table[...], network.pad[...]
    found = network._vectors(jnp.array([[[PAD, PAD, PAD, 7], [3, 1, 4, 1]]]))
    np.testing.assert_array_equal(found[0, 0], jnp.concatenate([pad, pad, pad, table[7]]))
    np.testing.assert_array_equal(found[0, 1], jnp.concatenate([table[3], table[1], table[4], table[1]]))


def test_blocks_of_one_token_are_a_decoder_whose_upper_layers_see_themselves():
    """L = 1, P = 1, c handed on as it is and no norms: lower layers over tokens, upper layers each over its own."""
    shared = {"vocab_size": 11, "width": 16, "depth": 4, "heads": 4, "norm": "none"}
    mixers = {"mixer": ("attention", "attention", "window", "window"), "mixer_kwargs": {"window": {"window": 1}}}
    plain = LanguageModel(**shared, **mixers, rngs=nnx.Rngs(3))
    network = BlockTransformer(**shared, block_length=1, prefix=1, random_padding=False, rngs=nnx.Rngs(4))
    network.expand.kernel[...] = jnp.eye(16)[:, None]
    network.lookup.table[...] = network.embed.table[...] = plain.embed.table[...]
    for index, block in enumerate(plain.blocks):
        own = (network.block_decoder.blocks if index < 2 else network.blocks)[index % 2]
        nnx.update(own, nnx.state(block))
    x = tokens(2, 9)
    np.testing.assert_allclose(network(x)[0], plain(x)[0], atol=1e-5)


# ---- padding ---------------------------------------------------------------------------------------------------------


def test_training_pads_each_sequence_by_chance():
    network, x = model(), tokens(32, 10)
    known = [whole_of(network, x, jnp.full(32, p)) for p in range(4)]
    drawn = network(x, train=True, key=jax.random.key(5))[0]
    equal = np.stack([np.abs(drawn - one).max((1, 2)) < 1e-5 for one in known])
    assert (equal.sum(0) == 1).all() and (equal.sum(1) > 0).all()
    np.testing.assert_allclose(network(x)[0], known[3], atol=1e-5)
    with pytest.raises(ValueError, match="random_padding in training needs a random key"):
        network(x, train=True)


def test_without_chance_there_is_nothing_to_begin_with():
    network, x = model(random_padding=False), tokens(2, 10)
    assert network.begin is None and network.token_pad is None
    np.testing.assert_array_equal(network(x, train=True, key=jax.random.key(5))[0], network(x)[0])
    for use in (lambda: network(x, padding=1), lambda: network.init_cache(2, 8, 1)):
        with pytest.raises(ValueError, match=r"padding needs model\.random_padding=True"):
            use()


def test_padding_out_of_bounds():
    for padding in (-1, 4, [0, 4]):
        with pytest.raises(ValueError, match="must be 0 to 3"):
            model()(tokens(2, 4), padding=padding)


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixer", "settings", "stack"),
    some(
        [(*mixer, stack) for stack in ("loop", "scan") for mixer in MIXERS],
        [*((*mixer, "loop") for mixer in MIXERS), ("attention", {}, "scan")],
    ),
)
def test_cached_is_whole(mixer, settings, stack):
    """Token by token, and in chunks that begin and end anywhere in a block."""
    network, x = model(mixer, settings, stack=stack, depth=2 if stack == "loop" else 4), tokens(2, 13)
    whole = whole_of(network, x)
    for cuts in (list(range(1, 13)), [3, 6, 7]):
        found, cache = in_chunks(network, x, cuts, network.init_cache(2, 13))
        np.testing.assert_allclose(found, whole, atol=1e-5)
    assert cache["length"].tolist() == [13, 13]


@pytest.mark.parametrize(("block_length", "prefix", "depth"), some(SHAPES, [(4, 1, 2), (1, 2, 2), (8, 2, 2)]))
def test_cached_is_whole_in_blocks_of_any_length(block_length, prefix, depth):
    network, x = model(block_length=block_length, prefix=prefix, depth=depth), tokens(2, 11)
    whole = whole_of(network, x)
    for cuts in (list(range(1, 11)), [3, 7, 8]):
        found, _ = in_chunks(network, x, cuts, network.init_cache(2, 11))
        np.testing.assert_allclose(found, whole, atol=1e-5)


@pytest.mark.parametrize(
    ("mixer", "stack"),
    some(itertools.product(("ccgqa", "window"), ("loop", "scan")), [("ccgqa", "loop"), ("window", "scan")]),
)
def test_sequences_in_different_places_of_a_block(mixer, stack):
    """Four paddings, in chunks that end blocks of some of them; no row of one is another's."""
    network, x, padding = model(mixer, stack=stack, depth=4), tokens(4, 12), jnp.arange(4)
    whole = whole_of(network, x, padding)
    for row in range(4):
        alone = whole_of(network, x[row : row + 1], padding[row : row + 1])
        np.testing.assert_allclose(alone[0], whole[row], atol=1e-5)
    for cuts in (list(range(1, 12)), [3, 6]):
        found, _ = in_chunks(network, x, cuts, network.init_cache(4, 12, padding))
        np.testing.assert_allclose(found, whole, atol=1e-5)


def test_a_full_sequence_beside_one_that_ends_a_block():
    """9 tokens in a room for 9: the third block is open, and the other sequence ends its second."""
    network, x = model(), tokens(2, 9)
    caches = [extend(network, x[row : row + 1, :n], network.init_cache(1, 9))[1] for row, n in ((0, 6), (1, 4))]
    cache = jax.tree.map(lambda *rows: jnp.concatenate(rows), *caches)
    rest = jnp.stack([x[0, 6:9], x[1, 4:7]])
    expected = jnp.stack([network(x[:1])[0][0, 6:9], network(x[1:])[0][0, 4:7]])
    for cuts in ([], [1, 2]):
        np.testing.assert_allclose(in_chunks(network, rest, cuts, cache)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("mixer", "stack"),
    some(itertools.product(("attention", "window"), ("loop", "scan")), [("attention", "scan"), ("window", "loop")]),
)
def test_continuations_of_a_prompt_are_exact(mixer, stack):
    network = model(mixer, stack=stack, depth=4)
    prompt, rest = tokens(2, 7), tokens(6, 7, seed=2)
    whole = network(jnp.concatenate([jnp.repeat(prompt, 3, 0), rest], 1))[0][:, 7:]
    cache = extend(network, prompt, network.init_cache(2, 7))[1]
    found, cache = in_chunks(network, rest, [1, 2, 3, 4, 5, 6], network.branch(cache, 3, 7))
    assert cache["length"].tolist() == [14] * 6
    np.testing.assert_allclose(found, whole, atol=1e-5)
    with pytest.raises(ValueError, match=r"branch\.more=0 must be at least 1"):
        network.branch(cache, 2, 0)


def test_a_cache_holds_a_number_of_each_block():
    """Width 16, two lower and two upper layers, float32: a lower layer caches 2 x 16 numbers a block of 4 tokens, an
    upper one 2 x 16 numbers of 2 + 3 positions; context 16, open block 4, length and padding, a length a layer."""
    network = model(depth=4)
    blocks = lambda length: (length + 3 + 3) // 4
    of = lambda length: 4 * (2 * 2 * 16 * blocks(length) + 2 * 2 * 16 * 5 + 16 + 4 + 2 + 4)
    for length in (1, 8, 64):
        assert memory.cache_bytes(lambda n: network.init_cache(1, n), length) == of(length)
    # Of as many layers the plain decoder caches 2 x 16 x 4 numbers a token: an eighth.
    assert memory.cache_bytes_per_token(lambda n: network.init_cache(1, n), 64) == 4 * 2 * 16 * 4 / 8


class Counted(Attention):
    """Attention that says which cache it was run on, by its room."""

    rooms: ClassVar = []

    def __call__(self, x, context, cache=None, key=None):
        if cache is not None:
            jax.debug.callback(lambda room=cache["k"].shape[2]: Counted.rooms.append(room))
        return super().__call__(x, context, cache, key)


def test_a_step_inside_a_block_does_not_run_the_block_decoder():
    """One lower and two upper layers, 21 tokens: room for 6 blocks and for 5 positions."""
    network = model(f"{__name__}:Counted", depth=3)
    assert network.block_decoder.blocks.depth == 1 and network.blocks.depth == 2

    def rooms(cache, x):
        found = []
        for t in range(x.shape[1]):
            jax.effects_barrier()
            Counted.rooms.clear()
            _, cache = extend(network, x[:, t : t + 1], cache)
            jax.effects_barrier()
            found.append(sorted(Counted.rooms))
        return found

    inside, ends = [5, 5], [5, 5, 6]
    assert rooms(network.init_cache(2, 21), tokens(2, 9)) == [ends, *[inside] * 3] * 2 + [ends]
    # Prompts of 1, 2 and 5 tokens, padded to end their blocks together.
    prompts = jnp.array([1, 2, 5])
    cache = network.init_cache(3, 21, -prompts % 4)
    parts = [jax.tree.map(lambda rows, i=i: rows[i : i + 1], cache) for i in range(3)]
    for i, length in enumerate((1, 2, 5)):
        for t in range(length):
            _, parts[i] = extend(network, tokens(1, length)[:, t : t + 1], parts[i])
    cache = jax.tree.map(lambda *rows: jnp.concatenate(rows), *parts)
    assert rooms(cache, tokens(3, 8)) == [*[inside] * 3, ends] * 2
    # Two phases: both run where one sequence ends a block and the other does not.
    assert rooms(network.init_cache(2, 21, [1, 3]), tokens(2, 4)) == [[*inside, *ends], inside] * 2


# ---- training --------------------------------------------------------------------------------------------------------


def loss_of(network, dtype=None):
    """params -> mean cross-entropy with pads drawn; and the params, in `dtype`."""
    graph, params, *rest = split(network)
    x = tokens(3, 10)
    key = jax.random.key(7)

    def loss(params):
        logits, _ = merge(Parts(graph, params, *rest))(x[:, :-1], train=True, key=key)
        return cross_entropy(logits, x[:, 1:]).mean()

    return loss, params if dtype is None else jax.tree.map(lambda p: p.astype(dtype), params)


@pytest.mark.parametrize("stack", ["loop", "scan"])
def test_gradients_by_finite_differences(stack):
    """In float64 but for norms, rotary angles and logits; every parameter is moved, and every one has a gradient."""
    with jax.enable_x64(True):
        loss, params = loss_of(model(stack=stack, remat=stack == "scan", depth=4, dtype=jnp.float64), jnp.float64)
        gradient = jax.jit(jax.grad(loss))(params)
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
        along = jax.jit(lambda step, move: loss(jax.tree.map(lambda p, d: p + step * d, params, move)))
        for seed in range(3):
            keys = iter(jax.random.split(jax.random.key(seed), 200))
            leaves, tree = jax.tree.flatten(params)
            moves = [jnp.std(p) * jax.random.normal(next(keys), p.shape, p.dtype) + 1e-2 for p in leaves]
            near, far = (along(h, tree.unflatten(moves)) - along(-h, tree.unflatten(moves)) for h in (0.002, 0.004))
            exact = sum(jnp.sum(g * d) for g, d in zip(jax.tree.leaves(gradient), moves, strict=True))
            np.testing.assert_allclose((8 * near - far) / (12 * 0.002), exact, rtol=2e-3, atol=5e-4)


def test_loop_and_scan_are_one_network():
    x, key = tokens(2, 11), jax.random.key(2)
    loop, scan = (model(stack=stack, depth=6, dropout=0.1)(x, train=True, key=key)[0] for stack in ("loop", "scan"))
    np.testing.assert_allclose(loop, scan, atol=1e-5)


def test_layers_of_both_decoders_report():
    settings = {"selector": "strided", "block": 2}
    network = model("block_sparse", settings, depth=5, block_depth=3)
    assert network(tokens(2, 16))[1]["metrics"]["density"].shape == (5,)


def test_parameters_of_the_named_sizes():
    """What docs/attention.md says of them."""
    sizes = {"tiny": (11_972, 10_352), "small": (861_472, 819_840), "wide": (3_363_392, None)}
    sizes["medium"] = (25_861_248, 25_301_504)
    for size, counts in sizes.items():
        for name, kind, known in zip(("block_transformer", "language"), (BlockTransformer, LanguageModel), counts):
            if known:
                make = lambda kind=kind, name=name, size=size: kind(
                    vocab_size=256, **SIZES[name][size], rngs=nnx.Rngs(0)
                )
                assert memory.parameter_count(split(nnx.eval_shape(make)).params) == known


def test_bfloat16():
    network = model(dtype=jnp.bfloat16)
    cache = network.init_cache(2, 9)
    assert cache["blocks"][0]["k"].dtype == cache["context"].dtype == jnp.bfloat16
    found, _ = in_chunks(network, tokens(2, 9), [1, 2, 6], cache)
    assert found.dtype == jnp.float32
    exact = model()(tokens(2, 9))[0]
    assert np.abs(found - exact).max() < 2 * np.abs(network(tokens(2, 9))[0] - exact).max() + 1e-3


def test_every_parameter_names_its_axes():
    names = []
    map_paths(lambda path, _: names.append(path), split(model(stack="loop")).params)
    assert {name.partition("/")[0] for name in names} == {
        *("begin", "block_decoder", "blocks", "embed", "expand", "lookup", "norm", "pad", "token_pad")
    }


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"block_length": 3}, "model.width=16 must be a multiple of model.block_length=3"),
        ({"block_length": 0}, "model.block_length=0 must be at least 1"),
        ({"prefix": 0}, "model.prefix=0 must be at least 1"),
        ({"block_depth": 0}, "model.block_depth=0 must be at least 1"),
        ({"block_depth": 2}, "model.depth=2 and block_depth=2 must leave each decoder a layer"),
        ({"depth": 1}, "model.depth=1 and block_depth=None must leave each decoder a layer"),
        ({"learned_positions": 8}, "model.learned_positions=8 must be 0"),
        ({"mixer": ("attention", "none", "none")}, "depth=1 must be a positive multiple of the 3 layers"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, sentence):
    with pytest.raises(ValueError) as error:
        model(**settings)
    assert sentence in str(error.value) and "\n" not in str(error.value)
