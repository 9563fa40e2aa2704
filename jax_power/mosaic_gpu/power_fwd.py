"""Forward of the attention form in Pallas: y_i = Σ_j w_ij v_j / Σ_j w_ij, w_ij = s_ij^p · exp(G_i − G_j), s = c_i q_i·k_j.

A block of 64·groups query rows of one head; each consumer warpgroup owns 64 of them and shares the stream of 128-key tiles:
S = Q Kᵀ from shared memory, S → w in registers, O += w V with w from registers. There is no running maximum and nothing is
rescaled. The product with V is in flight while the next S is started. One more warpgroup loads.

Shared memory: q_smem (y leaves through it where it fits), k_smem and v_smem in a ring of stages, gates of the keys beside k.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from bridge import spec
from jax_power.mosaic_gpu import compat, tiles
from jax_power.mosaic_gpu.attention_common import (
    COLUMN,
    ROW,
    Deck,
    Gates,
    allocate,
    next_slot,
    plain,
    power,
    scale_rows,
    spread_columns,
    spread_rows,
)


def attend(call: spec.PowerCall, q: Array, k: Array, v: Array, gates: Gates | None, scale: Array | None) -> tuple[Array, Array]:
    """y `[b, t, h_q, e]` and the normaliser of the scaled rows `[b, h_q, t]`, float32, t filled up to whole blocks.

    Args:
      q, k, v: as `fill_up` leaves them.
      gates: of the keys, or None.
      scale: float16: `head_scale(k)`.
    """
    d, e, dtype = q.shape[-1], v.shape[-1], q.dtype
    tile = tiles.forward(d, e, gates=gates is not None, half=scale is not None)
    block_rows, keys, stages = tile.groups * tiles.ROWS, tile.keys, tile.stages
    row_tiles, key_tiles = pl.cdiv(call.t, block_rows), pl.cdiv(call.t_kv, keys)
    deck = Deck.make(row_tiles, call.h_q, call.b, call.t_kv * (d + e) * 2 // call.group, longest_last=call.causal)

    def power_attention_forward(q_gmem: Any, k_gmem: Any, v_gmem: Any, *refs: Any) -> None:
        refs = list(refs)
        gates_gmem = Gates(refs.pop(0), refs.pop(0), refs.pop(0)) if gates is not None else None
        scale_gmem = refs.pop(0) if scale is not None else None
        y_gmem, norm_gmem, smem = refs
        batch, head, row_tile = deck.deal(lax.axis_index("block"))
        head_kv = lax.div(head, jnp.int32(call.group))
        warpgroup = lax.axis_index("warpgroup")
        seen = jnp.minimum(key_tiles, pl.cdiv((row_tile + 1) * block_rows, keys)) if call.causal else jnp.int32(key_tiles)

        @pl.when(warpgroup == tile.groups)
        def _load() -> None:
            plgpu.set_max_registers(tile.producer_registers, action="decrease")

            @pl.loop(0, seen)
            def _tile(n: Array) -> None:
                slot, tokens = lax.rem(n, jnp.int32(stages)), (batch, pl.ds(n * keys, keys), head_kv)

                @pl.when(n >= stages)
                def _() -> None:
                    plgpu.barrier_wait(smem["k_empty"].at[slot])

                plgpu.copy_gmem_to_smem(k_gmem.at[tokens], smem["k"].at[slot], smem["k_full"].at[slot])
                if gates_gmem is not None:
                    of_keys = (batch, head_kv, pl.ds(n * keys, keys))
                    plgpu.copy_gmem_to_smem(gates_gmem.sum.at[of_keys], smem["sum"].at[slot], smem["k_full"].at[slot])
                    plgpu.copy_gmem_to_smem(gates_gmem.rest.at[of_keys], smem["rest"].at[slot], smem["k_full"].at[slot])

                @pl.when(n >= stages)
                def _() -> None:
                    plgpu.barrier_wait(smem["v_empty"].at[slot])

                plgpu.copy_gmem_to_smem(v_gmem.at[tokens], smem["v"].at[slot], smem["v_full"].at[slot])

        @pl.when(warpgroup < tile.groups)
        def _consume() -> None:
            plgpu.set_max_registers(tile.consumer_registers, action="increase")
            first = row_tile * block_rows + warpgroup * tiles.ROWS
            mine = jnp.minimum(seen, lax.div(first, jnp.int32(keys)) + 1) if call.causal else seen
            q_smem, q_full = smem["q"].at[warpgroup], smem["q_full"].at[warpgroup]
            plgpu.copy_gmem_to_smem(q_gmem.at[batch, pl.ds(first, tiles.ROWS), head], q_smem, q_full)
            if gates_gmem is not None:
                row_gates_smem = smem["row_sum"].at[warpgroup]
                plgpu.copy_gmem_to_smem(gates_gmem.sum.at[batch, head_kv, pl.ds(first, tiles.ROWS)], row_gates_smem, q_full)
            plgpu.barrier_wait(q_full)
            factor = scale_rows(q_smem)
            of_head = None if scale_gmem is None else scale_gmem[batch, head_kv]
            if gates_gmem is not None:
                row_gate = compat.load(row_gates_smem, ROW)
                row_block = lax.div(first, jnp.int32(tiles.GATE_BLOCK))
                growth = jnp.exp2(row_gate)
                start = [gates_gmem.edges[batch, head_kv, 4 * row_block + i] for i in range(2)]

            def decayed(scores: Array, n: Array, keys_smem: Any, last: bool) -> Array:
                """Scores times the p-th root of the gates between row and key, and float16's scale."""
                if gates_gmem is not None:
                    width = scores.shape[1]
                    if last:
                        decay = spread_rows(row_gate, width) - spread_columns(compat.load(keys_smem("sum"), COLUMN), tiles.ROWS)
                        scores = scores * jnp.exp2(decay)
                    else:
                        end = [gates_gmem.edges[batch, head_kv, 4 * n + 2 + i] for i in range(2)]
                        between = growth * jnp.exp2((start[0] - end[0]) + (start[1] - end[1]))
                        rest = compat.load(keys_smem("rest"), COLUMN)
                        scores = scores * spread_rows(between, width) * spread_columns(rest, tiles.ROWS)
                return scores if of_head is None else scores * of_head

            def sums(out: Any) -> tuple[Array, Array, Array]:
                def weigh(n: Array, half: Array | None = None) -> tuple[Any, Array]:
                    """Where tile n or one of its halves lies in shared memory, and its weights; ends what was in flight."""
                    width = keys if half is None else tiles.ROWS

                    def part(name: str) -> Any:
                        tile_smem = smem[name].at[lax.rem(n, jnp.int32(stages))]
                        return tile_smem if half is None else tile_smem.at[pl.ds(pl.multiple_of(half * width, width), width)]

                    def score(acc: Any) -> Array:
                        plgpu.wgmma(acc, q_smem, part("k").transpose((1, 0)))
                        return acc[...]  # waits for this product, and for O += w V of the tile before

                    scores = pl.run_scoped(score, plgpu.ACC((tiles.ROWS, width), jnp.float32))
                    return part, power(decayed(scores, n, part, half is not None), call.deg)

                def whole_tile(n: Array, norm: Array) -> Array:
                    slot = lax.rem(n, jnp.int32(stages))
                    plgpu.barrier_wait(smem["k_full"].at[slot])
                    part, weights = weigh(n)

                    @pl.when(n > 0)
                    def _() -> None:
                        plgpu.barrier_arrive(smem["v_empty"].at[next_slot(n, stages - 1, stages)])

                    plgpu.barrier_arrive(smem["k_empty"].at[slot])
                    norm += weights.sum(1)
                    rounded = weights.astype(dtype)
                    plgpu.barrier_wait(smem["v_full"].at[slot])
                    plgpu.wgmma(out, rounded, part("v"))
                    return norm

                def half_tile(n: Array, half: Array, norm: Array, mean: Array, *, masked: bool) -> tuple[Array, Array]:
                    """Half of a row's last tile, on the diagonal if `masked`.

                    Here the mean is taken with the rounded weights, so that a row that sees one key gets just its v. (With
                    many keys, and so in all other tiles, the roundings cancel by themselves.)
                    """
                    part, weights = weigh(n, half)
                    if masked:
                        row = plgpu.broadcasted_iota(jnp.int32, weights.shape, 0, layout=plgpu.Layout.WGMMA)
                        column = plgpu.broadcasted_iota(jnp.int32, weights.shape, 1, layout=plgpu.Layout.WGMMA)
                        weights = jnp.where(column <= row, weights, 0.0)
                    rounded = weights.astype(dtype)
                    norm, mean = norm + weights.sum(1), mean + rounded.astype(jnp.float32).sum(1)
                    plgpu.wgmma(out, rounded, part("v"))
                    return norm, mean

                zeros = plgpu.layout_cast(jnp.zeros((tiles.ROWS,), jnp.float32), ROW)
                last = mine - 1
                norm = mean = lax.fori_loop(0, last, whole_tile, zeros)
                slot = lax.rem(last, jnp.int32(stages))
                plgpu.barrier_wait(smem["k_full"].at[slot])
                plgpu.barrier_wait(smem["v_full"].at[slot])
                whole_halves = lax.div(lax.rem(first, jnp.int32(keys)), tiles.ROWS) if call.causal else keys // tiles.ROWS
                norm, mean = lax.fori_loop(
                    0, whole_halves, lambda half, x: half_tile(last, half, *x, masked=False), (norm, mean)
                )
                if call.causal:
                    norm, mean = half_tile(last, whole_halves, norm, mean, masked=True)
                out = out[...]

                @pl.when(last > 0)
                def _() -> None:
                    plgpu.barrier_arrive(smem["v_empty"].at[next_slot(last, stages - 1, stages)])

                plgpu.barrier_arrive(smem["k_empty"].at[slot])
                plgpu.barrier_arrive(smem["v_empty"].at[slot])
                return norm, mean, out

            norm, mean, out = pl.run_scoped(sums, plgpu.ACC((tiles.ROWS, e), jnp.float32))

            @pl.loop(mine, seen)
            def _skip(n: Array) -> None:  # tiles that only later rows of the block see
                slot = lax.rem(n, jnp.int32(stages))
                plgpu.barrier_wait(smem["k_full"].at[slot])
                plgpu.barrier_arrive(smem["k_empty"].at[slot])
                plgpu.barrier_wait(smem["v_full"].at[slot])
                plgpu.barrier_arrive(smem["v_empty"].at[slot])

            if call.normalize:
                inverse = jnp.where(mean == 0.0, 0.0, 1.0 / mean)
            else:
                whole = factor if of_head is None else factor * of_head
                inverse = plain(call) / power(whole, call.deg)
            y_smem = smem["y"].at[warpgroup] if "y" in smem else q_smem
            y_smem[...] = (out * spread_rows(inverse, e)).astype(dtype)
            smem["norm"][warpgroup] = norm
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[batch, pl.ds(first, tiles.ROWS), head])
            plgpu.copy_smem_to_gmem(smem["norm"].at[warpgroup], norm_gmem.at[batch, head, pl.ds(first, tiles.ROWS)])
            plgpu.wait_smem_to_gmem(0)

    operands = {"q": (tile.groups, tiles.ROWS, d), "k": (stages, keys, d), "v": (stages, keys, e)}
    vectors = {"norm": (tile.groups, tiles.ROWS)}
    if d != e:
        operands["y"] = (tile.groups, tiles.ROWS, e)
    if gates is not None:
        vectors |= {"row_sum": (tile.groups, tiles.ROWS), "sum": (stages, keys), "rest": (stages, keys)}
    scratch = allocate("forward of the attention form", dtype, operands, vectors) | {
        "q_full": plgpu.Barrier(num_arrivals=1 if gates is None else 2, num_barriers=tile.groups),
        "k_full": plgpu.Barrier(num_arrivals=1 if gates is None else 3, num_barriers=stages),
        "v_full": plgpu.Barrier(num_barriers=stages),
        "k_empty": plgpu.Barrier(num_arrivals=tile.groups, num_barriers=stages),
        "v_empty": plgpu.Barrier(num_arrivals=tile.groups, num_barriers=stages),
    }
    out_type = (
        jax.ShapeDtypeStruct((*q.shape[:3], e), dtype),
        jax.ShapeDtypeStruct((call.b, call.h_q, row_tiles * block_rows), jnp.float32),
    )
    run = compat.kernel(
        power_attention_forward,
        out_type=out_type,
        scratch_types=(scratch,),
        grid=(deck.size,),
        grid_names=("block",),
        num_threads=tile.groups + 1,
        thread_name="warpgroup",
    )
    return run(q, k, v, *(gates or ()), *(() if scale is None else (scale,)))
