"""Set encoders: any order, any partition give one encoding; the estimated gradient is the gradient on average."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.models.mixtures import log_likelihood
from lissom.models.set_clusterer import SetClusterer
from lissom.models.set_encoders import UMBC, WEIGHTS, Attention, DeepSets
from lissom.models.variables import Parts, flatten, merge, split
from lissom.ops.attention import attention
from tests.cases import some

ENCODERS = {
    **{weight: ("umbc", {"slots": 3, "weight": weight}) for weight in WEIGHTS},
    "sampled": ("umbc", {"slots": 3, "sampled": True}),
    **{pooling: ("deep_sets", {"pooling": pooling}) for pooling in ("mean", "sum", "max")},
    "attention": ("attention", {"slots": 3, "depth": 1}),
}
POOLED = [name for name in ENCODERS if name != "attention"]
ESTIMATED = [name for name in POOLED if name != "max"]


@functools.cache
def parts_of(name, wide):
    encoder, given = ENCODERS[name]
    net = SetClusterer(
        input_shape=(12, 2),
        classes=3,
        width=8,
        heads=2,
        element_depth=1,
        encoder=encoder,
        **({"norm": "none", "dtype": jnp.float64} if wide else {}),
        encoder_kwargs={encoder: given},
        rngs=nnx.Rngs(0),
    )
    parts = split(net)
    as_numpy = lambda leaf: np.asarray(leaf, np.float64 if wide else np.float32)
    return parts._replace(params=jax.tree.map(as_numpy, parts.params))


def network(name="softmax", *, wide=False, remat=False, chunk=None, gradient_chunks=None):
    """A small one of that encoder; `wide`: float64 throughout, without norms, which compute in float32."""
    net = merge(parts_of(name, wide))
    net.remat = remat
    if name != "attention":
        net.encoder.chunk, net.encoder.gradient_chunks = chunk, gradient_chunks
    return net


def called(net, **settings):
    """net(x, sizes) -> mixture, compiled."""
    return jax.jit(lambda *inputs: net(*inputs, **settings)[0])


def sets(elements=12, batch=2, seed=1, scale=2.0):
    return scale * jax.random.normal(jax.random.key(seed), (batch, elements, 2))


def close(left, right, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), left, right)


# ---- one encoding ------------------------------------------------------------------------------------------


@functools.cache
def streaming(name):
    """(update, finish) of a network, compiled once a shape."""
    net = network(name)
    return jax.jit(net.update), jax.jit(lambda state: (net.encoder.finish(state), net.finish(state)[0])), net


@pytest.mark.parametrize("name", POOLED)
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(12)), cuts=st.sets(st.integers(1, 11)))
def test_any_partition_in_any_order_is_the_whole(name, order, cuts):
    update, finish, net = streaming(name)
    x = sets()[:, jnp.array(order)]
    state = net.init_state(2)
    for start, stop in itertools.pairwise([0, *sorted(cuts), 12]):
        state = update(state, x[:, start:stop])
    close(finish(state), finish(update(net.init_state(2), sets())), 1e-5)


@pytest.mark.parametrize("name", POOLED)
def test_any_partition_in_float64(name):
    with jax.enable_x64(True):
        net, x = network(name, wide=True), sets().astype(jnp.float64)

        @functools.partial(jax.jit, static_argnums=1)
        def read(x, edges):
            state = net.init_state(2)
            for start, stop in itertools.pairwise(edges):
                state = net.update(state, x[:, start:stop])
            return net.finish(state)[0]

        whole = read(x, (0, 12))
        assert whole.means.dtype == jnp.float64
        for edges in ((0, 1, 12), (0, 3, 4, 9, 12)):
            close(read(x[:, ::-1], edges), whole, 1e-10)


@pytest.mark.parametrize("name", ENCODERS)
def test_order_does_not_matter_and_elements_do(name):
    net, x = called(network(name)), sets()
    close(net(x[:, ::-1]), net(x), 2e-5)
    for at in (0, 11):
        assert np.abs(net(x.at[:, at].add(3.0)).means - net(x).means).max() > 1e-4


@pytest.mark.parametrize("chunk", [5, 100])
@pytest.mark.parametrize("name", POOLED)
def test_a_call_in_chunks_is_the_call(name, chunk):
    """5 does not divide 12: the last chunk is cut short. With gradient chunks the value is the same."""
    x, key = sets(), jax.random.key(3)
    plain = called(network(name, chunk=chunk), train=True, key=key)(x)
    close(plain, called(network(name), train=True, key=key)(x), 1e-5)
    if name in ESTIMATED:
        close(called(network(name, chunk=chunk, gradient_chunks=1), train=True, key=key)(x), plain, 1e-6)


@pytest.mark.parametrize("name", some(ENCODERS, ["softmax", "sampled", "mean", "attention"]))
def test_padding_reaches_nothing(name):
    """NaN behind the elements that count; a set alone without padding gives the same, values and gradients."""
    net, chunk = network(name, chunk=5), 5
    sizes = jnp.array([7, 12])
    x = sets()
    padded = jnp.where((jnp.arange(12) < sizes[:, None])[..., None], x, jnp.nan)
    graph, params, stats, frozen = split(net)

    def loss(params, x, sizes):
        module = merge(Parts(graph, params, stats, frozen))
        mixture = module(x, sizes)[0]
        return log_likelihood(mixture, x, sizes, chunk=chunk).sum()

    of = jax.jit(jax.value_and_grad(loss))
    both = of(params, padded, sizes)
    alone = [of(params, x[i : i + 1, :size], None) for i, size in enumerate((7, 12))]
    close(both, jax.tree.map(jnp.add, *alone), 3e-4)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "mean", "max"])
def test_an_empty_set_is_finite(name):
    mixture = called(network(name, chunk=5))(sets(), jnp.array([0, 12]))
    assert all(np.isfinite(leaf).all() for leaf in mixture)


# ---- what the weights are ----------------------------------------------------------------------------------


def umbc(**settings):
    return UMBC(8, heads=2, slots=3, norm="none", rngs=nnx.Rngs(0), **settings)


def test_softmax_slots_are_cross_attention_to_the_whole_set():
    """The degenerate identity: K queries against the set by the op that every mixer uses."""
    net, h = umbc(weight="softmax", residual=False), jax.random.normal(jax.random.key(2), (2, 9, 8))
    q = jnp.broadcast_to(net.q(net.slots[...]), (2, 3, 2, 4))
    whole = attention(q, net.k(h), net.v(h)).reshape(2, 3, 8)
    state = net.init_state(2)
    for part in (h[:, 6:], h[:, :2], h[:, 2:6]):
        state = net.update(state, part)
    close(net.finish(state), whole, 1e-5)
    residual = umbc(weight="softmax")
    close(residual(h), whole + q.reshape(2, 3, 8), 1e-5)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_weights_by_their_equations(weight):
    """Sums in numpy, the weights as the docstring writes them."""
    net, h = umbc(weight=weight, residual=False), 3 * jax.random.normal(jax.random.key(2), (1, 5, 8))
    q, k, v = (np.asarray(x, np.float64) for x in (net.q(net.slots[...]), net.k(h)[0], net.v(h)[0]))
    s = np.einsum("khd,nhd->hkn", q, k) / 2  # sqrt(D) = 2
    sigma = 1 / (1 + np.exp(-s))
    w = {
        "softmax": np.exp(s),
        "sigmoid": sigma,
        "slot_sigmoid": sigma / sigma.sum(1, keepdims=True),
        "slot_softmax": np.exp(s) / np.exp(s).sum(1, keepdims=True),
    }[weight]
    expected = np.einsum("hkn,nhd->khd", w / w.sum(-1, keepdims=True), v).reshape(3, 8)
    np.testing.assert_allclose(net(h)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_large_scores_neither_overflow_nor_vanish(weight):
    """Scores of some thousands of either sign, the largest in the last chunk: finite, and still one encoding."""
    net, h = umbc(weight=weight), 3000 * jax.random.normal(jax.random.key(2), (1, 8, 8))
    order = jnp.argsort(jnp.abs(h).sum(-1)[0])
    state = net.init_state(1)
    for at in range(0, 8, 2):
        state = net.update(state, h[:, order[at : at + 2]])
    assert np.isfinite(net.finish(state)).all()
    np.testing.assert_allclose(net.finish(state), net(h), rtol=1e-4)
    gradient = jax.grad(lambda h: net(h).sum())(h)
    assert np.isfinite(gradient).all()


def test_slots_are_sampled_once_a_set_and_in_training_only():
    net, h = umbc(sampled=True), jnp.ones((2, 4, 8))
    close(net(h), net(h, key=jax.random.key(0)), 0)
    first, again, other = (net(h, train=True, key=jax.random.key(i)) for i in (0, 0, 1))
    close(first, again, 0)
    assert np.abs(first - other).max() > 1e-4 and np.abs(first[0] - first[1]).max() > 1e-4
    state = net.init_state(2, train=True, key=jax.random.key(0))  # the queries stay for all chunks
    close(net.finish(net.update(net.update(state, h[:, :3]), h[:, 3:])), first, 1e-5)
    with pytest.raises(ValueError, match="sampled needs a random key"):
        net(h, train=True)


def test_pooling_by_hand():
    h = jnp.array([[[1.0, 5.0], [3.0, 1.0], [2.0, 3.0]]])
    pooled = lambda pooling: DeepSets(2, heads=1, pooling=pooling, norm="none", rngs=nnx.Rngs(0))
    for pooling, expected in (("sum", [6, 9]), ("mean", [2, 3]), ("max", [3, 5])):
        np.testing.assert_array_equal(pooled(pooling)(h)[0, 0], expected)
    for pooling, expected in (("sum", [4, 6]), ("mean", [2, 3]), ("max", [3, 5])):
        np.testing.assert_array_equal(pooled(pooling)(h, jnp.array([2]))[0, 0], expected)


def test_elements_see_each_other_in_the_baseline_only():
    """What an element's block makes of it depends on another element: why it cannot be read in chunks."""
    net = Attention(8, heads=2, depth=1, slots=1, rngs=nnx.Rngs(0))
    h = jax.random.normal(jax.random.key(2), (1, 4, 8))
    seen = []
    original = net.pool.update
    net.pool.update = lambda state, h, present=None: seen.append(h) or original(state, h, present)
    net(h), net(h.at[0, 3].set(h[0, 2]))
    assert np.abs(seen[0][0, 0] - seen[1][0, 0]).max() > 1e-3
    with pytest.raises(ValueError, match="the encoder Attention needs a set as a whole"):
        network("attention").init_state(1)


