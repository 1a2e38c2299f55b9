"""Every implementation of binary_matmul against numpy's product of +1 and -1, exactly, and packing by hand. The kernels
are interpreted."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.evaluation import costs
from lissom.ops import dispatch, testing
from lissom.ops.binary_matmul import OP, binary_matmul, pack_signs, xla
from lissom.ops.binary_matmul.cases import TINY
from lissom.ops.binary_matmul.packing import unpack_signs
from lissom.ops.interpreting import interpreting

ALL = list(OP.implementations)
PLAIN = [name for name in ALL if not name.startswith("pallas")]


def call(implementation, x, w, length):
    with interpreting() if implementation.startswith("pallas") else contextlib.nullcontext():
        return binary_matmul(x, w, length=length, implementation=implementation)


def signs(seed, *shape):
    return np.random.default_rng(seed).choice([-1, 1], shape)


def packed(array) -> jax.Array:
    return pack_signs(jnp.asarray(array, jnp.float32))


def check(implementation, x, w):
    """x [..., k], w [n, k] of +1 and -1."""
    with dispatch.record() as choices:
        y = jax.jit(lambda a, b: call(implementation, a, b, x.shape[-1]))(packed(x), packed(w))
    assert {choice.implementation for choice in choices} == {implementation}
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, x @ w.T)
    testing.show_equal(OP.name, implementation)


# Each with its word: bits from the lowest up. -0.0 is at least 0, NaN is not.
PACKED = [
    ([1.0, -1.0, 2.5, -0.1], 0b0101),
    ([0.0, -0.0, 0.0, -3.0], 0b0111),
    ([np.nan, np.inf, -np.inf, -np.nan], 0b0010),
    ([-1e-37, 1e-37], 0b10),
]


@pytest.mark.parametrize(("x", "word"), PACKED)
def test_packing_by_hand(x, word):
    found = pack_signs(np.array(x, np.float32))
    assert found.dtype == jnp.uint32 and found.shape == (1,) and found[0] == word


@pytest.mark.parametrize(("length", "words"), [(31, [2**31 - 1]), (32, [2**32 - 1]), (33, [2**32 - 1, 1])])
def test_rows_are_filled_up_with_zeros(length, words):
    found = jax.jit(pack_signs)(jnp.ones((2, 3, length), jnp.bfloat16))
    np.testing.assert_array_equal(found, np.broadcast_to(np.array(words, np.uint32), (2, 3, len(words))))


def test_the_last_bit_of_a_word_and_the_first_of_the_next():
    x = -np.ones(64, np.int8)
    x[[31, 32]] = 0
    np.testing.assert_array_equal(pack_signs(x), np.array([2**31, 1], np.uint32))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 1000])
def test_unpacking_is_the_inverse(length):
    x = signs(0, 3, length)
    for dtype in (jnp.int32, jnp.int8):
        found = unpack_signs(packed(x), length, dtype)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, x)


@pytest.mark.parametrize("implementation", ALL)
def test_a_product_by_hand(implementation):
    """(1, 1, -1) with (1, -1, -1) is 1 - 1 + 1 = 1 and with (-1, -1, 1) is -3; a word of 3 entries is xored to 010 and
    111: 3 - 2 * 1 and 3 - 2 * 3."""
    x, w = jnp.array([[0b011]], jnp.uint32), jnp.array([[0b001], [0b100]], jnp.uint32)
    np.testing.assert_array_equal(call(implementation, x, w, 3), [[1, -3]])


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("name", TINY)
def test_equals_the_product_of_signs(name, implementation):
    case = TINY[name]
    check(implementation, signs(1, case.m, case.k), signs(2, case.n, case.k))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("leading", [(), (2, 3), (2, 1, 4)])
def test_leading_axes(leading, implementation):
    check(implementation, signs(3, *leading, 40), signs(4, 5, 40))


@settings(max_examples=5, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    length=st.integers(1, 600),
    columns=st.sampled_from([3, 16, 256]),
    rows=st.sampled_from([2, 7, 8192]),
    words=st.sampled_from([1, 4, 24]),
    unrolled=st.sampled_from([1, 2, 32]),
    for_rows=st.booleans(),
)
def test_any_shape_in_blocks(m, n, length, columns, rows, words, unrolled, for_rows):
    """Blocks that overhang, sums in parts, and parts in a loop."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"COLUMNS": columns, "ROWS": rows, "WORDS": words, "MOST_UNROLLED": unrolled}.items():
            patch.setattr(xla, name, value)
        patch.setattr(xla, "_is_for_rows", lambda rows, words: for_rows)
        check("xla", signs(5, m, length), signs(6, n, length))


