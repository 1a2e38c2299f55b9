"""Layers of neurons: by hand, normalised potentials folded into thresholds, activations of the dense twins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.models.registry import construct
from lissom.models.spiking import ACTIVATIONS
from lissom.models.spiking.activations import ClipFloor
from lissom.models.spiking.neurons import ALIF, CUBA, IF, LIF, PLIF
from lissom.ops.spiking import State, spike_scan


def neuron(kind, channels=1, space=(), **settings):
    return kind(channels, space, rngs=nnx.Rngs(0), **settings)


def spikes(layer, current, **call):
    """Of one neuron, as a list."""
    found, _ = layer(jnp.array(current, jnp.float32)[:, None, None], train=False, **call)
    return found[:, 0, 0].astype(int).tolist()


def test_neurons_by_hand():
    # v: 0.6, 1.2 fires, 0.6, 1.2 fires
    assert spikes(neuron(IF), [0.6] * 4) == [0, 1, 0, 1]
    # soft: 0.6, 1.2 - 1 = 0.2, 0.8, 1.4 - 1 = 0.4, 1.0 fires
    assert spikes(neuron(IF, reset="soft"), [0.6] * 5) == [0, 1, 0, 1, 1]
    # half is left: 0.6, 0.9, 1.05 fires, 0.6
    assert spikes(neuron(LIF), [0.6] * 4) == [0, 0, 1, 0]
    assert spikes(neuron(PLIF), [0.6] * 4) == [0, 0, 1, 0]  # begins with the same decay
    assert spikes(neuron(LIF, decay=1.0), [0.6] * 4) == [0, 1, 0, 1]
    assert spikes(neuron(LIF, threshold=0.5), [0.6] * 2) == [1, 1]
    assert spikes(neuron(LIF, threshold=0.5, learn_threshold=True), [0.6, 0.4]) == [1, 0]
    # The current halves too: i 0.8, 0.4, 0.2; v 0.8, 0.8 at a decay of a half, 0.6
    assert spikes(neuron(CUBA, threshold=0.79), [0.8, 0, 0]) == [1, 0, 0]
    assert spikes(neuron(CUBA, threshold=0.81), [0.8, 0.05, 0]) == [0, 1, 0]
    # Each spike raises the threshold by 1, and half of that is left a step later.
    adaptive = neuron(ALIF, decay=0.0, adaptation_decay=0.5, adaptation_step=1.0)
    assert spikes(adaptive, [1.2] * 5) == [1, 0, 0, 0, 1]  # 1, 2, 1.5, 1.25, 1.125


def test_what_is_learned_has_gradients():
    layer = neuron(PLIF, 3, learn_threshold=True)
    graph, params = nnx.split(layer)
    current = jax.random.normal(jax.random.key(0), (6, 4, 3)) + 0.3
    grads = jax.grad(lambda params: nnx.merge(graph, params)(current, train=True)[0].sum())(params)
    found = {"/".join(map(str, path)): float(leaf[...][0]) for path, leaf in nnx.to_flat_state(grads)}
    assert found.keys() == {"decay", "threshold"}
    assert found["threshold"] < 0 < abs(found["decay"])  # a higher threshold has fewer spikes
    for threshold in (1e-3, 1.0, 1e3):
        learned = neuron(LIF, learn_threshold=True, threshold=threshold).limit()
        assert float(learned[0]) == pytest.approx(threshold, rel=1e-4)


@pytest.mark.parametrize("kind", [IF, LIF, PLIF])
@pytest.mark.parametrize("form", ["channel", "element"])
def test_a_folded_norm_fires_as_the_norm(kind, form):
    """Scales of either sign, and 0; the state is handed on in the middle."""
    layer = neuron(kind, 6, (3, 2), membrane_norm=form)
    width = layer.norm.scale.shape
    assert width == ((6,) if form == "channel" else (36,))
    keys = jax.random.split(jax.random.key(1), 5)
    scale = jax.random.normal(keys[0], width).at[:2].set(0.0)
    layer.norm.scale[...] = scale
    layer.norm.bias[...] = jax.random.normal(keys[1], width).at[:2].set(jnp.array([0.5, 1.5])) + 0.2
    layer.norm.mean[...] = 0.3 * jax.random.normal(keys[2], width)
    layer.norm.var[...] = jnp.exp(jax.random.normal(keys[3], width))
    current = jax.random.normal(keys[4], (9, 4, 3, 2, 6)) + 0.4
    first, state = layer(current[:4], train=False)
    second, after = layer(current[4:], state, train=False)
    found = np.concatenate([first, second])

    decay = float(np.asarray(layer.rates()["decay"]).reshape(-1)[0])
    flat = lambda x: np.asarray(x, np.float64).reshape(-1, width[0])
    v, fired = np.zeros(current.shape[1:]), []
    for now in np.asarray(current, np.float64):
        h = decay * v + now
        normed = (flat(h) - flat(layer.norm.mean[...])) / np.sqrt(flat(layer.norm.var[...]) + layer.norm.epsilon)
        fires = (normed * flat(scale) + flat(layer.norm.bias[...])).reshape(h.shape) >= 1
        v = np.where(fires, 0, h)
        fired.append(fires)
    np.testing.assert_array_equal(found, np.stack(fired))
    np.testing.assert_allclose(after.v, v, atol=1e-5)
    assert 0.1 < found.mean() < 0.9
    # The bias alone decides where the scale is 0: 0.7 never fires, 1.7 always.
    constant = found.reshape(9, -1, width[0])[..., :2]
    assert (constant == [0, 1]).all()


def test_a_norm_in_training_takes_each_step_alone():
    layer = neuron(LIF, 2, membrane_norm="channel")
    current = jax.random.normal(jax.random.key(0), (3, 50, 2)) * 2 + 1
    found, state = layer(current, train=True)
    v, mean = np.zeros((50, 2)), np.zeros(2)
    for now, fires in zip(np.asarray(current, np.float64), np.asarray(found), strict=True):
        h = 0.5 * v + now
        expected = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5) >= 1
        np.testing.assert_array_equal(fires, expected)
        v = np.where(expected, 0, h)  # the potential itself is reset, not what was compared
        mean = 0.9 * mean + 0.1 * h.mean(0)
    np.testing.assert_allclose(state.v, v, atol=1e-5)
    np.testing.assert_allclose(layer.norm.mean[...], mean, atol=1e-5)


def test_a_norm_in_training_has_the_gradients_of_the_scan():
    """With a norm that changes nothing at one step it is a neuron, gradients included."""
    current = jax.random.normal(jax.random.key(0), (1, 40, 3)) * 1.5
    layer = neuron(LIF, 3, membrane_norm="channel", attached=True)
    spread, middle = current.std((0, 1)), current.mean((0, 1))
    layer.norm.scale[...] = jnp.sqrt(jnp.square(spread) + 1e-5)
    layer.norm.bias[...] = middle
    weights = jax.random.normal(jax.random.key(1), current.shape)
    # Through the statistics gradients pass besides; a direction that leaves them alone has none.
    away = jax.random.normal(jax.random.key(2), current.shape)
    away = away - away.mean((0, 1))
    unit = (current - middle) / spread
    away = away - unit * (away * unit).mean((0, 1))
    graph, variables = nnx.split(layer)
    normed = lambda x: (nnx.merge(graph, jax.tree.map(jnp.copy, variables))(x, train=True)[0] * weights).sum()
    plain = lambda x: (spike_scan(x, decay=0.5)[0] * weights).sum()
    assert float(normed(current)) == pytest.approx(float(plain(current)))
    one, other = (float((jax.grad(function)(current) * away).sum()) for function in (normed, plain))
    assert one == pytest.approx(other, rel=1e-3) and abs(one) > 0.1


def test_clip_floor_is_the_mean_of_a_neuron():
    """An IF neuron with a soft reset that begins at half a threshold, over as many steps as levels."""
    levels, limit = 8, 2.0
    layer = ClipFloor(1, (), levels=levels, limit=limit, rngs=nnx.Rngs(0))
    x = jnp.linspace(-1, 3, 401).at[200].set(0.0) + 1e-3
    found, _ = layer(x[None, :, None], train=True)
    current = jnp.broadcast_to(x, (levels, 401))
    start = State(jnp.full(401, limit / 2))
    fired, _ = spike_scan(current, start, threshold=limit, reset="soft")
    np.testing.assert_allclose(found[0, :, 0], limit * fired.mean(0), atol=1e-6)
    assert len(np.unique(np.round(found, 5))) == levels + 1


def test_clip_floor_by_hand():
    layer = ClipFloor(1, (), levels=4, limit=2.0, rngs=nnx.Rngs(0))
    x = jnp.array([-1.0, 0.2, 0.3, 0.8, 1.7, 1.9])
    # steps of a half, rounded to the nearest
    np.testing.assert_allclose(layer(x[None, None], train=False)[0][0, 0], [0, 0, 0.5, 1.0, 1.5, 2.0])
    slope = jax.grad(lambda x: layer(x, train=True)[0].sum())(x[None, None])
    np.testing.assert_allclose(slope[0, 0], [0, 1, 1, 1, 1, 0])
    graph, params = nnx.split(layer)
    pull = jax.grad(lambda params: nnx.merge(graph, params)(x[None, None, -1:], train=True)[0].sum())(params)
    assert float(pull["limit"][...][0]) == 1.0  # what is clipped is the limit


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("lif", {"threshold": 0.0}, "neuron.threshold=0.0 must be above 0"),
        ("lif", {"decay": 1.5}, "neuron.decay=1.5 must be at least 0 and at most 1"),
        ("plif", {"decay": 1.0}, "neuron.decay=1.0 must be between 0 and 1"),
        ("lif", {"membrane_norm": "layer"}, "neuron.membrane_norm='layer' must be one of none, channel, element"),
        ("lif", {"membrane_norm": "channel", "reset": "soft"}, "goes with reset='hard'"),
        ("cuba", {"membrane_norm": "channel"}, "whose only state is the potential; not cuba"),
        ("alif", {"adaptation_decay": 2.0}, "neuron.adaptation_decay=2.0 must be at least 0 and at most 1"),
        ("cuba", {"current_decay": -1.0}, "neuron.current_decay=-1.0 must be at least 0 and at most 1"),
        ("clip_floor", {"levels": 0}, "neuron.levels=0 must be at least 1 and, in 8 bits, at most 255"),
        ("clip_floor", {"levels": 256}, "neuron.levels=256 must be at least 1 and, in 8 bits, at most 255"),
        ("clip_floor", {"limit": -1.0}, "neuron.limit=-1.0 must be above 0"),
        ("lif", {"reset": "gentle"}, "neuron.reset='gentle' must be one of hard, soft, none"),
        ("lif", {"surrogate": "none"}, "neuron.surrogate='none' must be one of arctan"),
        ("lif", {"slope": 0.0}, "neuron.slope=0.0 must be above 0"),
    ],
)
def test_bad_settings(name, settings, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        construct(ACTIVATIONS, name, {name: settings}, "neuron", channels=2, space=(), rngs=nnx.Rngs(0))