# ---- the gradient ------------------------------------------------------------------------------------------


def gradient(net, x, chosen=None, key=None):
    """Of the negative log-likelihood, by the parameters."""
    graph, params, stats, frozen = split(net)

    @jax.jit
    def of(params, chosen):
        def loss(params):
            module = merge(Parts(graph, params, stats, frozen))
            mixture, _ = module.finish(module.read(x, train=True, key=key, chosen=chosen), train=True)
            return -log_likelihood(mixture, x).mean()

        return jax.value_and_grad(loss)(params)

    return lambda chosen: of(params, chosen)


@pytest.mark.parametrize(
    ("name", "chunks"),
    some(
        [*((name, 1) for name in ESTIMATED), ("softmax", 2)],
        [("slot_softmax", 1), ("sampled", 1), ("mean", 1), ("softmax", 2)],
    ),
)
def test_the_mean_over_all_choices_is_the_gradient(name, chunks):
    """Every choice of 1 or 2 of the 3 chunks (5, 5 and 2 elements) of a set, in float64: exact, parameter by parameter,
    and a single choice is not the gradient where it is in front of the sums, and is it behind them."""
    with jax.enable_x64(True):
        x, key = sets(batch=1).astype(jnp.float64), jax.random.key(4)
        net = network(name, wide=True, chunk=5)
        loss, exact = gradient(net, x, key=key)(None)
        of = gradient(net, x, key=key)
        found = [of(jnp.array([choice])) for choice in itertools.combinations(range(3), chunks)]
        for value, _ in found:
            np.testing.assert_allclose(value, loss, rtol=1e-13)
        mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *(grads for _, grads in found))
        largest = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(exact))
        close(*(jax.tree.map(lambda leaf: leaf / largest, tree) for tree in (mean, exact)), 1e-13)
        exact, single = flatten(exact), flatten(found[0][1])
        behind = [path for path in exact if path.startswith(("head", "slot_blocks", "component"))]
        assert any(path.startswith("elements") for path in exact) and len(behind) > 10
        for path in behind:
            np.testing.assert_allclose(single[path] / largest, exact[path] / largest, rtol=1e-9, atol=1e-13)
        assert np.abs(single["elements/0/kernel"] - exact["elements/0/kernel"]).max() > 1e-6


