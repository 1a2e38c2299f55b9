"""Kernels, compiled by the real TPU compiler for machines that are described and not there. libtpu is the extra `tpu`;
the second command of .ci/run has the environment that this takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from lissom.ops import dispatch, testing
from lissom.ops.attention import BlockSparse, Causal, Full, Neighbourhood, Segments, Window, attention

pytestmark = pytest.mark.tpu_compile

V5E, V5P = "v5e:2x2", "v5p:2x2x1"
BF16, F32 = jnp.bfloat16, np.float32

# name: mask of an int32 array, its shape, (batch, q_len, kv_len, heads, kv_heads, head_dim, v_dim), dtype, options
CASES = {
    "gpt2_small": (lambda _: Causal(), (1,), (1, 1024, 1024, 12, 12, 64, 64), BF16, {}),
    "llama3_8b": (lambda _: Causal(), (1,), (1, 8192, 8192, 32, 8, 128, 128), BF16, {}),
    "float32": (lambda _: Causal(), (1,), (1, 2048, 2048, 4, 4, 128, 128), F32, {}),
    "gemma2_window": (lambda _: Window(4095, 0), (1,), (1, 8192, 8192, 8, 4, 256, 256), BF16, {"logit_softcap": 50.0}),
    "vit_b16": (lambda _: Full(), (1,), (8, 197, 197, 12, 12, 64, 64), BF16, {}),
    "deepseek_v2_lite": (lambda _: Causal(), (1,), (1, 4096, 4096, 16, 16, 192, 128), BF16, {}),
    "packed": (lambda ids: Segments(ids) & Causal(), (2, 4096), (2, 4096, 4096, 9, 3, 64, 64), BF16, {}),
    "packed_float32": (lambda ids: Segments(ids) & Causal(), (2, 1024), (2, 1024, 1024, 4, 2, 64, 64), F32, {}),
    "block_sparse": (lambda i: BlockSparse(i) & Causal(), (1, 8, 64, 8), (1, 8192, 8192, 8, 2, 128, 128), BF16, {}),
    "grid": (lambda _: Neighbourhood((48, 48), (13, 13), (1, 3)), (1,), (1, 2304, 2304, 4, 4, 64, 64), BF16, {}),
    "chunk": (lambda offset: Causal(offset), (4,), (4, 130, 4096, 8, 2, 128, 128), BF16, {}),
}  # fmt: skip


@functools.cache
def devices(machine: str):
    return topologies.get_topology_desc(platform="tpu", topology_name=machine).devices


def with_gradients(mask_of, options):
    def run(q, k, v, d_out, numbers):
        f = lambda *x: attention(*x, mask=mask_of(numbers), implementation="pallas_tpu", **options)
        out, pull = jax.vjp(f, q, k, v)
        return out, pull(d_out)

    return run


def shapes_of(sizes, dtype, numbers, sharding, whole):
    batch, q_len, kv_len, heads, kv_heads, head_dim, v_dim = sizes
    rows = ((q_len, heads, head_dim), (kv_len, kv_heads, head_dim), (kv_len, kv_heads, v_dim), (q_len, heads, v_dim))
    floats = [jax.ShapeDtypeStruct((batch, *row), dtype, sharding=sharding) for row in rows]
    return [*floats, jax.ShapeDtypeStruct(numbers, np.int32, sharding=whole)]


def copies(sizes, dtype):
    """Bytes of what the algorithm keeps beside its arguments and results: q, k, v, out with its rest, d_out and the
    gradients heads-major, widths in whole lanes and lengths in whole tiles of at most 1024; 8 rows of float32."""
    batch, q_len, kv_len, heads, kv_heads, head_dim, v_dim = sizes
    rounded = lambda n, to: -(-n // to) * to
    lanes = functools.partial(rounded, to=128)
    q_len, kv_len = (rounded(n, 1024) if n > 1024 else lanes(n) for n in (q_len, kv_len))
    of_queries = batch * heads * q_len * (2 * lanes(head_dim) + 3 * lanes(v_dim))
    of_keys = batch * kv_heads * kv_len * 2 * (lanes(head_dim) + lanes(v_dim))
    return np.dtype(dtype).itemsize * (of_queries + of_keys) + 4 * 8 * batch * heads * q_len


# Every kernel in both dtypes; all cases on both machines would double the time.
ON_V5P = ("llama3_8b", "float32", "packed", "block_sparse")


@pytest.mark.parametrize(("name", "machine"), [*((name, V5E) for name in CASES), *((name, V5P) for name in ON_V5P)])
def test_forward_and_backward_compile_and_keep_memory_linear(name, machine):
    mask_of, numbers, sizes, dtype, options = CASES[name]
    one = SingleDeviceSharding(devices(machine)[0])
    args = shapes_of(sizes, dtype, numbers, one, one)
    compiled = jax.jit(with_gradients(mask_of, options)).lower(*args).compile()
    program = compiled.as_text()
    assert testing.show_lowered(program, "tpu", "compiles") == {("attention", "pallas_tpu")}
    assert all(name in program for name in ("attention_forward", "attention_dq", "attention_dkv"))
    used, allowed = compiled.memory_analysis().temp_size_in_bytes, copies(sizes, dtype) + 2**21
    assert used <= allowed, f"{used / 2**20:.1f} MB of temporaries, allowed {allowed / 2**20:.1f}"


@pytest.mark.parametrize("machine", [V5E, V5P])
def test_compiles_over_four_chips(machine):
    mask_of, numbers, sizes, dtype, options = CASES["block_sparse"]
    sizes = (2, *sizes[1:])
    mesh = Mesh(np.array(devices(machine)).reshape(2, 2), ("data", "tensor"))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data", None, "tensor", None), ()))
    args = shapes_of(sizes, dtype, numbers, rows, whole)
    with dispatch.partition(mesh, batch="data", heads="tensor"):
        compiled = jax.jit(with_gradients(mask_of, options)).lower(*args).compile()
    program = compiled.as_text()
    assert testing.show_lowered(program, "tpu", "compiles") == {("attention", "pallas_tpu")}
    assert "all-gather" not in program and "all-to-all" not in program  # nobody gathers keys, values or queries
    _, q_len, kv_len, heads, kv_heads, head_dim, v_dim = sizes
    local = (1, q_len, kv_len, heads // 2, kv_heads // 2, head_dim, v_dim)
    assert compiled.memory_analysis().temp_size_in_bytes <= copies(local, dtype) + 2**21


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_remat_and_scan_over_layers_compile(dtype):
    one = SingleDeviceSharding(devices(V5E)[0])

    def layers(x, weights):
        @jax.checkpoint
        def layer(x, w):
            out = attention(x, x, x, mask=Causal(), implementation="pallas_tpu")
            return x + jnp.einsum("bthd,hde->bthe", out, w), None

        return jax.lax.scan(layer, x, weights)[0].astype(jnp.float32).sum()

    args = [jax.ShapeDtypeStruct(s, dtype, sharding=one) for s in ((1, 1024, 2, 64), (3, 2, 64, 64))]
    program = jax.jit(jax.grad(layers, argnums=1)).lower(*args).compile().as_text()
    assert testing.show_lowered(program, "tpu", "compiles") == {("attention", "pallas_tpu")}
