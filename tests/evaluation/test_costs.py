"""The FLOP count against hand-computed numbers, and against XLA's on the unrolled form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.experimental import pallas as pl

from lissom.evaluation.costs import count
from lissom.ops.grouped_matmul import grouped_matmul
from lissom.training.meta.inner import adapted


def shape(*dimensions, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dimensions, dtype)


def xla_flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_matmul_is_two_operations_a_multiply_accumulate():
    # 4 x 6 outputs, each a sum of 5 products: 2 * 4 * 6 * 5
    assert count(jnp.dot, shape(4, 5), shape(5, 6)).flops == 2 * 4 * 6 * 5
    assert count(jnp.dot, shape(4, 5), shape(5, 6)).flops == xla_flops(jnp.dot, shape(4, 5), shape(5, 6))


def test_batched_and_complex_products():
    attention_scores = lambda q, k: jnp.einsum("bthd,bshd->bhts", q, k)
    assert count(attention_scores, shape(2, 7, 3, 8), shape(2, 9, 3, 8)).flops == 2 * (2 * 3 * 7 * 9) * 8
    # A complex multiply-accumulate is 4 real products and 4 real sums.
    assert count(jnp.dot, shape(4, 5, dtype=jnp.complex64), shape(5, 6, dtype=jnp.complex64)).flops == 8 * 4 * 6 * 5


@pytest.mark.parametrize("padding, pairs", [("VALID", 6 * 3), ("SAME", 3 * 8 - 2)])
def test_convolution_counts_pairs_that_meet_an_input(padding, pairs):
    # 8 inputs, kernel 3. VALID: 6 outputs see 3 inputs each. SAME: 8 outputs, the two at the ends miss one.
    conv = lambda x, w: lax.conv_general_dilated(x, w, (1,), padding, dimension_numbers=("NWC", "WIO", "NWC"))
    arguments = shape(2, 8, 4), shape(3, 4, 5)
    assert count(conv, *arguments).flops == 2 * 2 * 4 * 5 * pairs
    assert count(conv, *arguments).flops == xla_flops(conv, *arguments)


def test_grouped_convolution_sees_its_own_channels_only():
    conv = lambda x, w: lax.conv_general_dilated(x, w, (2, 2), "VALID", feature_group_count=4)
    # Output 3 x 3 from 7 x 7 with kernel 3, stride 2; depthwise: one input channel an output channel.
    assert count(conv, shape(2, 4, 7, 7), shape(4, 1, 3, 3)).flops == 2 * (2 * 4 * 3 * 3) * (3 * 3) * 1


def test_gradient_of_a_strided_convolution_does_not_count_holes():
    loss = lambda x, w: lax.conv_general_dilated(x, w, (2, 2), "VALID").sum()
    arguments = shape(2, 4, 7, 7), shape(6, 4, 3, 3)
    forward = 2 * (2 * 6 * 3 * 3) * (3 * 3 * 4)
    # Nobody reads the sum itself, so the two gradients remain, each with as many products as the forward
    # pass.
    assert count(jax.grad(loss, argnums=(0, 1)), *arguments).flops == 2 * forward


def test_ragged_product_and_its_gradients():
    # Four rows in two groups: each row meets one [5, 6] matrix.
    product = lambda x, w: lax.ragged_dot(x, w, jnp.array([1, 3], jnp.int32))
    arguments = shape(4, 5), shape(2, 5, 6)
    assert count(product, *arguments).flops == 2 * 4 * 5 * 6
    gradients = jax.grad(lambda x, w: product(x, w).sum(), argnums=(0, 1))
    assert count(gradients, *arguments).flops == 2 * (2 * 4 * 5 * 6)


def test_scan_times_its_length_where_xla_counts_one_trip():
    def scanned(x, w):
        return lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=7)[0]

    def unrolled(x, w):
        for _ in range(7):
            x = jnp.tanh(x @ w)
        return x

    arguments = shape(4, 5), shape(5, 5)
    assert count(scanned, *arguments).flops == 7 * (2 * 4 * 5 * 5)
    assert count(scanned, *arguments).flops == count(unrolled, *arguments).flops
    # XLA's number on the unrolled form holds the 7 tanh as transcendentals, not as flops.
    assert count(unrolled, *arguments).flops == xla_flops(unrolled, *arguments)


def test_nested_scans_multiply():
    inner = lambda x: lax.fori_loop(0, 3, lambda i, c: c @ c, x)
    outer = lambda x: lax.scan(lambda c, _: (inner(c), None), x, None, length=5)[0]
    assert count(outer, shape(4, 4)).flops == 5 * 3 * (2 * 4 * 4 * 4)


def test_gradient_of_an_mlp_by_hand():
    def loss(weights, x):
        hidden = jax.nn.relu(x @ weights[0])
        return (hidden @ weights[1]).sum()

    weights, x = [shape(5, 7), shape(7, 3)], shape(4, 5)
    first, second = 2 * 4 * 5 * 7, 2 * 4 * 7 * 3
    # Forward: only the first product is needed (the loss is linear in the second). Backward: d/dW2, d/dh,
    # d/dW1.
    assert count(jax.grad(loss), weights, x).flops == first + second + second + first
    assert count(jax.value_and_grad(loss), weights, x).flops == 3 * second + 2 * first


def test_unread_results_count_nothing():
    assert count(lambda x: (x @ x, x @ x.T)[0], shape(4, 4)).flops == 2 * 4**3
    assert count(lambda x: jax.jit(lambda x: (x @ x, x @ x.T))(x)[1], shape(4, 4)).flops == 2 * 4**3
    stacked = lambda x: lax.scan(lambda c, _: (c + 1, c @ c), x, None, length=3)[0]
    assert count(stacked, shape(4, 4)).flops == 0


@jax.custom_vjp
def squared(x):
    return x @ x


squared.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))


@pytest.mark.parametrize(("remat", "products"), [("none", 16), ("step", 20), ("tree", 28)])
def test_checkpoints_within_checkpoints(remat, products):
    """Four inner steps of two products, and as many in their backward pass; a checkpointed step computes its first one
    again, and two segments of two steps all of theirs besides."""
    x, w = jnp.ones((7, 5)), jnp.ones((5, 3))
    loss = lambda w, key: jnp.square(jnp.tanh(x @ w)).sum()
    learned = lambda w: adapted(loss, w, optax.sgd(0.1), 4, jax.random.key(0), remat=remat)
    assert count(jax.grad(lambda w: jnp.square(learned(w)).sum()), w).flops == products * 2 * 7 * 5 * 3


def test_inside_of_jit_remat_and_custom_rules():
    product = 2 * 4**3
    assert count(jax.jit(jax.checkpoint(lambda x: x @ x)), shape(4, 4)).flops == product
    assert count(squared, shape(4, 4)).flops == product
    assert count(jax.grad(lambda x: squared(x).sum()), shape(4, 4)).flops == 2 * product
    twice = lambda x: jnp.sin(jnp.sin(x @ x) @ x).sum()
    plain = count(jax.grad(twice), shape(4, 4)).flops
    # Remat computes both forward products again; the first forward pass is read by nobody.
    assert plain == 2 * product + 4 * product
    assert count(jax.grad(jax.checkpoint(twice)), shape(4, 4)).flops == plain


def test_shard_map_times_the_mesh():
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(lambda x: x @ x.T @ x, mesh=mesh, in_specs=spec, out_specs=spec)
    # Each of 4 shards has 2 of the 8 rows: [2, 5] @ [5, 2] and [2, 2] @ [2, 5].
    assert count(sharded, shape(8, 5)).flops == 4 * (2 * 2 * 2 * 5 + 2 * 2 * 5 * 2)


def test_cond_takes_the_largest_branch_and_platform_dependent_ours():
    branches = lambda p, x: lax.cond(p, lambda x: x @ x, lambda x: x @ x @ x, x)
    assert count(branches, shape(dtype=jnp.bool_), shape(4, 4)).flops == 2 * (2 * 4**3)

    def dependent(x):
        return lax.platform_dependent(x, cpu=lambda x: x @ x, cuda=lambda x: x @ x @ x, default=lambda x: x)

    assert count(dependent, shape(4, 4), platform="cpu").flops == 2 * 4**3
    assert count(dependent, shape(4, 4), platform="gpu").flops == 2 * (2 * 4**3)
    assert count(dependent, shape(4, 4), platform="tpu").flops == 0


def test_while_is_unknown_unless_its_trips_are_given():
    loop = lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c, x)
    costs = count(loop, shape(4, 4))
    assert costs.flops is None and "while" in costs.unknown[0]
    assert count(loop, shape(4, 4), while_trips=[2.5]).flops == 2.5 * 2 * 4**3
    with pytest.raises(ValueError, match="fewer while_trips"):
        count(lambda x: loop(loop(x)), shape(4, 4), while_trips=[1])
    with pytest.raises(ValueError, match="belong to no loop"):
        count(loop, shape(4, 4), while_trips=[1, 2])
    cheap = lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x)
    assert count(lambda x: loop(cheap(x)), shape(4, 4), while_trips=[3]).flops == 3 * 2 * 4**3
    assert count(cheap, shape(4, 4)).flops == 0


def test_a_kernel_counts_by_its_estimate_or_is_unknown():
    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] @ x_ref[...]

    def call(estimate):
        out = shape(4, 4)
        return pl.pallas_call(kernel, out_shape=out, cost_estimate=estimate, interpret=True)

    estimate = pl.CostEstimate(flops=123, transcendentals=0, bytes_accessed=0)
    assert count(lambda x: call(estimate)(x) @ x, shape(4, 4)).flops == 123 + 2 * 4**3
    costs = count(lambda x: call(None)(x) @ x, shape(4, 4))
    assert costs.flops is None and "pallas_call" in costs.unknown[0]
    assert costs.by_primitive == {"dot_general": 2 * 4**3}


def test_foreign_work_is_unknown_not_zero():
    for function in (jnp.linalg.svd, lambda x: jax.pure_callback(np.asarray, shape(4, 4), x)):
        costs = count(function, shape(4, 4))
        assert costs.flops is None and costs.unknown


def test_fft_and_factorizations():
    # 3 complex transforms of 8 points: 3 * 5 * 8 * log2(8)
    assert count(jnp.fft.fft, shape(3, 8, dtype=jnp.complex64)).flops == 3 * 5 * 8 * 3
    assert count(jnp.linalg.cholesky, shape(6, 6)).flops == 6**3 / 3


def test_blocks_of_several_kinds():
    """A loop whose blocks pick their body from a constant list counts each as its own kind, nested too."""
    kinds = np.array([0, 2, 2, 1, 5], np.int32)  # 5 is clamped to 2, the last
    widths = (4, 8, 16)

    def f(x, y):
        bodies = [lambda at, width=width: (x[at] @ y[:, :width]).sum() for width in widths]
        row = lambda _, at: (None, jax.lax.switch(at[0], bodies, at[1]))
        one = lambda: jax.lax.scan(row, None, (kinds, np.arange(5, dtype=np.int32)))[1]
        return jax.lax.scan(lambda c, _: (c, one()), None, None, length=3)[1]

    shapes = (jax.ShapeDtypeStruct((5, 2, 3), jnp.float32), jax.ShapeDtypeStruct((3, 16), jnp.float32))
    assert count(f, *shapes).flops == 3 * 2 * 2 * 3 * (4 + 16 + 16 + 8 + 16)


def test_a_switch_inside_a_switch_on_the_same_index():
    kinds, widths = np.array([0, 1, 2], np.int32), (4, 8, 16)

    def row(_, kind):
        inner = lambda x: jax.lax.switch(kind, [lambda x, w=w: (x @ x[:, :w]).sum() for w in widths], x)
        return None, jax.lax.switch(kind, [inner] * 3, jnp.zeros((16, 16)))

    assert count(lambda: jax.lax.scan(row, None, kinds)[1]).flops == 2 * 16 * 16 * sum(widths)


def test_a_key_and_a_padding_mask():
    from lissom.ops.attention import attention, masks

    key = jax.random.key(0)
    assert count(lambda x: x @ x + jax.random.normal(key, (4, 4)), shape(4, 4)).flops == 128
    rows = [shape(2, 8, 2, 16)] * 3
    padded = masks.Lengths(jnp.array([3, 8]))
    attend = lambda mask: count(lambda q, k, v: attention(q, k, v, mask=mask, implementation="xla"), *rows).flops
    assert attend(padded) == attend(masks.Full()) == 2 * 2 * 2 * 2 * 8 * 8 * 16


def test_causal_attention_counts_its_triangle():
    from lissom.ops.attention import attention, masks

    shape = jax.ShapeDtypeStruct((1, 4096, 2, 16), jnp.float32)
    flops = {
        mask: count(lambda q, k, v, m=mask: attention(q, k, v, mask=m, implementation="xla"), *[shape] * 3).flops
        for mask in (masks.Full(), masks.Causal(), masks.Window(255, 0))
    }
    full = 2 * 2 * 4096 * 4096 * 2 * 16
    assert flops[masks.Full()] == full
    assert full / 2 < flops[masks.Causal()] < 0.6 * full
    assert full * 256 / 4096 < flops[masks.Window(255, 0)] < 2 * full * 256 / 4096


def test_a_grouped_matmul_counts_its_rows_and_no_more():
    """Whatever the sizes: 2 m k n forward, and twice as much for the gradients, of which each is one more."""
    x, w, sizes = jnp.ones((40, 6)), jnp.ones((3, 6, 5)), jnp.array([7, 0, 33])
    product = lambda x, w: grouped_matmul(x, w, sizes, implementation="xla")
    assert count(product, x, w).flops == 2 * 40 * 6 * 5
    assert count(lambda x, w: jax.vjp(product, x, w)[1](jnp.ones((40, 5))), x, w).flops == 2 * 2 * 40 * 6 * 5
    both = jax.value_and_grad(lambda x, w: (product(x, w) ** 2).sum(), argnums=(0, 1))
    assert count(both, x, w).flops == 3 * 2 * 40 * 6 * 5
    assert count(jax.vmap(product, (0, None)), jnp.ones((4, 40, 6)), w).flops == 4 * 2 * 40 * 6 * 5