@pytest.mark.parametrize("name", ["softmax", "sum"])
def test_drawn_chunks_are_all_drawn(name):
    """Of many keys, each of the 3 chunks is drawn about a third of the time, and sets of a batch draw apart."""
    net, x = network(name, chunk=4, gradient_chunks=1), jnp.zeros((2, 12, 2))

    @jax.jit
    @jax.vmap
    def touched(key):
        """Which elements have a gradient."""
        loss = lambda x: net(x, train=True, key=key)[0].means.sum()
        return jnp.abs(jax.grad(loss)(x)).sum(-1).reshape(2, 3, 4).sum(-1) > 0

    drawn = np.asarray(touched(jax.random.split(jax.random.key(0), 300)))
    assert (drawn.sum(-1) == 1).all()
    assert (np.abs(drawn.mean(0) - 1 / 3) < 0.11).all()  # 4 standard deviations of 300 draws
    assert (drawn[:, 0] != drawn[:, 1]).any()


@pytest.mark.parametrize("name", ["softmax", "slot_sigmoid", "max"])
def test_remat_changes_no_gradient(name):
    x = sets()

    plain, again = (gradient(network(name, chunk=5, remat=remat), x) for remat in (False, True))
    close(again(None), plain(None), 1e-5)
    assert "remat" in str(jax.make_jaxpr(again)(None)) and "remat" not in str(jax.make_jaxpr(plain)(None))


