"""dk and dv of the chunked form in Pallas, for a block of keys, through the state gradient behind the chunk and through the
chunk.

Through the state gradient dS (symmetric, as S): dv = φ(k) dS and dk = 2 Σ_a k[a] (dS[a] v), both with left operands made in
registers, K^ · k^[a] and V^ · k^[a], from one tile dS[a]. A block takes 64 · groups keys of a chunk of one key-value head, one
consumer warpgroup 64 of them:
  1. state: for each a, dv += (K^ · k^[a]) dS[a], dk += (V^ · k^[a]) dS[a]ᵀ;      2. moments: K^ dM;      3. from both dk^, dv^;
  4. every query head of the group, query tiles from the diagonal on: Sᵀ = K^ Q~ᵀ, V^ Dᵀ, and from both P/den and ds~ in
     registers:
     dv^ += P/den D,  dk^ += ds~ Q~.
One more warpgroup loads. Shared memory: k^ and v^ transposed, a ring of state tiles, one of q~ and D tiles with their row
factors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from jax_power.mosaic_gpu import compat, tiles
from jax_power.mosaic_gpu.chunked_fwd import NARROW, decay_on_diagonal, load_fragments, store_rows
from jax_power.mosaic_gpu.chunked_gradient_q import HALF_MAX, load_matrices
from jax_power.mosaic_gpu.chunked_prepare import Gates, Keys, Sizes
from jax_power.mosaic_gpu.chunked_update import BLOCK, COLUMNS, ROWS, TILE, TILED, WGMMA, release_loaded


class KeyRows(NamedTuple):
    """Per key-value head and token, float32 `[h, t]`: what the products with state gradient and its moments are multiplied
    by.
    """

    dk_state: Array
    dk_moment: Array
    dv_state: Array


class QueryColumns(NamedTuple):
    """Per query head and token, float32 `[b · h_q, t]`: h, h 2^(tile_prefix) and ΔD."""

    h: Array
    h_decayed: Array
    mean: Array


def gradient_kv(
    z: Sizes,
    q: Array,
    dy: Array,
    keys: Keys,
    gates: Gates,
    rows: KeyRows,
    columns: QueryColumns,
    states: Array | None,
    moments: Array | None,
    finish: Array,
    *,
    last_chunk_has_state: bool,
    p_scale: float,
    ds_scale: float,
    out_dtype: Any,
) -> tuple[Array, Array, Array, Array]:
    """dk, dv `[b, padded t, h_kv, padded size]` in `out_dtype`; ½ <k^, dk^> and its part through the state, float32 `[h, t]`.

    Args:
      q, dy: q~ᵀ and Dᵀ, float16 `[b · h_q, feature, t]`.
      states, moments: of the gradient, behind every chunk, float16; none if nothing comes from behind the only chunk.
      finish: from dk^ and dv^ to dk and dv, float32 `[2, h]`.
    """
    d, e, row = z.padded, z.padded, tiles.gradient(z.padded)
    groups, stages, query_stages = row.groups, row.stages, row.tile_stages
    blocks, has_states = z.chunk // (groups * TILE), states is not None
    feature_blocks = d // BLOCK
    vectors = [gates.tile_prefix, gates.tile_decay, *(rows if has_states else ())]

    def gradient_kv_kernel(q_gmem: Any, dy_gmem: Any, k_gmem: Any, v_gmem: Any, *refs: Any) -> None:
        columns_gmem, total_gmem, finish_gmem, rows_gmem, *others = refs
        held: Any = others[:2] if has_states else (None, None)
        states_gmem, moments_gmem = held
        dk_gmem, dv_gmem, sums_gmem, scratch = others[-4:]
        k_smem, v_smem, factors_smem, vectors_smem, state_smem, q_smem, dy_smem, columns_smem, *others = scratch
        rows_full, state_full, state_empty, queries_full, queries_empty = others[-5:]
        item, thread = lax.axis_index("item"), lax.axis_index("warpgroup")
        chunk, rest = lax.rem(item, jnp.int32(z.chunks)), lax.div(item, jnp.int32(z.chunks))
        block, head = lax.rem(rest, jnp.int32(blocks)), lax.div(rest, jnp.int32(blocks))
        batch, own_head = lax.div(head, jnp.int32(z.h_kv)), lax.rem(head, jnp.int32(z.h_kv))
        first_tile = block * groups
        members = BLOCK if last_chunk_has_state else jnp.where(chunk < z.chunks - 1, BLOCK, 0)
        query_tiles = z.chunk_tiles - first_tile  # of each query head, from this block's first tile on
        queries = z.group * query_tiles

        @pl.when(thread < groups)
        def _consume() -> None:
            plgpu.set_max_registers(row.consumer_registers, action="increase")
            own_tile = first_tile + thread
            here, mine = pl.ds(chunk * z.chunk + own_tile * TILE, TILE), rows_full.at[thread]
            plgpu.copy_gmem_to_smem(k_gmem.at[head, :, here], k_smem.at[thread], mine)
            plgpu.copy_gmem_to_smem(v_gmem.at[head, :, here], v_smem.at[thread], mine)
            plgpu.copy_gmem_to_smem(rows_gmem.at[:, head, here], vectors_smem.at[thread, pl.ds(0, len(vectors))], mine)
            if has_states:
                plgpu.copy_gmem_to_smem(k_gmem.at[head, :, here], factors_smem.at[thread], mine)
                plgpu.copy_gmem_to_smem(moments_gmem.at[head, chunk], others[0].at[thread], mine)
            plgpu.barrier_wait(mine)
            prefix, to_end = (compat.load(vectors_smem.at[thread, n], ROWS) for n in range(2))

            def row_vector(n: int) -> Array:
                return compat.load(vectors_smem.at[thread, n], ROWS)

            def spread(x: Array, width: int = TILE) -> Array:
                return lax.broadcast_in_dim(x, (TILE, width), [0])

            def row_products(x: Array) -> Array:
                """<k^, x> of each row."""
                return (load_fragments(k_smem.at[thread]).astype(jnp.float32) * x).sum(axis=1)

            def products_with_states(accs: Any) -> None:
                column = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=WGMMA)

                def piece(ref: Any, n: int) -> Array:
                    return load_fragments(ref.at[thread, pl.ds(TILE * n, TILE)])

                def later_features(k: Array, n: int, b: int) -> Array:
                    """Columns of k^'s n-th piece from block b on, those behind the block doubled: (j, a) is as (a, j)."""
                    own = BLOCK * b - TILE * n
                    doubled = jnp.where(column >= own + BLOCK, k + k, k) if own + BLOCK > 0 else k + k
                    return lax.slice(doubled, (0, max(own, 0)), (TILE, TILE))

                # In pieces of 64 columns. Beside dk and dv of 128, registers hold none from one matrix to the next.
                held = (piece(k_smem, 0), piece(v_smem, 0)) if d == TILE else None
                for b in range(feature_blocks):
                    held_k = None if held is None else later_features(held[0], 0, b)

                    def add_matrix(i: Any, _: None, held_k: Array | None = held_k, b: int = b) -> None:
                        feature = BLOCK * b + i
                        slot = lax.rem(feature, jnp.int32(stages))
                        factor = compat.load(factors_smem.at[thread, feature], ROWS)
                        plgpu.barrier_wait(state_full.at[slot])
                        for n in range(e // TILE):
                            v = piece(v_smem, n) if held is None else held[1]
                            state = state_smem.at[slot, :, pl.ds(TILE * n, TILE)]
                            plgpu.wgmma(accs[0], v * spread(factor), state.transpose((1, 0)))
                            if held is None:  # a fragment loaded beside a product in flight came out wrong (NOTES)
                                plgpu.wgmma_wait(0)
                        for n in range(BLOCK * b // TILE, d // TILE):
                            k = later_features(piece(k_smem, n), n, b) if held_k is None else held_k
                            state = state_smem.at[slot, pl.ds(max(BLOCK * b, TILE * n), k.shape[1])]
                            plgpu.wgmma(accs[1], k * spread(factor, k.shape[1]), state)
                            if held is None:
                                plgpu.wgmma_wait(0)
                        # Drained, while the other warpgroup makes its operands: in flight they spill registers.
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(state_empty.at[slot])

                    lax.fori_loop(0, members, add_matrix, None)

            dk = plgpu.layout_cast(jnp.zeros((TILE, d), jnp.float32), WGMMA)
            dv = plgpu.layout_cast(jnp.zeros((TILE, e), jnp.float32), WGMMA)
            if has_states:

                def product(acc: Any) -> Array:
                    plgpu.wgmma(acc, k_smem.at[thread].transpose((1, 0)), others[0].at[thread])
                    return acc[...]

                dk, dv = pl.run_state(products_with_states)(
                    (plgpu.WGMMAAccumulatorRef.init(dk), plgpu.WGMMAAccumulatorRef.init(dv))
                )
                km = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((TILE, d), jnp.float32))
                dk, dv = dk * spread(row_vector(2), d) + km * spread(row_vector(3), d), dv * spread(row_vector(4), e)
                part = row_products(dk)
            else:
                part = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), ROWS)
            vectors_smem.at[thread, len(vectors) + 1][...] = 0.5 * part

            def products(slot: Any) -> tuple[Array, Array]:
                """Scores and <v^, D> of this warpgroup's keys with a tile of queries."""

                def both(accs: Any) -> None:
                    plgpu.wgmma(accs[0], k_smem.at[thread].transpose((1, 0)), q_smem.at[slot])
                    plgpu.wgmma(accs[1], v_smem.at[thread].transpose((1, 0)), dy_smem.at[slot])

                zeros = plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), WGMMA)
                return pl.run_state(both)((plgpu.WGMMAAccumulatorRef.init(zeros), plgpu.WGMMAAccumulatorRef.init(zeros)))

            def add_queries(dk: Array, dv: Array, ds: Array, p: Array, slot: Any) -> tuple[Array, Array]:
                def both(accs: Any) -> None:
                    plgpu.wgmma(accs[0], ds.astype(jnp.float16), q_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma(accs[1], p.astype(jnp.float16), dy_smem.at[slot].transpose((1, 0)))

                return pl.run_state(both)((plgpu.WGMMAAccumulatorRef.init(dk), plgpu.WGMMAAccumulatorRef.init(dv)))

            def column(slot: Any, n: int) -> Array:
                return lax.broadcast_in_dim(compat.load(columns_smem.at[slot, n], COLUMNS), (TILE, TILE), [1])

            to_ds = 2.0 * ds_scale / p_scale

            def head_tiles(member: Any, carry: Any) -> Any:
                dk, dv = carry
                first = member * query_tiles

                @pl.loop(0, own_tile - first_tile)
                def _skip(i: Any) -> None:  # queries before all of this warpgroup's keys
                    slot = lax.rem(first + i, jnp.int32(query_stages))
                    plgpu.barrier_wait(queries_full.at[slot])
                    plgpu.barrier_arrive(queries_empty.at[slot])

                slot = lax.rem(first + own_tile - first_tile, jnp.int32(query_stages))
                plgpu.barrier_wait(queries_full.at[slot])
                s, dp = products(slot)
                of_query = compat.load(vectors_smem.at[thread, 0], COLUMNS)
                x = s * column(slot, 0) * decay_on_diagonal(prefix, of_query, rows_first=False) * p_scale
                ds = jnp.maximum(jnp.minimum(x * (dp - column(slot, 2)) * to_ds, HALF_MAX), -HALF_MAX)
                dk, dv = add_queries(dk, dv, ds, x * s, slot)
                release_loaded(queries_empty.at[slot])

                def later_tile(tile: Any, carry: Any) -> Any:
                    dk, dv, reach = carry
                    slot = lax.rem(first + tile - first_tile, jnp.int32(query_stages))
                    plgpu.barrier_wait(queries_full.at[slot])
                    s, dp = products(slot)
                    x = s * (column(slot, 1) * spread(reach))
                    dk, dv = add_queries(dk, dv, x * (dp - column(slot, 2)) * to_ds, x * s, slot)
                    release_loaded(queries_empty.at[slot])
                    return dk, dv, reach * total_gmem[head, chunk * z.chunk_tiles + tile]

                dk, dv, _ = lax.fori_loop(own_tile + 1, z.chunk_tiles, later_tile, (dk, dv, to_end * p_scale))
                return dk, dv

            dk, dv = lax.fori_loop(0, z.group, head_tiles, (dk, dv))
            vectors_smem.at[thread, len(vectors)][...] = 0.5 * row_products(dk)
            results = [
                lax.bitcast_convert_type((x * finish_gmem[n, head]).astype(out_dtype), jnp.float16)
                for n, x in enumerate((dk, dv))
            ]
            for result, own_smem, result_gmem in zip(results, (k_smem, v_smem), (dk_gmem, dv_gmem), strict=True):
                store_rows(result, own_smem.at[thread], result_gmem.at[batch, here, own_head])
            sums_smem = vectors_smem.at[thread, pl.ds(len(vectors), 2)]
            plgpu.copy_smem_to_gmem(sums_smem, sums_gmem.at[:, head, here])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(thread == groups)
        def _load() -> None:
            plgpu.set_max_registers(row.producer_registers, action="decrease")

            def load_queries(i: Any) -> None:
                slot = lax.rem(i, jnp.int32(query_stages))
                q_head = batch * z.h_q + own_head * z.group + lax.div(i, query_tiles)
                token = pl.ds(chunk * z.chunk + (first_tile + lax.rem(i, query_tiles)) * TILE, TILE)
                plgpu.copy_gmem_to_smem(q_gmem.at[q_head, :, token], q_smem.at[slot], queries_full.at[slot])
                plgpu.copy_gmem_to_smem(dy_gmem.at[q_head, :, token], dy_smem.at[slot], queries_full.at[slot])
                plgpu.copy_gmem_to_smem(columns_gmem.at[:, q_head, token], columns_smem.at[slot], queries_full.at[slot])

            first_queries = min(query_stages, groups)  # the last block has `groups` tiles
            for i in range(first_queries):
                load_queries(jnp.int32(i))
            if has_states:
                features = feature_blocks * members
                load_matrices(states_gmem.at[head, chunk], features, state_smem, state_full, state_empty)

            @pl.loop(first_queries, queries)
            def _(i: Any) -> None:
                pl.when(i >= query_stages)(lambda: plgpu.barrier_wait(queries_empty.at[lax.rem(i, jnp.int32(query_stages))]))
                load_queries(i)

    arrays: list[Any] = [q, dy, keys.k, keys.v, jnp.stack(columns), gates.tile_total, finish, jnp.stack(vectors)]
    arrays += [states, moments] if has_states else []
    run = compat.kernel(
        gradient_kv_kernel,
        out_type=[
            jax.ShapeDtypeStruct((z.b, z.tokens, z.h_kv, d), jnp.float16),
            jax.ShapeDtypeStruct((z.b, z.tokens, z.h_kv, e), jnp.float16),
            jax.ShapeDtypeStruct((2, z.heads, z.tokens), jnp.float32),
        ],
        scratch_types=[
            (
                plgpu.SMEM((groups, d, TILE), jnp.float16, transforms=TILED),
                plgpu.SMEM((groups, e, TILE), jnp.float16, transforms=TILED),
                plgpu.SMEM((groups, d, TILE), jnp.float16),
                plgpu.SMEM((groups, len(vectors) + 2, TILE), jnp.float32),
                plgpu.SMEM((stages, d, e), jnp.float16, transforms=NARROW),
                plgpu.SMEM((query_stages, d, TILE), jnp.float16, transforms=TILED),
                plgpu.SMEM((query_stages, e, TILE), jnp.float16, transforms=TILED),
                plgpu.SMEM((query_stages, 3, TILE), jnp.float32),
                *([plgpu.SMEM((groups, d, d), jnp.float16, transforms=TILED)] if has_states else []),
                plgpu.Barrier(num_arrivals=3 + 2 * has_states, num_barriers=groups),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
                plgpu.Barrier(num_arrivals=3, num_barriers=query_stages),
                plgpu.Barrier(num_arrivals=groups, num_barriers=query_stages),
            )
        ],
        grid=(z.chunks * blocks * z.heads,),
        grid_names=("item",),
        num_threads=groups + 1,
        thread_name="warpgroup",
    )
    dk, dv, (all_rows, part) = run(*arrays)
    return lax.bitcast_convert_type(dk, out_dtype), lax.bitcast_convert_type(dv, out_dtype), all_rows, part
