"""Forward of scaled dot-product attention on Hopper: online softmax over tiles of keys (Dao, "FlashAttention-2", 2023).

A block takes `groups` × 64 queries of one head. Its last warpgroup loads: tiles of K and V by TMA into a ring of `stages`.
Each consumer warpgroup holds 64 rows: S = Q Kᵀ from shared memory, the running maximum, sum and O in registers, and P fed
back from registers as the A operand of O += P V. Two consumers take turns at the matrix units (ping-pong: Shah et al.,
"FlashAttention-3", 2024): while one computes exponentials the other multiplies.
Memory: Q, reused for O, (d + e) · 2 bytes · (64 · groups) rows at most; K and V (d + e) · 2 bytes · keys · stages.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from bridge.spec_sdpa import SdpaCall
from jax_power.mosaic_gpu import compat, sdpa_visible
from jax_power.mosaic_gpu.sdpa_visible import Visible

ROWS = 64
WGMMA, ROW, COL = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
LOG2_E = math.log2(math.e)


class Tiles(NamedTuple):
    groups: int = 2
    keys: int = 128
    stages: int = 2
    consumer_registers: int = 232
    producer_registers: int = 40
    ping_pong: bool = True
    ahead: bool = False
    head_group: int = 8


def forward(call: SdpaCall, tiles: Tiles, q: Array, k: Array, v: Array, extras: list, lengths: list) -> tuple[Array, Array]:
    d, e = q.shape[-1], v.shape[-1]
    rows = tiles.groups * ROWS
    row_blocks = -(-call.t // rows)
    heads = call.b * call.h_q
    together = next(n for n in range(min(tiles.head_group, heads), 0, -1) if heads % n == 0)
    tile_extras = [x for x in extras if x.kind == "tile"]

    def body(*refs):
        q_gmem, k_gmem, v_gmem, *rest = refs
        extra_gmem = rest[: len(extras)]
        rest = rest[len(extras) :]
        length_gmem, (out_gmem, lse_gmem) = rest[:-2], rest[-2:]
        n = lax.axis_index("item")
        per_group = together * row_blocks
        within = lax.rem(n, jnp.int32(per_group))
        head = lax.div(n, jnp.int32(per_group)) * together + lax.rem(within, jnp.int32(together))
        block = row_blocks - 1 - lax.div(within, jnp.int32(together))
        batch, head = lax.div(head, jnp.int32(call.h_q)), lax.rem(head, jnp.int32(call.h_q))
        kv_head = lax.div(head, jnp.int32(call.group))
        queries, keys = call.t, call.s
        if call.query_lengths:
            queries = jnp.clip(length_gmem[0][batch], 0, call.t)
        if call.key_lengths:
            keys = jnp.clip(length_gmem[-1][batch], 0, call.s)
        visible = Visible.of(call, queries, keys, tiles.keys)
        row = block * rows
        blocks = visible.key_blocks(row, rows, tiles.keys)
        blocks = blocks._replace(last=jnp.maximum(blocks.last, blocks.first + 1))

        def scoped(q_smem, k_smem, v_smem, o_smem, lse_smem, extra_smem, q_full, k_full, v_full, k_empty, v_empty, turn):
            o_smem = q_smem if o_smem is None else o_smem
            group = lax.axis_index("group")

            def pick(x):  # index of an extra operand
                return (batch if x.shape[0] != 1 else 0, head if x.shape[1] != 1 else 0)

            @pl.when(group == tiles.groups)
            def _load():
                plgpu.set_max_registers(tiles.producer_registers, action="decrease")

                @pl.loop(blocks.first, blocks.last)
                def _(i):
                    step = i - blocks.first
                    slot = lax.rem(step, jnp.int32(tiles.stages))
                    at = pl.ds(i * tiles.keys, tiles.keys)

                    @pl.when(step >= tiles.stages)
                    def _():
                        plgpu.barrier_wait(k_empty.at[slot])

                    plgpu.copy_gmem_to_smem(k_gmem.at[batch, at, kv_head], k_smem.at[slot], k_full.at[slot])
                    for x, gmem, smem in zip(
                        tile_extras, [g for x, g in zip(extras, extra_gmem) if x.kind == "tile"], extra_smem, strict=True
                    ):
                        plgpu.copy_gmem_to_smem(
                            gmem.at[*pick(x), pl.ds(row, rows), at], smem.at[slot], k_full.at[slot]
                        )

                    @pl.when(step >= tiles.stages)
                    def _():
                        plgpu.barrier_wait(v_empty.at[slot])

                    plgpu.copy_gmem_to_smem(v_gmem.at[batch, at, kv_head], v_smem.at[slot], v_full.at[slot])

            @pl.when(group < tiles.groups)
            def _attend():
                plgpu.set_max_registers(tiles.consumer_registers, action="increase")
                own_row = row + group * ROWS
                plgpu.copy_gmem_to_smem(q_gmem.at[batch, pl.ds(own_row, ROWS), head], q_smem.at[group], q_full.at[group])
                own = visible.key_blocks(own_row, ROWS, tiles.keys)

                def swap():
                    if tiles.ping_pong:
                        plgpu.barrier_arrive(turn)
                        plgpu.barrier_wait(turn)

                top = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
                total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
                acc = plgpu.layout_cast(jnp.zeros((ROWS, e), jnp.float32), WGMMA)
                row_extras = [
                    compat.load(g.at[*pick(x), pl.ds(own_row, ROWS)], ROW, optimized=False)
                    for x, g in zip(extras, extra_gmem)
                    if x.kind == "row"
                ]
                plgpu.barrier_wait(q_full.at[group])

                factor = 1.0 if extras or call.scale <= 0 else call.scale * LOG2_E

                def finish(s, i, masked):
                    """Scores in base 2 but for `factor`, hidden ones −∞."""
                    slot = lax.rem(i - blocks.first, jnp.int32(tiles.stages))
                    if factor == 1.0:
                        s = s * (call.scale * LOG2_E)
                    tiled, rowed = iter(extra_smem), iter(row_extras)
                    for x, g in zip(extras, extra_gmem):
                        if x.kind == "tile":
                            part = compat.load(next(tiled).at[slot, pl.ds(group * ROWS, ROWS)], WGMMA)
                        elif x.kind == "row":
                            part = lax.broadcast_in_dim(next(rowed), s.shape, [0])
                        else:
                            part = compat.load(g.at[*pick(x), pl.ds(i * tiles.keys, tiles.keys)], COL, optimized=False)
                            part = lax.broadcast_in_dim(part, s.shape, [1])
                        s = s + part.astype(jnp.float32) * LOG2_E
                    seen = visible.mask(own_row, i * tiles.keys, s.shape) if masked else None
                    return s if seen is None else jnp.where(seen, s, -jnp.inf)

                def softmax(s, top, total):
                    new_top = jnp.maximum(top, s.max(axis=1) * factor)
                    reference = jnp.where(new_top == -jnp.inf, 0.0, new_top) if call.may_hide_rows else new_top
                    shrink = jnp.exp2(top - reference)
                    p = jnp.exp2(s * factor - lax.broadcast_in_dim(reference, s.shape, [0]))
                    return p, new_top, total * shrink + p.sum(axis=1), shrink

                def step(i, carry, *, masked):
                    acc, top, total = carry
                    slot = lax.rem(i - blocks.first, jnp.int32(tiles.stages))
                    plgpu.barrier_wait(k_full.at[slot])

                    def product(s_ref):
                        plgpu.wgmma(s_ref, q_smem.at[group], k_smem.at[slot].T)
                        swap()
                        return s_ref[...]

                    s = pl.run_scoped(product, plgpu.ACC((ROWS, tiles.keys), jnp.float32))
                    s = finish(s, i, masked)
                    plgpu.barrier_arrive(k_empty.at[slot])
                    p, top, total, shrink = softmax(s, top, total)
                    acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
                    p = p.astype(v_gmem.dtype)
                    acc, total, top, p = lax.optimization_barrier((acc, total, top, p))
                    plgpu.barrier_wait(v_full.at[slot])
                    swap()

                    def weigh(acc_ref):
                        plgpu.wgmma(acc_ref, p, v_smem.at[slot])

                    acc = pl.run_state(weigh)(plgpu.ACC.init(acc))
                    plgpu.barrier_arrive(v_empty.at[slot])
                    return acc, top, total

                def my_turn():
                    if tiles.ping_pong:
                        plgpu.barrier_wait(turn.at[group])

                def your_turn():
                    if tiles.ping_pong:
                        plgpu.barrier_arrive(turn.at[1 - group])

                def step_ahead(i, carry, *, masked):
                    acc, top, total, p = carry
                    n = i - blocks.first
                    slot, slot_before = (lax.rem(n + (tiles.stages - m), jnp.int32(tiles.stages)) for m in (0, 1))
                    plgpu.barrier_wait(k_full.at[slot])
                    my_turn()

                    def products(refs):
                        acc_ref, top_ref, total_ref, p_ref, shrink_ref = refs

                        def scores(s_ref):
                            plgpu.wgmma(s_ref, q_smem.at[group], k_smem.at[slot].T)
                            plgpu.barrier_wait(v_full.at[slot_before])
                            plgpu.wgmma(acc_ref, p, v_smem.at[slot_before])
                            your_turn()
                            return plgpu.wgmma_accumulator_load(s_ref, wait_n=1)

                        s = pl.run_scoped(scores, plgpu.ACC((ROWS, tiles.keys), jnp.float32))
                        s = finish(s, i, masked)
                        plgpu.barrier_arrive(k_empty.at[slot])
                        new_p, new_top, new_total, shrink = softmax(s, top, total)
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(v_empty.at[slot_before])
                        return new_p.astype(v_gmem.dtype), new_top, new_total, shrink

                    def outer(acc_ref):
                        acc_ref[...] = acc
                        out = products((acc_ref, None, None, None, None))
                        return acc_ref[...], out

                    acc, (p, top, total, shrink) = pl.run_scoped(outer, plgpu.ACC((ROWS, e), jnp.float32))
                    acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
                    return acc, top, total, p

                # clamp this group's full range to what the block walks
                full_first = jnp.clip(own.full_first, blocks.first, blocks.last)
                full_last = jnp.clip(own.full_last, full_first, blocks.last)
                any_mask = visible.right is not None or visible.left is not None or visible.counts_keys
                if tiles.ahead:
                    pl.when(group == 1)(your_turn)
                    plgpu.barrier_wait(k_full.at[0])
                    my_turn()

                    def scores(s_ref):
                        plgpu.wgmma(s_ref, q_smem.at[group], k_smem.at[0].T)
                        your_turn()
                        return s_ref[...]

                    s = pl.run_scoped(scores, plgpu.ACC((ROWS, tiles.keys), jnp.float32))
                    s = finish(s, blocks.first, True)
                    plgpu.barrier_arrive(k_empty.at[0])
                    p, top, total, _ = softmax(s, top, total)
                    carry = acc, top, total, p.astype(v_gmem.dtype)
                    begin, one = blocks.first + 1, step_ahead
                    full_first = jnp.maximum(full_first, begin)
                    full_last = jnp.maximum(full_last, begin)
                else:
                    carry = acc, top, total
                    begin, one = blocks.first, step
                    pl.when(group == 1)(swap)
                if visible.left is not None:
                    carry = lax.fori_loop(begin, full_first, functools.partial(one, masked=True), carry)
                    carry = lax.fori_loop(full_first, full_last, functools.partial(one, masked=False), carry)
                else:
                    carry = lax.fori_loop(begin, full_last, functools.partial(one, masked=False), carry)
                if any_mask:
                    carry = lax.fori_loop(full_last, blocks.last, functools.partial(one, masked=True), carry)
                if tiles.ahead:
                    acc, top, total, p = carry
                    slot = lax.rem(blocks.last - 1 - blocks.first, jnp.int32(tiles.stages))
                    plgpu.barrier_wait(v_full.at[slot])

                    def weigh(acc_ref):
                        plgpu.wgmma(acc_ref, p, v_smem.at[slot])

                    acc = pl.run_state(weigh)(plgpu.ACC.init(acc))
                else:
                    acc, top, total = carry
                    pl.when(group == 0)(swap)
                if call.query_lengths:
                    index = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
                    total = jnp.where(index < queries - own_row, total, 0.0)
                empty = total == 0.0
                inverse = jnp.where(empty, 0.0, 1.0 / total)
                o_smem[group] = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(out_gmem.dtype)
                lse_smem[group] = jnp.where(empty, -jnp.inf, top * (1 / LOG2_E) + jnp.log(total))
                plgpu.commit_smem()
                at = pl.ds(own_row, ROWS)
                plgpu.copy_smem_to_gmem(o_smem.at[group], out_gmem.at[batch, at, head])
                plgpu.copy_smem_to_gmem(lse_smem.at[group], lse_gmem.at[batch, head, at])
                plgpu.wait_smem_to_gmem(0)

        ring = tiles.stages
        pl.run_scoped(
            scoped,
            plgpu.SMEM((tiles.groups, ROWS, d), q.dtype),
            plgpu.SMEM((ring, tiles.keys, d), k.dtype),
            plgpu.SMEM((ring, tiles.keys, e), v.dtype),
            None if d == e else plgpu.SMEM((tiles.groups, ROWS, e), v.dtype),
            plgpu.SMEM((tiles.groups, ROWS), jnp.float32),
            [plgpu.SMEM((ring, rows, tiles.keys), x.dtype) for x in tile_extras],
            plgpu.Barrier(num_barriers=tiles.groups),
            plgpu.Barrier(num_barriers=ring, num_arrivals=1 + len(tile_extras)),
            plgpu.Barrier(num_barriers=ring),
            plgpu.Barrier(num_barriers=ring, num_arrivals=tiles.groups),
            plgpu.Barrier(num_barriers=ring, num_arrivals=tiles.groups),
            plgpu.Barrier(num_barriers=2) if tiles.ahead else plgpu.Barrier(num_arrivals=tiles.groups),
            collective_axes="group",
        )

    out, lse = compat.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((*q.shape[:3], e), v.dtype),
            jax.ShapeDtypeStruct((call.b, call.h_q, row_blocks * rows), jnp.float32),
        ),
        grid=(row_blocks * heads,),
        grid_names=("item",),
        num_threads=tiles.groups + 1,
        thread_name="group",
    )(q, k, v, *(x.array for x in extras), *lengths)
    return out, lse
