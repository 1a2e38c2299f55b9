"""decode_attention, compiled by the real TPU compiler for machines that are described and not there. libtpu is the
extra `tpu`; the second command of .ci/run has the environment that this takes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from lissom.ops import dispatch, testing
from lissom.ops.decode_attention import decode_attention

pytestmark = pytest.mark.tpu_compile

MACHINES = ["v5e:2x2", "v5p:2x2x1"]
BF16, F32 = jnp.bfloat16, np.float32

# name: dtype, q_len, heads, v_dim, shape of k, that of the block table or None for dense, options
CASES = {
    "llama3_8b": (BF16, 1, 32, 128, (8, 8, 4096, 128), None, {}),
    "llama3_8b_one_sequence": (BF16, 1, 32, 128, (1, 8, 32768, 128), None, {"splits": 2}),
    "gpt2_small": (BF16, 1, 12, 64, (8, 12, 1024, 64), None, {}),
    "gemma2_2b": (BF16, 1, 8, 256, (4, 4, 8192, 256), None, {"window": 4096, "logit_softcap": 50.0}),
    "phi3": (BF16, 2, 32, 96, (2, 32, 2048, 96), None, {}),
    "latent": (BF16, 2, 64, 512, (4, 1, 4096, 576), None, {"splits": 4}),
    "latent_768_rows": (BF16, 6, 128, 512, (2, 1, 4096, 576), None, {}),
    "float32": (F32, 4, 32, 128, (8, 8, 4096, 128), None, {"window": 1000, "logit_softcap": 30.0}),
    "float32_turned": (F32, 1, 12, 64, (8, 12, 4096, 64), None, {}),
    "pages_of_16": (BF16, 1, 32, 128, (2048, 8, 16, 128), (8, 256), {}),
    "pages_of_48": (BF16, 1, 32, 128, (512, 8, 48, 128), (8, 64), {}),
    "pages_of_128_verify_16": (BF16, 16, 32, 128, (256, 8, 128, 128), (8, 32), {"splits": 2}),
    "pages_of_8_float32": (F32, 1, 32, 128, (2048, 8, 8, 128), (8, 256), {}),
    "pages_turned": (BF16, 1, 12, 64, (256, 12, 128, 64), (8, 32), {}),
    "large_pages": (BF16, 1, 64, 128, (64, 64, 1024, 128), (8, 8), {}),
}  # fmt: skip


@functools.cache
def devices(machine: str):
    return topologies.get_topology_desc(platform="tpu", topology_name=machine).devices


def call(q, k, v, sinks, lengths, table=None, implementation="pallas_tpu", **options):
    return decode_attention(
        q, k, v, lengths=lengths, block_table=table, sinks=sinks, implementation=implementation, **options
    )


def shapes_of(name, q_spec=(), k_spec=(), numbers=(), mesh=None, device=None):
    dtype, q_len, heads, v_dim, cache, table, _ = CASES[name]
    batch = cache[0] if table is None else table[0]

    def shape(sizes, dtype, spec):
        sharding = SingleDeviceSharding(device) if mesh is None else NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    arrays = [shape((batch, q_len, heads, cache[3]), dtype, q_spec), shape(cache, dtype, k_spec)]
    arrays += [shape((*cache[:3], v_dim), dtype, k_spec), shape((heads,), F32, q_spec[2:3])]
    arrays.append(shape((batch,), np.int32, numbers))
    return arrays if table is None else [*arrays, shape(table, np.int32, numbers)]


def moved(program: str) -> int:
    """Elements of the largest array that the program makes, of whatever memory; parameters and views are not made."""
    made = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (?!parameter|bitcast|get-tuple-element|tuple)[\w-]+\(", program)
    return max(math.prod(int(n) for n in sizes.split(",") if n) for sizes in made)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", CASES)
def test_compiles_and_does_not_copy_the_cache(name, machine):
    dtype, _, _, _, cache, _, options = CASES[name]
    args = shapes_of(name, device=devices(machine)[0])
    compiled = jax.jit(functools.partial(call, **options)).lower(*args).compile()
    program = compiled.as_text()
    assert testing.show_lowered(program, "tpu", "compiles") == {("decode_attention", "pallas_tpu")}
    # Each array in v5e's VMEM is no temporary to the analysis, so the text is asked too.
    assert moved(program) < math.prod(cache) / 4
    assert compiled.memory_analysis().temp_size_in_bytes < math.prod(cache) * np.dtype(dtype).itemsize


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", ["llama3_8b", "gpt2_small"])
def test_a_loop_that_fills_the_cache_does_not_copy_it(name, machine):
    """Eight steps of writing a token and decoding, in one loop."""

    def decode(q, k, v, sinks, lengths):
        def step(carry, _):
            q, k, v, lengths = carry
            new = q[:, 0, : k.shape[1], None]
            put = jax.vmap(lambda cache, row, at: jax.lax.dynamic_update_slice_in_dim(cache, row, at, 1))
            k, v = put(k, new, lengths), put(v, new, lengths)
            q = call(q, k, v, sinks, lengths + 1, implementation="pallas_tpu")
            return (q, k, v, lengths + 1), None

        return jax.lax.scan(step, (q, k, v, lengths), None, length=8)[0]

    args = shapes_of(name, device=devices(machine)[0])
    compiled = jax.jit(decode, donate_argnums=(1, 2)).lower(*args).compile()
    assert testing.show_lowered(compiled.as_text(), "tpu", "compiles") == {("decode_attention", "pallas_tpu")}
    cache = math.prod(CASES[name][4]) * 2
    assert compiled.memory_analysis().temp_size_in_bytes < cache / 4
    assert not re.search(rf"= \(?bf16\[{','.join(map(str, CASES[name][4]))}\]\S* copy", compiled.as_text())


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", ["llama3_8b", "pages_of_16"])
def test_compiles_over_four_chips(name, machine):
    mesh = Mesh(np.array(devices(machine)).reshape(2, 2), ("data", "tensor"))
    paged = CASES[name][5] is not None
    args = shapes_of(name, ("data", None, "tensor"), (None if paged else "data", "tensor"), ("data",), mesh)
    with dispatch.partition(mesh, batch="data", heads="tensor"):
        compiled = jax.jit(call).lower(*args).compile()
    program = compiled.as_text()
    assert testing.show_lowered(program, "tpu", "compiles") == {("decode_attention", "pallas_tpu")}
    assert "all-gather" not in program and "all-to-all" not in program
    assert moved(program) < math.prod(CASES[name][4]) / 16


@pytest.mark.parametrize("name", ["llama3_8b", "pages_of_16"])
def test_compiles_under_vmap(name):
    """Over queries: the pages are shared; a dense cache is one a sequence, so here it is the lengths that differ."""
    args = shapes_of(name, device=devices(MACHINES[0])[0])
    args[0] = jax.ShapeDtypeStruct((3, *args[0].shape), args[0].dtype, sharding=args[0].sharding)
    axes = (0, *[None] * (len(args) - 1))
    program = jax.jit(jax.vmap(call, in_axes=axes)).lower(*args).compile().as_text()
    assert testing.show_lowered(program, "tpu", "compiles") == {("decode_attention", "pallas_tpu")}
