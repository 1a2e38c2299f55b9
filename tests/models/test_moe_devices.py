"""Experts on a mesh give what they give on one device: values and every gradient, however uneven the choices are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.models.bounds import UnsupportedForm
from lissom.models.context import Context
from lissom.models.moe.devices import Places, packed, unpacked
from lissom.models.moe.experts import Experts
from lissom.models.moe.layer import MoE
from lissom.models.moe.routing import Choices, Everyone
from lissom.models.variables import merge, split
from lissom.ops.attention import masks

WIDTH, EXPERTS = 12, 8
X = jax.random.normal(jax.random.key(0), (8, 6, WIDTH))
NAMES = ("data", "fsdp", "tensor", "expert")


def mesh_of(*sizes):
    return jax.make_mesh(sizes, NAMES, (jax.sharding.AxisType.Auto,) * 4)


def close(a, b):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


DRAWN = jax.random.randint(jax.random.key(0), (8, 6, 2), 0, EXPERTS)
CHOICES = {
    "even": jnp.arange(8 * 6 * 2).reshape(8, 6, 2) % EXPERTS,
    "drawn": DRAWN,
    "one expert": jnp.full((8, 6, 2), 5),
    "one device's tokens": DRAWN.at[:2].set(7),
    "some of none": DRAWN.at[:, ::2, 1].set(EXPERTS).at[:, 1].set(-1),
    "none": jnp.full((8, 6, 2), EXPERTS),
}


@functools.cache
def experts(buffer):
    return Experts(WIDTH, 10, experts=EXPERTS, gated=True, buffer=buffer, dtype=jnp.float32, rngs=nnx.Rngs(0))


@functools.cache
def runner(buffer):
    """(x, choices) -> (y, its gradients by kernels, x and weights), compiled."""
    parts = split(experts(buffer))

    def of(params, x, weights, chosen):
        y, _ = merge(parts._replace(params=params))(x, Choices(chosen, weights), None)
        return jnp.sin(y).sum(), y

    run = jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2), has_aux=True))
    return lambda x, chosen: run(parts.params, x, jnp.cos(jnp.arange(chosen.size)).reshape(chosen.shape), chosen)


@pytest.mark.parametrize(("buffer", "mesh"), [(0.3, (2, 1, 1, 4)), (1.5, (1, 2, 2, 2))])
def test_choices_that_are_exchanged(buffer, mesh):
    """A buffer of 1.5 holds the even ones; one of 0.3 needs several rounds for any. Axes of all kinds beside."""
    for name, chosen in CHOICES.items():
        (_, y), grads = runner(buffer)(X, chosen)
        with jax.set_mesh(mesh_of(*mesh)):
            (_, split_y), split_grads = runner(buffer)(X, chosen)
        assert y.any() or name == "none"
        close(split_y, y)
        jax.tree.map(close, split_grads, grads)


def test_a_batch_that_the_mesh_does_not_divide():
    (_, y), grads = runner(1.5)(X[:3], DRAWN[:3])
    with jax.set_mesh(mesh_of(1, 1, 2, 4)):
        (_, split_y), split_grads = runner(1.5)(X[:3], DRAWN[:3])
    close(split_y, y)
    jax.tree.map(close, split_grads, grads)


def test_gradients_of_several_rounds_are_summed_wide():
    """In bfloat16 the kernels' gradients are as near to the exact ones as those of one device."""
    fine = runner(0.3)
    coarse = split(Experts(WIDTH, 10, experts=EXPERTS, gated=True, buffer=0.3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    chosen = CHOICES["one expert"]
    weights = jnp.cos(jnp.arange(chosen.size)).reshape(chosen.shape)

    def of(params):
        y, _ = merge(coarse._replace(params=params))(X, Choices(chosen, weights), None)
        return jnp.sin(y.astype(jnp.float32)).sum()

    run = jax.jit(jax.grad(of))
    exact = fine(X, chosen)[1][0]
    one = run(coarse.params)
    with jax.set_mesh(mesh_of(2, 1, 1, 4)):
        many = run(coarse.params)
    error = lambda found: max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), found, exact)))
    assert error(many) <= 2 * error(one)


