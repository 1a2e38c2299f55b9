"""Every implementation of the product with few bits against the float64 reference, the reference against sums by hand,
and integers against numpy's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.evaluation import costs
from lissom.ops import testing
from lissom.ops.quantized_matmul import OP, quantized_matmul, xla
from lissom.ops.quantized_matmul.cases import REAL, TINY, Case, arrays
from lissom.ops.quantized_matmul.decoding import halves, in_halves, in_order
from tests.ops.traced import operations

PLAIN = [name for name in OP.implementations if not name.startswith("pallas")]
BF16 = jnp.bfloat16


@pytest.fixture
def small_blocks(monkeypatch):
    """Tiny problems have several blocks of 8 channels, the last of which does not come out even."""
    monkeypatch.setattr(xla, "BLOCK", 1)


def call(case, codes, implementation, x, scale, x_scale=None):
    return quantized_matmul(x, codes, scale, bits=case.bits, x_scale=x_scale, implementation=implementation)


def given(case, seed=0):
    """x, codes, scale and what else there is, as numpy arrays."""
    return [np.asarray(a) for a in arrays(case, jax.random.key(seed))]


def check(case, implementation, dtype=np.float32, check=testing.check_forward, seed=0):
    """What is float32 in the case is differentiated or cast; codes, and x of few bits, are constants."""
    x, codes, scale, *x_scale = given(case, seed)
    if x_scale:
        f = lambda i, scale, x_scale: call(case, codes, i, x, scale, x_scale)
        check(OP, f, {"scale": scale, "x_scale": x_scale[0]}, implementation, np.float32)
    elif dtype == np.float32:
        check(OP, lambda i, x, scale: call(case, codes, i, x, scale), {"x": x, "scale": scale}, implementation, dtype)
    else:
        check(OP, lambda i, x: call(case, codes, i, x, scale), {"x": x}, implementation, dtype)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("name", TINY)
def test_equals_reference(name, dtype, small_blocks):
    check(TINY[name], "xla", dtype, testing.check_case)


@pytest.mark.parametrize("name", ["int4_groups", "int4_int8", "fp8"])
def test_equals_reference_in_one_block(name):
    check(TINY[name], "xla", check=testing.check_case)


def test_the_reference_is_the_equation():
    """In float64, against loops over numbers written without jax."""
    case = Case(2, 12, 3, "int4", "float64", 4, "")
    rng = np.random.default_rng(0)
    x, codes, scale = rng.standard_normal((2, 12)), rng.integers(0, 256, (3, 6)), rng.standard_normal((3, 3))
    y = np.zeros((2, 3))
    for row in range(2):
        for n in range(3):
            for k in range(12):
                nibble = int(codes[n, k // 2]) >> 4 * (k % 2) & 15
                y[row, n] += x[row, k] * scale[n, k // 4] * (nibble - 16 * (nibble > 7))
    with jax.enable_x64(True):
        found = call(case, jnp.asarray(codes, jnp.uint8), "reference", jnp.asarray(x), jnp.asarray(scale))
    np.testing.assert_allclose(found, y, atol=1e-13)
    testing.show_equal("quantized_matmul", "reference")


@pytest.mark.parametrize("implementation", PLAIN)
def test_hand_computed(implementation):
    # The byte 0x7F is -1 (low) and 7, 0x80 is 0 and -8. Groups of two with scales 1 and 10:
    # 1 * -1 + 2 * 7 = 13, 10 * (3 * 0 + 4 * -8) = -320, together -307.
    x = jnp.array([1.0, 2.0, 3.0, 4.0])
    codes, scale = jnp.array([[0x7F, 0x80]], jnp.uint8), jnp.array([[1.0, 10.0]])
    y = quantized_matmul(x, codes, scale, bits=4, implementation=implementation)
    assert y.shape == (1,) and y.tolist() == [-307.0]
    # Of int8 with a scale of x of 0.5: (1 * -128 + 2 * 127) * 3 * 0.5 = 189.
    y = quantized_matmul(
        jnp.array([[1, 2]], jnp.int8),
        jnp.array([[-128, 127]], jnp.int8),
        jnp.array([[3.0]]),
        x_scale=jnp.float32(0.5),
        implementation=implementation,
    )
    assert y.dtype == jnp.float32 and y.tolist() == [[189.0]]


def test_halves():
    byte = jnp.arange(256, dtype=jnp.int32).astype(jnp.uint8).reshape(8, 32)
    numbers = np.asarray(in_order(halves(byte, 4), 4)).reshape(256, 2)
    sign = lambda nibble: nibble - 16 * (nibble > 7)
    code = np.arange(256)
    np.testing.assert_array_equal(numbers, np.stack([sign(code & 15), sign(code >> 4)], 1))
    x = jnp.arange(12.0).reshape(2, 6)
    assert in_halves(x, 4).tolist() == [[[0, 2, 4], [1, 3, 5]], [[6, 8, 10], [7, 9, 11]]]
    for bits in (4, 8):
        np.testing.assert_array_equal(in_order(in_halves(x, bits), bits), x)


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize(("bits", "group", "m"), [(8, None, 1), (8, None, 6), (8, 128, 3), (4, 128, 1), (4, None, 5)])
def test_integers_are_summed_exactly(implementation, bits, group, m):
    """Sums that float32 does not hold (of 2048 products of -128 * -128, 2^25), against numpy's int64."""
    rng = np.random.default_rng(m)
    k, n = 2048, 5
    x = rng.integers(-128, 128, (m, k), np.int8)
    x[:, : k // 2] = -128
    codes = rng.integers(-128, 128, (n, k * bits // 8), np.int8)
    codes[0] = -128  # of 4 bits: 0 and -8
    groups = 1 if group is None else k // group
    scale = np.exp2(rng.integers(-4, 5, (n, groups))).astype(np.float32)
    numbers = codes.astype(np.int64)
    if bits == 4:
        nibbles = np.stack([codes.view(np.uint8) & 15, codes.view(np.uint8) >> 4], -1).reshape(n, k).astype(np.int64)
        numbers, codes = nibbles - 16 * (nibbles > 7), codes.view(np.uint8)
    sums = np.einsum("mgk,ngk->mng", x.astype(np.int64).reshape(m, groups, -1), numbers.reshape(n, groups, -1))
    assert groups > 1 or bits == 4 or sums.max() > 2**24
    # The scales are powers of two: only the sum over groups rounds, of whose terms none is below 1/16.
    want = (sums * scale.astype(np.float64)).sum(-1)
    found = quantized_matmul(x, codes, scale, bits=bits, x_scale=np.float32(1), implementation=implementation)
    if groups == 1:
        np.testing.assert_array_equal(found, want.astype(np.float32))
    else:
        np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("name", ["int8_int8", "int4_groups", "int4_groups_row"])
def test_leading_axes_and_scales_of_x(name, implementation, small_blocks):
    case = TINY[name]
    x, codes, scale, *x_scale = given(case)
    x = np.stack([x, x[::-1]])[:, None]  # [2, 1, m, k]
    f = functools.partial(call, case, codes, implementation)
    if not x_scale:
        y = f(x, scale)
        assert y.shape == (2, 1, case.m, case.n)
        np.testing.assert_allclose(y[1, 0, ::-1], f(x[0, 0], scale), rtol=1e-5, atol=1e-5)
        return
    (rows,) = x_scale
    one = f(x, scale, np.ones((), np.float32))
    for of_x in (np.float32(3), rows, rows[None], np.stack([rows, 2 * rows])[:, None]):
        np.testing.assert_allclose(f(x, scale, of_x), one * of_x, rtol=1e-6)


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("name", ["int8_row", "int4_groups", "int8_int8_row", "fp8_fp8"])
def test_vmap_equals_a_loop(name, implementation, small_blocks):
    case = TINY[name]
    sets = [arrays(case, jax.random.key(seed)) for seed in range(3)]
    x, codes, scale, *x_scale = (jnp.stack(a) for a in zip(*sets))

    def one(x, codes, scale, x_scale=None):
        return call(case, codes, implementation, x, scale, x_scale)

    for axes in ((0, None, None, 0), (0, 0, 0, 0), (None, None, 0, None)):
        operands = [a if axis == 0 else a[0] for a, axis in zip((x, codes, scale, *x_scale), axes)]
        together = jax.jit(jax.vmap(one, in_axes=axes[: len(operands)]))(*operands)
        for i in range(3):
            alone = one(*(a[i] if axis == 0 else a for a, axis in zip(operands, axes)))
            np.testing.assert_allclose(together[i], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["int8", "int4_groups"])
def test_differentiates_twice(name, small_blocks):
    """As the reference, which is plain jnp, in float64."""
    case = TINY[name]

    def penalty(implementation, x, scale):
        loss = lambda *a: (call(case, codes, implementation, *a) ** 2).sum()
        return sum((g**2).sum() for g in jax.grad(loss, argnums=(0, 1))(x, scale))

    with jax.enable_x64(True):
        x, codes, scale = given(case)
        both = jnp.asarray(x, jnp.float64), jnp.asarray(scale, jnp.float64)
        ours, theirs = (jax.grad(penalty, argnums=(1, 2))(name, *both) for name in ("xla", "reference"))
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(b).max())


@pytest.mark.parametrize("implementation", PLAIN)
def test_numbers_of_few_bits_are_constants(implementation):
    x, codes, scale, x_scale = (jnp.asarray(a) for a in given(TINY["fp8_fp8"]))
    f = lambda x, codes: call(TINY["fp8_fp8"], codes, implementation, x, scale, x_scale).sum()
    for gradient in jax.grad(f, argnums=(0, 1))(x, codes):
        assert not gradient.astype(jnp.float32).any()


@pytest.mark.parametrize(
    ("m", "n", "group", "moved"), [(8, 64, None, "x"), (64, 8, None, "codes"), (8, 64, 8, "codes")]
)
def test_numbers_of_4_bits_meet_x_where_less_is_moved(m, n, group, moved):
    """x is cut into halves where it is smaller than the matrix, else the numbers are put in order, as where groups have
    scales, each of which lies in both halves."""
    case = Case(m, 32, n, "int4", "int8", group, "")
    x, codes, *scales = arrays(case, jax.random.key(0))
    made = operations(jax.make_jaxpr(lambda *a: call(case, codes, "xla", a[0], *a[1:]))(x, *scales).jaxpr)
    sizes = {e.invars[0].aval.size for e in made if e.primitive.name == "transpose" and e.invars[0].aval.ndim == 3}
    assert sizes == {{"x": m, "codes": n}[moved] * 32}


@pytest.mark.parametrize("name", ["gemv_int8", "gemv_int4", "m16_int4", "m512_int8", "int8_2048"])
def test_the_matrix_is_neither_transposed_nor_whole_in_numbers(name):
    """One row of int8 is multiplied without a product of matrices, others in blocks; nothing of floats or of int8 has
    the size of the matrix but in `gemv_int8`, where it is no array of the compiled program."""
    case = REAL[name]
    x, codes, scale, *x_scale = jax.eval_shape(lambda: arrays(case, jax.random.key(0)))
    f = lambda x, scale, codes, *x_scale: call(case, codes, "xla", x, scale, *x_scale)
    made = list(operations(jax.make_jaxpr(f)(x, scale, codes, *x_scale).jaxpr))
    products = [e for e in made if e.primitive.name == "dot_general"]
    assert len(products) == (0 if name == "gemv_int8" else 1)
    for e in made:
        if e.primitive.name == "transpose":
            assert e.invars[0].aval.size <= max(case.m * max(case.k, case.n), case.groups * case.n)
    for e in products:
        whole = case.n * case.k
        assert case.x == "int8" or max(v.aval.size for v in e.invars) <= max(xla.BLOCK, case.m * case.k) < whole
    if case.x == "int8":
        assert [v.aval.dtype for v in (*products[0].invars, *products[0].outvars)] == [np.int8, np.int8, np.int32]
    memory = jax.jit(f).lower(x, scale, codes, *x_scale).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 4 * (3 * xla.BLOCK + 3 * case.m * max(case.k, case.n))


BAD = {
    "bits is one of 8, 4, got 2": lambda x, c, s, p: quantized_matmul(x, c, s, bits=2),
    "codes is an array of int8 or float8_e4m3fn or float8_e5m2 with bits=8, got uint8": lambda x, c, s, p: (
        quantized_matmul(x, p, s)
    ),
    "codes is an array of uint8 with bits=4, got int8": lambda x, c, s, p: quantized_matmul(x, c, s, bits=4),
    "scale is an array of float32 or float64, got bfloat16": lambda x, c, s, p: quantized_matmul(x, c, s.astype(BF16)),
    "x is an array of float16 .*, got int32": lambda x, c, s, p: quantized_matmul(x.astype(np.int32), c, s),
    "codes and scale are of rank 2": lambda x, c, s, p: quantized_matmul(x, c, s[0]),
    r"x is \[..., 12\], not empty, for codes \(7, 12\), got shape \(5, 11\)": lambda x, c, s, p: (
        quantized_matmul(x[:, 1:], c, s)
    ),
    r"x is \[..., 12\], not empty, for codes \(7, 6\) \(two a byte\), got shape \(5, 11\)": lambda x, c, s, p: (
        quantized_matmul(x[:, 1:], p, s, bits=4)
    ),
    r"scale is \[7, g\] for codes \(7, 12\), where g divides k = 12, got shape \(7, 5\)": lambda x, c, s, p: (
        quantized_matmul(x, c, np.ones((7, 5), np.float32))
    ),
    r"scale is \[7, g\] .* got shape \(6, 1\)": lambda x, c, s, p: quantized_matmul(x, c, s[1:]),
    "scale: a group of 3 numbers of 4 bits would end within a byte": lambda x, c, s, p: (
        quantized_matmul(x, p, np.ones((7, 4), np.float32), bits=4)
    ),
    "x_scale: x of int8 needs an x_scale": lambda x, c, s, p: quantized_matmul(x.astype(np.int8), c, s),
    "x_scale: x of float32 takes no x_scale": lambda x, c, s, p: quantized_matmul(x, c, s, x_scale=np.float32(1)),
    "got int8 for float8_e4m3fn": lambda x, c, s, p: (
        quantized_matmul(x.astype(np.int8), c.astype(jnp.float8_e4m3fn), s, x_scale=np.float32(1))
    ),
    "got float8_e5m2 for int8": lambda x, c, s, p: (
        quantized_matmul(x.astype(jnp.float8_e5m2), c, s, x_scale=np.float32(1))
    ),
    "x_scale is an array of float32, as scale is, got float16": lambda x, c, s, p: (
        quantized_matmul(x.astype(np.int8), c, s, x_scale=np.float16(1))
    ),
    r"x_scale is broadcastable to \(5, 1\), got shape \(5,\)": lambda x, c, s, p: (
        quantized_matmul(x.astype(np.int8), c, s, x_scale=np.ones(5, np.float32))
    ),
}  # fmt: skip


@pytest.mark.parametrize("said", BAD)
def test_bad_operands(said):
    x, codes, scale = given(TINY["int8"])
    packed = np.zeros((7, 6), np.uint8)
    with pytest.raises(ValueError, match=said):
        BAD[said](x, codes, scale, packed)


@pytest.mark.parametrize(("bits", "most"), [(8, 2**17), (4, 2**21)])
def test_sums_that_may_overflow(bits, most):
    """Of numbers down to -128 (of 4 bits -8) times -128; two groups of half as many fit."""

    def shape(groups):
        dtype = np.int8 if bits == 8 else np.uint8
        shapes = ((1, most), np.int8), ((1, most * bits // 8), dtype), ((1, groups), np.float32)
        x, codes, scale = (jax.ShapeDtypeStruct(*of) for of in shapes)
        f = lambda x, codes, scale: quantized_matmul(x, codes, scale, bits=bits, x_scale=np.float32(1))
        return jax.eval_shape(f, x, codes, scale).shape

    with pytest.raises(ValueError, match=f"a group of {most} products of up to .* may not fit into int32"):
        shape(1)
    assert shape(2) == (1, 1)


@pytest.mark.parametrize("m", [1, 3, 8])
@pytest.mark.parametrize("of", ["floats", "integers"])
def test_operations_are_those_of_the_equation(m, of):
    """A sum is no product to who counts, and rows that are padded are some: 2 m n k, whatever the form."""
    codes, scale = jnp.ones((16, 64), jnp.int8), jnp.ones((16, 1))
    x = jnp.ones((m, 64), jnp.float32 if of == "floats" else jnp.int8)
    x_scale = None if of == "floats" else jnp.ones(())
    call = lambda x: quantized_matmul(x, codes, scale, x_scale=x_scale, implementation="xla")
    assert costs.count(call, x).flops == 2 * m * 16 * 64
