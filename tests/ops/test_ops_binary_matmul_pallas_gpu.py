"""The Hopper kernel of binary_matmul: its counting by hand, races, what it refuses, and lowered for CUDA. It passes the
tests of test_ops_binary_matmul.py too. No GPU is needed, and none is used."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.ops import dispatch, testing
from lissom.ops.binary_matmul import binary_matmul, pack_signs, pallas_gpu
from lissom.ops.interpreting import interpreting
from tests.ops.traced import grids


def call(x, w, length):
    return binary_matmul(x, w, length=length, implementation="pallas_gpu")


def bits(rows: int, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, -(-length // 32)), jnp.uint32)


def test_bits_are_counted():
    words = np.concatenate([np.random.default_rng(0).integers(0, 2**32, 50), [0, 1, 2**31, 2**32 - 1]])
    found = pallas_gpu._bits(jnp.asarray(words, jnp.uint32))
    np.testing.assert_array_equal(found, [int(word).bit_count() for word in words])


def test_three_bits_are_added():
    """Places of 0b11110000, 0b11001100 and 0b10101010 from the highest: 3, 2, 2, 1, 2, 1, 1, 0 are set."""
    total, carry = pallas_gpu._added(*(jnp.uint32(word) for word in (0b11110000, 0b11001100, 0b10101010)))
    assert (int(total), int(carry)) == (0b10010110, 0b11101000)


def test_every_count_of_a_place(capfd):
    """Rows that differ in as many words as their number, so that all sums are used: 0 to 40 of 40, in five steps.
    The interpreter reports a race on stdout and goes on."""
    x = np.where(np.arange(40 * 32) // 32 < np.arange(41)[:, None], -1, 1).astype(np.float32)
    w = np.ones((1, 40 * 32), np.float32)
    with interpreting():
        y = call(pack_signs(x), pack_signs(w), 40 * 32)
    np.testing.assert_array_equal(y[:, 0], 32 * (40 - 2 * np.arange(41)))
    assert "RACE" not in capfd.readouterr().out


def test_tiles_of_the_grid():
    """65 rows are two tiles of 64, 33 columns two of 32; examples of a vmap are more rows: 195 are four tiles."""
    run = functools.partial(call, length=70)
    assert grids(run, bits(65, 70), bits(33, 70)) == [(4,)]
    many = jax.ShapeDtypeStruct((3, 65, 3), jnp.uint32)
    assert grids(jax.vmap(run, in_axes=(0, None)), many, bits(33, 70)) == [(8,)]


@pytest.mark.parametrize("batched", [False, True])
def test_refuses_what_needs_long_offsets(batched):
    run = functools.partial(call, length=64)
    x = jax.ShapeDtypeStruct((2**15, 2**11, 2), jnp.uint32)
    with pytest.raises(NotImplementedError, match="4294967296 elements need offsets of more than 32 bits"):
        jax.eval_shape(jax.vmap(run, in_axes=(0, None)) if batched else run, x, bits(64, 64))


def lowered(f, *arguments, mesh=(("x", 1),)):
    """The program for machines with an H200, where there is none."""
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    names, sizes = zip(*mesh)
    auto = (jax.sharding.AxisType.Auto,) * len(names)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(sizes, names, auto, abstract_device=h200)):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)


@pytest.mark.parametrize(("m", "length", "n"), [(1, 4096, 4096), (1000, 1000, 300)])
def test_lowers_for_an_h200(m, length, n):
    program = lowered(functools.partial(call, length=length), bits(m, length), bits(n, length))
    assert testing.show_lowered(program, "cuda") == {("binary_matmul", "pallas_gpu")}
    assert "lissom_binary_matmul" in program and program.count("@mosaic_gpu_v2") == 1


def test_under_shard_map_a_device_has_its_rows():
    with dispatch.partition(batch="data"):
        run = functools.partial(call, length=256)
        program = lowered(run, bits(512, 256), bits(64, 256), mesh=(("data", 4),))
    (line,) = (line for line in program.splitlines() if "@mosaic_gpu_v2" in line)
    assert "tensor<8x128xui32>" in line and "tensor<128x64xi32>" in line
