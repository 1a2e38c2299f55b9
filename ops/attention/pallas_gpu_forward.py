"""The forward kernel of `pallas_gpu`, which explains it."""

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
    finished,
    place,
    produce_keys,
    product,
    seen,
    spread,
    weighed,
    zeros,
)
from lissom.ops.hopper import PRODUCER_REGISTERS, ROWS, consumer_registers, tile


def forward(q, k, v, plan: Plan, block_k: int, consumers: int, stages: int, *, scale, softcap, interpret):
    """out [batch, q_len, heads, v_dim] and lse [batch, heads, q_len]; lengths are multiples of 8, head sizes of 64."""
    batch, q_len, heads, head_dim = q.shape
    n_tiles = -(-q_len // (ROWS * consumers))
    v_dim = v.shape[3]
    body = functools.partial(_forward, plan=plan, scale=scale, softcap=softcap, interpret=bool(interpret))
    scratch = {
        "q_smem": tile((consumers, ROWS, head_dim), q.dtype),
        "k_smem": tile((stages, block_k, head_dim), q.dtype),
        "v_smem": tile((stages, block_k, v_dim), q.dtype),
        # A warpgroup is done with its queries when it writes its output: one buffer serves both if it fits.
        "out_smem": None if v_dim == head_dim else tile((consumers, ROWS, v_dim), q.dtype),
        "lse_smem": plgpu.SMEM((consumers, ROWS), jnp.float32),
        "bounds_smem": plgpu.SMEM((consumers, max(plan.n_bounds, 1), ROWS), jnp.int32),
        "codes_smem": plgpu.SMEM((stages, max(plan.n_codes, 1), block_k), jnp.int32),
        "q_ready": plgpu.Barrier(num_arrivals=1 + bool(plan.n_bounds), num_barriers=consumers),
        "k_ready": plgpu.Barrier(num_arrivals=1 + bool(plan.n_codes), num_barriers=stages),
        "v_ready": plgpu.Barrier(num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        "turn": plgpu.Barrier(num_arrivals=2) if consumers == 2 else None,
    }
    out, lse = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((batch, q_len, heads, v_dim), q.dtype),
            # Room for every row of every tile: what is copied without a swizzle is not clipped (`pallas_gpu`).
            jax.ShapeDtypeStruct((batch, heads, n_tiles * ROWS * consumers), jnp.float32),
        ],
        scratch_types={name: kind for name, kind in scratch.items() if kind is not None},
        grid=(batch * n_tiles * heads,),
        grid_names=("block",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        kernel_name="lissom_attention_forward",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, *plan.operands)
    return out, lse[..., :q_len]


def _forward(q_ref, k_ref, v_ref, index_ref, counts_ref, bounds_ref, codes_ref, out_ref, lse_ref, *, plan, scale,
             softcap, interpret, **scratch):  # fmt: skip
    """q_ref, out_ref [batch, q_len, heads, .]; k_ref, v_ref [batch, kv_len, kv_heads, .]; lse_ref [batch, heads, .];
    the tables as in `Plan`; `scratch` as `forward` allocates it."""
    consumers, heads, kv_heads = scratch["q_smem"].shape[0], q_ref.shape[2], k_ref.shape[2]
    (batch, turn, head), group = place(index_ref.shape[2], heads), jax.lax.axis_index("warpgroup")
    # The last tiles first: under a causal mask they have the most to do.
    number = index_ref.shape[2] - 1 - turn
    at = (*entry(index_ref, batch, head, heads, kv_heads), number)
    index_ref = index_ref.at[at]  # [most]
    whole, count = counts_ref[(*at, 0)], counts_ref[(*at, 1)]

    @pl.when(group < consumers)
    def _():
        plgpu.set_max_registers(consumer_registers(consumers), action="increase")
        first = (number * consumers + group) * ROWS
        bounds_ref_ = bounds_ref.at[:, batch if bounds_ref.shape[1] > 1 else 0]  # [bounds, q_len]
        _consume(q_ref.at[batch, pl.ds(first, ROWS), head], bounds_ref_.at[:, pl.ds(first, ROWS)], index_ref, whole,
                 count, out_ref.at[batch, pl.ds(first, ROWS), head], lse_ref.at[batch, head, pl.ds(first, ROWS)], group,
                 plan, scale, softcap, interpret, **scratch)  # fmt: skip

    @pl.when(group == consumers)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        kv_head = head // (heads // kv_heads)
        codes_ref_ = codes_ref.at[:, batch if codes_ref.shape[1] > 1 else 0]  # [codes, kv_len]
        produce_keys(k_ref.at[batch, :, kv_head], v_ref.at[batch, :, kv_head], codes_ref_, index_ref, count, plan,
                     **scratch)  # fmt: skip


def _consume(q_ref, bounds_ref, index_ref, whole, count, out_ref, lse_ref, group, plan, scale, softcap, interpret, *,
             q_smem, k_smem, v_smem, lse_smem, bounds_smem, codes_smem, q_ready, k_ready, v_ready, k_free, v_free,
             turn=None, out_smem=None):  # fmt: skip
    """Attention of one warpgroup: q_ref [ROWS, head_dim], bounds_ref [bounds, ROWS], out_ref [ROWS, v_dim]."""
    (stages, block_k), v_dim = k_smem.shape[:2], v_smem.shape[2]
    q_smem, lse_smem, bounds_smem = q_smem.at[group], lse_smem.at[group], bounds_smem.at[group]
    out_smem = q_smem if out_smem is None else out_smem.at[group]
    plgpu.copy_gmem_to_smem(q_ref, q_smem, q_ready.at[group])
    if plan.n_bounds:
        plgpu.copy_gmem_to_smem(bounds_ref, bounds_smem, q_ready.at[group])
    plgpu.barrier_wait(q_ready.at[group])
    bounds = [plgpu.load(bounds_smem.at[i], layout=PER_ROW) for i in range(plan.n_bounds)]

    def take_turns():
        if turn is not None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

    def step(number, carry, tested):
        acc, m, total = carry
        slot = jax.lax.rem(number, jnp.int32(stages))
        plgpu.barrier_wait(k_ready.at[slot])
        s = product(q_smem, k_smem.at[slot], take_turns)
        s, unit, _ = capped(s, scale, softcap)
        if tested:
            codes = [plgpu.load(codes_smem.at[slot, i], layout=PER_COLUMN) for i in range(plan.n_codes)]
            if codes:
                plgpu.commit_smem()  # they are read before the copy engine may overwrite them
            sees = seen(plan, bounds, codes, index_ref[number] * block_k, s.shape, key_axis=1)
            s = s if sees is None else jnp.where(sees, s, -jnp.inf)
        plgpu.barrier_arrive(k_free.at[slot])
        new, p, kept = weighed(s, unit, m, may_be_empty=tested)
        acc, total, p16 = acc * spread(kept, acc.shape, 0), total * kept + p.sum(axis=1), p.astype(q_smem.dtype)
        take_turns()
        plgpu.barrier_wait(v_ready.at[slot])
        acc = add_product(acc, p16, v_smem.at[slot], interpret)
        plgpu.barrier_arrive(v_free.at[slot])
        return acc, new, total

    # In turns: the second warpgroup begins half a step behind, and the first waits half a step at the end.
    pl.when(group == 1)(take_turns)
    row = lambda value: plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), PER_ROW)
    carry = zeros((ROWS, v_dim)), row(-jnp.inf), row(0.0)
    if plan.is_possible(whole=True):
        carry = jax.lax.fori_loop(0, whole, functools.partial(step, tested=False), carry)
    if plan.is_possible(whole=False):
        carry = jax.lax.fori_loop(whole, count, functools.partial(step, tested=True), carry)
    pl.when(group == 0)(take_turns)

    out, lse = finished(*carry)
    out_smem[...] = out.astype(out_smem.dtype)
    lse_smem[...] = lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, out_ref)
    plgpu.copy_smem_to_gmem(lse_smem, lse_ref)
    plgpu.wait_smem_to_gmem(0)
