"""The LSTM by its equations, a step a token; what every mixer promises stands in test_mixers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.models.bounds import UnsupportedForm
from lissom.models.context import Context
from lissom.models.mixers.lstm import LSTM
from lissom.ops.attention import masks

CAUSAL = Context(mask=masks.Causal())
sigmoid = lambda x: 1 / (1 + np.exp(-x))


def test_two_steps_by_hand():
    """One cell that reads the number x: Wx = (1, 0, 0, 2), Wh = (0, 0, 1, 1), b = (0, 1, 0, 0), Wo = 3."""
    mixer = LSTM(1, heads=1, rngs=nnx.Rngs(0))
    mixer.x.kernel[...] = jnp.array([1.0, 0, 0, 2]).reshape(1, 4, 1)
    mixer.kernel[...] = jnp.array([0.0, 0, 1, 1]).reshape(1, 4, 1)
    mixer.o.kernel[...] = jnp.array([[3.0]])
    assert mixer.bias[...].tolist() == [[0.0], [1.0], [0.0], [0.0]]
    y, _, _ = mixer(jnp.array([[[1.0], [-1.0]]]), CAUSAL)
    # t = 0: i = 1, f = 1, o = 0, g = 2, and nothing to forget: c = sigmoid(1) tanh(2) = 0.731059 x 0.964028
    c0 = 0.731059 * 0.964028
    assert c0 == pytest.approx(0.704761, abs=1e-6)
    # h = sigmoid(0) tanh(c) = 0.5 x 0.607381
    h0 = 0.5 * 0.607381
    # t = 1: i = -1, f = 1, o = h0 = 0.303690, g = -2 + h0 = -1.696310
    # c = sigmoid(1) c0 + sigmoid(-1) tanh(-1.696310) = 0.731059 x 0.704761 - 0.268941 x 0.934946
    c1 = 0.731059 * c0 - 0.268941 * 0.934946
    # h = sigmoid(0.303690) tanh(0.263776) = 0.575344 x 0.257824
    assert c1 == pytest.approx(0.263776, abs=2e-6)
    h1 = 0.575344 * 0.257824
    np.testing.assert_allclose(y[0, :, 0], [3 * h0, 3 * h1], atol=1e-5)


@pytest.mark.parametrize("hidden", [None, 3])
def test_it_is_a_loop_over_the_tokens(hidden):
    mixer = LSTM(5, heads=2, hidden=hidden, rngs=nnx.Rngs(0))
    cells = hidden or 5
    mixer.bias[...] = jax.random.normal(jax.random.key(3), (4, cells))
    x = jax.random.normal(jax.random.key(1), (2, 7, 5))
    of_x, of_h, b, out = (
        np.asarray(p[...], np.float64) for p in (mixer.x.kernel, mixer.kernel, mixer.bias, mixer.o.kernel)
    )
    assert of_h.shape == (cells, 4, cells)
    for row in range(2):
        h, c = np.zeros(cells), np.zeros(cells)
        for t in range(7):
            gates = [np.asarray(x[row, t]) @ of_x[:, n] + h @ of_h[:, n] + b[n] for n in range(4)]
            i, f, o = map(sigmoid, gates[:3])
            c = f * c + i * np.tanh(gates[3])
            h = o * np.tanh(c)
            np.testing.assert_allclose(mixer(x, CAUSAL)[0][row, t], h @ out, atol=2e-6)


def test_a_state_is_not_rounded_on_its_way_through_a_cache():
    """In bfloat16 a token at a time is all of them at once."""
    mixer = LSTM(6, heads=1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 40, 6), jnp.bfloat16)
    cache = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), mixer.init_cache(2, 40, jnp.bfloat16))
    assert cache["h"].dtype == cache["c"].dtype == jnp.float32
    parts = []
    for t in range(40):
        y, cache, _ = mixer(x[:, t : t + 1], Context(mask=masks.Causal(offset=cache["length"])), cache)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), mixer(x, CAUSAL)[0], rtol=1e-2, atol=1e-3)


def test_it_remembers_with_an_open_forget_gate():
    """Forget gates near 1, input gates near 0 behind the first token: the cells still hold what the first put there."""
    mixer = LSTM(2, heads=1, rngs=nnx.Rngs(0))
    mixer.kernel[...] = jnp.zeros((2, 4, 2))
    mixer.x.kernel[...] = jnp.zeros((2, 4, 2)).at[0, 0].set(60.0).at[1, 3].set(5.0)
    mixer.bias[...] = jnp.array([[-30.0] * 2, [30.0] * 2, [30.0] * 2, [0.0] * 2])
    mixer.o.kernel[...] = jnp.eye(2)
    x = jnp.zeros((1, 40, 2)).at[0, 0].set(jnp.array([1.0, 1.0]))
    y = mixer(x, CAUSAL)[0]
    np.testing.assert_allclose(y, np.tanh(np.tanh(5.0)), rtol=1e-5)


def test_gradients_reach_the_first_token_and_are_finite():
    mixer = LSTM(4, heads=1, rngs=nnx.Rngs(0))
    x = 100 * jax.random.normal(jax.random.key(0), (1, 30, 4))
    far = jax.grad(lambda x: mixer(x, CAUSAL)[0][:, -1].sum())(x)
    assert np.isfinite(far).all()
    near = jax.grad(lambda x: mixer(x, CAUSAL)[0][:, -1].sum())(x / 100)
    assert np.abs(near[:, 0]).max() > 0


def test_what_it_has_no_form_of():
    mixer, x = LSTM(4, heads=1, rngs=nnx.Rngs(0)), jnp.zeros((1, 3, 4))
    ids = jnp.zeros((1, 3), jnp.int32)
    for context in (
        Context(),
        Context(mask=masks.Causal() & masks.Segments(ids)),
        Context(mask=masks.Causal(), segments=ids),
    ):
        with pytest.raises(UnsupportedForm, match="it takes a causal mask alone, not"):
            mixer(x, context)
    with pytest.raises(ValueError, match=r"mixer\.hidden=0 must be at least 1"):
        LSTM(4, heads=1, hidden=0, rngs=nnx.Rngs(0))
