"""What this machine can do at most, measured in the process that measures an op, and the least time that follows.

Sheets are not trusted: a clock, a container's share of cores and the data decide (on zeros an H200 multiplies
matrices 13 % faster than on normal data). Noise only ever makes a ceiling look lower, so each is the best of several
calls. Results are written over older results (`latency.Recycled`), so that no page fault is timed.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from lissom.evaluation.latency import Recycled
from lissom.evaluation.rows import Measurement, measure
from lissom.ops import exponential

REPEATS = 8
DISPATCHES = 300
DTYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Work:
    """What a problem needs however it is computed: matrix-product operations in `dtype`, bytes that must move,
    exponentials."""

    flops: float
    bytes: float
    exps: float
    dtype: str


@dataclass(frozen=True)
class Limit:
    """The least time of a `Work`, and which of its terms ("flops", "bytes", "exps") is the largest."""

    seconds: float
    term: str


@dataclass(frozen=True)
class Ceilings:
    """Rates a second. `matmul`: by dtype, in operations (2 a multiply-add). `dispatch`: seconds of an empty call.
    `by`: who reached what, where it was not this process ({"bandwidth": "torch"})."""

    bandwidth: float
    matmul: Mapping[str, float]
    exp: float
    fma: float
    dispatch: float
    by: Mapping[str, str] = field(default_factory=dict)

    def limit(self, work: Work) -> Limit:
        """max(flops / matmul rate, bytes / bandwidth, exps / exp rate): nothing overlaps better than wholly."""
        terms = {
            "flops": work.flops / self.matmul[work.dtype],
            "bytes": work.bytes / self.bandwidth,
            "exps": work.exps / self.exp,
        }
        term = max(terms, key=terms.get)
        return Limit(terms[term], term)

    def rates(self) -> dict[str, float]:
        """All but the dispatch, by name: "bandwidth", "exp", "fma" and the dtypes of the matrix products."""
        return {"bandwidth": self.bandwidth, **self.matmul, "exp": self.exp, "fma": self.fma}

    def raised(self, rates: Mapping[str, float], by: str | None = None) -> "Ceilings":
        """With other rates (named as in `rates()`) where these are higher: measured later, or by another program
        (`by`). A ceiling is what anything ever reached."""
        best = {key: max(rate, rates.get(key, 0.0)) for key, rate in self.rates().items()}
        who = {key: by for key, rate in self.rates().items() if by and best[key] > rate}
        matmul = {dtype: best[dtype] for dtype in self.matmul}
        return Ceilings(best["bandwidth"], matmul, best["exp"], best["fma"], self.dispatch, {**self.by, **who})

    def measurements(self) -> list[Measurement]:
        """All of them, as a row keeps them."""
        who = lambda key: {"by": self.by.get(key, "jax")}
        return [
            measure("bandwidth", self.bandwidth, **who("bandwidth")),
            *(measure("matmul_rate", rate, dtype=dtype, **who(dtype)) for dtype, rate in self.matmul.items()),
            measure("exp_rate", self.exp),
            measure("fma_rate", self.fma),
            measure("dispatch_seconds", self.dispatch),
        ]

    def __str__(self) -> str:
        rates = ", ".join(f"{dtype} {rate / 1e9:,.0f}" for dtype, rate in self.matmul.items())
        return (
            f"ceilings: {self.bandwidth / 1e9:,.1f} GB/s; matrix products {rates} GFLOP/s; "
            f"{self.exp / 1e9:,.2f} G exp/s; multiply-adds {self.fma / 1e9:,.0f} GFLOP/s; "
            f"dispatch {self.dispatch * 1e6:.1f} us"
        )


def measure_ceilings(*, repeats: int = REPEATS, tiny: bool = False) -> Ceilings:
    """Measures all ceilings of the default device: some seconds, or with `tiny` (sizes that measure nothing but the
    code) less than one."""
    accelerated = jax.default_backend() != "cpu"
    width = 128 if tiny else 8192 if accelerated else 2048
    streamed = 1 << (14 if tiny else 28 if accelerated else 26)
    wide = 1 << (12 if tiny else 27 if accelerated else 22)
    matmul = {dtype: _matmul(width, dtype, repeats) for dtype in DTYPES}
    fma = _elementwise(wide, _multiply_adds, 2 * CHAINS * CHAIN, repeats)
    return Ceilings(
        bandwidth=_bandwidth(streamed, repeats),
        matmul=matmul,
        exp=max(_elementwise(wide, _exponentials(exp), EXPONENTIALS, repeats) for exp in (jnp.exp, exponential.exp)),
        # Where there is no matrix unit, a product of matrices is made of multiply-adds, and made best.
        fma=fma if accelerated else max(fma, matmul["float32"]),
        dispatch=_dispatch(),
    )


def _best(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest call, after two untimed ones."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times[2:])


def _normal(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> jax.Array:
    key = jax.random.key(seed)
    if dtype == "int8":
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def _matmul(width: int, dtype: str, repeats: int) -> float:
    # The result's dtype is the one that the platform is fastest with: int32 for int8, else that of the operands.
    result = jnp.int32 if dtype == "int8" else dtype
    a, b = (_normal((width, width), dtype, seed) for seed in (0, 1))
    product = Recycled(lambda a, b: jnp.dot(a, b, preferred_element_type=result), a, b)
    return 2 * width**3 / _best(lambda: product(a, b), repeats)


def _bandwidth(size: int, repeats: int) -> float:
    """The best of a scaling in place, which reads and writes, and a sum, which reads. A copy from one place to
    another moves more than it seems to: a CPU reads what it is about to overwrite."""
    x = _normal((size,))
    read = jax.jit(jnp.sum)
    reading = 4 * size / _best(lambda: read(x), repeats)
    in_place = jax.jit(lambda x: x * 0.999, donate_argnums=0)
    state = [x]

    def scale():
        state[0] = in_place(state[0])
        return state[0]

    return max(reading, 8 * size / _best(scale, repeats))


EXPONENTIALS = 8
"""Exponentials of one element: independent, since a chain of them would measure how long one takes."""

CHAINS, CHAIN = 8, 16
"""Independent chains of dependent multiply-adds of one element: a unit that takes four cycles for one is kept busy."""


def _exponentials(exp):
    return lambda x: sum(exp(x * (0.1 * (i + 1))) for i in range(EXPONENTIALS))


def _multiply_adds(x):
    chains = [x * (i + 1.0) for i in range(CHAINS)]
    for _ in range(CHAIN):
        chains = [chain * 0.999 + x for chain in chains]
    return sum(chains)


def _elementwise(size: int, function: Callable, operations: int, repeats: int) -> float:
    x = _normal((size,))
    fused = Recycled(function, x)
    return operations * size / _best(lambda: fused(x), 2 * repeats)


def _dispatch() -> float:
    x = jnp.float32(0)
    increment = jax.jit(lambda x: x + 1)
    return _best(lambda: increment(x), DISPATCHES)