@pytest.mark.parametrize("name", ["softmax", "slot_sigmoid", "sampled", "mean"])
def test_gradient_by_finite_differences(name):
    """Float64, in chunks, along a random direction of all parameters: central differences of 1e-5."""
    with jax.enable_x64(True):
        net, x, key = network(name, wide=True, chunk=5), sets().astype(jnp.float64), jax.random.key(4)
        graph, params, stats, frozen = split(net)

        @jax.jit
        def loss(params):
            mixture, _ = merge(Parts(graph, params, stats, frozen))(x, train=True, key=key)
            return -log_likelihood(mixture, x, chunk=5).mean()

        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(7), len(leaves))
        along = jax.tree.unflatten(
            tree, [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves)]
        )
        moved = lambda by: loss(jax.tree.map(lambda p, d: p + by * d, params, along))
        slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(jax.grad(loss)(params)), jax.tree.leaves(along)))
        np.testing.assert_allclose((moved(1e-5) - moved(-1e-5)) / 2e-5, slope, rtol=1e-6)


# ---- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "settings", "words"),
    [
        ("umbc", {"weight": "exp"}, "encoder_kwargs.umbc.weight='exp' must be one of softmax, sigmoid"),
        ("umbc", {"slots": 0}, "encoder_kwargs.umbc.slots=0 must be at least 1"),
        ("umbc", {"chunk": 0}, "encoder_kwargs.umbc.chunk=0 must be at least 1"),
        ("umbc", {"gradient_chunks": 1}, "encoder_kwargs.umbc.gradient_chunks=1 needs chunk"),
        ("umbc", {"chunk": 4, "gradient_chunks": 0}, "gradient_chunks=0 must be at least 1"),
        ("deep_sets", {"pooling": "median"}, "pooling='median' must be one of mean, sum, max"),
        ("deep_sets", {"pooling": "max", "chunk": 4, "gradient_chunks": 1}, "pooling='max' is none"),
        ("attention", {"depth": 0}, "encoder_kwargs.attention.depth=0 must be at least 1"),
        ("attention", {"chunk": 4}, "has no setting 'chunk'"),
        ("slots", {}, "unknown encoder 'slots': known are umbc, deep_sets, attention"),
    ],
)
def test_bad_settings_give_a_sentence(encoder, settings, words):
    with pytest.raises(ValueError, match=words):
        SetClusterer(
            input_shape=(12, 2),
            classes=3,
            width=8,
            heads=2,
            encoder=encoder,
            encoder_kwargs={encoder: settings},
            rngs=nnx.Rngs(0),
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 9}, "model.width=9 must be a multiple of model.heads=2"),
        ({"slot_depth": 0}, "model.slot_depth=0 must be at least 1"),
        ({"least_variance": 0.0}, "model.least_variance=0.0 must be above 0"),
        ({"input_shape": (12, 2, 1)}, "the model set_clusterer reads examples \\[elements, features\\]"),
    ],
)
def test_bad_sizes_give_a_sentence(settings, words):
    with pytest.raises(ValueError, match=words):
        SetClusterer(**{"input_shape": (12, 2), "classes": 3, "width": 8, "heads": 2, **settings}, rngs=nnx.Rngs(0))


def test_a_key_is_asked_for():
    with pytest.raises(ValueError, match="gradient_chunks needs a random key"):
        network("softmax", chunk=4, gradient_chunks=1)(sets(), train=True)
