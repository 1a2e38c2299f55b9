"""Hypernetworks: what the paper says of magnitudes, groups against single calls, and the main network within."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.compression.transforms import applied, build_transforms
from lissom.models import products
from lissom.models.bounds import UnsupportedForm
from lissom.models.cnn import ConvNet
from lissom.models.hypernetworks.hypernetwork import CODES, Hypernetwork
from lissom.models.linear import Conv
from lissom.models.variables import Parts, flatten, logical_axes, merge, path_name, split

MAIN = {"network": "cnn", "network_size": "tiny"}
DEFAULT = {"code": "raw", "residual": False}


def made(seed=0, hidden=(16, 128), **settings):
    return Hypernetwork(input_shape=(12, 2), classes=3, hidden=hidden, rngs=nnx.Rngs(seed), **{**MAIN, **settings})


def inputs(rows=6, seed=1):
    return jax.random.normal(jax.random.key(seed), (rows, 12, 2))


def params_of(net):
    return flatten(split(net).params)


def test_codes_by_hand():
    """gamma 0, 1/3, 1/2, 1: angles 0, 30, 45 and 90 degrees."""
    at = jnp.array([[0.0, 1 / 3], [0.5, 1.0]])
    half, root = 3**0.5 / 2, 0.5**0.5
    np.testing.assert_allclose(CODES["cosine"](at), [[1, half, 0, 0.5], [root, 0, root, 1]], atol=1e-6)
    np.testing.assert_array_equal(CODES["raw"](at), at)


def test_the_code_has_one_norm():
    at = jax.random.uniform(jax.random.key(0), (200, 3))
    np.testing.assert_allclose(jnp.linalg.norm(CODES["cosine"](at), axis=-1), 3**0.5, rtol=1e-6)


@pytest.mark.parametrize("code", CODES)
def test_by_its_equation(code):
    """One hidden layer, numbers by numpy, biases that are not 0."""
    net = made(hidden=(5,), code=code, conditions=2)
    net.layers[0].bias[...] = jax.random.normal(jax.random.key(3), (5,))
    gamma = np.array([[0.2, 0.9]], np.float32)
    e = np.concatenate([np.cos(np.pi * gamma / 2), np.sin(np.pi * gamma / 2)], -1) if code == "cosine" else gamma
    z = e @ np.asarray(net.layers[0].kernel[...]) + np.asarray(net.layers[0].bias[...])
    z = np.where(z > 0, z, 0.01 * z)
    found, main = net.weights(jnp.asarray(gamma)), params_of(net.network)
    assert net.names == tuple(found)
    for name, head in zip(net.names, net.heads, strict=True):
        expected = main[name] + np.tensordot(z, head.kernel[...], 1)[0]
        np.testing.assert_allclose(found[name][0], expected, atol=1e-5)


@pytest.mark.parametrize("factor", [0.5, 0.125])
def test_the_defaults_weights_are_proportional_to_the_condition(factor):
    """h(a e) = a h(e), exactly: factors of two round nothing, and every bias begins at 0. The residual is added to what
    is proportional; the code makes it proportional to nothing."""
    gamma = jnp.array([[0.875], [0.25]])
    net = made(**DEFAULT)
    whole, part = net.weights(gamma), net.weights(factor * gamma)
    for name in net.names:
        assert np.abs(whole[name]).max() > 0
        np.testing.assert_array_equal(part[name], factor * whole[name])

    def added(net, at):
        """The norm of all that h adds to theta_0."""
        found, base = net.weights(jnp.full((1, 1), at)), params_of(net.network)
        return float(jnp.sqrt(sum(jnp.square(found[name] - base[name]).sum() for name in found)))

    alone, coded = made(code="raw"), made(hidden=(512, 512))  # so wide that a draw is like its mean
    assert added(alone, 0.5 * factor) == pytest.approx(factor * added(alone, 0.5), rel=1e-4)
    assert added(coded, 0.5 * factor) == pytest.approx(added(coded, 0.5), rel=0.15)


def test_gradients_of_the_default_grow_with_the_condition():
    """Of the last kernel, W_theta, in proportion to it where those of the weights are given: the last hidden layer is
    proportional. Of the magnitude-invariant form they do not."""

    def norm(net, at):
        graph, params, *rest = split(net)
        total = lambda params: sum(
            leaf.sum() for leaf in merge(Parts(graph, params, *rest)).weights(jnp.full((1, 1), at)).values()
        )
        return float(jnp.linalg.norm(jax.grad(total)(params)["heads"][0]["kernel"]))

    assert norm(made(**DEFAULT), 0.125) == pytest.approx(norm(made(**DEFAULT), 1.0) / 8, rel=1e-6)
    assert 0.5 < norm(made(), 0.125) / norm(made(), 1.0) < 2


def test_predicted_tensors_keep_the_norm_of_the_code():
    """Kaiming's variances by fan-out: each tensor's expected square of h is |e|^2, here 1, whatever its size is: mean
    over draws. Of the main network alone the largest kernel has a norm of about 8 (variance 2 / fan-in)."""
    squares = []
    for seed in range(20):
        net = made(seed=seed, network_kwargs={"cnn": {"channels": (25, 25), "kernel": 5}})
        base = params_of(net.network)
        found = net.weights(jnp.array([[0.3]]))
        squares.append([float(jnp.square(found[name][0] - base[name]).sum()) for name in net.names])
    np.testing.assert_allclose(np.mean(squares, 0), 1.0, rtol=0.35)
    assert float(jnp.linalg.norm(base["convs/1/kernel"])) == pytest.approx((25 * 2) ** 0.5, rel=0.1)


def test_predicted_tensors_as_large_as_in_the_main_network():
    """At |e| = 1, means over draws; biases of the main network begin at 0."""
    ratios = []
    for seed in range(20):
        net = made(seed=seed, **DEFAULT, head_init="main", network_kwargs={"cnn": {"channels": (25, 25), "kernel": 5}})
        alone = params_of(ConvNet(input_shape=(12, 2), classes=3, channels=(25, 25), kernel=5, stride=2,
                                  rngs=nnx.Rngs(seed)))  # fmt: skip
        found = net.weights(jnp.ones((1, 1)))
        assert all((leaf == 0).all() for name, leaf in found.items() if name.endswith("bias"))
        of_kernels = [name for name in net.names if name.endswith("kernel")]
        ratios.append([float(jnp.square(found[name]).sum() / jnp.square(alone[name]).sum()) for name in of_kernels])
    np.testing.assert_allclose(np.mean(ratios, 0), 1.0, rtol=0.35)


@pytest.mark.parametrize("residual", [True, False])
def test_without_h_it_is_the_main_network(residual):
    """With the residual a main network as it begins alone; without it one of zeros, whose logits are 0."""
    net = made(residual=residual)
    for head in net.heads:
        head.kernel[...] = jnp.zeros_like(head.kernel[...])
    x = inputs()
    alone = ConvNet(input_shape=(12, 2), classes=3, channels=(4, 4), kernel=3, stride=2, rngs=nnx.Rngs(0))
    expected = alone(x)[0] if residual else jnp.zeros((6, 3))
    assert not residual or np.abs(expected).max() > 0.1
    for condition in (None, jnp.array([[0.1], [0.7], [1.0]])):
        np.testing.assert_allclose(net(x, condition)[0], expected, atol=1e-5)


def test_what_is_predicted_is_what_the_main_network_has():
    net, alone = made(), ConvNet(input_shape=(12, 2), classes=3, channels=(4, 4), kernel=3, stride=2, rngs=nnx.Rngs(0))
    shapes = lambda tree, axes: {name: leaf.shape[axes:] for name, leaf in tree.items()}
    assert shapes(net.weights(jnp.zeros((3, 1))), 1) == shapes(params_of(alone), 0)
    axes, own = ({path_name(p): names for p, names in logical_axes(module).items()} for module in (net, alone))
    assert [axes[f"heads/{n}/kernel"] for n in range(len(net.names))] == [(None, *own[name]) for name in net.names]


def test_what_is_not_predicted_stays_a_parameter():
    net = made(predicted="^head/", **DEFAULT)
    assert net.names == ("head/bias", "head/kernel")
    params = params_of(net)
    assert np.abs(params["network/convs/0/kernel"]).max() > 0  # not zeroed, and trained as it is
    assert np.abs(params["network/head/kernel"]).max() == 0
    x, at = inputs(), jnp.array([[0.2], [0.9]])
    np.testing.assert_allclose(net(x, at)[0], by_hand(net, x, at), atol=1e-5)


def by_hand(net, x, condition, train=False, key=None):
    """One call of the main network, as it is alone, a group."""
    graph, params, stats, frozen = split(net.network)
    found, rows = net.weights(condition), len(x) // len(condition)
    keys = [None] * len(condition) if key is None else jax.random.split(key, len(condition))
    outputs = []
    for group, key in enumerate(keys):
        flat = {name: found[name][group] if name in found else leaf for name, leaf in flatten(params).items()}
        tree = jax.tree.unflatten(jax.tree.structure(params), list(flat.values()))
        main = merge(Parts(graph, tree, stats, frozen))
        outputs.append(main(x[group * rows : (group + 1) * rows], train=train, key=key)[0])
    return jnp.concatenate(outputs)


@pytest.mark.parametrize("settings", [{}, DEFAULT, {"network": "sequence_transformer"}], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_groups_in_one_call_are_calls_of_their_own(settings, groups):
    net = made(**settings)
    x, at = inputs(), jnp.linspace(0.1, 1, groups)[:, None]
    output = net(x, at)[0]
    np.testing.assert_allclose(output, by_hand(net, x, at), atol=1e-5)
    if groups > 1:  # and the condition matters
        assert np.abs(output - by_hand(net, x, at[::-1])).max() > 1e-3
        np.testing.assert_allclose(jax.jit(net)(x, at)[0], output, atol=1e-5)


def test_every_group_drops_by_a_key_of_its_own():
    net = made(network_kwargs={"cnn": {"dropout": 0.5}})
    x, at, key = (
        jnp.repeat(inputs(2), 3, 0).reshape(2, 3, 12, 2).swapaxes(0, 1).reshape(6, 12, 2),
        None,
        jax.random.key(7),
    )
    at = jnp.full((3, 1), 0.4)
    output = net(x, at, train=True, key=key)[0]
    np.testing.assert_allclose(output, by_hand(net, x, at, True, key), atol=1e-5)
    assert np.abs(output[:2] - output[2:4]).max() > 1e-3  # the same inputs


def test_losses_are_means_and_tallies_are_sums_over_groups():
    class Telling(nnx.Module):
        def __init__(self, *, input_shape, classes, rngs):
            self.kernel = nnx.Param(jnp.ones(3), out_sharding=(None,))

        def __call__(self, inputs, *, train=False, key=None):
            aux = {"losses": {"a": inputs.sum()}, "metrics": {"b": inputs.mean(), "class_hits": inputs[:, 0, :1]}}
            return inputs[:, 0, :1] * self.kernel[...], aux

    net = made()
    net.network, net.names = Telling(input_shape=(12, 2), classes=3, rngs=nnx.Rngs(0)), ("kernel",)
    net.heads = nnx.List([net.heads[0]])
    net.heads[0].kernel = nnx.Param(jnp.zeros((128, 3)), out_sharding=(None, None))
    x = inputs()
    output, aux = net(x, jnp.full((3, 1), 0.5))
    np.testing.assert_allclose(output, jnp.repeat(x[:, 0, :1], 3, 1))
    assert aux["losses"]["a"] == pytest.approx(float(x.sum()) / 3, rel=1e-4)
    assert aux["metrics"]["b"] == pytest.approx(float(x.mean()), rel=1e-4)
    np.testing.assert_allclose(aux["metrics"]["class_hits"], x.reshape(3, 2, 12, 2)[:, :, 0, :1].sum(0), rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, DEFAULT, {**DEFAULT, "head_init": "main"}], ids=str)
def test_everything_learns(settings):
    net = made(**settings)
    graph, params, stats, frozen = split(net)
    x, at = inputs(), jnp.array([[0.3], [0.8]])
    loss = lambda params: jnp.square(merge(Parts(graph, params, stats, frozen))(x, at)[0] - 1).sum()
    norms = {name: float(jnp.abs(leaf).max()) for name, leaf in flatten(jax.grad(loss)(params)).items()}
    assert [name for name, norm in norms.items() if norm == 0] == []
    # theta_0 has the sum of the groups' gradients, of h a multiple of each.
    assert {name.split("/")[0] for name in norms} == {"network", "layers", "heads"}


def test_a_main_network_in_fewer_bits():
    """theta_0 is stored in int8, by one scale a channel, and what is predicted is added to what it stands for."""
    net, x, at = made(), inputs(), jnp.array([[0.3], [0.8]])
    small = applied(made(), build_transforms([{"name": "int8_weights", "rules": (("^network/", {}),)}]), iter(()))
    assert split(small).frozen["network"]["convs"][0]["kernel"]["integers"].dtype == jnp.int8
    for name, weights in net.weights(at).items():
        error = np.abs(small.weights(at)[name] - weights).max()
        largest = np.abs(params_of(net.network)[name]).max()
        assert error == 0 if name.endswith("bias") else 0 < error <= largest / 254 * 1.001
    assert 0 < np.abs(small(x, at)[0] - net(x, at)[0]).max() < 0.1


def test_no_condition_is_the_middle():
    net, x = made(conditions=2), inputs()
    np.testing.assert_array_equal(net(x)[0], net(x, jnp.full((1, 2), 0.5))[0])
    assert np.abs(net(x)[0] - net(x, jnp.full((1, 2), 0.4))[0]).max() > 1e-4


def test_bad_calls_are_one_sentence():
    net, x = made(), inputs()
    with pytest.raises(UnsupportedForm, match="6 examples can't be 4 groups of one condition each"):
        net(x, jnp.zeros((4, 1)))
    with pytest.raises(UnsupportedForm, match=r"is 1 numbers, \[groups, 1\], and this one is \[6\]"):
        net(x, jnp.zeros(6))
    for outside in (-0.1, 1.5, jnp.nan):
        with pytest.raises(ValueError, match=r"a condition must lie in \[0, 1\]"):
            net(x, jnp.full((2, 1), outside))
    net.network.ranges = nnx.BatchStat(jnp.zeros(2))
    with pytest.raises(UnsupportedForm, match="carries no statistics, and this one has ranges"):
        net(x)
    del net.network.ranges
    net.network.convs[0].kernel = None
    with pytest.raises(UnsupportedForm, match="predicts convs/0/kernel, which its main network does not have"):
        net(x)


@pytest.mark.parametrize("spatial,kernel,stride", [((13,), (5,), 2), ((7, 6), (3, 2), 1), ((5, 4, 6), (2, 3, 3), 2)])
def test_convolutions_as_products_of_matrices(spatial, kernel, stride):
    conv = Conv(3, 4, kernel, stride=stride, bias=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, *spatial, 3))
    plain, text = conv(x), str(jax.make_jaxpr(conv)(x))
    with products.as_matrices():
        np.testing.assert_allclose(conv(x), plain, atol=1e-5)
        inside = str(jax.make_jaxpr(lambda x: conv(x))(x))
    assert "conv_general_dilated" in text and "conv_general_dilated" not in inside
    assert "conv_general_dilated" in str(jax.make_jaxpr(lambda x: conv(x))(x))


def test_mapped_convolutions_are_no_grouped_ones():
    net, x = made(), inputs()
    text = str(jax.make_jaxpr(lambda at: net(x, at)[0])(jnp.zeros((3, 1))))
    assert "conv_general_dilated" not in text
    assert "conv_general_dilated" in str(jax.make_jaxpr(lambda at: net(x, at)[0])(jnp.zeros((1, 1))))
