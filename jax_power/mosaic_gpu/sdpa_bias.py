"""Gradient of a bias `[b, h_q, t, s]` of scaled dot-product attention on Hopper: dS, summed over what the bias is shared by.

A block owns a tile of the gradient, makes P and dS again for every batch element and head that reads this tile of the bias, and
adds them up in registers: the same order every time, and no memory beyond the gradient's own. Two products a tile more than
the other gradients take.
Memory: q, dO, k, v and the tiles of the extras in a ring of `stages`; the gradient's tile.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from bridge.spec_sdpa import SdpaCall
from jax_power.mosaic_gpu import compat, sdpa_tiles
from jax_power.mosaic_gpu.sdpa_bwd import Operands
from jax_power.mosaic_gpu.sdpa_scores import LOG2_E, ROW, ROWS, WGMMA, Accumulator, Extras, Visible


def gradient_bias(call: SdpaCall, tiles: sdpa_tiles.Backward, operands: Operands) -> Array:
    """The gradient of the first of the extras, which is of kind "tile", in its shape and dtype."""
    q, _, v = operands[:3]
    bias = operands.extras[0].array
    d, e, dtype = q.shape[-1], v.shape[-1], q.dtype
    rows, width, ring = tiles.groups * ROWS, tiles.width, tiles.stages
    row_blocks, col_blocks = -(-call.t // rows), -(-call.s // width)
    shared_b, shared_h = call.b // bias.shape[0], call.h_q // bias.shape[1]

    def body(*refs: Any) -> None:
        (q_gmem, k_gmem, v_gmem, dout_gmem, stats_gmem), extras, lengths, (dbias_gmem,) = operands.split(refs)
        index, col_block = lax.axis_index("item"), lax.axis_index("col")
        row = lax.rem(index, jnp.int32(row_blocks)) * rows
        bias_of = lax.div(index, jnp.int32(row_blocks))
        bias_batch, bias_head = lax.div(bias_of, jnp.int32(bias.shape[1])), lax.rem(bias_of, jnp.int32(bias.shape[1]))
        col = col_block * width
        keys_at = pl.ds(col, width)

        def member_of(n):
            """Batch element and head of the n-th user of this tile."""
            batch = bias_batch if shared_b == 1 else lax.div(n, jnp.int32(shared_h))
            return batch, bias_head if shared_h == 1 else lax.rem(n, jnp.int32(shared_h))

        def run(q_smem, dout_smem, k_smem, v_smem, extras_smem, out_smem, full, empty):
            group = lax.axis_index("group")

            @pl.when(group == tiles.groups)
            def load() -> None:
                if tiles.registers is not None:
                    plgpu.set_max_registers(tiles.registers[1], action="decrease")

                @pl.loop(0, shared_b * shared_h)
                def _(n):
                    batch, head = member_of(n)
                    kv_head = lax.div(head, jnp.int32(call.group))
                    slot = lax.rem(n, jnp.int32(ring))
                    pl.when(n >= ring)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    for source, smem in ((q_gmem, q_smem), (dout_gmem, dout_smem)):
                        plgpu.copy_gmem_to_smem(source.at[batch, pl.ds(row, rows), head], smem.at[slot], full.at[slot])
                    for source, smem in ((k_gmem, k_smem), (v_gmem, v_smem)):
                        plgpu.copy_gmem_to_smem(source.at[batch, keys_at, kv_head], smem.at[slot], full.at[slot])
                    extras.copy(batch, head, pl.ds(row, rows), keys_at, extras_smem, slot, full.at[slot])

            @pl.when(group < tiles.groups)
            def differentiate() -> None:
                if tiles.registers is not None:
                    plgpu.set_max_registers(tiles.registers[0], action="increase")
                own_row = row + group * ROWS
                own_at, part = pl.ds(own_row, ROWS), pl.ds(group * ROWS, ROWS)

                def step(n, dbias):
                    batch, head = member_of(n)
                    slot = lax.rem(n, jnp.int32(ring))
                    visible = Visible.of(call, batch, lengths, width)
                    row_extras = extras.rows(batch, head, own_at)
                    starts = [compat.load(stats_gmem.at[batch, head, m, own_at], ROW, optimized=False) for m in (0, 1)]
                    plgpu.barrier_wait(full.at[slot])

                    def products(s_acc, dp_acc):
                        s_acc[...], dp_acc[...] = (lax.broadcast_in_dim(x, (ROWS, width), [0]) for x in starts)
                        plgpu.wgmma(s_acc, q_smem.at[slot, part], k_smem.at[slot].T)
                        plgpu.wgmma(dp_acc, dout_smem.at[slot, part], v_smem.at[slot].T)
                        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1) * (call.scale * LOG2_E)
                        own_tiles = [x.at[slot, part] for x in extras_smem]
                        p = jnp.exp2(extras.add(s, batch, head, row_extras, keys_at, own_tiles))
                        seen = visible.mask(own_row, col, p.shape)
                        return p if seen is None else jnp.where(seen, p, 0.0), dp_acc[...]

                    tile = Accumulator((ROWS, width), jnp.float32)
                    p, dp = pl.run_scoped(products, tile, tile)
                    plgpu.barrier_arrive(empty.at[slot])
                    return dbias + p * dp

                dbias = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), WGMMA)
                dbias = lax.fori_loop(0, shared_b * shared_h, step, dbias)
                out_smem[group] = dbias.astype(bias.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[group], dbias_gmem.at[bias_batch, bias_head, own_at, keys_at])
                plgpu.wait_smem_to_gmem(0)

        tile_extras = Extras.tiles(operands.extras, ring, rows, width)
        pl.run_scoped(
            run,
            plgpu.SMEM((ring, rows, d), dtype),
            plgpu.SMEM((ring, rows, e), dtype),
            plgpu.SMEM((ring, width, d), dtype),
            plgpu.SMEM((ring, width, e), dtype),
            tile_extras,
            plgpu.SMEM((tiles.groups, ROWS, width), bias.dtype),
            plgpu.Barrier(num_barriers=ring, num_arrivals=4 + len(tile_extras)),
            plgpu.Barrier(num_barriers=ring, num_arrivals=tiles.groups),
            collective_axes="group",
        )

    return compat.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(bias.shape, bias.dtype),
        grid=(row_blocks * bias.shape[0] * bias.shape[1], col_blocks),
        grid_names=("item", "col"),
        num_threads=tiles.groups + 1,
        thread_name="group",
    )(*operands.arrays())
