"""Forward of scaled dot-product attention on Hopper: online softmax over tiles of keys (Dao, "FlashAttention-2", 2023).

A block takes `groups` × 64 queries of one head. Its last warpgroup loads: tiles of K and V by TMA into a ring of `stages`.
Each consumer warpgroup holds 64 rows: S = Q Kᵀ from shared memory, the running maximum, sum and O in registers, and P fed
back from registers as the A operand of O += P V. Two consumers take turns at the matrix units (ping-pong: Shah et al.,
"FlashAttention-3", 2024): while one computes exponentials the other multiplies.
Memory: Q, reused for O, (d + e) · 2 bytes · (64 · groups) rows at most; K and V (d + e) · 2 bytes · keys · stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from bridge.spec_sdpa import SdpaCall
from jax_power.mosaic_gpu import compat, sdpa_tiles
from jax_power.mosaic_gpu.sdpa_scores import LOG2_E, ROW, ROWS, WGMMA, Accumulator, Extra, Extras, Visible, item, walk


def residual_scale(dtype: Any) -> float:
    """What the residual of the output is multiplied by: float16's small numbers have few digits."""
    return 2048.0 if dtype == jnp.float16 else 1.0


def forward(
    call: SdpaCall,
    tiles: sdpa_tiles.Forward,
    q: Array,
    k: Array,
    v: Array,
    extras: Sequence[Extra],
    lengths: Sequence[Array],
    *,
    residual: bool,
) -> tuple[Array, ...]:
    """Output in the shape `[*q.shape[:3], e]` and log-sum-exp `[b, h_q, ·]`, both padded behind the last query.

    With `residual`, also what rounding the output left over, times `residual_scale`, in the output's shape and dtype.
    """
    d, e, dtype = q.shape[-1], v.shape[-1], q.dtype
    rows, width, ring = tiles.groups * ROWS, tiles.width, tiles.stages
    row_blocks = -(-call.t // rows)
    # Scores become exponents by one fused multiply-add, unless something is added to them first.
    factor = 1.0 if extras else call.scale * LOG2_E
    operands, count = list(extras), len(lengths)

    def body(*refs: Any) -> None:
        q_gmem, k_gmem, v_gmem, *rest = refs
        extras = Extras(operands, rest[: len(operands)])
        lengths, (out_gmem, lse_gmem, *rest_gmem) = rest[len(operands) :][:count], rest[len(operands) + count :]
        batch, head, block = item(call.b, call.h_q, row_blocks, last_first=True)
        kv_head = lax.div(head, jnp.int32(call.group))
        visible = Visible.of(call, batch, lengths, width)
        row = block * rows
        blocks = visible.key_blocks(row, rows, width)
        # At least one tile, in which all may be hidden: then every row starts from a maximum.
        blocks = blocks._replace(last=jnp.maximum(blocks.last, blocks.first + 1))

        def run(q_smem, k_smem, v_smem, out_smem, lse_smem, extras_smem, q_full, k_full, v_full, k_empty, v_empty, turn):
            group = lax.axis_index("group")

            @pl.when(group == tiles.groups)
            def load() -> None:
                if tiles.registers is not None:
                    plgpu.set_max_registers(tiles.registers[1], action="decrease")

                @pl.loop(blocks.first, blocks.last)
                def _(i):
                    step = i - blocks.first
                    slot = lax.rem(step, jnp.int32(ring))
                    at = pl.ds(i * width, width)
                    pl.when(step >= ring)(lambda: plgpu.barrier_wait(k_empty.at[slot]))
                    plgpu.copy_gmem_to_smem(k_gmem.at[batch, at, kv_head], k_smem.at[slot], k_full.at[slot])
                    extras.copy(batch, head, pl.ds(row, rows), at, extras_smem, slot, k_full.at[slot])
                    pl.when(step >= ring)(lambda: plgpu.barrier_wait(v_empty.at[slot]))
                    plgpu.copy_gmem_to_smem(v_gmem.at[batch, at, kv_head], v_smem.at[slot], v_full.at[slot])

            @pl.when(group < tiles.groups)
            def attend() -> None:
                if tiles.registers is not None:
                    plgpu.set_max_registers(tiles.registers[0], action="increase")
                own_row = row + group * ROWS
                own_at = pl.ds(own_row, ROWS)
                plgpu.copy_gmem_to_smem(q_gmem.at[batch, own_at, head], q_smem.at[group], q_full.at[group])
                own = visible.key_blocks(own_row, ROWS, width)
                masks = visible.left is not None, visible.right is not None or visible.counts_keys
                row_extras = extras.rows(batch, head, own_at)
                plgpu.barrier_wait(q_full.at[group])

                def slot_of(i):
                    return lax.rem(i - blocks.first, jnp.int32(ring))

                def take_turn():
                    if tiles.ping_pong:
                        plgpu.barrier_wait(turn.at[group])

                def pass_turn():
                    if tiles.ping_pong:
                        plgpu.barrier_arrive(turn.at[1 - group])

                def finish(s, i, masked):
                    """Scores of tile i, in base 2 but for `factor`, with extras; −∞ where hidden. Frees the tile of keys."""
                    slot = slot_of(i)
                    if factor == 1.0:
                        s = s * (call.scale * LOG2_E)
                    own_tiles = [x.at[slot, pl.ds(group * ROWS, ROWS)] for x in extras_smem]
                    s = extras.add(s, batch, head, row_extras, pl.ds(i * width, width), own_tiles)
                    plgpu.barrier_arrive(k_empty.at[slot])
                    seen = visible.mask(own_row, i * width, s.shape) if masked else None
                    return s if seen is None else jnp.where(seen, s, -jnp.inf)

                def softmax(s, top, total):
                    """P in float32, the new maximum and sum, and the factor for what was summed before."""
                    new_top = jnp.maximum(top, s.max(axis=1) * factor)
                    # A row that has seen no key yet has maximum −∞; any finite reference leaves its weights 0.
                    reference = jnp.where(new_top == -jnp.inf, 0.0, new_top) if call.may_hide_rows else new_top
                    shrink = jnp.exp2(top - reference)
                    p = jnp.exp2(s * factor - lax.broadcast_in_dim(reference, s.shape, [0]))
                    return p, new_top, total * shrink + p.sum(axis=1), shrink

                def weigh(acc, p, slot):
                    def product(acc_ref):
                        plgpu.wgmma(acc_ref, p, v_smem.at[slot])

                    return pl.run_state(product)(Accumulator.init(acc))

                def step(i, carry, *, masked):
                    acc, top, total = carry
                    slot = slot_of(i)
                    plgpu.barrier_wait(k_full.at[slot])

                    def scores(s_acc):
                        plgpu.wgmma(s_acc, q_smem.at[group], k_smem.at[slot].T)
                        pass_turn()
                        return s_acc[...]

                    s = pl.run_scoped(scores, Accumulator((ROWS, width), jnp.float32))
                    p, top, total, shrink = softmax(finish(s, i, masked), top, total)
                    acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
                    acc, total, top, p = lax.optimization_barrier((acc, total, top, p.astype(dtype)))
                    plgpu.barrier_wait(v_full.at[slot])
                    take_turn()
                    acc = weigh(acc, p, slot)
                    plgpu.barrier_arrive(v_empty.at[slot])
                    return acc, top, total

                top = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
                total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
                acc = plgpu.layout_cast(jnp.zeros((ROWS, e), jnp.float32), WGMMA)
                # The first warpgroup has the turn at the start, and passes it once more at the end.
                if tiles.ping_pong:
                    pl.when(group == 1)(take_turn)
                acc, top, total = walk(step, (acc, top, total), blocks.first, blocks, own, masks)
                if tiles.ping_pong:
                    pl.when(group == 0)(pass_turn)

                if call.query_lengths:
                    index = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
                    total = jnp.where(index < visible.queries - own_row, total, 0.0)
                empty = total == 0.0
                inverse = jnp.where(empty, 0.0, 1.0 / total)
                out_ref = q_smem if out_smem is None else out_smem
                exact = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
                out_ref[group] = exact.astype(dtype)
                lse_smem[group] = jnp.where(empty, -jnp.inf, top * (1 / LOG2_E) + jnp.log(total))
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_ref.at[group], out_gmem.at[batch, own_at, head])
                plgpu.copy_smem_to_gmem(lse_smem.at[group], lse_gmem.at[batch, head, own_at])
                if residual:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    left_over = (exact - exact.astype(dtype).astype(jnp.float32)) * residual_scale(dtype)
                    out_ref[group] = left_over.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(out_ref.at[group], rest_gmem[0].at[batch, own_at, head])
                plgpu.wait_smem_to_gmem(0)

        tile_extras = Extras.tiles(operands, ring, rows, width)
        pl.run_scoped(
            run,
            plgpu.SMEM((tiles.groups, ROWS, d), dtype),
            plgpu.SMEM((ring, width, d), dtype),
            plgpu.SMEM((ring, width, e), dtype),
            None if d == e else plgpu.SMEM((tiles.groups, ROWS, e), dtype),
            plgpu.SMEM((tiles.groups, ROWS), jnp.float32),
            tile_extras,
            plgpu.Barrier(num_barriers=tiles.groups),
            plgpu.Barrier(num_barriers=ring, num_arrivals=1 + len(tile_extras)),
            plgpu.Barrier(num_barriers=ring),
            plgpu.Barrier(num_barriers=ring, num_arrivals=tiles.groups),
            plgpu.Barrier(num_barriers=ring, num_arrivals=tiles.groups),
            plgpu.Barrier(num_barriers=2),
            collective_axes="group",
        )

    out = jax.ShapeDtypeStruct((*q.shape[:3], e), dtype)
    return compat.kernel(
        body,
        out_type=(
            out,
            jax.ShapeDtypeStruct((call.b, call.h_q, row_blocks * rows), jnp.float32),
            *([out] if residual else []),
        ),
        grid=(row_blocks * call.b * call.h_q,),
        grid_names=("item",),
        num_threads=tiles.groups + 1,
        thread_name="group",
    )(q, k, v, *(x.array for x in operands), *lengths)
