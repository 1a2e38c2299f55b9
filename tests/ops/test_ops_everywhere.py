"""Every op in plain jax: the reference itself, and what lowers for machines that are not here."""

import functools
import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from lissom.ops import testing
from lissom.ops.attention import BlockSparse, Causal, KeyColumns, Neighbourhood, attention
from lissom.ops.binary_matmul import binary_matmul
from lissom.ops.decode_attention import decode_attention
from lissom.ops.grouped_matmul import grouped_matmul
from lissom.ops.quantized_matmul import quantized_matmul
from lissom.ops.softmax import softmax
from lissom.ops.spiking import spike_scan

ROOT = pathlib.Path(__file__).parent.parent.parent
NAMES = (
    *("attention", "binary_matmul", "decode_attention", "grouped_matmul", "quantized_matmul", "softmax", "spiking"),
)
OPS = {name: importlib.import_module(f"lissom.ops.{name}").OP for name in NAMES}

LIST = np.zeros((1, 1, 2, 1), np.int32)
MASKS = {
    "causal": Causal(),
    "plane": Neighbourhood((8, 32), 5),
    "blocks": BlockSparse(jnp.asarray(LIST)) & Causal(),
    "columns": KeyColumns(LIST),
}


def attend(mask, name, x):
    f = lambda q, k, v: attention(q, k, v, mask=mask, implementation=name).astype(jnp.float32).sum()
    return jax.grad(f, argnums=(0, 1, 2))(x, x, x)


def product(name, x):
    w, sizes = jnp.ones((4, 256, 128), x.dtype), jnp.array([10, 0, 30, 24])
    f = lambda x, w: grouped_matmul(x, w, sizes, implementation=name).astype(jnp.float32).sum()
    return jax.grad(f, argnums=(0, 1))(x, w)


def few_bits(name, x):
    """4 bits in groups, with gradients, and integers."""
    scale = jnp.ones((128, 4))
    f = lambda x: quantized_matmul(x, jnp.ones((128, 128), jnp.uint8), scale, bits=4, implementation=name).sum()
    codes, one = jnp.ones((128, 256), jnp.int8), jnp.float32(1)
    return jax.grad(f)(x), quantized_matmul(x.astype(jnp.int8), codes, scale, x_scale=one, implementation=name)


def spikes(name, x):
    return jax.grad(lambda x: spike_scan(x, decay=0.9, implementation=name)[0].astype(jnp.float32).sum())(x)


def signs(name, x):
    bits = jax.lax.bitcast_convert_type(x.reshape(64, 128, 2), jnp.uint32)
    return binary_matmul(bits, bits[:40], length=4096, implementation=name)


PROGRAMS = {
    **{f"attention {m}": ("attention", (2, 256, 4, 64), functools.partial(attend, mask)) for m, mask in MASKS.items()},
    "decode": (
        "decode_attention",
        (2, 4, 256, 64),
        lambda n, x: decode_attention(x[:, :, :1].swapaxes(1, 2), x, x, lengths=jnp.array([3, 200]), implementation=n),
    ),
    "pages": (
        "decode_attention",
        (16, 2, 16, 64),
        lambda n, x: decode_attention(
            x[:2, :, :2], x, x, lengths=jnp.array([3, 60]), block_table=jnp.arange(16).reshape(2, 8), implementation=n
        ),
    ),
    "signs": ("binary_matmul", (64, 256), signs),
    "groups": ("grouped_matmul", (64, 256), product),
    "few bits": ("quantized_matmul", (64, 256), few_bits),
    "spiking": ("spiking", (20, 8, 128), spikes),
    "softmax": ("softmax", (64, 256), lambda n, x: jax.grad(lambda x: softmax(x, implementation=n)[0].sum())(x)),
}  # fmt: skip


def plain(op):
    """The implementations of an op that are made of XLA's operations alone."""
    return OPS[op].runs_on("cpu")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(("program", "name"), [(p, n) for p, (op, *_) in PROGRAMS.items() for n in plain(op)])
def test_lowers_elsewhere(program, name, platform):
    op, shape, f = PROGRAMS[program]
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    lowered = jax.jit(lambda x: f(name, x)).trace(x).lower(lowering_platforms=(platform,))
    assert testing.show_lowered(lowered.as_text(debug_info=True), platform) == {(op, name)}


@pytest.mark.tpu_compile
@pytest.mark.parametrize(("program", "name"), [(p, n) for p, (op, *_) in PROGRAMS.items() for n in plain(op)])
def test_compiles_for_a_tpu(program, name):
    op, shape, f = PROGRAMS[program]
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=SingleDeviceSharding(device))
    compiled = jax.jit(lambda x: f(name, x)).lower(x).compile()
    assert testing.show_lowered(compiled.as_text(), "tpu", "compiles") == {(op, name)}


def test_the_reference_of_attention_is_the_equation():
    """In float64, against softmax(q k^T) v written for one head without jax."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 7, 5))
    seen = np.tril(np.ones((7, 7), bool))
    scores = np.where(seen, q @ k.T / np.sqrt(5), -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    with jax.enable_x64(True):
        one = lambda x: jnp.asarray(x)[None, :, None]
        out = attention(one(q), one(k), one(v), mask=Causal(), implementation="reference")
        rows = softmax(jnp.asarray(scores), implementation="reference")
    np.testing.assert_allclose(out[0, :, 0], weights @ v, atol=1e-14)
    np.testing.assert_allclose(rows, weights, atol=1e-15)
    for op in ("attention", "softmax"):
        testing.show_equal(op, "reference")


def test_the_reference_of_decoding_is_attention():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 1, 4, 8), (2, 2, 9, 8), (2, 2, 9, 8)))
    out = decode_attention(q, k, v, lengths=jnp.array([9, 9]), implementation="reference")
    whole = attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), implementation="reference")
    np.testing.assert_allclose(out, whole, rtol=1e-6)
    testing.show_equal("decode_attention", "reference")


def test_the_page_of_support_knows_every_implementation():
    """docs/support.json is made by `pytest tests/ops --support`: a new implementation has to be run there once."""
    known = json.loads((ROOT / "docs" / "support.json").read_text())
    for op, made in OPS.items():
        for name in made.implementations:
            if name != "cudnn":  # which cannot even be lowered without its library
                assert known.get(op, {}).get(name), f"{op} {name}: run pytest tests/ops --support"


def test_facts_are_noted_of_what_exists():
    with pytest.raises(ValueError, match="a fact is one of"):
        testing.show("attention", "xla", "cpu", "is fast")
