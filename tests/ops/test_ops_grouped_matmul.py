"""Every implementation of the grouped matmul against the float64 reference, and the reference against loops by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from lissom.ops import testing
from lissom.ops.grouped_matmul import (
    OP,
    grouped_matmul,
    permutation,
    permute,
    transposed_grouped_matmul,
    unpermute,
    xla,
)
from lissom.ops.grouped_matmul.cases import REAL, TINY, sizes

PLAIN = [name for name in OP.implementations if not name.startswith("pallas")]
FORMS = [name for name in PLAIN if name != "reference"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Tiny problems have whole blocks and rests of several sizes."""
    monkeypatch.setattr(xla, "BLOCK", 8)
    monkeypatch.setattr(xla, "RESTS", (2, 4, 6, 8))


def inputs(case, dtype=np.float32, seed=0):
    x, w, y = testing.normal(seed, (case.m, case.k), (case.g, case.k, case.n), (case.m, case.n), dtype=dtype)
    return x, w, y, jnp.asarray(sizes(case, seed))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("name", TINY)
def test_equals_reference(name, implementation, dtype, small_blocks):
    x, w, y, of = inputs(TINY[name], dtype)
    rows = lambda i, x, w: grouped_matmul(x, w, of, implementation=i)
    sums = lambda i, x, y: transposed_grouped_matmul(x, y, of, implementation=i)
    testing.check_case(OP, rows, {"x": x, "w": w}, implementation, dtype)
    testing.check_case(OP, sums, {"x": x, "y": y}, implementation, dtype)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("implementation", FORMS)
def test_activations(implementation, activation, small_blocks):
    """In bfloat16 the result alone: its backward pass has the product in bfloat16, the reference in float32."""
    for dtype, check in (
        (np.float32, functools.partial(testing.check_case, transform=jax.checkpoint)),
        (jnp.bfloat16, testing.check_forward),
    ):
        x, w, _, of = inputs(TINY["short"], dtype)
        rows = lambda i, x, w, of=of: grouped_matmul(x, w, of, activation=activation, implementation=i)
        check(OP, rows, {"x": x, "w": w}, implementation, dtype)


@settings(max_examples=8, deadline=None)
@given(
    of=st.lists(st.integers(0, 13), min_size=1, max_size=5),
    behind=st.integers(0, 9),
    k=st.integers(1, 5),
    n=st.integers(1, 5),
    implementation=st.sampled_from(FORMS),
)
def test_any_sizes(of, behind, k, n, implementation):
    m = max(1, sum(of) + behind)
    x, w, y = testing.normal(m, (m, k), (len(of), k, n), (m, n))
    of = jnp.asarray(of, jnp.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "BLOCK", 4)
        patch.setattr(xla, "RESTS", (1, 2, 4))
        both = lambda i, x, w, y: (
            grouped_matmul(x, w, of, implementation=i),
            transposed_grouped_matmul(x, y, of, implementation=i),
        )
        testing.check_case(OP, both, {"x": x, "w": w, "y": y}, implementation, np.float32)


def test_the_reference_is_the_equation():
    """In float64, against a loop over rows written without jax; 3 + 0 + 2 rows of 6."""
    rng = np.random.default_rng(0)
    x, w, y, of = rng.standard_normal((6, 4)), rng.standard_normal((3, 4, 2)), rng.standard_normal((6, 2)), (3, 0, 2)
    group = [0, 0, 0, 2, 2]
    rows, sums = np.zeros((6, 2)), np.zeros((3, 4, 2))
    for i, j in enumerate(group):
        rows[i] = x[i] @ w[j]
        sums[j] += np.outer(x[i], y[i])
    with jax.enable_x64(True):
        given = [jnp.asarray(a) for a in (x, w, y)]
        found = grouped_matmul(given[0], given[1], jnp.array(of), implementation="reference")
        other = transposed_grouped_matmul(given[0], given[2], jnp.array(of), implementation="reference")
    np.testing.assert_allclose(found, rows, atol=1e-14)
    np.testing.assert_allclose(other, sums, atol=1e-14)
    testing.show_equal("grouped_matmul", "reference")


@pytest.mark.parametrize("implementation", PLAIN)
def test_hand_computed(implementation):
    # Rows 1, 2 | 3, behind the groups 4; matrices 10 and 100. y = 10, 20, 300, 0; with dy = 1 each dx = 10, 10, 100, 0
    # and dw = 1 + 2 and 3.
    x, w, of = jnp.array([[1.0], [2.0], [3.0], [4.0]]), jnp.array([[[10.0]], [[100.0]]]), jnp.array([2, 1])
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, of, implementation=implementation), x, w)
    assert y.ravel().tolist() == [10, 20, 300, 0]
    dx, dw = pull(jnp.ones_like(y))
    assert dx.ravel().tolist() == [10, 10, 100, 0] and dw.ravel().tolist() == [3, 3]