@pytest.mark.parametrize(
    ("m", "length", "is_for_rows"), [(1, 288, True), (5, 288, False), (64, 2048, True), (65, 2048, False)]
)
def test_few_rows_have_a_form_of_their_own(m, length, is_for_rows, monkeypatch):
    ran = []
    for name in ("_by_rows", "_by_columns"):
        monkeypatch.setattr(xla, name, lambda n, x, w, name=name: ran.append(name) or jnp.zeros((len(x), len(w))))
    words = -(-length // 32)
    jax.eval_shape(
        lambda x, w: call("xla", x, w, length),
        jax.ShapeDtypeStruct((m, words), jnp.uint32),
        jax.ShapeDtypeStruct((9, words), jnp.uint32),
    )
    assert ran == ["_by_rows" if is_for_rows else "_by_columns"]


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (1, 0)], ids=str)
def test_vmap(axes, implementation):
    x = signs(7, 3, 2, 50) if axes[0] == 0 else signs(7, 2, 3, 50) if axes[0] == 1 else signs(7, 2, 50)
    w = signs(8, 4, 50) if axes[1] is None else signs(8, 3, 4, 50)
    y = jax.vmap(lambda x, w: call(implementation, x, w, 50), in_axes=axes)(packed(x), packed(w))
    expected = np.einsum({(0, None): "bmk,nk->bmn", (None, 0): "mk,bnk->bmn", (1, 0): "mbk,bnk->bmn"}[axes], x, w)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("implementation", ["xla", "int8", "reference"])
def test_over_devices(implementation):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w = signs(9, 8, 3, 70), signs(10, 5, 70)
    with dispatch.partition(mesh, batch="data"):
        y = jax.jit(lambda x, w: call(implementation, x, w, 70))(packed(x), packed(w))
    np.testing.assert_array_equal(y, x @ w.T)


@pytest.mark.parametrize("implementation", ["reference", "xla", "int8", "pallas_tpu"])
def test_operations_are_counted(implementation):
    x, w = (jax.ShapeDtypeStruct((rows, 32), jnp.uint32) for rows in (6, 7))
    found = costs.count(lambda x, w: binary_matmul(x, w, length=1000, implementation=implementation), x, w)
    assert found.flops == 2 * 6 * 1000 * 7


def test_default():
    with dispatch.record() as choices:
        binary_matmul(packed(signs(0, 2, 3)), packed(signs(0, 2, 3)), length=3)
    assert {(c.implementation, c.platform) for c in choices} == {("xla", "cpu"), ("int8", "default")}


BITS, WIDE = np.zeros((2, 2), np.uint32), np.zeros((2, 3), np.uint32)


@pytest.mark.parametrize(
    ("x", "w", "length", "sentence"),
    [
        (BITS.astype(np.int32), BITS, 40, "x_bits is a uint32 array, got int32."),
        (BITS, [[1]], 40, "w_bits is a uint32 array, got list."),
        (BITS, BITS, 4.0, "length is an integer, got 4.0."),
        (BITS, BITS, True, "length is an integer, got True."),
        (BITS, BITS, 0, "length is from 1 to 2^31 - 1, got 0."),
        (WIDE, BITS, 40, "x_bits is [..., 2] for length 40 and not empty, got shape (2, 3)."),
        (BITS, WIDE, 64, "w_bits is [n, 2] for length 64 and not empty, got shape (2, 3)."),
        (BITS, BITS, 65, "x_bits is [..., 3] for length 65 and not empty, got shape (2, 2)."),
        (BITS, BITS[None], 64, "w_bits is [n, 2] for length 64 and not empty, got shape (1, 2, 2)."),
        (BITS[:0], BITS, 64, "x_bits is [..., 2] for length 64 and not empty, got shape (0, 2)."),
        (BITS[0, 0], BITS, 64, "x_bits is [..., 2] for length 64 and not empty, got shape ()."),
    ],
)
def test_errors(x, w, length, sentence):
    with pytest.raises(ValueError) as error:
        binary_matmul(x, w, length=length)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (np.array([True]), "x is a float or integer array, got bool."),
        (np.array([1j]), "x is a float or integer array, got complex128."),
        ([1.0], "x is a float or integer array, got list."),
        (np.zeros((2, 0)), "x has rank 1 at least and is not empty, got shape (2, 0)."),
        (np.float32(1), "x has rank 1 at least and is not empty, got shape ()."),
    ],
)
def test_errors_of_packing(x, sentence):
    with pytest.raises(ValueError) as error:
        pack_signs(x)
    assert str(error.value) == sentence
