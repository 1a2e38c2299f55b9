"""The mixture of fields: its integrator against exact solutions, rows in blocks against rows alone, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.models.mixture_of_fields import MixtureOfFields, blocks_of, integrate
from lissom.training.objectives.trajectories import Trajectories


def rotation(x):
    return jnp.stack([x[..., 1], -x[..., 0]], -1)


def test_runge_kutta_is_of_fourth_order():
    """x'' = -x from (1, 0) is (cos t, -sin t); twice the steps divide the error by 16. One step of h is the exponential
    series up to h^4."""
    times = 0.5 * np.arange(1, 5)
    exact = np.stack([np.cos(times), -np.sin(times)], -1)
    with jax.enable_x64(True):
        states = [
            integrate(rotation, jnp.array([1.0, 0.0], jnp.float64), interval=0.5, count=4, substeps=n)
            for n in (1, 2, 4)
        ]
    errors = [np.abs(np.asarray(found) - exact).max() for found in states]
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.1) and errors[1] / errors[2] == pytest.approx(16, rel=0.1)
    step = integrate(lambda x: x, jnp.array([1.0]), interval=0.3, count=1)
    assert step[0, 0] == pytest.approx(1 + 0.3 + 0.3**2 / 2 + 0.3**3 / 6 + 0.3**4 / 24, rel=1e-6)


def test_blocks_by_hand():
    """Experts 2, 0, 2, 2, 0 of 3, two rows a block: expert 0 has rows 1, 4; expert 1 none; expert 2 rows 0, 2 and 3. At
    most (5 + 3) // 2 = 4 blocks are needed, and here 3 are."""
    blocks = blocks_of(jnp.array([2, 0, 2, 2, 0]), 3, 2)
    assert blocks.source.tolist() == [[1, 4], [0, 2], [3, 0], [0, 0]]
    assert blocks.expert.tolist()[:3] == [0, 2, 2]
    assert blocks.place.tolist() == [2, 0, 3, 4, 1]