@pytest.mark.parametrize("implementation", PLAIN)
def test_sizes_beyond_the_rows_are_cut(implementation):
    x, w, y, _ = inputs(TINY["random"])
    whole, beyond = jnp.array([20, 5, 20, 0, 0]), jnp.array([20, 5, 40, 7, 9])
    for f, other in ((grouped_matmul, w), (transposed_grouped_matmul, y)):
        np.testing.assert_array_equal(
            f(x, other, beyond, implementation=implementation), f(x, other, whole, implementation=implementation)
        )


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_nan_stays_in_its_row_and_group(implementation, small_blocks):
    x, w, y, of = inputs(TINY["random"])
    x[3], y[3] = np.nan, np.nan  # of the first group that has more than three rows
    first = int(np.searchsorted(np.cumsum(of), 3, side="right"))
    rows = np.isnan(grouped_matmul(x, w, of, implementation=implementation)).any(1)
    sums = np.isnan(transposed_grouped_matmul(x, y, of, implementation=implementation)).any((1, 2))
    assert np.flatnonzero(rows).tolist() == [3] and np.flatnonzero(sums).tolist() == [first]


@pytest.mark.parametrize("implementation", PLAIN)
def test_vmap_equals_a_loop(implementation, small_blocks):
    case = TINY["random"]
    x, w, weight = testing.normal(4, (3, case.m, case.k), (case.g, case.k, case.n), (3, case.m, case.n))
    of = jnp.stack([jnp.asarray(sizes(case, seed)) for seed in range(3)])
    call = functools.partial(grouped_matmul, implementation=implementation)
    one = jax.value_and_grad(lambda x, w, of, c: (call(x, w, of) * c).sum(), argnums=(0, 1))
    together = jax.jit(jax.vmap(one, in_axes=(0, None, 0, 0)))(x, w, of, weight)
    for i in range(3):
        for a, b in zip(*map(jax.tree.leaves, (together, one(x[i], w, of[i], weight[i])))):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", PLAIN)
def test_differentiates_twice(implementation, small_blocks):
    x, w, y, of = inputs(TINY["some_empty"])

    def penalty(x, w):
        call = lambda x, w: (grouped_matmul(x, w, of, activation="silu", implementation=implementation) * y).sum()
        return sum((g**2).sum() for g in jax.grad(call, argnums=(0, 1))(x, w))

    with jax.enable_x64(True):
        x, w, y = (jnp.asarray(a, jnp.float64) for a in (x, w, y))
        of = of.astype(jnp.int32)
        check_grads(penalty, (x, w), order=1, modes=["rev"], rtol=1e-6)


def test_as_lax_ragged_dot():
    """The same arguments, result and gradients, also with a result wider than the operands."""
    x, w, _, of = inputs(TINY["random"], jnp.bfloat16)
    for wide in (None, jnp.float32):
        both = lambda f, wide: jax.vjp(lambda x, w: f(x, w, of, preferred_element_type=wide), x, w)
        (y, pull), (theirs, other) = (both(f, wide) for f in (grouped_matmul, jax.lax.ragged_dot))
        for a, b in zip((y, *pull(jnp.ones_like(y))), (theirs, *other(jnp.ones_like(y)))):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=2e-2, atol=2e-2)


def test_memory_beyond_the_outputs_is_small():
    """Of the CPU target: forward, and forward and backward, at most 1.2 times the outputs, of which the op's own
    arrays are a part."""
    case = REAL["cpu_random"]
    x, w = jnp.zeros((case.m, case.k)), jnp.zeros((case.g, case.k, case.n))
    of, dy = jnp.asarray(sizes(case)), jnp.zeros((case.m, case.n))
    call = functools.partial(grouped_matmul, implementation="xla")
    backward = lambda x, w, of, dy: jax.vjp(lambda x, w: call(x, w, of), x, w)[1](dy)
    for f, operands in ((call, (x, w, of)), (backward, (x, w, of, dy))):
        memory = jax.jit(f).lower(*operands).compile().memory_analysis()
        assert memory.temp_size_in_bytes <= 0.5 * memory.output_size_in_bytes


