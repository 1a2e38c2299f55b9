"""Products with weights of few bits in real models, by name: tests take `TINY`, benchmarks `REAL`."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lissom.ops.quantized_matmul.decoding import FP8, is_quantized


@dataclass(frozen=True)
class Case:
    """x [m, k] of dtype `x` and a matrix of n rows of k numbers; `codes`: int4 (two a byte), int8, or a float8;
    `group`: how many share a scale, None: all of a row."""

    m: int
    k: int
    n: int
    codes: str
    x: str
    group: int | None
    origin: str

    @property
    def bits(self) -> int:
        return 4 if self.codes == "int4" else 8

    @property
    def groups(self) -> int:
        return 1 if self.group is None else self.k // self.group


def arrays(case: Case, key: jax.Array) -> tuple[jax.Array, ...]:
    """x, codes, scale, and x_scale [m, 1] where x has one; results are of the size of x, or 1."""
    keys = jax.random.split(key, 4)
    spread = {"int4": 4.0, "int8": 64.0}.get(case.codes, 1.0)
    scale = jax.random.uniform(keys[2], (case.n, case.groups), jnp.float32, 0.5, 1.5) / (spread * case.k**0.5)
    given = (_drawn(keys[0], (case.m, case.k), case.x), _codes(keys[1], case), scale)
    if not is_quantized(jnp.dtype(case.x)):
        return given
    size = 64.0 if case.x == "int8" else 1.0
    return (*given, jax.random.uniform(keys[3], (case.m, 1), jnp.float32, 0.5, 1.5) / size)


def _codes(key: jax.Array, case: Case) -> jax.Array:
    if case.codes != "int4":
        return _drawn(key, (case.n, case.k), case.codes)
    return jax.random.randint(key, (case.n, case.k // 2), 0, 256, jnp.int32).astype(jnp.uint8)


def _drawn(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """All integers of the type, else standard normal numbers."""
    dtype = jnp.dtype(dtype)
    if dtype in (jnp.int8,):
        return jax.random.randint(key, shape, -128, 128, jnp.int32).astype(dtype)
    x = jax.random.normal(key, shape, jnp.float32)
    return (jnp.clip(x, -4, 4) if dtype in FP8 else x).astype(dtype)


REAL = {
    "int8_2048": Case(2048, 2048, 2048, "int8", "int8", None, "the CPU target"),
    "gemv_int8": Case(1, 4096, 11008, "int8", "float32", None, "LLaMA-7B's up projection of one token"),
    "gemv_int4": Case(1, 4096, 11008, "int4", "float32", 128, "the same, in groups of 4 bits"),
    "m16_int4": Case(16, 4096, 11008, "int4", "float32", 128, "the same of 16 tokens"),
    "m512_int8": Case(512, 4096, 11008, "int8", "float32", None, "the same of a prompt"),
    "int8_8192": Case(8192, 8192, 8192, "int8", "int8", None, "the GPU target"),
    "fp8_8192": Case(8192, 8192, 8192, "float8_e4m3fn", "float8_e4m3fn", None, "the GPU target of float8"),
    "gpu_gemv_int8": Case(1, 4096, 11008, "int8", "bfloat16", 128, "LLaMA-7B's up projection of one token"),
    "gpu_gemv_int4": Case(1, 4096, 11008, "int4", "bfloat16", 128, "the GPU target of few rows"),
    "gpu_m16_int4": Case(16, 4096, 11008, "int4", "bfloat16", 128, "the same of 16 tokens"),
}

TINY = {
    "int8": Case(5, 12, 7, "int8", "float32", None, "gemv_int8, of five tokens"),
    "int8_row": Case(1, 12, 7, "int8", "float32", None, "gemv_int8"),
    "int8_groups": Case(3, 12, 9, "int8", "float32", 3, "gpu_gemv_int8"),
    "int8_groups_row": Case(1, 12, 9, "int8", "float32", 4, "gpu_gemv_int8"),
    "int4": Case(5, 12, 7, "int4", "float32", None, "4 bits without groups"),
    "int4_groups": Case(3, 24, 9, "int4", "float32", 6, "m16_int4"),
    "int4_groups_row": Case(1, 24, 21, "int4", "float32", 4, "gemv_int4"),
    "fp8": Case(3, 12, 7, "float8_e4m3fn", "float32", 4, "weights of float8"),
    "fp8_e5m2_row": Case(1, 12, 7, "float8_e5m2", "float32", None, "weights of float8"),
    "int8_int8": Case(6, 12, 7, "int8", "int8", None, "int8_2048"),
    "int8_int8_row": Case(1, 12, 7, "int8", "int8", 4, "a step of decoding in integers"),
    "int4_int8": Case(3, 24, 21, "int4", "int8", 6, "weights of 4 bits, activations of 8"),
    "int4_int8_few": Case(3, 24, 21, "int4", "int8", None, "the same without groups"),
    "int4_int8_many": Case(9, 24, 7, "int4", "int8", None, "windows of a convolution"),
    "fp8_fp8": Case(5, 12, 7, "float8_e4m3fn", "float8_e5m2", 6, "fp8_8192"),
}
