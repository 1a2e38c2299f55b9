"""The soft top-k against optimal transport and its gradient against differences; votes by hand; what is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.optimize import brentq
from scipy.special import expit, logsumexp

from lissom.models.keyed_experts import KeyedExperts, RandomFeatures
from lissom.models.soft_top_k import soft_top_k
from lissom.models.variables import Frozen, split


def exact(scores, k, temperature):
    """The same in float64, the threshold by a root finder."""
    z = np.asarray(scores, np.float64) / temperature
    t = brentq(lambda t: expit(z - t).sum() - k, z.min() - 50, z.max() + 50, xtol=1e-13)
    return expit(z - t)


@pytest.mark.parametrize("temperature", [2.5e-4, 0.02, 0.3, 10.0])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_soft_top_k_against_a_root_finder(k, temperature):
    scores = np.array(0.2 * jax.random.normal(jax.random.key(k), (5, 7)))
    found = np.array(soft_top_k(scores, k, temperature))
    for row, one in zip(found, scores, strict=True):
        np.testing.assert_allclose(row, exact(one, k, temperature), atol=2e-4 if temperature < 1e-3 else 1e-5)
    np.testing.assert_allclose(found.sum(-1), k, rtol=1e-5)


def test_soft_top_k_is_entropic_optimal_transport():
    """Sinkhorn between n points and the anchors 0 and 1, squared distance, entropy weighed by epsilon: what point i
    sends to the anchor 1, times n, at temperature epsilon / 2."""
    n, k, epsilon = 6, 2, 0.1
    scores = np.array(jax.random.uniform(jax.random.key(0), (n,)), np.float64)
    cost = np.square(scores[:, None] - np.array([0.0, 1.0]))
    log_mu, log_nu = np.full(n, -np.log(n)), np.log([(n - k) / n, k / n])
    g = np.zeros(2)
    for _ in range(3000):
        f = epsilon * (log_mu - logsumexp((g - cost) / epsilon, axis=1))
        g = epsilon * (log_nu - logsumexp((f[:, None] - cost) / epsilon, axis=0))
    plan = np.exp((f[:, None] + g - cost) / epsilon)
    np.testing.assert_allclose(soft_top_k(jnp.array(scores), k, epsilon / 2), n * plan[:, 1], rtol=1e-4)


def test_soft_top_k_at_its_limits():
    scores = jnp.array([0.3, -0.1, 0.25, 0.0, 0.9])
    np.testing.assert_allclose(soft_top_k(scores, 2, 1e-4), [1, 0, 0, 0, 1], atol=1e-6)  # the two largest
    np.testing.assert_allclose(soft_top_k(scores, 2, 1e4), [0.4] * 5, atol=1e-4)  # 2 of 5 each
    np.testing.assert_array_equal(soft_top_k(scores, 5, 0.1), [1] * 5)
    # One score more than the others, two experts: sigmoid(d / 2T) and the rest, since t lies in the middle.
    np.testing.assert_allclose(soft_top_k(jnp.array([0.2, 0.0]), 1, 0.1), [expit(1.0), expit(-1.0)], rtol=1e-6)
    # Equal ones share: the third place is half of each.
    np.testing.assert_allclose(soft_top_k(jnp.array([1.0, 1.0, 0.5, 0.5]), 3, 1e-3), [1, 1, 0.5, 0.5], atol=1e-6)


@pytest.mark.parametrize("temperature", [0.02, 0.5])
def test_gradient_of_soft_top_k_against_differences(temperature):
    k, size = 3, 1e-6
    scores = np.array(0.1 * jax.random.normal(jax.random.key(1), (6,)), np.float64)
    found = jax.jacrev(lambda s: soft_top_k(s, k, temperature))(jnp.array(scores, jnp.float32))
    columns = [
        (exact(scores + size * e, k, temperature) - exact(scores - size * e, k, temperature)) / (2 * size)
        for e in np.eye(6)
    ]
    np.testing.assert_allclose(found, np.stack(columns, -1), rtol=1e-3, atol=1e-4 / temperature)
    np.testing.assert_allclose(found.sum(0), 0, atol=1e-4 / temperature)  # rows sum to k whatever the scores
    # Where all are 0 or 1 there is no gradient, and no NaN.
    flat = jax.jacrev(lambda s: soft_top_k(s, 1, 1e-6))(jnp.array([0.0, 1.0, 2.0]))
    np.testing.assert_array_equal(flat, np.zeros((3, 3)))


@pytest.mark.parametrize(
    ("k", "temperature", "sentence"), [(0, 1.0, "k=0 must be in 1..3"), (4, 1.0, "k=4"), (1, 0.0, "must be over 0")]
)
def test_bad_requests_of_soft_top_k(k, temperature, sentence):
    with pytest.raises(ValueError, match=sentence):
        soft_top_k(jnp.zeros(3), k, temperature)


def network(**settings):
    made = {"input_shape": (4, 4, 1), "classes": 3, "experts": 3, "k": 1, "filters": 2, **settings}
    return KeyedExperts(**made, rngs=nnx.Rngs(0))


def images(count=4):
    return jax.random.normal(jax.random.key(7), (count, 4, 4, 1))


def test_votes_by_hand():
    net = network(k=2, temperature=0.05, bound=2.0, cutoff=0.3)
    x = np.array(net.features(images()), np.float64)
    keys, w, c = (np.array(v[...], np.float64) for v in (net.keys, net.kernel, net.bias))
    assert x.shape == (4, 8)  # 4x4 pixels pooled to 2x2, two filters
    votes, losses = [], []
    for row in x:
        cosines = keys @ row / np.linalg.norm(keys, axis=1) / np.linalg.norm(row)
        scores = exact(cosines, 2, 0.05)
        scores = np.where(scores < 0.3, 0, scores)
        weights = scores * np.maximum(cosines, 0)
        said = 2 * np.tanh((np.einsum("f,efc->ec", row, w) + c) / 2)
        votes.append((weights[:, None] * said).sum(0) / max(weights.sum(), 1e-9))
        losses.append((scores * (1 - cosines)).sum())
    found, aux = net(images())
    np.testing.assert_allclose(found, votes, rtol=1e-3, atol=1e-5)
    assert np.abs(votes).max() > 0.1
    assert float(aux["losses"]["keys"]) == pytest.approx(np.mean(losses), rel=1e-4)


def test_one_expert_is_a_linear_head_and_all_are_their_mean():
    one = network(experts=1, k=1, bound=0.0)
    x = one.features(images())
    np.testing.assert_allclose(one(images())[0], x @ one.kernel[...][0] + one.bias[...][0], rtol=1e-5, atol=1e-6)
    assert one.keys is None and one(images())[1]["losses"] == {}
    dense = network(experts=3, k=3, bound=0.0)
    assert dense.keys is None
    mean = dense.features(images()) @ dense.kernel[...].mean(0)
    np.testing.assert_allclose(dense(images())[0], mean, rtol=1e-4, atol=1e-6)


def test_nearest_key_decides_at_low_temperature():
    net = network(temperature=1e-5, bound=0.0)
    x = net.features(images())
    net.keys[...] = jnp.stack([x[0], x[1], -x[0] - x[1]])  # a key that is an input is its nearest
    said = jnp.einsum("bf,efc->bec", x, net.kernel[...])
    np.testing.assert_allclose(net(images())[0][:2], said[jnp.arange(2), jnp.arange(2)], rtol=1e-4, atol=1e-6)
    # No gradient reaches experts that were not asked: nothing they have learned is unlearned.
    parts = split(net)

    def vote(params):
        module = nnx.merge(parts.graph, params, parts.stats, parts.frozen)
        return module(images()[:1])[0][0, 2]

    gradient = jax.grad(vote)(parts.params)
    assert np.abs(gradient["kernel"][0, :, 2]).min() > 0
    np.testing.assert_array_equal(gradient["kernel"][1:], 0)
    np.testing.assert_array_equal(gradient["kernel"][0, :, :2], 0)  # nor other classes, of the score alone


def test_an_input_that_no_key_is_near_has_no_vote():
    net = network()
    x = net.features(images())
    net.keys[...] = jnp.tile(-x[:1], (3, 1))
    np.testing.assert_array_equal(net(images()[:1])[0], 0)


def test_what_is_trained():
    parts = split(network(train_keys=False, key_loss=1.0))
    assert set(parts.params) == {"kernel", "bias"} and set(parts.frozen) == {"keys", "features"}
    assert network(train_keys=False)(images())[1]["losses"] == {}
    trained = split(network(key_rate=0.2))
    assert set(trained.params) == {"kernel", "bias", "keys"}
    np.testing.assert_allclose(np.linalg.norm(trained.params["keys"], axis=1), 5, rtol=1e-5)
    # A step of the parameter moves the key, which begins alike, by that fraction.
    slow, fast = network(key_rate=0.2), network(key_rate=1.0)
    np.testing.assert_allclose(slow(images())[0], fast(images())[0], rtol=1e-4, atol=1e-6)
    slow.keys[...], fast.keys[...] = slow.keys[...] + 0.1, fast.keys[...] + 0.02
    np.testing.assert_allclose(slow(images())[0], fast(images())[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 4, 3), (8, 2)])
def test_random_features_tell_contrast(shape):
    features = RandomFeatures(shape, filters=5, kernel=3, pool=2, rngs=nnx.Rngs(0))
    kernel = features.kernel
    assert isinstance(kernel, Frozen)
    axes = tuple(range(len(shape)))
    np.testing.assert_allclose(kernel[...].sum(axes), 0, atol=1e-5)
    np.testing.assert_allclose(jnp.square(kernel[...]).sum(axes), 1, rtol=1e-5)
    x = jax.random.normal(jax.random.key(0), (2, *shape))
    found = features(x)
    assert found.shape == (2, features.size)
    # By hand: the middle of the first window's tanh, from padded inputs.
    padded = jnp.pad(x, [(0, 0), *[(1, 1)] * (len(shape) - 1), (0, 0)])
    cells = [(i, j) for i in (0, 1) for j in (0, 1)] if len(shape) == 3 else [(i,) for i in (0, 1)]
    windows = [padded[(slice(None), *(slice(at, at + 3) for at in cell))] for cell in cells]
    flat = kernel[...].reshape(-1, 5)
    first = np.mean([jnp.tanh(window.reshape(2, -1) @ flat) for window in windows], axis=0)
    np.testing.assert_allclose(found[:, :5], first, rtol=1e-4, atol=1e-5)
    # A constant has contrast at the edge only, where zeros are padded.
    inner = features(jnp.ones((1, *(8 for _ in shape[:-1]), shape[-1])))
    middle = inner.reshape(*(4 for _ in shape[:-1]), 5)[(1,) * (len(shape) - 1)]
    np.testing.assert_allclose(middle, 0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"k": 4}, "model.k=4 nearest keys are more than model.experts=3"),
        ({"experts": 0}, "model.experts=0 must be at least 1"),
        ({"key_rate": 0.0}, "model.key_rate=0.0 must be over 0"),
        ({"temperature": 0.0}, "model.temperature=0.0 must be over 0"),
        ({"cutoff": 1.0}, "model.cutoff=1.0 must be at least 0 and below 1"),
        ({"bound": -1.0}, "model.bound=-1.0 must be at least 0"),
        ({"key_loss": -1.0}, "model.key_loss=-1.0 must be at least 0"),
        ({"pool": 3}, r"model.pool=3 must divide the spatial axes \[4, 4\]"),
        ({"kernel": 1}, "model.kernel=1 sees one number"),
        ({"input_shape": (2, 4, 4, 1)}, "keyed_experts reads examples"),
    ],
)
def test_bad_settings_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        network(**settings)
    assert "\n" not in str(error.value)