def test_in_shard_map_each_device_has_its_own_sizes():
    case = TINY["random"]
    x, w, _ = testing.normal(5, (2 * case.m, case.k), (case.g, case.k, case.n), (1, 1))
    of = jnp.stack([jnp.asarray(sizes(case, seed)) for seed in range(2)])
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    P = jax.sharding.PartitionSpec

    def loss(x, w, of):
        return (grouped_matmul(x, w, of[0]) ** 2).sum()[None]

    split = jax.shard_map(loss, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P("data"), check_vma=False)
    grad = jax.jit(jax.grad(lambda x, w: split(x, w, of).sum(), argnums=(0, 1)))(x, w)
    one = jax.grad(lambda x, w, of: loss(x, w, of).sum(), argnums=(0, 1))
    alone = [one(x[i * case.m : (i + 1) * case.m], w, of[i : i + 1]) for i in range(2)]
    np.testing.assert_allclose(grad[0], np.concatenate([a[0] for a in alone]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grad[1], alone[0][1] + alone[1][1], rtol=1e-4, atol=1e-4)


BAD = {
    "x is a float array": lambda x, w, of: grouped_matmul(x.astype(int), w, of),
    "x is of rank 2 and w of rank 3": lambda x, w, of: grouped_matmul(x, w[0], of),
    "x is of rank 2 and y of rank 2": lambda x, w, of: transposed_grouped_matmul(x, w, of),
    "of one dtype": lambda x, w, of: grouped_matmul(x, w.astype(jnp.bfloat16), of),
    "group_sizes is an array of integers": lambda x, w, of: grouped_matmul(x, w, of.astype(float)),
    "group_sizes is of rank 1": lambda x, w, of: grouped_matmul(x, w, of[None]),
    r"w is \[groups, k, n\]": lambda x, w, of: grouped_matmul(x, w[:, :1], of),
    "y has as many rows": lambda x, w, of: transposed_grouped_matmul(x, x[:3], of),
    "activation is None or one of relu, gelu, silu, got 'tanh'": lambda x, w, of: grouped_matmul(
        x, w, of, activation="tanh"
    ),
    "preferred_element_type is a float dtype, got int8": lambda x, w, of: grouped_matmul(
        x, w, of, preferred_element_type=jnp.int8
    ),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_operands(said):
    x, w, _, of = inputs(TINY["equal"])
    with pytest.raises(ValueError, match=said):
        BAD[said](jnp.asarray(x), jnp.asarray(w), of)


# ---- permuting --------------------------------------------------------------------------------------------------


def test_a_permutation_is_stable_and_drops():
    # Tokens 0..3 choose (1, 0), (1, dropped), (0, 1), (dropped, 1): group 0 has choices 1 and 4, group 1 has 0, 2, 5
    # and 7, behind them 3 and 6.
    groups_of = jnp.array([[1, 0], [1, 2], [0, 1], [-1, 1]])
    by = permutation(groups_of, 2)
    assert by.choice.tolist() == [1, 4, 0, 2, 5, 7, 3, 6] and by.group_sizes.tolist() == [2, 4]
    assert by.row[by.choice].tolist() == list(range(8))
    x = jnp.arange(4.0)[:, None]
    assert permute(x, by).ravel().tolist() == [0, 2, 0, 1, 2, 3, 1, 3]
    # Row i carries i: token 0 has rows 2 and 0, weights 10 and 1.
    y = unpermute(jnp.arange(8.0)[:, None], by, jnp.tile(jnp.array([10.0, 1.0]), (4, 1)))
    assert y.ravel().tolist() == [20 + 0, 30 + 6, 10 + 4, 70 + 5]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_permuting_equals_take_and_its_gradients(dtype):
    x, rows, weights = testing.normal(6, (5, 3), (10, 3), (5, 2))
    x, rows = jnp.asarray(x, dtype), jnp.asarray(rows, dtype)
    groups_of = jax.random.randint(jax.random.key(0), (5, 2), -1, 3)
    by = permutation(groups_of, 3)
    plain = lambda x: jnp.repeat(x, 2, axis=0)[by.choice]
    combine = lambda rows, weights: jnp.einsum("tkd,tk->td", rows.astype(jnp.float32)[by.row].reshape(5, 2, 3), weights)
    tolerance = 1e-6 if dtype == jnp.float32 else 3e-2
    for ours, theirs, operands in (
        (lambda x: permute(x, by), plain, (x,)),
        (lambda r, w: unpermute(r, by, w), lambda r, w: combine(r, w).astype(dtype), (rows, jnp.asarray(weights))),
    ):
        (a, pull), (b, other) = jax.vjp(ours, *operands), jax.vjp(theirs, *operands)
        (dy,) = testing.normal(7, a.shape)
        compare = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
        assert a.dtype == b.dtype
        compare(a.astype(np.float32), b.astype(np.float32))
        for c, d in zip(pull(dy.astype(a.dtype)), other(dy.astype(a.dtype))):
            assert c.dtype == d.dtype
            compare(c.astype(np.float32), d.astype(np.float32))


def test_permuting_does_not_scatter():
    by = permutation(jnp.zeros((5, 2), int), 3)
    back = lambda x, w: jax.grad(lambda x, w: unpermute(permute(x, by), by, w).sum(), argnums=(0, 1))(x, w)
    assert "scatter" not in str(jax.make_jaxpr(back)(jnp.ones((5, 3)), jnp.ones((5, 2))))


def test_bad_permutations():
    by = permutation(jnp.zeros((5, 2), int), 3)
    for said, call in {
        "groups_of is": lambda: permutation(jnp.zeros((5, 2)), 3),
        "not of 3 tokens": lambda: permute(jnp.zeros((3, 2)), by),
        "are not of 10 choices": lambda: unpermute(jnp.zeros((9, 2)), by, jnp.zeros((5, 2))),
    }.items():
        with pytest.raises(ValueError, match=said):
            call()
