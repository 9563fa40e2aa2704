"""Backward of scaled dot-product attention on Hopper in two kernels without atomics: one for dq, one for dk and dv.

    P = exp(S − L)      dP = dO Vᵀ      dS = P ∘ (dP − δ)      dQ = scale · dS K      dK = scale · dSᵀ Q      dV = Pᵀ dO

`gradient_q`: a consumer warpgroup holds 64 queries and walks over tiles of keys. `gradient_kv`: it holds 64 keys, computes Sᵀ
and dPᵀ, and walks over tiles of queries, and over the query heads that read its key-value head. In both the last warpgroup
loads by TMA into a ring, P and dS go back into the matrix units from registers, and the last products of a tile run while the
first ones of the next are issued.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from bridge.spec_sdpa import SdpaCall
from jax_power.mosaic_gpu import compat
from jax_power.mosaic_gpu.sdpa_fwd import COL, LOG2_E, ROW, ROWS, WGMMA
from jax_power.mosaic_gpu.sdpa_visible import Visible


class Tiles(NamedTuple):
    groups: int = 2
    width: int = 64
    stages: int = 2
    consumer_registers: int = 240
    producer_registers: int = 24
    registers_a: bool = False  # operands that stay are kept in registers
    overlap: bool = True
    head_group: int = 8


def _decode(call, tiles, blocks, heads, *, longest_last: bool):
    """(batch, head, block) of this thread block."""
    together = next(n for n in range(min(tiles.head_group, call.b * heads), 0, -1) if (call.b * heads) % n == 0)
    n = lax.axis_index("item")
    per_group = together * blocks
    within = lax.rem(n, jnp.int32(per_group))
    head = lax.div(n, jnp.int32(per_group)) * together + lax.rem(within, jnp.int32(together))
    block = lax.div(within, jnp.int32(together))
    block = blocks - 1 - block if longest_last else block
    return lax.div(head, jnp.int32(heads)), lax.rem(head, jnp.int32(heads)), block


def _visible(call, batch, length_gmem, width):
    queries, keys = call.t, call.s
    if call.query_lengths:
        queries = jnp.clip(length_gmem[0][batch], 0, call.t)
    if call.key_lengths:
        keys = jnp.clip(length_gmem[-1][batch], 0, call.s)
    return Visible.of(call, queries, keys, width)


def gradient_q(call: SdpaCall, tiles: Tiles, q, k, v, dout, stats, extras, lengths, *, rows_grad: bool = False):
    """dq `[b, t, h_q, d]`; with `rows_grad` also the sum of dS over each row `[b, h_q, t]`. stats: L in base 2 and δ, `[b, h_q, 2, t]`."""
    d, e = q.shape[-1], v.shape[-1]
    rows = tiles.groups * ROWS
    row_blocks = -(-call.t // rows)
    tile_extras = [x for x in extras if x.kind == "tile"]

    def body(*refs):
        q_gmem, k_gmem, v_gmem, dout_gmem, stats_gmem, *rest = refs
        extra_gmem, rest = rest[: len(extras)], rest[len(extras) :]
        length_gmem, outs = rest[: len(lengths)], rest[len(lengths) :]
        dq_gmem = outs[0]
        batch, head, block = _decode(call, tiles, row_blocks, call.h_q, longest_last=True)
        kv_head = lax.div(head, jnp.int32(call.group))
        visible = _visible(call, batch, length_gmem, tiles.width)
        row = block * rows
        blocks = visible.key_blocks(row, rows, tiles.width)

        def pick(x):
            return (batch if x.shape[0] != 1 else 0, head if x.shape[1] != 1 else 0)

        def scoped(q_smem, dout_smem, k_smem, v_smem, sum_smem, extra_smem, own_full, k_full, v_full, k_empty, v_empty):
            group = lax.axis_index("group")

            @pl.when(group == tiles.groups)
            def _load():
                plgpu.set_max_registers(tiles.producer_registers, action="decrease")

                @pl.loop(blocks.first, blocks.last)
                def _(i):
                    step = i - blocks.first
                    slot = lax.rem(step, jnp.int32(tiles.stages))
                    at = pl.ds(i * tiles.width, tiles.width)

                    @pl.when(step >= tiles.stages)
                    def _():
                        plgpu.barrier_wait(k_empty.at[slot])

                    plgpu.copy_gmem_to_smem(k_gmem.at[batch, at, kv_head], k_smem.at[slot], k_full.at[slot])
                    tiled = [g for x, g in zip(extras, extra_gmem, strict=True) if x.kind == "tile"]
                    for x, gmem, smem in zip(tile_extras, tiled, extra_smem, strict=True):
                        plgpu.copy_gmem_to_smem(gmem.at[*pick(x), pl.ds(row, rows), at], smem.at[slot], k_full.at[slot])

                    @pl.when(step >= tiles.stages)
                    def _():
                        plgpu.barrier_wait(v_empty.at[slot])

                    plgpu.copy_gmem_to_smem(v_gmem.at[batch, at, kv_head], v_smem.at[slot], v_full.at[slot])

            @pl.when(group < tiles.groups)
            def _differentiate():
                plgpu.set_max_registers(tiles.consumer_registers, action="increase")
                own_row = row + group * ROWS
                at = pl.ds(own_row, ROWS)
                plgpu.copy_gmem_to_smem(q_gmem.at[batch, at, head], q_smem.at[group], own_full.at[group])
                plgpu.copy_gmem_to_smem(dout_gmem.at[batch, at, head], dout_smem.at[group], own_full.at[group])
                own = visible.key_blocks(own_row, ROWS, tiles.width)
                start, minus_delta = (compat.load(stats_gmem.at[batch, head, n, at], ROW, optimized=False) for n in (0, 1))
                row_extras = [
                    compat.load(g.at[*pick(x), at], ROW, optimized=False)
                    for x, g in zip(extras, extra_gmem, strict=True)
                    if x.kind == "row"
                ]
                plgpu.barrier_wait(own_full.at[group])
                own_q, own_dout = q_smem.at[group], dout_smem.at[group]
                if tiles.registers_a:
                    own_q, own_dout = (compat.load(x, WGMMA) for x in (own_q, own_dout))

                def step(i, sums, dq_ref, *, masked):
                    n = i - blocks.first
                    slot = lax.rem(n, jnp.int32(tiles.stages))
                    slot_before = lax.rem(n + (tiles.stages - 1), jnp.int32(tiles.stages))
                    plgpu.barrier_wait(k_full.at[slot])

                    def products(s_ref, dp_ref):
                        s_ref[...] = lax.broadcast_in_dim(start, (ROWS, tiles.width), [0])
                        dp_ref[...] = lax.broadcast_in_dim(minus_delta, (ROWS, tiles.width), [0])
                        plgpu.wgmma(s_ref, own_q, k_smem.at[slot].T)
                        plgpu.barrier_wait(v_full.at[slot])
                        plgpu.wgmma(dp_ref, own_dout, v_smem.at[slot].T)
                        s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                        if tiles.overlap:

                            @pl.when(n > 0)
                            def _():
                                plgpu.barrier_arrive(k_empty.at[slot_before])

                        factor = call.scale * LOG2_E
                        if extras:
                            s, factor = s * factor, 1.0
                        tiled, rowed = iter(extra_smem), iter(row_extras)
                        for x, g in zip(extras, extra_gmem, strict=True):
                            if x.kind == "tile":
                                part = compat.load(next(tiled).at[slot, pl.ds(group * ROWS, ROWS)], WGMMA)
                            elif x.kind == "row":
                                part = lax.broadcast_in_dim(next(rowed), s.shape, [0])
                            else:
                                part = compat.load(g.at[*pick(x), pl.ds(i * tiles.width, tiles.width)], COL, optimized=False)
                                part = lax.broadcast_in_dim(part, s.shape, [1])
                            s = s + part.astype(jnp.float32) * LOG2_E
                        p = jnp.exp2(s * factor)
                        seen = visible.mask(own_row, i * tiles.width, s.shape) if masked else None
                        if seen is not None:
                            p = jnp.where(seen, p, 0.0)
                        return p, dp_ref[...]

                    tile = plgpu.ACC((ROWS, tiles.width), jnp.float32)
                    p, dp = pl.run_scoped(products, tile, tile)
                    plgpu.barrier_arrive(v_empty.at[slot])
                    ds = p * dp
                    if rows_grad:
                        sums = sums + ds.sum(axis=1)
                    plgpu.wgmma(dq_ref, ds.astype(q_gmem.dtype), k_smem.at[slot])
                    if not tiles.overlap:
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(k_empty.at[slot])
                    return sums

                def walk(dq_ref):
                    sums = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW) if rows_grad else None
                    full_first = jnp.clip(own.full_first, blocks.first, blocks.last)
                    full_last = jnp.clip(own.full_last, full_first, blocks.last)
                    one = functools.partial(step, dq_ref=dq_ref)
                    begin = blocks.first
                    if visible.left is not None:
                        sums = lax.fori_loop(begin, full_first, functools.partial(one, masked=True), sums)
                        begin = full_first
                    sums = lax.fori_loop(begin, full_last, functools.partial(one, masked=False), sums)
                    if visible.right is not None or visible.left is not None or visible.counts_keys:
                        sums = lax.fori_loop(full_last, blocks.last, functools.partial(one, masked=True), sums)
                    return (dq_ref[...], sums) if rows_grad else dq_ref[...]

                dq = pl.run_scoped(walk, plgpu.ACC((ROWS, d), jnp.float32))
                if rows_grad:
                    dq, sums = dq
                q_smem[group] = (dq * call.scale).astype(q_gmem.dtype)
                if rows_grad:
                    sum_smem[group] = sums
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_smem.at[group], dq_gmem.at[batch, at, head])
                if rows_grad:
                    plgpu.copy_smem_to_gmem(sum_smem.at[group], outs[1].at[batch, head, at])
                plgpu.wait_smem_to_gmem(0)

        ring = tiles.stages
        pl.run_scoped(
            scoped,
            plgpu.SMEM((tiles.groups, ROWS, d), q.dtype),
            plgpu.SMEM((tiles.groups, ROWS, e), q.dtype),
            plgpu.SMEM((ring, tiles.width, d), q.dtype),
            plgpu.SMEM((ring, tiles.width, e), q.dtype),
            plgpu.SMEM((tiles.groups, ROWS), jnp.float32) if rows_grad else None,
            [plgpu.SMEM((ring, rows, tiles.width), x.dtype) for x in tile_extras],
            plgpu.Barrier(num_barriers=tiles.groups, num_arrivals=2),
            plgpu.Barrier(num_barriers=ring, num_arrivals=1 + len(tile_extras)),
            plgpu.Barrier(num_barriers=ring),
            plgpu.Barrier(num_barriers=ring, num_arrivals=tiles.groups),
            plgpu.Barrier(num_barriers=ring, num_arrivals=tiles.groups),
            collective_axes="group",
        )

    out_type = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if rows_grad:
        out_type.append(jax.ShapeDtypeStruct((call.b, call.h_q, row_blocks * rows), jnp.float32))
    return compat.kernel(
        body,
        out_type=tuple(out_type),
        grid=(row_blocks * call.b * call.h_q,),
        grid_names=("item",),
        num_threads=tiles.groups + 1,
        thread_name="group",
    )(q, k, v, dout, stats, *(x.array for x in extras), *lengths)


def gradient_kv(call: SdpaCall, tiles: Tiles, q, k, v, dout, stats, extras, lengths, *, cols_grad: bool = False):
    """dk, dv `[b, s, h_kv, ·]`; with `cols_grad` also the sum of dS over each column `[b, h_q, s]`. extras are transposed."""
    d, e = q.shape[-1], v.shape[-1]
    cols = tiles.groups * ROWS
    col_blocks = -(-call.s // cols)
    tile_extras = [x for x in extras if x.kind == "tile"]

    def body(*refs):
        q_gmem, k_gmem, v_gmem, dout_gmem, stats_gmem, *rest = refs
        extra_gmem, rest = rest[: len(extras)], rest[len(extras) :]
        length_gmem, outs = rest[: len(lengths)], rest[len(lengths) :]
        dk_gmem, dv_gmem = outs[:2]
        batch, kv_head, block = _decode(call, tiles, col_blocks, call.h_kv, longest_last=False)
        visible = _visible(call, batch, length_gmem, tiles.width)
        col = block * cols
        blocks = visible.query_blocks(col, cols, tiles.width)
        count = blocks.last - blocks.first

        def pick(x, head):
            return (batch if x.shape[0] != 1 else 0, head if x.shape[1] != 1 else 0)

        def scoped(k_smem, v_smem, q_smem, dout_smem, stats_smem, sum_smem, extra_smem, own_full, full, empty):
            group = lax.axis_index("group")

            @pl.when(group == tiles.groups)
            def _load():
                plgpu.set_max_registers(tiles.producer_registers, action="decrease")

                @pl.loop(0, call.group)
                def _(member):
                    head = kv_head * call.group + member

                    @pl.loop(blocks.first, blocks.last)
                    def _(i):
                        step = member * count + i - blocks.first
                        slot = lax.rem(step, jnp.int32(tiles.stages))
                        at = pl.ds(i * tiles.width, tiles.width)

                        @pl.when(step >= tiles.stages)
                        def _():
                            plgpu.barrier_wait(empty.at[slot])

                        plgpu.copy_gmem_to_smem(q_gmem.at[batch, at, head], q_smem.at[slot], full.at[slot])
                        plgpu.copy_gmem_to_smem(dout_gmem.at[batch, at, head], dout_smem.at[slot], full.at[slot])
                        plgpu.copy_gmem_to_smem(stats_gmem.at[batch, head, :, at], stats_smem.at[slot], full.at[slot])
                        tiled = [g for x, g in zip(extras, extra_gmem, strict=True) if x.kind == "tile"]
                        for x, gmem, smem in zip(tile_extras, tiled, extra_smem, strict=True):
                            source = gmem.at[*pick(x, head), pl.ds(col, cols), at]
                            plgpu.copy_gmem_to_smem(source, smem.at[slot], full.at[slot])

            @pl.when(group < tiles.groups)
            def _differentiate():
                plgpu.set_max_registers(tiles.consumer_registers, action="increase")
                own_col = col + group * ROWS
                own_at = pl.ds(own_col, ROWS)
                plgpu.copy_gmem_to_smem(k_gmem.at[batch, own_at, kv_head], k_smem.at[group], own_full.at[group])
                plgpu.copy_gmem_to_smem(v_gmem.at[batch, own_at, kv_head], v_smem.at[group], own_full.at[group])
                own = visible.query_blocks(own_col, ROWS, tiles.width)
                plgpu.barrier_wait(own_full.at[group])
                own_k, own_v = k_smem.at[group], v_smem.at[group]
                if tiles.registers_a:
                    own_k, own_v = (compat.load(x, WGMMA) for x in (own_k, own_v))

                def step(i, sums, member, row_extras, dk_ref, dv_ref, *, masked):
                    head = kv_head * call.group + member
                    n = member * count + i - blocks.first
                    slot = lax.rem(n, jnp.int32(tiles.stages))
                    slot_before = lax.rem(n + (tiles.stages - 1), jnp.int32(tiles.stages))
                    plgpu.barrier_wait(full.at[slot])

                    def scores(s_ref):
                        s_ref[...] = lax.broadcast_in_dim(compat.load(stats_smem.at[slot, 0], COL), (ROWS, tiles.width), [1])
                        plgpu.wgmma(s_ref, own_k, q_smem.at[slot].T)
                        return s_ref[...]

                    tile = plgpu.ACC((ROWS, tiles.width), jnp.float32)
                    s = pl.run_scoped(scores, tile)
                    if tiles.overlap:

                        @pl.when(n > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[slot_before])

                    factor = call.scale * LOG2_E
                    if extras:
                        s, factor = s * factor, 1.0
                    tiled, rowed = iter(extra_smem), iter(row_extras)
                    for x, g in zip(extras, extra_gmem, strict=True):
                        if x.kind == "tile":
                            part = compat.load(next(tiled).at[slot, pl.ds(group * ROWS, ROWS)], WGMMA)
                        elif x.kind == "row":
                            part = lax.broadcast_in_dim(next(rowed), s.shape, [0])
                        else:
                            part = g.at[*pick(x, head), pl.ds(i * tiles.width, tiles.width)]
                            part = lax.broadcast_in_dim(compat.load(part, COL, optimized=False), s.shape, [1])
                        s = s + part.astype(jnp.float32) * LOG2_E
                    p = jnp.exp2(s * factor)
                    seen = visible.mask(i * tiles.width, own_col, s.shape, keys_first=True) if masked else None
                    if seen is not None:
                        p = jnp.where(seen, p, 0.0)

                    def weights(dp_ref):
                        dp_ref[...] = lax.broadcast_in_dim(compat.load(stats_smem.at[slot, 1], COL), (ROWS, tiles.width), [1])
                        plgpu.wgmma(dp_ref, own_v, dout_smem.at[slot].T)
                        plgpu.wgmma(dv_ref, p.astype(q_gmem.dtype), dout_smem.at[slot])
                        return plgpu.wgmma_accumulator_load(dp_ref, wait_n=1)

                    ds = p * pl.run_scoped(weights, tile)
                    if cols_grad:
                        sums = sums + ds.sum(axis=1)
                    plgpu.wgmma(dk_ref, ds.astype(q_gmem.dtype), q_smem.at[slot])
                    if not tiles.overlap:
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[slot])
                    return sums

                def walk(dk_ref, dv_ref):
                    full_first = jnp.clip(own.full_first, blocks.first, blocks.last)
                    full_last = jnp.clip(own.full_last, full_first, blocks.last)

                    @pl.loop(0, call.group)
                    def _(member):
                        head = kv_head * call.group + member
                        row_extras = [
                            compat.load(g.at[*pick(x, head), own_at], ROW, optimized=False)
                            for x, g in zip(extras, extra_gmem, strict=True)
                            if x.kind == "row"
                        ]
                        sums = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW) if cols_grad else None
                        one = functools.partial(step, member=member, row_extras=row_extras, dk_ref=dk_ref, dv_ref=dv_ref)
                        begin = blocks.first
                        # the diagonal comes first here
                        if visible.right is not None:
                            sums = lax.fori_loop(begin, full_first, functools.partial(one, masked=True), sums)
                            begin = full_first
                        if visible.left is not None:
                            sums = lax.fori_loop(begin, full_last, functools.partial(one, masked=False), sums)
                            sums = lax.fori_loop(full_last, blocks.last, functools.partial(one, masked=True), sums)
                        else:
                            sums = lax.fori_loop(begin, blocks.last, functools.partial(one, masked=False), sums)
                        if cols_grad:
                            plgpu.wait_smem_to_gmem(0)
                            index = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
                            sum_smem[group] = jnp.where(index < visible.keys - own_col, sums, 0.0)
                            plgpu.commit_smem()
                            plgpu.copy_smem_to_gmem(sum_smem.at[group], outs[2].at[batch, head, own_at])

                    return dk_ref[...], dv_ref[...]

                sums_of = plgpu.ACC((ROWS, d), jnp.float32), plgpu.ACC((ROWS, e), jnp.float32)
                dk, dv = pl.run_scoped(walk, *sums_of)
                if call.key_lengths:
                    counts = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW) < visible.keys - own_col
                    dk = jnp.where(lax.broadcast_in_dim(counts, dk.shape, [0]), dk, 0.0)
                    dv = jnp.where(lax.broadcast_in_dim(counts, dv.shape, [0]), dv, 0.0)
                k_smem[group] = (dk * call.scale).astype(q_gmem.dtype)
                v_smem[group] = dv.astype(q_gmem.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(k_smem.at[group], dk_gmem.at[batch, own_at, kv_head])
                plgpu.copy_smem_to_gmem(v_smem.at[group], dv_gmem.at[batch, own_at, kv_head])
                plgpu.wait_smem_to_gmem(0)

        ring = tiles.stages
        pl.run_scoped(
            scoped,
            plgpu.SMEM((tiles.groups, ROWS, d), q.dtype),
            plgpu.SMEM((tiles.groups, ROWS, e), q.dtype),
            plgpu.SMEM((ring, tiles.width, d), q.dtype),
            plgpu.SMEM((ring, tiles.width, e), q.dtype),
            plgpu.SMEM((ring, 2, tiles.width), jnp.float32),
            plgpu.SMEM((tiles.groups, ROWS), jnp.float32) if cols_grad else None,
            [plgpu.SMEM((ring, cols, tiles.width), x.dtype) for x in tile_extras],
            plgpu.Barrier(num_barriers=tiles.groups, num_arrivals=2),
            plgpu.Barrier(num_barriers=ring, num_arrivals=3 + len(tile_extras)),
            plgpu.Barrier(num_barriers=ring, num_arrivals=tiles.groups),
            collective_axes="group",
        )

    out_type = [jax.ShapeDtypeStruct(x.shape, q.dtype) for x in (k, v)]
    if cols_grad:
        out_type.append(jax.ShapeDtypeStruct((call.b, call.h_q, col_blocks * cols), jnp.float32))
    return compat.kernel(
        body,
        out_type=tuple(out_type),
        grid=(col_blocks * call.b * call.h_kv,),
        grid_names=("item",),
        num_threads=tiles.groups + 1,
        thread_name="group",
    )(q, k, v, dout, stats, *(x.array for x in extras), *lengths)
