"""Our float32 exponential against float64, over the whole of float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.ops import exponential

SMALLEST_NORMAL = 2.0**-126
# As outside of tests: optimised, where products are added without rounding.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})


def units_off(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Error of y as exp(x), in units in the last place of float32."""
    exact = np.exp(x.astype(np.float64))
    return np.abs(y.astype(np.float64) - exact) / np.spacing(exact.astype(np.float32))


def every(step: int) -> np.ndarray:
    """Every step-th float32 by its bits, negative ones and NaN too; step 1 is all of them."""
    return np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32).view(np.float32)


def check(x: np.ndarray) -> None:
    y = np.asarray(compiled(exponential.exp)(x))
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.exp(x.astype(np.float64))
    finite = (exact >= SMALLEST_NORMAL) & (x < exponential.LARGEST_FINITE)
    assert units_off(x[finite], y[finite]).max(initial=0) <= exponential.LARGEST_ERROR
    below = exact < SMALLEST_NORMAL
    assert ((y[below] >= 0) & (y[below] <= SMALLEST_NORMAL)).all()
    assert (y[exact < 2.0**-127] == 0).all()
    assert np.isposinf(y[x > 88.73]).all()
    assert (np.isnan(y) == np.isnan(x)).all()


def test_a_sample_of_all_floats():
    # An odd step meets every exponent with varying mantissas; a third of the points lie in the range that matters.
    check(every(1021))
    check(np.random.default_rng(0).uniform(-90, 90, 2**20).astype(np.float32))


@pytest.mark.slow
def test_all_floats():
    for start in range(0, 2**32, 2**24):
        check(np.arange(start, start + 2**24, dtype=np.uint64).astype(np.uint32).view(np.float32))


def test_special_values():
    x = jnp.array([-jnp.inf, jnp.inf, jnp.nan, 0.0, -0.0, -1e38, 1e38], jnp.float32)
    np.testing.assert_array_equal(exponential.exp(x), [0, np.inf, np.nan, 1, 1, 0, np.inf])


def test_mantissa_and_exponent():
    x = np.random.default_rng(0).uniform(-2e4, 2e4, 2**16).astype(np.float32)
    p, n = (np.asarray(a) for a in compiled(exponential.mantissa_and_exponent)(x))
    assert p.min() >= 0.70 and p.max() <= 1.42
    exact = np.exp(x.astype(np.float64) - n * np.log(2.0))
    assert (np.abs(p - exact) / np.spacing(exact.astype(np.float32))).max() <= 2
    corrected, same = compiled(exponential.mantissa_and_exponent)(x, np.float32(2**-6))
    np.testing.assert_array_equal(same, n)
    np.testing.assert_allclose(corrected, exact * np.exp(2**-6), rtol=3e-7)


def test_powers_of_two():
    n = np.arange(-127, 129, dtype=np.int32)
    np.testing.assert_array_equal(exponential.power_of_two(n), [0, *2.0 ** np.arange(-126.0, 128), np.inf])


def test_derivatives():
    x = jnp.array([-3.0, 0.0, 2.0])
    first = jax.vmap(jax.grad(exponential.exp))
    second = jax.vmap(jax.grad(jax.grad(exponential.exp)))
    for derivative in (first, second):
        np.testing.assert_allclose(derivative(x), np.exp(x), rtol=1e-6)
    assert jax.grad(exponential.exp)(-jnp.inf) == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_other_dtypes_are_xlas_own(dtype):
    x = jnp.linspace(-3, 3, 50, dtype=dtype)
    y = exponential.exp(x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, jnp.exp(x))
