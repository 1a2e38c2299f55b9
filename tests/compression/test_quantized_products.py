"""Each of the three products of training has the operands that its rule says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard as sylvester

from lissom.compression.quantization.products import Operand, Rule, hadamard, product, rounded
from lissom.compression.quantization.rounding import fake
from lissom.compression.quantization.scaling import Scheme

ROWS, INPUTS, OUTPUTS = 16, 32, 8
FP4 = Operand(Scheme("fp4_e2m1", per=8, scale_format="ue4m3", tensor_scale=True))
INT4 = Operand(Scheme("int4"))


def operands(seed=0):
    x, w, d_y = (
        jnp.asarray(np.random.default_rng(seed + i).normal(size=shape), jnp.float32)
        for i, shape in enumerate([(ROWS, INPUTS), (INPUTS, OUTPUTS), (ROWS, OUTPUTS)])
    )
    return x, w, d_y


def pulled(rule, key=None):
    x, w, d_y = operands()
    y, pull = jax.vjp(jax.jit(lambda x, w: product(x, w, rule, key)), x, w)
    return y, *pull(d_y)


def test_without_rules_it_is_the_product():
    x, w, d_y = operands()
    for found, expected in zip(pulled(Rule()), (x @ w, d_y @ w.T, x.T @ d_y), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("through_scale", [False, True])
def test_forward_alone_is_the_derivative_of_rounded_operands(through_scale):
    """Whether scales are constants or not, and in rotated blocks too."""
    x, w, d_y = operands()
    own = Operand(Scheme("int4", per=8), rotation=8, through_scale=through_scale)

    def plain(x, w):
        x, w = hadamard(x, 1, 8), hadamard(w, 0, 8)
        kinds = {"through_scale": through_scale}
        return fake(x, own.scheme, (1,), **kinds) @ fake(w, own.scheme, (0,), **kinds)

    y, pull = jax.vjp(plain, x, w)
    for found, expected in zip(pulled(Rule(forward=(own, own))), (y, *pull(d_y)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_each_product_rounds_its_own_operands():
    """Along what it sums over: a kernel has other groups backward than forward."""
    x, w, d_y = operands()
    one, other = FP4.scheme, INT4.scheme
    y, d_x, d_w = pulled(Rule(forward=(FP4, INT4), by_inputs=(INT4, FP4), by_weights=(FP4, FP4)))
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(y, fake(x, one, (1,)) @ fake(w, other, (0,)), **close)
    np.testing.assert_allclose(d_x, fake(d_y, other, (1,)) @ fake(w.T, one, (0,)), **close)
    np.testing.assert_allclose(d_w, fake(x.T, one, (1,)) @ fake(d_y, one, (0,)), **close)
    assert np.abs(y - x @ w).max() > 0.1


@pytest.mark.parametrize("block", [2, 8, 32])
def test_rotations_are_hadamards_and_cancel(block):
    x, w, _ = operands()
    matrix = np.kron(np.eye(INPUTS // block), sylvester(block)) / np.sqrt(block)
    np.testing.assert_allclose(hadamard(x, 1, block), np.asarray(x) @ matrix, atol=1e-5)
    np.testing.assert_allclose(hadamard(w, 0, block), matrix @ np.asarray(w), atol=1e-5)
    np.testing.assert_allclose(hadamard(x, 1, block) @ hadamard(w, 0, block), x @ w, atol=1e-4)
    # Rounded forward and backward in rotated blocks: with 8 bits nearly the product itself.
    int8 = Operand(Scheme("int8"), rotation=block)
    few = Operand(Scheme("int8"), rotation=8)
    y, d_x, d_w = pulled(Rule(forward=(int8, int8), by_inputs=(few, few), by_weights=(few, few)))
    _, _, d_y = operands()
    for found, expected in zip((y, d_x, d_w), (x @ w, d_y @ w.T, x.T @ d_y), strict=True):
        assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


def test_rotations_help_against_what_lies_far_out():
    x, w, _ = operands()
    x = x.at[:, 5].mul(10)
    errors = []
    for rotation in (0, 32):
        own = Operand(Scheme("int4", per="tensor"), rotation=rotation)
        exact = Operand(Scheme("int8"), rotation=rotation)
        errors.append(np.abs(product(x, w, Rule(forward=(own, exact))) - x @ w).mean())
    assert errors[1] < 0.7 * errors[0]


def test_small_gradients_need_scales_that_reach_them():
    """UE4M3's smallest scale is 2^-9: a gradient below a quarter of that is gone, one above half of it is not."""
    x, w, d_y = operands()

    def relative(size, **scheme):
        operand = Operand(Scheme("fp4_e2m1", per=8, **scheme))
        rule = Rule(by_inputs=(operand, None), by_weights=(None, operand))
        d_y_ = size * d_y / jnp.abs(d_y).max()
        _, pull = jax.vjp(lambda x, w: product(x, w, rule), x, w)
        exact = d_y_ @ w.T, x.T @ d_y_
        return max(
            float(np.abs(found - want).max() / np.abs(want).max())
            for found, want in zip(pull(d_y_), exact, strict=True)
        )

    small = 0.24 * 2**-9
    assert relative(small, scale_format="ue4m3") == 1  # exactly 0
    assert relative(100 * small, scale_format="ue4m3") < 0.5
    for reaching in (
        {"scale_format": "ue4m3", "tensor_scale": True},
        {"scale_format": "ue5m3"},
        {"scale_format": "e8m0"},
    ):
        assert relative(small, **reaching) < 0.5


