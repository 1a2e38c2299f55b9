"""The backward kernels of `pallas_gpu`, which explains them: dq by tiles of queries, dk and dv by tiles of keys."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lissom.ops.attention.pallas_gpu_parts import (
    PER_COLUMN,
    PER_ROW,
    Plan,
    add_product,
    capped,
    entry,
    place,
    produce_keys,
    product,
    seen,
    spread,
    two_products,
    zeros,
)
from lissom.ops.hopper import PRODUCER_REGISTERS, ROWS, consumer_registers, drain, tile


def dq_of(q, k, v, d_out, stats, plan: Plan, block_k: int, consumers: int, stages: int, *, scale, softcap, interpret):
    """Gradient of q. stats: float32 [batch, heads, 2, q_len], (lse in base 2, delta)."""
    batch, q_len, heads, head_dim = q.shape
    v_dim, n_tiles = v.shape[3], -(-q_len // (ROWS * consumers))
    scratch = {
        "q_smem": tile((consumers, ROWS, head_dim), q.dtype),  # and in the end dq
        "d_out_smem": tile((consumers, ROWS, v_dim), q.dtype),
        "stats_smem": plgpu.SMEM((consumers, 2, ROWS), jnp.float32),
        "bounds_smem": plgpu.SMEM((consumers, max(plan.n_bounds, 1), ROWS), jnp.int32),
        "k_smem": tile((stages, block_k, head_dim), q.dtype),
        "v_smem": tile((stages, block_k, v_dim), q.dtype),
        "codes_smem": plgpu.SMEM((stages, max(plan.n_codes, 1), block_k), jnp.int32),
        "q_ready": plgpu.Barrier(num_arrivals=3 + bool(plan.n_bounds), num_barriers=consumers),
        "k_ready": plgpu.Barrier(num_arrivals=1 + bool(plan.n_codes), num_barriers=stages),
        "v_ready": plgpu.Barrier(num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
    }
    return plgpu.kernel(
        functools.partial(_dq, plan=plan, scale=scale, softcap=softcap, interpret=bool(interpret)),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=scratch,
        grid=(batch * n_tiles * heads,),
        grid_names=("block",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        kernel_name="lissom_attention_dq",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, d_out, stats, *plan.operands)


def _dq(q_ref, k_ref, v_ref, d_out_ref, stats_ref, index_ref, counts_ref, bounds_ref, codes_ref, dq_ref, *, plan, scale,
        softcap, interpret, **scratch):  # fmt: skip
    """q_ref, d_out_ref, dq_ref [batch, q_len, heads, .]; k_ref, v_ref [batch, kv_len, kv_heads, .]; stats_ref
    [batch, heads, 2, q_len]; the tables as in `Plan`."""
    consumers, heads, kv_heads = scratch["q_smem"].shape[0], q_ref.shape[2], k_ref.shape[2]
    (batch, turn, head), group = place(index_ref.shape[2], heads), jax.lax.axis_index("warpgroup")
    number = index_ref.shape[2] - 1 - turn
    at = (*entry(index_ref, batch, head, heads, kv_heads), number)
    index_ref = index_ref.at[at]  # [most]
    whole, count = counts_ref[(*at, 0)], counts_ref[(*at, 1)]

    @pl.when(group < consumers)
    def _():
        plgpu.set_max_registers(consumer_registers(consumers), action="increase")
        rows = pl.ds((number * consumers + group) * ROWS, ROWS)
        sources = (
            q_ref.at[batch, rows, head],
            d_out_ref.at[batch, rows, head],
            stats_ref.at[batch, head, :, rows],
            bounds_ref.at[:, batch if bounds_ref.shape[1] > 1 else 0, rows],
        )
        _consume_keys(sources, index_ref, whole, count, dq_ref.at[batch, rows, head], group, plan, scale, softcap,
                      interpret, **scratch)  # fmt: skip

    @pl.when(group == consumers)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        kv_head = head // (heads // kv_heads)
        codes_ref_ = codes_ref.at[:, batch if codes_ref.shape[1] > 1 else 0]  # [codes, kv_len]
        produce_keys(k_ref.at[batch, :, kv_head], v_ref.at[batch, :, kv_head], codes_ref_, index_ref, count, plan,
                     **scratch)  # fmt: skip


def _consume_keys(sources, index_ref, whole, count, dq_ref, group, plan, scale, softcap, interpret, *, q_smem,
                  d_out_smem, stats_smem, bounds_smem, k_smem, v_smem, codes_smem, q_ready, k_ready, v_ready, k_free,
                  v_free):  # fmt: skip
    """dq of one warpgroup's rows; sources: q_ref [ROWS, head_dim], d_out_ref [ROWS, v_dim], stats_ref [2, ROWS],
    bounds_ref [bounds, ROWS]."""
    stages, block_k, head_dim = k_smem.shape
    buffers = [smem.at[group] for smem in (q_smem, d_out_smem, stats_smem, bounds_smem)]
    for source, buffer in list(zip(sources, buffers))[: 3 + bool(plan.n_bounds)]:
        plgpu.copy_gmem_to_smem(source, buffer, q_ready.at[group])
    plgpu.barrier_wait(q_ready.at[group])
    q_smem, d_out_smem, stats_smem, bounds_smem = buffers
    lse, delta = (plgpu.load(stats_smem.at[i], layout=PER_ROW) for i in range(2))
    bounds = [plgpu.load(bounds_smem.at[i], layout=PER_ROW) for i in range(plan.n_bounds)]

    def step(number, dq, tested):
        slot = jax.lax.rem(number, jnp.int32(stages))
        plgpu.barrier_wait(k_ready.at[slot])
        plgpu.barrier_wait(v_ready.at[slot])

        def probabilities(s):
            s, unit, tanh = capped(s, scale, softcap)
            if tested:
                codes = [plgpu.load(codes_smem.at[slot, i], layout=PER_COLUMN) for i in range(plan.n_codes)]
                sees = seen(plan, bounds, codes, index_ref[number] * block_k, s.shape, key_axis=1)
                s = s if sees is None else jnp.where(sees, s, -jnp.inf)
            return jnp.exp2(s * unit - spread(lse, s.shape, 0)), tanh

        (p, tanh), dp = two_products(q_smem, k_smem.at[slot], d_out_smem, v_smem.at[slot], probabilities)
        plgpu.barrier_arrive(v_free.at[slot])
        ds = slope(p * (dp - spread(delta, dp.shape, 0)), tanh)
        dq = add_product(dq, ds.astype(q_smem.dtype), k_smem.at[slot], interpret)
        if tested and plan.n_codes:
            plgpu.commit_smem()  # the codes are read before the copy engine may overwrite them
        plgpu.barrier_arrive(k_free.at[slot])
        return dq

    dq = zeros((ROWS, head_dim))
    if plan.is_possible(whole=True):
        dq = jax.lax.fori_loop(0, whole, functools.partial(step, tested=False), dq)
    if plan.is_possible(whole=False):
        dq = jax.lax.fori_loop(whole, count, functools.partial(step, tested=True), dq)
    q_smem[...] = (dq * scale).astype(q_smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem, dq_ref)
    plgpu.wait_smem_to_gmem(0)


def dk_dv_of(q, k, v, d_out, stats, plan: Plan, block_q: int, consumers: int, stages: int, *, wants: tuple[str, ...],
             scale, softcap, interpret):  # fmt: skip
    """Gradients of k and v, as many as `wants` names ("dk", "dv"); `plan` is by tiles of keys."""
    batch, head_dim = q.shape[0], q.shape[3]
    kv_len, kv_heads, v_dim = v.shape[1:]
    n_tiles = -(-kv_len // (ROWS * consumers))
    scratch = {
        "k_smem": tile((consumers, ROWS, head_dim), q.dtype),  # and in the end dk
        "v_smem": tile((consumers, ROWS, v_dim), q.dtype),  # and in the end dv
        "codes_smem": plgpu.SMEM((consumers, max(plan.n_codes, 1), ROWS), jnp.int32),
        "q_smem": tile((stages, block_q, head_dim), q.dtype),
        "d_out_smem": tile((stages, block_q, v_dim), q.dtype),
        "stats_smem": plgpu.SMEM((stages, 2, block_q), jnp.float32),
        "bounds_smem": plgpu.SMEM((stages, max(plan.n_bounds, 1), block_q), jnp.int32),
        "k_ready": plgpu.Barrier(num_arrivals=1 + ("dk" in wants) + bool(plan.n_codes), num_barriers=consumers),
        "q_ready": plgpu.Barrier(num_arrivals=2 + bool(plan.n_bounds), num_barriers=stages),
        "d_out_ready": plgpu.Barrier(num_barriers=stages),
        "q_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        "d_out_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
    }
    shapes = {"dk": k.shape, "dv": v.shape}
    return plgpu.kernel(
        functools.partial(_dk_dv, plan=plan, wants=wants, scale=scale, softcap=softcap, interpret=bool(interpret)),
        out_type=[jax.ShapeDtypeStruct(shapes[name], q.dtype) for name in wants],
        scratch_types=scratch,
        grid=(batch * n_tiles * kv_heads,),
        grid_names=("block",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        kernel_name="lissom_attention_" + "_".join(wants),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, d_out, stats, *plan.operands)


def _dk_dv(q_ref, k_ref, v_ref, d_out_ref, stats_ref, index_ref, counts_ref, bounds_ref, codes_ref, *gradient_refs,
           plan, wants, scale, softcap, interpret, **scratch):  # fmt: skip
    """As `_dq`, and gradient_refs [batch, kv_len, kv_heads, .]. The first tiles of keys, which causal queries see most,
    come first."""
    consumers, heads, kv_heads = scratch["k_smem"].shape[0], q_ref.shape[2], k_ref.shape[2]
    (batch, number, kv_head), group = place(index_ref.shape[2], kv_heads), jax.lax.axis_index("warpgroup")
    shared = heads // kv_heads
    at = lambda head: (*entry(index_ref, batch, head, heads, kv_heads), number)

    @pl.when(group < consumers)
    def _():
        plgpu.set_max_registers(consumer_registers(consumers), action="increase")
        first = (number * consumers + group) * ROWS
        keys = pl.ds(first, ROWS)
        sources = (
            k_ref.at[batch, keys, kv_head],
            v_ref.at[batch, keys, kv_head],
            codes_ref.at[:, batch if codes_ref.shape[1] > 1 else 0, keys],
        )
        counts = lambda i: [counts_ref[(*at(kv_head * shared + i), j)] for j in range(2)]
        targets = [ref.at[batch, keys, kv_head] for ref in gradient_refs]
        _consume_queries(sources, counts, shared, first, targets, group, plan, wants, scale, softcap, interpret,
                         **scratch)  # fmt: skip

    @pl.when(group == consumers)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        bounds_ref_ = bounds_ref.at[:, batch if bounds_ref.shape[1] > 1 else 0]  # [bounds, q_len]

        def of_head(i, filled):
            head = kv_head * shared + i
            sources = q_ref.at[batch, :, head], stats_ref.at[batch, head], bounds_ref_, d_out_ref.at[batch, :, head]
            count = counts_ref[(*at(head), 1)]
            _produce_queries(sources, index_ref.at[at(head)], count, filled, plan, **scratch)
            return filled + count

        filled = jax.lax.fori_loop(0, shared, of_head, jnp.int32(0))
        drain(filled, scratch["q_smem"].shape[0], scratch["q_free"], scratch["d_out_free"])


def _produce_queries(sources, index_ref, count, filled, plan, *, q_smem, stats_smem, bounds_smem, d_out_smem, q_ready,
                     d_out_ready, q_free, d_out_free, **_):  # fmt: skip
    """Fills stages with the listed tiles of one head, `filled` stages in: q_ref, d_out_ref [q_len, .], stats_ref
    [2, q_len], bounds_ref [bounds, q_len]."""
    q_ref, stats_ref, bounds_ref, d_out_ref = sources
    stages, block_q = q_smem.shape[:2]

    @pl.loop(0, count)
    def _(step):
        slot = jax.lax.rem(filled + step, jnp.int32(stages))
        is_reused = filled + step >= stages
        queries = pl.ds(index_ref[step] * block_q, block_q)
        pl.when(is_reused)(lambda: plgpu.barrier_wait(q_free.at[slot]))
        plgpu.copy_gmem_to_smem(q_ref.at[queries], q_smem.at[slot], q_ready.at[slot])
        plgpu.copy_gmem_to_smem(stats_ref.at[:, queries], stats_smem.at[slot], q_ready.at[slot])
        if plan.n_bounds:
            plgpu.copy_gmem_to_smem(bounds_ref.at[:, queries], bounds_smem.at[slot], q_ready.at[slot])
        pl.when(is_reused)(lambda: plgpu.barrier_wait(d_out_free.at[slot]))
        plgpu.copy_gmem_to_smem(d_out_ref.at[queries], d_out_smem.at[slot], d_out_ready.at[slot])


def _consume_queries(sources, counts, shared, first, targets, group, plan, wants, scale, softcap, interpret, *, k_smem,
                     v_smem, codes_smem, q_smem, d_out_smem, stats_smem, bounds_smem, k_ready, q_ready, d_out_ready,
                     q_free, d_out_free):  # fmt: skip
    """dk and dv of one warpgroup's keys, which begin at `first`; sources: k_ref [ROWS, head_dim], v_ref [ROWS, v_dim],
    codes_ref [codes, ROWS]. Scores lie keys by queries here, so that both sums take their weights from registers."""
    stages, head_dim, v_dim = q_smem.shape[0], q_smem.shape[2], v_smem.shape[2]
    buffers = [smem.at[group] for smem in (k_smem, v_smem, codes_smem)]
    is_read = True, "dk" in wants, plan.n_codes > 0  # dv depends on no value
    for source, buffer, _ in (copy for copy in zip(sources, buffers, is_read) if copy[2]):
        plgpu.copy_gmem_to_smem(source, buffer, k_ready.at[group])
    plgpu.barrier_wait(k_ready.at[group])
    k_smem, v_smem, codes_smem = buffers
    codes = [plgpu.load(codes_smem.at[i], layout=PER_ROW) for i in range(plan.n_codes)]

    def step(number, carry, tested):
        dk, dv = carry
        slot = jax.lax.rem(number, jnp.int32(stages))
        plgpu.barrier_wait(q_ready.at[slot])
        plgpu.barrier_wait(d_out_ready.at[slot])

        def probabilities(s):
            s, unit, tanh = capped(s, scale, softcap)
            if tested:
                bounds = [plgpu.load(bounds_smem.at[slot, i], layout=PER_COLUMN) for i in range(plan.n_bounds)]
                sees = seen(plan, bounds, codes, first, s.shape, key_axis=0)
                s = s if sees is None else jnp.where(sees, s, -jnp.inf)
            lse = plgpu.load(stats_smem.at[slot, 0], layout=PER_COLUMN)
            return jnp.exp2(s * unit - spread(lse, s.shape, 1)), tanh

        if "dk" in wants:
            (p, tanh), dp = two_products(k_smem, q_smem.at[slot], v_smem, d_out_smem.at[slot], probabilities)
        else:
            p, _ = probabilities(product(k_smem, q_smem.at[slot]))
        if "dv" in wants:
            dv = add_product(dv, p.astype(q_smem.dtype), d_out_smem.at[slot], interpret)
        plgpu.barrier_arrive(d_out_free.at[slot])
        if "dk" in wants:
            delta = plgpu.load(stats_smem.at[slot, 1], layout=PER_COLUMN)
            ds = slope(p * (dp - spread(delta, dp.shape, 1)), tanh)
            dk = add_product(dk, ds.astype(q_smem.dtype), q_smem.at[slot], interpret)
        plgpu.commit_smem()  # statistics and bounds are read before the copy engine may overwrite them
        plgpu.barrier_arrive(q_free.at[slot])
        return dk, dv

    def of_head(i, carry):
        passed, sums = carry
        whole, count = counts(i)
        if plan.is_possible(whole=True):
            sums = jax.lax.fori_loop(passed, passed + whole, functools.partial(step, tested=False), sums)
        if plan.is_possible(whole=False):
            sums = jax.lax.fori_loop(passed + whole, passed + count, functools.partial(step, tested=True), sums)
        return passed + count, sums

    # A sum that is not wanted is carried as nothing.
    sums = (zeros((ROWS, head_dim)) if "dk" in wants else None, zeros((ROWS, v_dim)) if "dv" in wants else None)
    _, (dk, dv) = jax.lax.fori_loop(0, shared, of_head, (jnp.int32(0), sums))
    for name, target in zip(wants, targets):
        smem, value = (k_smem, dk * scale) if name == "dk" else (v_smem, dv)
        smem[...] = value.astype(smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, target)
    plgpu.wait_smem_to_gmem(0)


def slope(ds: jax.Array, tanh: jax.Array | None) -> jax.Array:
    """Gradient before the softcap, whose own is 1 - tanh^2."""
    return ds if tanh is None else ds * (1.0 - tanh * tanh)
