"""What only a GPU can show: kernels that run, and equal the reference. `uv run pytest -n 0 -m gpu --support`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.ops import testing
from lissom.ops.attention import OP as ATTENTION
from lissom.ops.attention import BlockSparse, Causal, Full, Neighbourhood, Segments, Window, attention
from lissom.ops.binary_matmul import OP as BINARY
from lissom.ops.binary_matmul import binary_matmul, pack_signs
from lissom.ops.decode_attention import OP as DECODE
from lissom.ops.decode_attention import decode_attention
from lissom.ops.grouped_matmul import OP as GROUPED
from lissom.ops.grouped_matmul import grouped_matmul, transposed_grouped_matmul
from lissom.ops.grouped_matmul.cases import Case, sizes
from lissom.ops.quantized_matmul import OP as QUANTIZED
from lissom.ops.quantized_matmul import quantized_matmul
from lissom.ops.quantized_matmul.cases import Case as Few
from lissom.ops.quantized_matmul.cases import arrays as of_few_bits
from lissom.ops.softmax import OP as SOFTMAX
from lissom.ops.softmax import softmax

pytestmark = pytest.mark.gpu

BF16 = jnp.bfloat16
ARRAYS = np.sort(np.random.default_rng(0).integers(0, 4, (2, 500)), axis=1).astype(np.int32)
LIST = np.random.default_rng(1).permuted(np.tile(np.arange(4, dtype=np.int32), (1, 4, 4, 1)), axis=3)[..., :2]

# mask, (batch, q_len, kv_len, heads, kv_heads, head_dim, v_dim), options
CASES = {
    "causal": (Causal(), (2, 512, 512, 4, 4, 64, 64), {}),
    "grouped": (Causal(), (1, 512, 512, 8, 2, 128, 128), {}),
    "odd_full": (Full(), (2, 197, 211, 2, 2, 64, 64), {}),
    "window_capped": (Window(100, 0), (1, 700, 700, 2, 1, 128, 128), {"logit_softcap": 20.0}),
    "packed": (Segments(ARRAYS) & Causal(), (2, 500, 500, 2, 2, 64, 64), {}),
    "two_head_sizes": (Causal(), (1, 384, 384, 2, 2, 192, 128), {}),
    "plane": (Neighbourhood((16, 24), (5, 7)), (1, 384, 384, 2, 2, 64, 64), {}),
    "blocks": (BlockSparse(jnp.asarray(LIST)) & Causal(), (1, 512, 512, 4, 4, 64, 64), {}),
    "rows_without_keys": (Causal(-130), (1, 256, 256, 2, 2, 64, 64), {}),
}


def on_gpu():
    """In the test: asking while tests are collected would start a backend."""
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU here")


def asked(run):
    """Runs it; a refusal is said by a skip, not passed over."""
    try:
        run()
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize("implementation", [n for n in ATTENTION.runs_on("cuda") if n != "reference"])
@pytest.mark.parametrize("name", CASES)
def test_attention(name, implementation):
    on_gpu()
    mask, (batch, q_len, kv_len, heads, kv_heads, d, dv), options = CASES[name]
    shapes = (batch, q_len, heads, d), (batch, kv_len, kv_heads, d), (batch, kv_len, kv_heads, dv)
    arrays = dict(zip("qkv", testing.normal(0, *shapes, dtype=BF16)))
    lse = {"return_lse": True} if implementation != "cudnn" else {}  # which it does not give
    call = lambda i, q, k, v: attention(q, k, v, mask=mask, implementation=i, **lse, **options)
    asked(lambda: testing.check_case(ATTENTION, call, arrays, implementation, BF16))


@pytest.mark.parametrize("implementation", [n for n in DECODE.runs_on("cuda") if n != "reference"])
@pytest.mark.parametrize("options", [{}, {"splits": 3}, {"window": 100}, {"paged": True}], ids=str)
def test_decode_attention(implementation, options):
    on_gpu()
    lengths, table = np.array([700, 33, 1024, 0]), None
    cache = (4, 2, 1024, 128)
    if "paged" in options:
        cache, options = (4 * 16, 2, 64, 128), {}
        table = np.random.default_rng(2).permutation(64).reshape(4, 16).astype(np.int32)
    arrays = dict(zip("qkv", testing.normal(1, (4, 1, 8, 128), cache, cache, dtype=BF16)))

    def call(i, q, k, v):
        given = {"lengths": lengths, "block_table": table, "return_lse": True, **options}
        return decode_attention(q, k, v, implementation=i, **given)

    asked(lambda: testing.check_forward(DECODE, call, arrays, implementation, BF16))


@pytest.mark.parametrize("implementation", [n for n in SOFTMAX.runs_on("cuda") if n != "reference"])
@pytest.mark.parametrize("shape", [(256, 1024), (3, 7, 197), (16, 8192)], ids=str)
def test_softmax(implementation, shape):
    on_gpu()
    arrays = {"x": testing.normal(2, shape, dtype=BF16)[0]}
    call = lambda i, x: softmax(4 * x, implementation=i)
    asked(lambda: testing.check_case(SOFTMAX, call, arrays, implementation, BF16))


GROUPS = {
    "equal": Case(2048, 256, 768, 8, "equal", "whole blocks"),
    "random": Case(1999, 320, 192, 7, "random", "blocks of several groups"),
    "decode": Case(300, 512, 256, 64, "zipf", "a few rows a group"),
    "short": Case(777, 128, 320, 5, "short", "rows of no group"),
}


@pytest.mark.parametrize("implementation", [n for n in GROUPED.runs_on("cuda") if n != "reference"])
@pytest.mark.parametrize("form", ["rows", "activated", "sums"])
@pytest.mark.parametrize("name", GROUPS)
def test_grouped_matmul(name, form, implementation):
    on_gpu()
    case = GROUPS[name]
    of = jnp.asarray(sizes(case))
    other = (case.m, case.n) if form == "sums" else (case.g, case.k, case.n)
    arrays = dict(zip(("x", "other"), testing.normal(3, (case.m, case.k), other, dtype=BF16)))
    f = transposed_grouped_matmul if form == "sums" else grouped_matmul
    options = {"activation": "gelu"} if form == "activated" else {}
    call = lambda i, x, other: f(x, other, of, implementation=i, **options)
    check = testing.check_forward if form == "activated" else testing.check_case
    asked(lambda: check(GROUPED, call, arrays, implementation, BF16))


@pytest.mark.parametrize("implementation", BINARY.runs_on("cuda"))
@pytest.mark.parametrize("shape", [(1, 4096, 4096), (1000, 1000, 300), (512, 2304, 256)], ids=str)
def test_binary_matmul(shape, implementation):
    on_gpu()
    m, k, n = shape
    x, w = (np.random.default_rng(4 + i).choice([-1, 1], (rows, k)).astype(np.float32) for i, rows in enumerate((m, n)))
    run = jax.jit(lambda x, w: binary_matmul(pack_signs(x), pack_signs(w), length=k, implementation=implementation))
    np.testing.assert_array_equal(run(x, w), x @ w.T)
    testing.show_equal(BINARY.name, implementation)


FEW_BITS = {
    "int8": Few(1, 2048, 1000, "int8", "bfloat16", None, "one row"),
    "int8_groups": Few(100, 2048, 1000, "int8", "bfloat16", 64, "several tiles of rows"),
    "int4": Few(1, 2048, 1000, "int4", "bfloat16", 128, "one row"),
    "int4_channels": Few(17, 2048, 1000, "int4", "float16", None, "a few rows"),
    "integers": Few(300, 2048, 992, "int8", "int8", None, "tiles that overhang"),
    "integers_in_groups": Few(300, 2048, 992, "int8", "int8", 256, "and of groups"),
    "float8": Few(300, 2048, 992, "float8_e4m3fn", "float8_e4m3fn", None, "float8"),
    "float8_of_two_kinds": Few(300, 2048, 992, "float8_e5m2", "float8_e4m3fn", 128, "float8, mixed"),
}


@pytest.mark.parametrize("implementation", [n for n in QUANTIZED.runs_on("cuda") if n != "reference"])
@pytest.mark.parametrize("name", FEW_BITS)
def test_quantized_matmul(name, implementation):
    on_gpu()
    case = FEW_BITS[name]
    x, codes, scale, *x_scale = (np.asarray(a) for a in of_few_bits(case, jax.random.key(0)))
    call = lambda i, x, *of_x: quantized_matmul(
        x, codes, scale, bits=case.bits, x_scale=of_x[0] if of_x else None, implementation=i
    )
    if x_scale:
        run = lambda i, of_x: call(i, x, of_x.astype(scale.dtype))
        asked(lambda: testing.check_forward(QUANTIZED, run, {"of_x": x_scale[0]}, implementation, np.float32))
    else:
        asked(lambda: testing.check_forward(QUANTIZED, call, {"x": x}, implementation, x.dtype))