def test_stochastic_gradients_are_right_on_average():
    x, w, d_y = operands()
    random = Operand(Scheme("int4", per="tensor"), stochastic=True)
    rule = Rule(by_inputs=(random, None), by_weights=(None, random))
    found = jax.vmap(lambda key: jax.vjp(lambda x, w: product(x, w, rule, key), x, w)[1](d_y))
    d_x, d_w = found(jax.random.split(jax.random.key(0), 2000))
    for draws, expected in ((d_x, d_y @ w.T), (d_w, x.T @ d_y)):
        error = np.abs(draws.mean(0) - expected)
        assert (error <= 5 * draws.std(0) / np.sqrt(2000) + 1e-5).all() and draws.std(0).max() > 0.1
    # Without a key the operands' own bits are one: twice the same, and another for others.
    own = [
        jax.jit(lambda x, w: jax.vjp(lambda x, w: product(x, w, rule), x, w)[1](d_y)[0])(x + more, w)
        for more in (0, 0, 1e-3)
    ]
    np.testing.assert_array_equal(own[0], own[1])
    assert np.abs(own[0] - own[2]).max() > 0.1


def test_backward_fills_the_last_group():
    """Rows and outputs that are no multiple of it: as with zeros beside them."""
    x, w, d_y = operands()
    rule = Rule(forward=(INT4, INT4), by_inputs=(FP4, FP4), by_weights=(FP4, FP4))
    few = x[:13], w[:, :5], d_y[:13, :5]
    wide = (jnp.pad(few[0], ((0, 3), (0, 0))), jnp.pad(few[1], ((0, 0), (0, 3))), jnp.pad(few[2], ((0, 3), (0, 3))))
    pull = lambda x, w, d_y: jax.vjp(lambda x, w: product(x, w, rule), x, w)[1](d_y)
    (d_x, d_w), (wide_x, wide_w) = pull(*few), pull(*wide)
    np.testing.assert_allclose(d_x, wide_x[:13], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_w, wide_w[:, :5], rtol=1e-5, atol=1e-6)


def test_forward_and_its_gradient_see_the_same_draws():
    """Rounded at random, on the rotated axes, and with scales that have gradients: as differentiating it would."""
    random = Operand(Scheme("int4", per=8), rotation=8, stochastic=True, through_scale=True)
    key = jax.random.key(3)
    x, w, d_y = operands()
    keys = jax.random.split(key, 4)
    plain = lambda x, w: rounded(x, random, (1,), keys[0]) @ rounded(w, random, (0,), keys[1])
    y, pull = jax.vjp(plain, x, w)
    for found, expected in zip(pulled(Rule(forward=(random, random)), key), (y, *pull(d_y)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(y - pulled(Rule(forward=(random, random)), jax.random.key(4))[0]).max() > 0.1


def test_what_options_cost_is_counted():
    plain = Operand(Scheme("fp4_e2m1", per=8, scale_format="ue4m3"))
    assert plain.extra_operations(100) == 400
    assert Operand(plain.scheme, rotation=16, stochastic=True).extra_operations(100) == 400 + 500 + 200
    assert FP4.extra_operations(80) == 320 + 10


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Operand(INT4.scheme, rotation=12), "rotation=12 must be a power of two"),
        (lambda: Rule(forward=(Operand(INT4.scheme, rotation=8), INT4)), "forward: both operands are rotated"),
        (lambda: product(jnp.ones((2, 3, 4)), jnp.ones((4, 5)), Rule()), "flatten both to two axes"),
        (lambda: hadamard(jnp.ones((3, 12)), 1, 8), r"rotation=8 does not divide axis 1 of \[3, 12\]"),
    ],
)
def test_bad_rules(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_blocks_of_one_are_no_rotation():
    x, w, _ = operands()
    one = Rule(forward=(Operand(INT4.scheme, rotation=1), None))
    np.testing.assert_array_equal(product(x, w, one), product(x, w, Rule(forward=(INT4, None))))
