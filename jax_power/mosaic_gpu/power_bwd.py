"""Backward of the attention form in Pallas, in two kernels without a sum that leaves its warpgroup: dq, then dk and dv.

    dq_i = f_i · Σ_j (dp_ij − δ_i) s_ij^(p−1) exp(G_i − G_j) k_j,   dp = dY Vᵀ,   δ_i = dy_i·y_i,   f_i = p c_i / n_i
    dv_j = Σ_i w_ij / n_i dy_i,    dk_j = p Σ_i (dp_ij − δ_i) u_ij^(p−1) a_ij q_i,    u_ij = a_ij s_ij,    w_ij / n_i = u_ij^p

with a_ij = alpha_i times the p-th root of the gates; alpha and δ pass from the first kernel to the second. For dlog_g both also
sum A_ij = w_ij (dp_ij − δ_i) / n_i, the first over j < i, the second over i > j (the diagonal carries no gate).

As in the forward pass a block is `groups` warpgroups of 64 rows (queries, then keys) and one that loads; tiles of the other
side stream past. S and dP have both operands in shared memory; dS and w are fed back from registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    Ranges,
    allocate,
    inverse_root,
    next_slot,
    packed,
    plain,
    power,
    scale_rows,
    score_bits,
    spread_columns,
    spread_rows,
    start,
)

# Rows of a block of either kernel: what vectors of queries are filled up to.
BLOCK = 2 * tiles.ROWS


class Queries(NamedTuple):
    """What the second kernel needs of every query, float32 `[b, h_q, t]`, t filled up to whole blocks.

    w_ij / n_i = (alpha_i s_ij)^p of the unscaled s; `delta` is δ, corrected; `row_sum` is Σ_{j<i} A_ij, None without gates.
    """

    alpha: Array
    delta: Array
    row_sum: Array | None


def differentiate_queries(
    call: spec.PowerCall,
    q: Array,
    k: Array,
    v: Array,
    y: Array,
    norm: Array,
    dy: Array,
    gates: Gates | None,
    ranges: Ranges | None,
) -> tuple[Array, Queries]:
    """dq, and what the second kernel needs. Arrays as `fill_up` leaves them, norm `[b, h_q, t]` filled up with zeros."""
    d, e, dtype = q.shape[-1], v.shape[-1], q.dtype
    tile = tiles.backward_q(d, e, gates=gates is not None)
    block_rows, keys, stages = tile.groups * tiles.ROWS, tile.width, tile.stages
    row_tiles, key_tiles = pl.cdiv(call.t, block_rows), pl.cdiv(call.t_kv, keys)
    deck = Deck.make(row_tiles, call.h_q, call.b, call.t_kv * (d + e) * 2 // call.group, longest_last=call.causal)
    gate_tiles = tiles.GATE_BLOCK // keys

    def power_attention_backward_queries(
        q_gmem: Any, k_gmem: Any, v_gmem: Any, y_gmem: Any, norm_gmem: Any, dy_gmem: Any, *refs: Any
    ) -> None:
        refs = list(refs)
        gates_gmem = Gates(*(refs.pop(0) for _ in Gates._fields)) if gates is not None else None
        ranges_gmem = Ranges(*(refs.pop(0) for _ in Ranges._fields)) if ranges is not None else None
        dq_gmem, alpha_gmem, delta_gmem = (refs.pop(0) for _ in range(3))
        row_sum_gmem = refs.pop(0) if gates is not None else None
        (smem,) = refs
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
                full = smem["kv_full"].at[slot]

                @pl.when(n >= stages)
                def _() -> None:
                    plgpu.barrier_wait(smem["kv_empty"].at[slot])

                plgpu.copy_gmem_to_smem(k_gmem.at[tokens], smem["k"].at[slot], full)
                plgpu.copy_gmem_to_smem(v_gmem.at[tokens], smem["v"].at[slot], full)
                if gates_gmem is not None:
                    of_keys = (batch, head_kv, pl.ds(n * keys, keys))
                    plgpu.copy_gmem_to_smem(gates_gmem.sum.at[of_keys], smem["sum"].at[slot], full)
                    plgpu.copy_gmem_to_smem(gates_gmem.rest.at[of_keys], smem["rest"].at[slot], full)

        @pl.when(warpgroup < tile.groups)
        def _consume() -> None:
            plgpu.set_max_registers(tile.consumer_registers, action="increase")
            first = row_tile * block_rows + warpgroup * tiles.ROWS
            mine = jnp.minimum(seen, lax.div(first, jnp.int32(keys)) + 1) if call.causal else seen
            q_smem, dy_smem, y_smem = (smem[name].at[warpgroup] for name in ("q", "dy", "y"))
            q_full, vector_smem = smem["q_full"].at[warpgroup], smem["vectors"].at[warpgroup]
            rows = (batch, pl.ds(first, tiles.ROWS), head)
            for source, target in ((q_gmem, q_smem), (dy_gmem, dy_smem), (y_gmem, y_smem)):
                plgpu.copy_gmem_to_smem(source.at[rows], target, q_full)
            plgpu.copy_gmem_to_smem(norm_gmem.at[batch, head, pl.ds(first, tiles.ROWS)], vector_smem.at[0], q_full)
            if gates_gmem is not None:
                of_rows = gates_gmem.sum.at[batch, head_kv, pl.ds(first, tiles.ROWS)]
                plgpu.copy_gmem_to_smem(of_rows, vector_smem.at[1], q_full)
            plgpu.barrier_wait(q_full)

            zeros = plgpu.layout_cast(jnp.zeros((tiles.ROWS,), jnp.float32), ROW)
            dy = compat.load(dy_smem, plgpu.Layout.WGMMA).astype(jnp.float32)
            if call.normalize:
                delta = (dy * compat.load(y_smem, plgpu.Layout.WGMMA).astype(jnp.float32)).sum(1)
            else:
                delta = zeros
            packing = None
            if ranges_gmem is not None:  # bounds |dp − δ| u^(p−1) by 2^15, row by row
                largest = (dy * dy).sum(1) * ranges_gmem.v_squared[batch, head_kv]
                packing = packed(largest, 13 - score_bits(call.deg) * (call.deg - 1))
            of_head = None if ranges_gmem is None else ranges_gmem.scale[batch, head_kv]
            factor = scale_rows(q_smem)
            own_q, own_dy = q_smem, dy_smem
            if tile.fragments:
                own_q, own_dy = (compat.load(x, plgpu.Layout.WGMMA) for x in (q_smem, dy_smem))
            factor = factor if of_head is None else factor * of_head
            norm = compat.load(vector_smem.at[0], ROW)
            if call.normalize:
                alpha = factor * inverse_root(norm, call.deg)
                inverse = jnp.where(norm == 0.0, 0.0, 1.0 / norm)
            else:
                alpha, inverse = zeros + 1.0, plain(call) / power(factor, call.deg)
            if gates_gmem is not None:
                row_gate = compat.load(vector_smem.at[1], ROW)
                row_block = lax.div(first, jnp.int32(tiles.GATE_BLOCK))
                growth = jnp.exp2(row_gate)
                row_start = [gates_gmem.edges[batch, head_kv, 4 * row_block + i] for i in range(2)]

            def before_row(piece: Array, least: int) -> Array:
                """Whether a key of a piece comes at least `least` tokens before a row."""
                shape = tiles.ROWS, tiles.ROWS
                key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
                row = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=ROW)
                return key <= spread_rows(row + (first - piece * tiles.ROWS - least), tiles.ROWS)

            def decay(n: Array, part: Any, piece: Array | None) -> Array:
                """The p-th root of the gates between row and key; 0 where the key comes after the row."""
                if piece is not None:
                    root = jnp.exp2(
                        spread_rows(row_gate, tiles.ROWS) - spread_columns(compat.load(part("sum"), COLUMN), tiles.ROWS)
                    )
                    return jnp.where(before_row(piece, 0), root, 0.0)
                block = lax.div(n, jnp.int32(gate_tiles))
                end = [gates_gmem.edges[batch, head_kv, 4 * block + 2 + i] for i in range(2)]
                between = growth * jnp.exp2((row_start[0] - end[0]) + (row_start[1] - end[1]))
                return spread_rows(between, keys) * spread_columns(compat.load(part("rest"), COLUMN), tiles.ROWS)

            def sums(dq: Any) -> tuple[Array, ...]:
                def accumulate(n: Array, carry: tuple[Array, ...], piece: Array | None = None) -> tuple[Array, ...]:
                    """dQ += dS K for tile n, or for one of the pieces of 64 keys of a tile on the diagonal."""
                    delta, before, itself, own = carry
                    width = keys if piece is None else tiles.ROWS

                    def part(name: str) -> Any:
                        tile_smem = smem[name].at[lax.rem(n, jnp.int32(stages))]
                        if width == keys:
                            return tile_smem
                        return tile_smem.at[pl.ds(pl.multiple_of((piece - n * pieces) * width, width), width)]

                    def products(s: Any, moved: Any) -> tuple[Array, Array]:
                        start(moved, spread_rows(-delta, width))  # so that dP − δ is what is summed up
                        plgpu.wgmma(s, own_q, part("k").transpose((1, 0)))
                        plgpu.wgmma(moved, own_dy, part("v").transpose((1, 0)))
                        return s[...], moved[...]  # waits for both, and for dQ += dS K of the tile before

                    acc = plgpu.ACC((tiles.ROWS, width), jnp.float32)
                    score, moved = pl.run_scoped(products, acc, acc)
                    if piece is None:
                        release(n - 1)
                    gate = None if gates_gmem is None else decay(n, part, piece)
                    u = score if gate is None else score * gate
                    u = u if of_head is None else u * of_head
                    masked = piece is not None and call.causal and gate is None
                    if masked:
                        u = jnp.where(before_row(piece, 0), u, 0.0)
                    if gate is not None or (piece is not None and call.normalize):
                        weight = power(u, call.deg)
                        product = weight * moved
                        if piece is not None and gate is not None:
                            earlier = before_row(piece, 1)
                            itself += jnp.where(earlier, 0.0, product).sum(1)
                            own += jnp.where(earlier, 0.0, weight).sum(1)
                        before += product.sum(1)
                    if piece is not None and call.normalize:
                        # Σ_j w_ij (dp_ij − δ_i) should be 0, and is the error that δ has from the rounding of y. Rows that see
                        # few keys feel it: without gates those of the first piece; with gates any, but then what they see is
                        # mostly in their last piece.
                        corrects = (piece == last_piece) if gate is not None else (last_piece == 0)
                        error = before * inverse * jnp.where(corrects, 1.0, 0.0)
                        delta, moved = delta + error, moved - spread_rows(error, width)
                    lower = power(u, call.deg - 1) if call.deg > 1 else None
                    dscore = moved if lower is None else moved * lower
                    # u carries the gates' p-th root, so u^(p−1) lacks one more of it; the scale of the head belongs to c_i.
                    dscore = dscore if gate is None else dscore * gate
                    if masked and lower is None:
                        dscore = jnp.where(before_row(piece, 0), dscore, 0.0)
                    if packing is not None:
                        dscore = jnp.clip(dscore * spread_rows(packing, width), -65504.0, 65504.0)
                    plgpu.wgmma(dq, dscore.astype(dtype), part("k"))
                    return delta, before, itself, own

                def release(n: Array) -> None:
                    @pl.when(n >= 0)
                    def _() -> None:
                        plgpu.barrier_arrive(smem["kv_empty"].at[next_slot(n, stages, stages)])

                def wait(n: Array) -> None:
                    plgpu.barrier_wait(smem["kv_full"].at[lax.rem(n, jnp.int32(stages))])

                def whole_tile(n: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                    wait(n)
                    return accumulate(n, carry)

                def edge_tile(n: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                    wait(n)
                    plgpu.wgmma_wait(0)
                    release(n - 1)
                    to = jnp.minimum((n + 1) * pieces, last_piece + 1)
                    return lax.fori_loop(n * pieces, to, lambda piece, carry: accumulate(n, carry, piece), carry)

                pieces = keys // tiles.ROWS
                last_piece = (
                    lax.div(first, jnp.int32(tiles.ROWS)) if call.causal else jnp.int32(pl.cdiv(call.t_kv, tiles.ROWS) - 1)
                )
                edge = mine - 1
                if gates_gmem is not None:  # tiles in the rows' own block of gates
                    edge = lax.div(first, jnp.int32(tiles.GATE_BLOCK)) * gate_tiles
                carry = lax.fori_loop(0, edge, whole_tile, (delta, zeros, zeros, zeros))
                carry = lax.fori_loop(edge, mine, edge_tile, carry)
                dq = dq[...]
                release(mine - 1)
                return *carry, dq

            delta, before, itself, own, dq = pl.run_scoped(sums, plgpu.ACC((tiles.ROWS, d), jnp.float32))

            @pl.loop(mine, seen)
            def _skip(n: Array) -> None:  # tiles that only later rows of the block see
                slot = lax.rem(n, jnp.int32(stages))
                plgpu.barrier_wait(smem["kv_full"].at[slot])
                plgpu.barrier_arrive(smem["kv_empty"].at[slot])

            whole = call.deg * factor * inverse
            whole = whole if packing is None else whole / packing
            q_smem[...] = (dq * spread_rows(whole, d)).astype(dtype)
            vector_smem[0] = alpha
            vector_smem[1] = delta
            if row_sum_gmem is not None:
                # Normalised, the sum over all j is 0, so that over j < i is what the token itself contributes, negated.
                row_sum = own * before * inverse - itself if call.normalize else before - itself
                vector_smem[2] = row_sum * inverse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem, dq_gmem.at[rows])
            for i, target in enumerate((alpha_gmem, delta_gmem, *(() if row_sum_gmem is None else (row_sum_gmem,)))):
                plgpu.copy_smem_to_gmem(vector_smem.at[i], target.at[batch, head, pl.ds(first, tiles.ROWS)])
            plgpu.wait_smem_to_gmem(0)

    rows_of = (tile.groups, tiles.ROWS)
    operands = {"q": (*rows_of, d), "dy": (*rows_of, e), "y": (*rows_of, e), "k": (stages, keys, d), "v": (stages, keys, e)}
    vectors = {"vectors": (tile.groups, 3, tiles.ROWS)}
    if gates is not None:
        vectors |= {"sum": (stages, keys), "rest": (stages, keys)}
    scratch = allocate("backward of the attention form, queries", dtype, operands, vectors) | {
        "q_full": plgpu.Barrier(num_arrivals=4 if gates is None else 5, num_barriers=tile.groups),
        "kv_full": plgpu.Barrier(num_arrivals=2 if gates is None else 4, num_barriers=stages),
        "kv_empty": plgpu.Barrier(num_arrivals=tile.groups, num_barriers=stages),
    }
    vector = jax.ShapeDtypeStruct((call.b, call.h_q, row_tiles * block_rows), jnp.float32)
    run = compat.kernel(
        power_attention_backward_queries,
        out_type=(jax.ShapeDtypeStruct(q.shape, dtype), *(vector,) * (2 if gates is None else 3)),
        scratch_types=(scratch,),
        grid=(deck.size,),
        grid_names=("block",),
        num_threads=tile.groups + 1,
        thread_name="warpgroup",
    )
    dq, *vectors = run(q, k, v, y, norm, dy, *(gates or ()), *(ranges or ()))
    return dq, Queries(vectors[0], vectors[1], None if gates is None else vectors[2])


def differentiate_keys(
    call: spec.PowerCall,
    q: Array,
    k: Array,
    v: Array,
    dy: Array,
    queries: Queries,
    gates: Gates | None,
    ranges: Ranges | None,
) -> tuple[Array, Array, Array | None]:
    """dk, dv, and with gates Σ_{i>j} A_ij, float32 `[b, h_kv, t]` filled up to whole blocks."""
    d, e, dtype = q.shape[-1], v.shape[-1], q.dtype
    tile = tiles.backward_kv(d, e)
    block_keys, width, stages = tile.groups * tiles.ROWS, tile.width, tile.stages
    row_tiles, key_tiles = pl.cdiv(call.t, width), pl.cdiv(call.t_kv, block_keys)
    head_bytes = call.t * (d + e) * 2 * call.group
    deck = Deck.make(key_tiles, call.h_kv, call.b, head_bytes, longest_last=False)

    def power_attention_backward_keys(
        q_gmem: Any, k_gmem: Any, v_gmem: Any, dy_gmem: Any, alpha_gmem: Any, delta_gmem: Any, *refs: Any
    ) -> None:
        refs = list(refs)
        gates_gmem = Gates(*(refs.pop(0) for _ in Gates._fields)) if gates is not None else None
        ranges_gmem = Ranges(*(refs.pop(0) for _ in Ranges._fields)) if ranges is not None else None
        dk_gmem, dv_gmem = refs.pop(0), refs.pop(0)
        column_sum_gmem = refs.pop(0) if gates is not None else None
        (smem,) = refs
        batch, head_kv, key_tile = deck.deal(lax.axis_index("block"))
        warpgroup = lax.axis_index("warpgroup")
        from_tile = key_tile * (block_keys // width) if call.causal else jnp.int32(0)
        count = row_tiles - from_tile  # tiles of queries of each head that reads these keys

        @pl.when(warpgroup == tile.groups)
        def _load() -> None:
            plgpu.set_max_registers(tile.producer_registers, action="decrease")

            @pl.loop(0, call.group)
            def _head(member: Array) -> None:
                head = head_kv * call.group + member

                @pl.loop(0, count)
                def _tile(m: Array) -> None:
                    n = member * count + m
                    slot, first = lax.rem(n, jnp.int32(stages)), (from_tile + m) * width
                    full = smem["q_full"].at[slot]

                    @pl.when(n >= stages)
                    def _() -> None:
                        plgpu.barrier_wait(smem["q_empty"].at[slot])

                    plgpu.copy_gmem_to_smem(q_gmem.at[batch, pl.ds(first, width), head], smem["q"].at[slot], full)
                    plgpu.copy_gmem_to_smem(dy_gmem.at[batch, pl.ds(first, width), head], smem["dy"].at[slot], full)
                    of_queries = (batch, head, pl.ds(first, width))
                    plgpu.copy_gmem_to_smem(alpha_gmem.at[of_queries], smem["alpha"].at[slot], full)
                    plgpu.copy_gmem_to_smem(delta_gmem.at[of_queries], smem["delta"].at[slot], full)
                    if gates_gmem is not None:
                        plgpu.copy_gmem_to_smem(
                            gates_gmem.sum.at[batch, head_kv, pl.ds(first, width)], smem["sum"].at[slot], full
                        )

        @pl.when(warpgroup < tile.groups)
        def _consume() -> None:
            plgpu.set_max_registers(tile.consumer_registers, action="increase")
            first = key_tile * block_keys + warpgroup * tiles.ROWS
            k_smem, v_smem = smem["k"].at[warpgroup], smem["v"].at[warpgroup]
            kv_full, vector_smem = smem["kv_full"].at[warpgroup], smem["vectors"].at[warpgroup]
            tokens = (batch, pl.ds(first, tiles.ROWS), head_kv)
            plgpu.copy_gmem_to_smem(k_gmem.at[tokens], k_smem, kv_full)
            plgpu.copy_gmem_to_smem(v_gmem.at[tokens], v_smem, kv_full)
            if gates_gmem is not None:
                of_keys = (batch, head_kv, pl.ds(first, tiles.ROWS))
                plgpu.copy_gmem_to_smem(gates_gmem.sum.at[of_keys], vector_smem.at[0], kv_full)
                plgpu.copy_gmem_to_smem(gates_gmem.rest.at[of_keys], vector_smem.at[1], kv_full)
            plgpu.barrier_wait(kv_full)
            own_k, own_v = k_smem, v_smem
            if tile.fragments:
                own_k, own_v = (compat.load(x, plgpu.Layout.WGMMA) for x in (k_smem, v_smem))
            zeros = plgpu.layout_cast(jnp.zeros((tiles.ROWS,), jnp.float32), ROW)
            pack = None if ranges_gmem is None else [ref[batch, head_kv] for ref in (ranges_gmem.weight, ranges_gmem.dscore)]

            def after(m: Array, least: int) -> Array:
                """Whether a query of tile m comes at least `least` tokens after a key."""
                query = plgpu.broadcasted_iota(jnp.int32, (tiles.ROWS, width), 1, layout=plgpu.Layout.WGMMA)
                key = plgpu.broadcasted_iota(jnp.int32, (tiles.ROWS,), 0, layout=ROW)
                return query >= spread_rows(key + (least + first - m * width), width)

            def coefficients(slot: Array, m: Array, edge: bool) -> Array:
                """a_ij of a tile, keys down and queries across; 0 where the query comes before the key."""
                a = compat.load(smem["alpha"].at[slot], COLUMN)
                if gates_gmem is None:
                    a = spread_columns(a, tiles.ROWS)
                else:
                    query_gate = compat.load(smem["sum"].at[slot], COLUMN)
                    if edge:
                        key_gate = compat.load(vector_smem.at[0], ROW)
                        root = jnp.exp2(spread_columns(query_gate, tiles.ROWS) - spread_rows(key_gate, width))
                        a = root * spread_columns(a, tiles.ROWS)
                    else:
                        blocks = lax.div(m * width, jnp.int32(tiles.GATE_BLOCK)), lax.div(first, jnp.int32(tiles.GATE_BLOCK))
                        query_start = [gates_gmem.edges[batch, head_kv, 4 * blocks[0] + i] for i in range(2)]
                        end = [gates_gmem.edges[batch, head_kv, 4 * blocks[1] + 2 + i] for i in range(2)]
                        rest = compat.load(vector_smem.at[1], ROW) * jnp.exp2(
                            (query_start[0] - end[0]) + (query_start[1] - end[1])
                        )
                        a = spread_rows(rest, width) * spread_columns(a * jnp.exp2(query_gate), tiles.ROWS)
                return jnp.where(after(m, 0), a, 0.0) if edge and call.causal else a

            def sums(dk: Any, dv: Any) -> tuple[Array, Array, Array]:
                def tile_of_queries(m: Array, column_sum: Array, member: Array, *, edge: bool) -> Array:
                    n = member * count + m
                    slot = lax.rem(n, jnp.int32(stages))

                    queries_smem, dy_smem = smem["q"].at[slot], smem["dy"].at[slot]
                    acc = plgpu.ACC((tiles.ROWS, width), jnp.float32)

                    def scores(s: Any) -> Array:
                        plgpu.wgmma(s, own_k, queries_smem.transpose((1, 0)))
                        return s[...]  # waits for it, and for the sums of the tile before

                    plgpu.barrier_wait(smem["q_full"].at[slot])
                    score = pl.run_scoped(scores, acc)

                    @pl.when(n > 0)
                    def _() -> None:
                        plgpu.barrier_arrive(smem["q_empty"].at[next_slot(n, stages - 1, stages)])

                    u = coefficients(slot, from_tile + m, edge) * score
                    lower = power(u, call.deg - 1) if call.deg > 1 else None
                    weight = u if lower is None else lower * u
                    rounded = weight if pack is None else jnp.clip(weight * pack[0], -65504.0, 65504.0)
                    rounded = rounded.astype(dtype)

                    def dweights(moved: Any) -> Array:
                        delta = compat.load(smem["delta"].at[slot], COLUMN)
                        start(moved, spread_columns(-delta, tiles.ROWS))  # so that dP − δ is what is summed up
                        plgpu.wgmma(moved, own_v, dy_smem.transpose((1, 0)))
                        plgpu.wgmma(dv, rounded, dy_smem)
                        return moved[...]

                    moved = pl.run_scoped(dweights, acc)
                    dscore = coefficients(slot, from_tile + m, edge) * moved
                    dscore = dscore if lower is None else lower * dscore
                    if gates_gmem is not None:
                        product = weight * moved
                        product = jnp.where(after(from_tile + m, 1), product, 0.0) if edge else product
                        column_sum += product.sum(1)
                    if pack is not None:
                        dscore = jnp.clip(dscore * pack[1], -65504.0, 65504.0)
                    plgpu.wgmma(dk, dscore.astype(dtype), queries_smem)
                    return column_sum

                def head(member: Array, column_sum: Array) -> Array:
                    # The block's own queries, which come before some of its keys, or share their block of gates.
                    edges = jnp.minimum(count, block_keys // width) if call.causal else jnp.int32(0)
                    edge, inside = (lambda m, x, edge=edge: tile_of_queries(m, x, member, edge=edge) for edge in (True, False))
                    column_sum = lax.fori_loop(0, edges, edge, column_sum)
                    return lax.fori_loop(edges, count, inside, column_sum)

                column_sum = lax.fori_loop(0, call.group, head, zeros)
                return column_sum, dk[...], dv[...]

            column_sum, dk, dv = pl.run_scoped(
                sums, plgpu.ACC((tiles.ROWS, d), jnp.float32), plgpu.ACC((tiles.ROWS, e), jnp.float32)
            )
            whole = plain(call)
            dk_factor, dv_factor = call.deg * whole, whole
            if pack is not None:
                dv_factor, dk_factor = dv_factor / pack[0], dk_factor / pack[1]
            k_smem[...] = (dk * dk_factor).astype(dtype)
            v_smem[...] = (dv * dv_factor).astype(dtype)
            if column_sum_gmem is not None:
                vector_smem[0] = column_sum * whole
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_smem, dk_gmem.at[tokens])
            plgpu.copy_smem_to_gmem(v_smem, dv_gmem.at[tokens])
            if column_sum_gmem is not None:
                plgpu.copy_smem_to_gmem(vector_smem.at[0], column_sum_gmem.at[batch, head_kv, pl.ds(first, tiles.ROWS)])
            plgpu.wait_smem_to_gmem(0)

    rows_of = (tile.groups, tiles.ROWS)
    operands = {"k": (*rows_of, d), "v": (*rows_of, e), "q": (stages, width, d), "dy": (stages, width, e)}
    vectors = {"vectors": (tile.groups, 2, tiles.ROWS), "alpha": (stages, width), "delta": (stages, width)}
    if gates is not None:
        vectors["sum"] = (stages, width)
    scratch = allocate("backward of the attention form, keys", dtype, operands, vectors) | {
        "kv_full": plgpu.Barrier(num_arrivals=2 if gates is None else 4, num_barriers=tile.groups),
        "q_full": plgpu.Barrier(num_arrivals=4 if gates is None else 5, num_barriers=stages),
        "q_empty": plgpu.Barrier(num_arrivals=tile.groups, num_barriers=stages),
    }
    column_sum_type = jax.ShapeDtypeStruct((call.b, call.h_kv, key_tiles * block_keys), jnp.float32)
    run = compat.kernel(
        power_attention_backward_keys,
        out_type=(
            jax.ShapeDtypeStruct(k.shape, dtype),
            jax.ShapeDtypeStruct(v.shape, dtype),
            *(() if gates is None else (column_sum_type,)),
        ),
        scratch_types=(scratch,),
        grid=(deck.size,),
        grid_names=("block",),
        num_threads=tile.groups + 1,
        thread_name="warpgroup",
    )
    dk, dv, *column_sum = run(q, k, v, dy, queries.alpha, queries.delta, *(gates or ()), *(ranges or ()))
    return dk, dv, column_sum[0] if column_sum else None