def test_everyone_on_a_mesh():
    weights = jax.random.uniform(jax.random.key(3), (8, 6, EXPERTS))
    run = jax.jit(jax.value_and_grad(lambda x, w: jnp.sin(experts(1.5)(x, Everyone(w), None)[0]).sum(), (0, 1)))
    y, grads = run(X, weights)
    with jax.set_mesh(mesh_of(2, 1, 1, 4)):
        split_y, split_grads = run(X, weights)
    close(split_y, y)
    jax.tree.map(close, split_grads, grads)


def test_buffers_are_bounded():
    """All tokens of all devices go to one expert: no buffer is larger than where all go apart."""
    with jax.set_mesh(mesh_of(1, 1, 1, 8)):
        parts = split(experts(1.0))
        run = jax.jit(lambda x, c: merge(parts)(x, Choices(c, jnp.ones(c.shape)), None)[0])
        program = run.lower(X, jnp.full((8, 6, 1), 5)).as_text()
    # 6 tokens a device, a choice each: 1 row for each of 8 devices at once.
    assert "all_to_all" in program and "tensor<8x1x12xf32>" in program and "tensor<48x12xf32>" not in program


def test_packing_and_its_transpose():
    """Rows 0, 1, 2 go to the places (1, 0), none, (0, 1) of a buffer of two by two."""
    rows = jnp.arange(6.0).reshape(3, 2)
    places = Places(jnp.array([[3, 2], [0, 3]]), jnp.array([2, 4, 1]))
    assert packed(rows, places).tolist() == [[[0, 0], [4, 5]], [[0, 1], [0, 0]]]
    assert unpacked(packed(rows, places), places).tolist() == [[0, 1], [0, 0], [4, 5]]
    buffer = jax.random.normal(jax.random.key(0), (2, 2, 2))
    pulled = jax.vjp(lambda rows: packed(rows, places), rows)[1](buffer)[0]
    close((pulled * rows).sum(), (packed(rows, places) * buffer).sum())
    close(pulled, unpacked(buffer, places))


@pytest.mark.parametrize("settings", [{}, {"gate": "expert_choice"}, {"gate": "soft"}, {"gate": "comet"}])
def test_the_layer_on_a_mesh(settings):
    """Sequences over four devices, experts over two of them, hidden widths over two."""
    rngs = nnx.Rngs(0)
    moe = MoE(WIDTH, experts=4, shared=1, **settings, rngs=rngs)
    parts = split(moe)
    context = Context(mask=masks.Causal(), train=True)

    def loss(params, x):
        y, aux = merge(parts._replace(params=params))(x, context, jax.random.key(1))
        return (y**2).sum() + sum(aux["losses"].values()), y

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, y), grads = run(parts.params, X)
    with jax.set_mesh(mesh_of(2, 1, 2, 2)):
        (_, split_y), split_grads = run(parts.params, X)
    close(split_y, y)
    jax.tree.map(close, split_grads, grads)


def test_experts_that_the_mesh_does_not_divide():
    moe = MoE(WIDTH, experts=6, rngs=nnx.Rngs(0))
    context = Context(mask=masks.Causal())
    message = r"ffn.experts=6 must be a multiple of the 4 devices"
    with jax.set_mesh(mesh_of(2, 1, 1, 4)), pytest.raises(UnsupportedForm, match=message):
        jax.jit(lambda x: moe(x, context)[0])(X)


def test_a_buffer_of_nothing():
    with pytest.raises(ValueError, match=r"ffn.buffer=0 must be above 0"):
        MoE(WIDTH, buffer=0, rngs=nnx.Rngs(0))
