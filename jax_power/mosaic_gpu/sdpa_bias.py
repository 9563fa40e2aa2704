"""Gradient of a bias `[b, h_q, t, s]` of scaled dot-product attention on Hopper: dS, summed over what the bias is shared by.

A block owns a tile of the gradient, makes P and dS again for every batch element and head that reads this tile of the bias, and
adds them up in registers: the same order every time, and no memory beyond the gradient's own. Two products a tile more than
the other gradients take.
Memory: q, dO, k, v and the tiles of the extras in a ring of `stages`; the gradient's tile.
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
from jax_power.mosaic_gpu import attention_common, compat, sdpa_block, sdpa_tiles
from jax_power.mosaic_gpu.attention_common import Ring
from jax_power.mosaic_gpu.sdpa_bwd import Operands
from jax_power.mosaic_gpu.sdpa_scores import LOG2_E, ROW, WGMMA, Accumulator, Extras, Visible
from jax_power.mosaic_gpu.tiles import ROWS


def gradient_bias(call: SdpaCall, tiles: sdpa_tiles.Backward, operands: Operands) -> Array:
    """The gradient of the first of the extras, which is of kind "tile", in its shape and dtype."""
    q, _, v = operands[:3]
    bias = operands.extras[0].array
    d, e, dtype = q.shape[-1], v.shape[-1], q.dtype
    rows, width = tiles.groups * ROWS, tiles.width
    row_blocks, col_blocks = -(-call.t // rows), -(-call.s // width)
    shared_b, shared_h = call.b // bias.shape[0], call.h_q // bias.shape[1]

    def gradient_of_the_bias(gmem: Sequence[Any], smem: sdpa_block.Smem) -> None:
        (q_gmem, k_gmem, v_gmem, dout_gmem, stats_gmem), extras, lengths, (dbias_gmem,) = operands.split(gmem)
        index, col_block = lax.axis_index("item"), lax.axis_index("col")
        row = lax.rem(index, jnp.int32(row_blocks)) * rows
        bias_of = lax.div(index, jnp.int32(row_blocks))
        bias_batch, bias_head = lax.div(bias_of, jnp.int32(bias.shape[1])), lax.rem(bias_of, jnp.int32(bias.shape[1]))
        col = col_block * width
        keys_at = pl.ds(col, width)
        ring = Ring.of(smem, "member", tiles.stages)

        def member_of(n):
            """Batch element and head of the n-th user of this tile."""
            batch = bias_batch if shared_b == 1 else lax.div(n, jnp.int32(shared_h))
            return batch, bias_head if shared_h == 1 else lax.rem(n, jnp.int32(shared_h))

        def load() -> None:
            @pl.loop(0, shared_b * shared_h)
            def _(n):
                batch, head = member_of(n)
                kv_head = lax.div(head, jnp.int32(call.group))
                rows_at = pl.ds(row, rows)
                copies = [(q_gmem.at[batch, rows_at, head], smem["q"]), (dout_gmem.at[batch, rows_at, head], smem["dout"])]
                copies += [(k_gmem.at[batch, keys_at, kv_head], smem["k"]), (v_gmem.at[batch, keys_at, kv_head], smem["v"])]
                sdpa_block.fill(ring, n, copies + extras.copies(batch, head, rows_at, keys_at, smem["extras"]))

        def differentiate(group: Array) -> None:
            own_row = row + group * ROWS
            own_at, part = pl.ds(own_row, ROWS), pl.ds(group * ROWS, ROWS)

            def step(n, dbias):
                batch, head = member_of(n)
                slot = ring.slot(n)
                visible = Visible.of(call, batch, lengths, width)
                row_extras = extras.rows(batch, head, own_at)
                stats = [compat.load(stats_gmem.at[batch, head, m, own_at], ROW, optimized=False) for m in (0, 1)]
                lse, delta = (lax.broadcast_in_dim(x, (ROWS, width), [0]) for x in stats)
                ring.await_full(n)

                def products(s_acc, dp_acc):
                    attention_common.start(dp_acc, delta)
                    plgpu.wgmma(s_acc, smem["q"].at[slot, part], smem["k"].at[slot].T)
                    plgpu.wgmma(dp_acc, smem["dout"].at[slot, part], smem["v"].at[slot].T)
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1) * (call.scale * LOG2_E) + lse
                    own_tiles = [x.at[slot, part] for x in smem["extras"]]
                    p = jnp.exp2(extras.add(s, batch, head, row_extras, keys_at, own_tiles))
                    seen = visible.mask(own_row, col, p.shape)
                    return p if seen is None else jnp.where(seen, p, 0.0), dp_acc[...]

                tile = Accumulator((ROWS, width), jnp.float32)
                p, dp = pl.run_scoped(products, tile, tile)
                ring.release(n, loaded=True)
                return dbias + p * dp

            dbias = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), WGMMA)
            dbias = lax.fori_loop(0, shared_b * shared_h, step, dbias)
            dbias_at = dbias_gmem.at[bias_batch, bias_head, own_at, keys_at]
            sdpa_block.store(smem["dbias"].at[group], dbias.astype(bias.dtype), dbias_at)
            plgpu.wait_smem_to_gmem(0)

        sdpa_block.part(tiles, load, differentiate)

    tiled = Extras.tiles(operands.extras, tiles.stages, rows, width)
    beside = {name: plgpu.SMEM((tiles.stages, rows, size), dtype) for name, size in (("q", d), ("dout", e))}
    smem = sdpa_block.streaming(tiles, dtype, "member", {"k": d, "v": e}, beside=[*beside, *tiled]) | beside
    smem |= {"extras": tiled, "dbias": plgpu.SMEM((tiles.groups, ROWS, width), bias.dtype)}
    (dbias,) = sdpa_block.launch(
        gradient_of_the_bias, tiles, smem,
        # The last axis may be long: 2^31 blocks, of the others 65535.
        grid={"col": col_blocks, "item": row_blocks * bias.shape[0] * bias.shape[1]},
        out_type=[jax.ShapeDtypeStruct(bias.shape, bias.dtype)], operands=operands.arrays(),
    )  # fmt: skip
    return dbias