@pytest.mark.parametrize("rows", [1, 3, 8, 50])
def test_every_row_has_a_place_in_a_block_of_its_expert(rows):
    rng = np.random.default_rng(rows)
    for case in range(20):
        count, experts = int(rng.integers(1, 30)), int(rng.integers(1, 7))
        expert = rng.integers(0, experts, count) if case else np.arange(count) % experts
        blocks = blocks_of(jnp.asarray(expert, jnp.int32), experts, rows)
        np.testing.assert_array_equal(blocks.source.reshape(-1)[blocks.place], np.arange(count))
        size = blocks.source.shape[1]
        np.testing.assert_array_equal(blocks.expert[blocks.place // size], expert)


def network(experts=3, gate="softmax", environments=5, dtype=jnp.float32, **settings):
    made = MixtureOfFields(
        input_shape=(6, 2),
        environments=environments,
        interval=0.2,
        width=8,
        experts=experts,
        context_size=4,
        gate=gate,
        dtype=dtype,
        rngs=nnx.Rngs(0),
        **settings,
    )
    made.contexts[...] = jax.random.normal(jax.random.key(1), made.contexts.shape)
    return made


def batch(rows=12, environments=5, seed=2):
    keys = jax.random.split(jax.random.key(seed), 2)
    inputs = jax.random.normal(keys[0], (rows, 6, 2))
    return {"inputs": inputs, "environment": jnp.arange(rows) % environments}


def alone(net, x, environment, depth=2):
    """The states behind x [D], by the equations: one expert, one row, no blocks."""
    chosen, weights, _ = net.gate(net.contexts[...], None, False)
    e, w, c = chosen[environment], weights[environment], net.contexts[environment]
    layers = [(layer.kernel[e], layer.bias[e]) for layer in (net.first, *net.inner, net.last)]
    assert len(layers) == depth + 1

    def field(x):
        (kernel, bias), *others = layers
        h = x @ kernel + c @ net.conditioned.kernel[e] + bias
        for kernel, bias in others:
            h = (h / (1 + jnp.exp(-h))) @ kernel + bias
        return w * h

    states = []
    for _ in range(5):
        a = field(x)
        b = field(x + 0.1 * a)
        c2 = field(x + 0.1 * b)
        d = field(x + 0.2 * c2)
        x = x + 0.2 / 6 * (a + 2 * b + 2 * c2 + d)
        states.append(x)
    return jnp.stack(states)


@pytest.mark.parametrize("gate", ["mixer", "softmax"])
@pytest.mark.parametrize("experts", [1, 3])
def test_rows_in_blocks_are_rows_alone(gate, experts):
    net, given = network(experts, gate), batch()
    chosen, weights, _ = net.gate(net.contexts[...], None, False)
    assert len(set(chosen.tolist())) >= min(experts, 2)  # blocks are of several experts
    if gate == "softmax" and experts > 1:
        assert (weights < 1).all()
    states = net(**given)[0]
    np.testing.assert_array_equal(states[:, 0], given["inputs"][:, 0])
    for row in range(5, 10):  # each environment once
        expected = alone(net, given["inputs"][row, 0], int(given["environment"][row]))
        np.testing.assert_allclose(states[row, 1:], expected, rtol=1e-4, atol=1e-5)
    # What comes behind the first state is not looked at.
    other = net(given["inputs"].at[:, 1:].set(jnp.nan), given["environment"])[0]
    np.testing.assert_array_equal(states, other)


def test_losses_of_every_expert_are_those_of_one_after_the_other():
    """Environment 4 is not in the batch."""
    net, given = network(3, "mixer"), batch(rows=8, environments=4)
    losses, known = net._losses(given["inputs"], given["environment"])
    assert known.tolist() == [True] * 4 + [False]
    for expert in range(3):
        net.gate.kernel[...] = jnp.zeros((5, 3)).at[-1, expert].set(1.0)
        states = net(**given)[0]
        errors = np.square(states - given["inputs"])[:, 1:].mean((1, 2))
        expected = [errors[np.asarray(given["environment"]) == n].mean() for n in range(4)]
        np.testing.assert_allclose(losses[:4, expert], expected, rtol=1e-4)


@pytest.mark.parametrize("gate", ["mixer", "softmax"])
def test_an_expert_has_gradient_from_its_own_environments_only(gate):
    net = network(3, gate)
    chosen = np.asarray(net.gate(net.contexts[...], None, False)[0])
    environment = int(np.flatnonzero(chosen == chosen[0])[0])
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    inputs = batch(rows=4)["inputs"]

    def loss(params):
        module = nnx.merge(graph, params, rest)
        states, _ = module(inputs, jnp.full(4, environment))
        return jnp.square(states - inputs).mean()

    grads = jax.grad(loss)(params)
    for layer in (grads["first"], grads["conditioned"], grads["last"]):
        sizes = np.abs(layer["kernel"][...]).max((1, 2))
        assert sizes[chosen[environment]] > 0
        assert (np.delete(sizes, chosen[environment]) == 0).all()
    of_contexts = np.abs(grads["contexts"][...]).max(1)
    assert of_contexts[environment] > 0 and (np.delete(of_contexts, environment) == 0).all()
    if gate == "softmax":
        assert np.abs(grads["gate"]["scores"]["kernel"][...]).max() > 0


def test_an_update_in_training_is_that_of_the_losses():
    """Contexts in two groups, an expert each that says its group's trajectories: the update finds which is whose."""
    net, environments = network(2, "mixer", environments=4, gate_kwargs={"mixer": {"every": 1}}), jnp.arange(4)
    net.contexts[...] = jnp.array([[3.0, 0, 0, 0], [3, 0.1, 0, 0], [0, 0, 3, 0], [0, 0, 3, 0.1]])
    first = jax.random.normal(jax.random.key(3), (4, 2))
    of = lambda row, expert: _by_expert(net, first[row], row, expert)
    inputs = jnp.stack([jnp.concatenate([first[n][None], of(n, 1 if n < 2 else 0)]) for n in range(4)])
    states, aux = net(inputs, environments, train=True)
    np.testing.assert_allclose(states, inputs, atol=1e-4)
    assert net.gate.calls[...] == 1 and aux["metrics"]["skipped_updates"] == 0
    assert net.gate(net.contexts[...], None, False)[0].tolist() == [1, 1, 0, 0]


def _by_expert(net, x, environment, expert):
    kernel = net.gate.kernel[...]
    net.gate.kernel[...] = jnp.zeros_like(kernel).at[-1, expert].set(1.0)
    states = alone(net, x, environment)
    net.gate.kernel[...] = kernel
    return states


def test_half_precision_keeps_the_state_in_float32():
    single, half = network(3), network(3, dtype=jnp.bfloat16)
    given = batch()
    states = half(**given)[0]
    assert states.dtype == jnp.float32
    error = np.abs(states - single(**given)[0]).max()
    assert 0 < error < 0.1


def test_bad_shapes_give_a_sentence():
    with pytest.raises(ValueError, match=r"the model mixture_of_fields reads examples \[states, features\]"):
        MixtureOfFields(input_shape=(6,), environments=2, interval=0.1, width=4, rngs=nnx.Rngs(0))


def test_loss_by_hand():
    """The first state counts nothing; squares of (1, 2) and (0, 3) off are a mean of 14 / 4."""
    inputs = jnp.zeros((1, 3, 2))
    said = jnp.array([[[9.0, 9.0], [1.0, 2.0], [0.0, 3.0]]])
    aux = {"losses": {"balance": jnp.array(0.25)}, "metrics": {"family_use": jnp.ones((1, 2))}}
    given = {
        "inputs": inputs,
        "environment": jnp.zeros(1, jnp.int32),
        "mask": jnp.ones(1),
        "families": jnp.ones((1, 1)),
    }
    loss, metrics = Trajectories().loss(lambda *_, **__: (said, aux), given, None, 0)
    assert loss == 3.75 and metrics == {"trajectory_error": 3.5, "balance": 0.25}


def test_judged_rows_that_only_fill_up_count_nothing():
    net, given = network(3), batch(rows=5)
    families = jax.nn.one_hot(jnp.array([0, 0, 1, 1, 1]), 2)
    given |= {"families": families, "mask": jnp.array([1.0, 1, 1, 1, 0])}
    sums = Trajectories().judge(net, given, None)
    chosen = np.asarray(net.gate(net.contexts[...], None, False)[0])
    use = np.zeros((2, 3))
    for row in range(4):
        use[int(families[row].argmax()), chosen[row]] += 1
    np.testing.assert_array_equal(sums["family_use"][0], use)
    states = net(given["inputs"], given["environment"])[0]
    error = np.square(states - given["inputs"])[:4, 1:].mean((1, 2)).sum()
    assert sums["loss"][0] == pytest.approx(float(error), rel=1e-5) and sums["loss"][1] == 4
    assert sums["trajectory_error"][0] == sums["loss"][0]
