"""Backward of the attention form in Pallas, in two kernels without a sum that leaves its warpgroup: dq, then dk and dv.

    dq_i = f_i · Σ_j (dp_ij − δ_i) s_ij^(p−1) exp(G_i − G_j) k_j,   dp = dY Vᵀ,   δ_i = dy_i·y_i,   f_i = p c_i / n_i
    dv_j = Σ_i w_ij / n_i dy_i,    dk_j = p Σ_i (dp_ij − δ_i) u_ij^(p−1) a_ij q_i,    u_ij = a_ij s_ij,    w_ij / n_i = u_ij^p

with a_ij = alpha_i times the p-th root of the gates; alpha and δ pass from the first kernel to the second. For dlog_g both also
sum A_ij = w_ij (dp_ij − δ_i) / n_i, the first over j < i, the second over i > j (the diagonal carries no gate).

As in the forward pass a block is `groups` warpgroups of 64 rows (queries, then keys) and one that loads; tiles of the other
side stream past. The accumulator of dP starts from −δ. dS and w are fed back from registers; their products are in flight while
the next S and dP are started. Tiles on the diagonal, and those that share the rows' block of gates, are computed 64 wide.

Shared memory: the rows' operands (gradients leave through them) and, in a ring of stages, those of the other side.
"""

from __future__ import annotations

import dataclasses
import functools
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
    Ring,
    RowGates,
    accumulator,
    allocate,
    clamp,
    inverse_root,
    packed,
    plain,
    power,
    scale_rows,
    score_bits,
    spread_columns,
    spread_rows,
    start,
    up_to_diagonal,
    zero_rows,
)

WGMMA = plgpu.Layout.WGMMA
# Rows of a block of either kernel: what vectors of queries are filled up to.
BLOCK = 2 * tiles.ROWS


class Queries(NamedTuple):
    """What the second kernel needs of every query, float32 `[b, h_q, t]`, t filled up to whole blocks.

    w_ij / n_i = (alpha_i s_ij)^p of the unscaled s; `delta` is δ, corrected; `row_sum` is Σ_{j<i} A_ij, None without gates.
    """

    alpha: Array
    delta: Array
    row_sum: Array | None


class Block(NamedTuple):
    """What a block works on: arrays in device and shared memory by name, its head and rows, and how many tiles it meets."""

    gmem: dict[str, Any]
    smem: dict[str, Any]
    batch: Array
    head: Array
    head_kv: Array
    first: Array
    tiles: Array
    ring: Ring


@dataclasses.dataclass(frozen=True)
class Backward:
    """What the two kernels have in common: the sizes of a call, and how a block divides into warpgroups."""

    call: spec.PowerCall
    d: int
    e: int
    dtype: Any
    gated: bool
    half: bool

    def names(self, *arrays: str) -> tuple[str, ...]:
        return *arrays, *(Gates._fields if self.gated else ()), *(Ranges._fields if self.half else ())

    def run(self, body: Any, deck: Deck, tile: tiles.Backward, scratch: dict[str, Any], out_type: Any, *arrays: Any) -> Any:
        kernel = compat.kernel(
            body,
            out_type=out_type,
            scratch_types=(scratch,),
            grid=(deck.size,),
            grid_names=("block",),
            num_threads=tile.groups + 1,
            thread_name="warpgroup",
        )
        return kernel(*arrays)

    def divide(self, tile: tiles.Backward, load: Any, consume: Any) -> None:
        """One warpgroup loads, the others consume; they share the registers accordingly."""
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == tile.groups)
        def _() -> None:
            plgpu.set_max_registers(tile.producer_registers, action="decrease")
            load()

        @pl.when(warpgroup < tile.groups)
        def _() -> None:
            plgpu.set_max_registers(tile.consumer_registers, action="increase")
            consume(warpgroup)


# ---------------------------------------------------------------------------------------------------------------------
# dq
# ---------------------------------------------------------------------------------------------------------------------


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
    kernel = BackwardQueries(call, q.shape[-1], v.shape[-1], q.dtype, gates is not None, ranges is not None)
    vector = jax.ShapeDtypeStruct((call.b, call.h_q, kernel.deck.tiles * BLOCK), jnp.float32)
    out_type = jax.ShapeDtypeStruct(q.shape, q.dtype), *(vector,) * (3 if kernel.gated else 2)
    body, arrays = kernel.power_attention_backward_queries, (q, k, v, y, norm, dy, *(gates or ()), *(ranges or ()))
    dq, *vectors = kernel.run(body, kernel.deck, kernel.tile, kernel.scratch(), out_type, *arrays)
    return dq, Queries(vectors[0], vectors[1], vectors[2] if kernel.gated else None)


class QueryRows(NamedTuple):
    """A warpgroup's 64 queries: their index, operands in shared memory, and numbers a row.

    `whole` is what u^p lacks of w, c_i and float16's scale of the head together; `inverse` 1 / n_i; `packing` float16's factor
    on dS.
    """

    first: Array
    q_smem: Any
    dy_smem: Any
    whole: Array
    alpha: Array
    inverse: Array
    delta: Array
    packing: Array | None
    of_head: Array | None
    gates: RowGates | None


class RowSums(NamedTuple):
    """δ, and what w_ij (dp_ij − δ_i) sums up to: over all keys so far, and of the token itself, with its own weight."""

    delta: Array
    all: Array
    itself: Array
    own: Array


@dataclasses.dataclass(frozen=True)
class BackwardQueries(Backward):
    @functools.cached_property
    def tile(self) -> tiles.Backward:
        return tiles.backward_q(self.d, self.e, gates=self.gated)

    @functools.cached_property
    def deck(self) -> Deck:
        call = self.call
        head_bytes = call.t_kv * (self.d + self.e) * 2 // call.group
        return Deck.make(pl.cdiv(call.t, BLOCK), call.h_q, call.b, head_bytes, longest_last=call.causal)

    def scratch(self) -> dict[str, Any]:
        groups, keys, stages = self.tile.groups, self.tile.width, self.tile.stages
        rows = (groups, tiles.ROWS)
        operands = {"q": (*rows, self.d), "dy": (*rows, self.e), "y": (*rows, self.e)}
        operands |= {"k": (stages, keys, self.d), "v": (stages, keys, self.e)}
        vectors = {"vectors": (groups, 3, tiles.ROWS)} | (dict.fromkeys(("sum", "rest"), (stages, keys)) if self.gated else {})
        barriers = {"q_full": plgpu.Barrier(num_arrivals=5 if self.gated else 4, num_barriers=groups)}
        barriers |= Ring.barriers("kv", stages, groups, copies=4 if self.gated else 2)
        return allocate("backward of the attention form, queries", self.dtype, operands, vectors) | barriers

    def power_attention_backward_queries(self, *refs: Any) -> None:
        *gmem, smem = refs
        names = (*self.names("q", "k", "v", "y", "norm", "dy"), "dq", "alpha", "delta", *(("row_sum",) if self.gated else ()))
        batch, head, row_tile = self.deck.deal(lax.axis_index("block"))
        first, keys = row_tile * BLOCK, self.tile.width
        count = jnp.int32(pl.cdiv(self.call.t_kv, keys))
        if self.call.causal:
            count = jnp.minimum(count, pl.cdiv(first + BLOCK, keys))
        head_kv = lax.div(head, jnp.int32(self.call.group))
        ring = Ring.of(smem, "kv", self.tile.stages)
        x = Block(dict(zip(names, gmem, strict=True)), smem, batch, head, head_kv, first, count, ring)
        self.divide(self.tile, functools.partial(self.load, x), functools.partial(self.consume, x))

    def load(self, x: Block) -> None:
        """The loading warpgroup: keys and values, with their gates, as stages are released."""

        @pl.loop(0, x.tiles)
        def _(n: Array) -> None:
            x.ring.await_empty(n)
            slot, here = x.ring.slot(n), pl.ds(n * self.tile.width, self.tile.width)
            for name in ("k", "v"):
                plgpu.copy_gmem_to_smem(x.gmem[name].at[x.batch, here, x.head_kv], x.smem[name].at[slot], x.ring.full.at[slot])
            for name in ("sum", "rest") if self.gated else ():
                plgpu.copy_gmem_to_smem(x.gmem[name].at[x.batch, x.head_kv, here], x.smem[name].at[slot], x.ring.full.at[slot])

    def consume(self, x: Block, warpgroup: Array) -> None:
        rows = self.receive_rows(x, warpgroup)
        mine = x.tiles
        if self.call.causal:
            mine = jnp.minimum(mine, lax.div(rows.first, jnp.int32(self.tile.width)) + 1)
        sums, dq = pl.run_scoped(functools.partial(self.sum_tiles, x, rows, mine), accumulator(self.d))

        @pl.loop(mine, x.tiles)
        def _(n: Array) -> None:  # tiles that only later rows of the block see
            x.ring.skip(n)

        self.store(x, rows, warpgroup, sums, dq)

    def receive_rows(self, x: Block, warpgroup: Array) -> QueryRows:
        call = self.call
        first = x.first + warpgroup * tiles.ROWS
        here, full = pl.ds(first, tiles.ROWS), x.smem["q_full"].at[warpgroup]
        q_smem, dy_smem, y_smem, vectors_smem = (x.smem[name].at[warpgroup] for name in ("q", "dy", "y", "vectors"))
        for name, target in (("q", q_smem), ("dy", dy_smem), ("y", y_smem)):
            plgpu.copy_gmem_to_smem(x.gmem[name].at[x.batch, here, x.head], target, full)
        plgpu.copy_gmem_to_smem(x.gmem["norm"].at[x.batch, x.head, here], vectors_smem.at[0], full)
        if self.gated:
            plgpu.copy_gmem_to_smem(x.gmem["sum"].at[x.batch, x.head_kv, here], vectors_smem.at[1], full)
        plgpu.barrier_wait(full)

        dy = compat.load(dy_smem, WGMMA).astype(jnp.float32)
        delta = (dy * compat.load(y_smem, WGMMA).astype(jnp.float32)).sum(1) if call.normalize else zero_rows()
        packing = of_head = None
        if self.half:  # |dp − δ| u^(p−1) ≤ 2^15, row by row
            largest = (dy * dy).sum(1) * x.gmem["v_squared"][x.batch, x.head_kv]
            packing = packed(largest, 13 - score_bits(call.deg) * (call.deg - 1))
            of_head = x.gmem["scale"][x.batch, x.head_kv]
        whole = scale_rows(q_smem)
        whole = whole if of_head is None else whole * of_head
        norm = compat.load(vectors_smem.at[0], ROW)
        if call.normalize:
            alpha, inverse = whole * inverse_root(norm, call.deg), jnp.where(norm == 0.0, 0.0, 1.0 / norm)
        else:
            alpha, inverse = zero_rows() + 1.0, plain(call) / power(whole, call.deg)
        gates = RowGates.load(vectors_smem.at[1], x.gmem["edges"].at[x.batch, x.head_kv], first) if self.gated else None
        return QueryRows(first, q_smem, dy_smem, whole, alpha, inverse, delta, packing, of_head, gates)

    def sum_tiles(self, x: Block, rows: QueryRows, mine: Array, dq: Any) -> tuple[RowSums, Array]:
        """The sums over the first `mine` tiles of keys, and dQ before its rows are scaled."""
        pieces = self.tile.width // tiles.ROWS  # of 64 keys, which tiles on the diagonal are cut into
        last_piece = jnp.int32(pl.cdiv(self.call.t_kv, tiles.ROWS) - 1)
        if self.call.causal:
            last_piece = lax.div(rows.first, jnp.int32(tiles.ROWS))

        def whole_tile(n: Array, sums: RowSums) -> RowSums:
            x.ring.await_full(n)
            return self.accumulate(x, rows, n, sums, dq)

        def edge_tile(n: Array, sums: RowSums) -> RowSums:
            x.ring.await_full(n)
            plgpu.wgmma_wait(0)
            x.ring.release(n - 1, loaded=self.gated)
            end = jnp.minimum((n + 1) * pieces, last_piece + 1)
            piece = functools.partial(self.accumulate_piece, x, rows, n, last_piece, dq=dq)
            return lax.fori_loop(n * pieces, end, piece, sums)

        edge = mine - 1
        if self.gated:  # tiles in the rows' own block of gates
            edge = lax.div(rows.first, jnp.int32(tiles.GATE_BLOCK)) * (tiles.GATE_BLOCK // self.tile.width)
        sums = RowSums(rows.delta, zero_rows(), zero_rows(), zero_rows())
        sums = lax.fori_loop(0, edge, whole_tile, sums)
        sums = lax.fori_loop(edge, mine, edge_tile, sums)
        result = dq[...]  # waits for all products
        x.ring.release(mine - 1, loaded=self.gated)
        return sums, result

    def multiply(self, rows: QueryRows, delta: Array, k_smem: Any, v_smem: Any) -> tuple[Array, Array]:
        """S and dP − δ for a tile or a piece of one; ends the products that were in flight."""
        width = k_smem.shape[0]

        def products(score: Any, moved: Any) -> tuple[Array, Array]:
            start(moved, spread_rows(-delta, width))
            plgpu.wgmma(score, rows.q_smem, k_smem.transpose((1, 0)))
            plgpu.wgmma(moved, rows.dy_smem, v_smem.transpose((1, 0)))
            return score[...], moved[...]

        acc = accumulator(width)
        return pl.run_scoped(products, acc, acc)

    def accumulate(self, x: Block, rows: QueryRows, n: Array, sums: RowSums, dq: Any) -> RowSums:
        """dQ += dS K for a tile whose keys all come before the rows, and before their block of gates."""
        slot = x.ring.slot(n)
        k_smem = x.smem["k"].at[slot]
        u, moved = self.multiply(rows, sums.delta, k_smem, x.smem["v"].at[slot])
        x.ring.release(n - 1, loaded=self.gated)
        decay = None
        if rows.gates is not None:
            block = lax.div(n, jnp.int32(tiles.GATE_BLOCK // self.tile.width))
            decay = rows.gates.across(x.smem["rest"].at[slot], x.gmem["edges"].at[x.batch, x.head_kv], block)
            u *= decay
        u = u if rows.of_head is None else u * rows.of_head
        if rows.gates is not None:
            sums = sums._replace(all=sums.all + (power(u, self.call.deg) * moved).sum(1))
        self.add_product(rows, u, moved, decay, k_smem, dq)
        return sums

    def accumulate_piece(
        self, x: Block, rows: QueryRows, n: Array, last_piece: Array, piece: Array, sums: RowSums, *, dq: Any
    ) -> RowSums:
        """dQ += dS K for 64 keys of tile n, of which some may come after some rows."""
        slot, offset = x.ring.slot(n), piece * tiles.ROWS - n * self.tile.width

        def part(name: str) -> Any:
            return x.smem[name].at[slot, pl.ds(pl.multiple_of(offset, tiles.ROWS), tiles.ROWS)]

        u, moved = self.multiply(rows, sums.delta, part("k"), part("v"))
        ahead, decay = rows.first - piece * tiles.ROWS, None
        if rows.gates is not None:
            decay = jnp.where(up_to_diagonal(ahead), rows.gates.within(part("sum")), 0.0)
            u *= decay
        elif self.call.causal:
            u = jnp.where(up_to_diagonal(ahead), u, 0.0)
        u = u if rows.of_head is None else u * rows.of_head
        if self.gated or self.call.normalize:
            weight = power(u, self.call.deg)
            product = weight * moved
            if self.gated:
                earlier = up_to_diagonal(ahead - 1)
                itself, own = (jnp.where(earlier, 0.0, z).sum(1) for z in (product, weight))
                sums = sums._replace(itself=sums.itself + itself, own=sums.own + own)
            sums = sums._replace(all=sums.all + product.sum(1))
        if self.call.normalize:
            # Σ_j w_ij (dp_ij − δ_i) should be 0, and is the error that δ has from the rounding of y. Rows that see few keys
            # feel it: without gates the first 64 rows, with gates any, but then what they see is mostly in their last piece.
            corrects = piece == last_piece if self.gated else last_piece == 0
            error = sums.all * rows.inverse * jnp.where(corrects, 1.0, 0.0)
            sums, moved = sums._replace(delta=sums.delta + error), moved - spread_rows(error, tiles.ROWS)
        if self.call.deg == 1 and self.call.causal and not self.gated:  # u^0 does not know the mask
            moved = jnp.where(up_to_diagonal(ahead), moved, 0.0)
        self.add_product(rows, u, moved, decay, part("k"), dq)
        return sums

    def add_product(self, rows: QueryRows, u: Array, moved: Array, decay: Array | None, k_smem: Any, dq: Any) -> None:
        """dQ += dS K, left in flight. u carries the gates' p-th root, so u^(p−1) lacks one more of it."""
        dscore = moved if self.call.deg == 1 else moved * power(u, self.call.deg - 1)
        dscore = dscore if decay is None else dscore * decay
        if rows.packing is not None:
            dscore = clamp(dscore * spread_rows(rows.packing, dscore.shape[1]))
        plgpu.wgmma(dq, dscore.astype(self.dtype), k_smem)

    def store(self, x: Block, rows: QueryRows, warpgroup: Array, sums: RowSums, dq: Array) -> None:
        factor = self.call.deg * rows.whole * rows.inverse
        factor = factor if rows.packing is None else factor / rows.packing
        q_smem, vectors_smem, here = x.smem["q"].at[warpgroup], x.smem["vectors"].at[warpgroup], pl.ds(rows.first, tiles.ROWS)
        q_smem[...] = (dq * spread_rows(factor, self.d)).astype(self.dtype)
        vectors = {"alpha": rows.alpha, "delta": sums.delta}
        if self.gated:
            # Normalised, the sum over all j is 0, so that over j < i is what the token itself contributes, negated.
            earlier = sums.own * sums.all * rows.inverse if self.call.normalize else sums.all
            vectors["row_sum"] = (earlier - sums.itself) * rows.inverse
        for i, vector in enumerate(vectors.values()):
            vectors_smem[i] = vector
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, x.gmem["dq"].at[x.batch, here, x.head])
        for i, name in enumerate(vectors):
            plgpu.copy_smem_to_gmem(vectors_smem.at[i], x.gmem[name].at[x.batch, x.head, here])
        plgpu.wait_smem_to_gmem(0)


# ---------------------------------------------------------------------------------------------------------------------
# dk and dv
# ---------------------------------------------------------------------------------------------------------------------


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
    kernel = BackwardKeys(call, q.shape[-1], v.shape[-1], q.dtype, gates is not None, ranges is not None)
    column_sum = jax.ShapeDtypeStruct((call.b, call.h_kv, kernel.deck.tiles * BLOCK), jnp.float32)
    out_type = *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)), *((column_sum,) if kernel.gated else ())
    body = kernel.power_attention_backward_keys
    arrays = (q, k, v, dy, queries.alpha, queries.delta, *(gates or ()), *(ranges or ()))
    dk, dv, *sums = kernel.run(body, kernel.deck, kernel.tile, kernel.scratch(), out_type, *arrays)
    return dk, dv, sums[0] if sums else None


class KeyRows(NamedTuple):
    """A warpgroup's 64 keys: their index, operands in shared memory, where their gates lie."""

    first: Array
    k_smem: Any
    v_smem: Any
    vectors_smem: Any


@dataclasses.dataclass(frozen=True)
class BackwardKeys(Backward):
    @functools.cached_property
    def tile(self) -> tiles.Backward:
        return tiles.backward_kv(self.d, self.e)

    @functools.cached_property
    def deck(self) -> Deck:
        call = self.call
        head_bytes = call.t * (self.d + self.e) * 2 * call.group
        return Deck.make(pl.cdiv(call.t_kv, BLOCK), call.h_kv, call.b, head_bytes, longest_last=False)

    def scratch(self) -> dict[str, Any]:
        groups, width, stages = self.tile.groups, self.tile.width, self.tile.stages
        rows = (groups, tiles.ROWS)
        operands = {"k": (*rows, self.d), "v": (*rows, self.e), "q": (stages, width, self.d), "dy": (stages, width, self.e)}
        names = ("alpha", "delta", *(("sum",) if self.gated else ()))
        vectors = {"vectors": (groups, 2, tiles.ROWS)} | dict.fromkeys(names, (stages, width))
        barriers = {"kv_full": plgpu.Barrier(num_arrivals=4 if self.gated else 2, num_barriers=groups)}
        barriers |= Ring.barriers("q", stages, groups, copies=5 if self.gated else 4)
        return allocate("backward of the attention form, keys", self.dtype, operands, vectors) | barriers

    def power_attention_backward_keys(self, *refs: Any) -> None:
        *gmem, smem = refs
        names = (*self.names("q", "k", "v", "dy", "alpha", "delta"), "dk", "dv", *(("column_sum",) if self.gated else ()))
        batch, head_kv, key_tile = self.deck.deal(lax.axis_index("block"))
        # Tiles of queries of each head that reads these keys: from the block's own on.
        count = jnp.int32(pl.cdiv(self.call.t, self.tile.width))
        if self.call.causal:
            count -= key_tile * (BLOCK // self.tile.width)
        ring = Ring.of(smem, "q", self.tile.stages)
        head = head_kv * self.call.group
        x = Block(dict(zip(names, gmem, strict=True)), smem, batch, head, head_kv, key_tile * BLOCK, count, ring)
        self.divide(self.tile, functools.partial(self.load, x), functools.partial(self.consume, x))

    def first_query(self, x: Block, m: Array) -> Array:
        return (x.first if self.call.causal else 0) + m * self.tile.width

    def load(self, x: Block) -> None:
        """The loading warpgroup: queries of one head after the other, with what the first kernel found of them."""

        @pl.loop(0, self.call.group)
        def _(member: Array) -> None:
            @pl.loop(0, x.tiles)
            def _(m: Array) -> None:
                n, head = member * x.tiles + m, x.head + member
                x.ring.await_empty(n)
                slot, here = x.ring.slot(n), pl.ds(self.first_query(x, m), self.tile.width)
                full = x.ring.full.at[slot]
                for name in ("q", "dy"):
                    plgpu.copy_gmem_to_smem(x.gmem[name].at[x.batch, here, head], x.smem[name].at[slot], full)
                for name in ("alpha", "delta"):
                    plgpu.copy_gmem_to_smem(x.gmem[name].at[x.batch, head, here], x.smem[name].at[slot], full)
                if self.gated:
                    plgpu.copy_gmem_to_smem(x.gmem["sum"].at[x.batch, x.head_kv, here], x.smem["sum"].at[slot], full)

    def consume(self, x: Block, warpgroup: Array) -> None:
        rows = self.receive_rows(x, warpgroup)
        column_sum, dk, dv = pl.run_scoped(
            functools.partial(self.sum_tiles, x, rows),
            *(accumulator(size) for size in (self.d, self.e)),
        )
        self.store(x, rows, warpgroup, column_sum, dk, dv)

    def receive_rows(self, x: Block, warpgroup: Array) -> KeyRows:
        first = x.first + warpgroup * tiles.ROWS
        here, full = pl.ds(first, tiles.ROWS), x.smem["kv_full"].at[warpgroup]
        k_smem, v_smem, vectors_smem = (x.smem[name].at[warpgroup] for name in ("k", "v", "vectors"))
        for name, target in (("k", k_smem), ("v", v_smem)):
            plgpu.copy_gmem_to_smem(x.gmem[name].at[x.batch, here, x.head_kv], target, full)
        for i, name in enumerate(("sum", "rest") if self.gated else ()):
            plgpu.copy_gmem_to_smem(x.gmem[name].at[x.batch, x.head_kv, here], vectors_smem.at[i], full)
        plgpu.barrier_wait(full)
        return KeyRows(first, k_smem, v_smem, vectors_smem)

    def sum_tiles(self, x: Block, rows: KeyRows, dk: Any, dv: Any) -> tuple[Array, Array, Array]:
        """Σ_{i>j} A_ij, dK and dV over all queries."""

        def of_head(member: Array, column_sum: Array) -> Array:
            # The block's own queries come before some of its keys, or share their block of gates.
            own = jnp.minimum(x.tiles, BLOCK // self.tile.width) if self.call.causal else jnp.int32(0)
            edge, inside = (
                functools.partial(self.accumulate, x, rows, member, dk=dk, dv=dv, edge=edge) for edge in (True, False)
            )
            column_sum = lax.fori_loop(0, own, edge, column_sum)
            return lax.fori_loop(own, x.tiles, inside, column_sum)

        column_sum = lax.fori_loop(0, self.call.group, of_head, zero_rows())
        return column_sum, dk[...], dv[...]

    def accumulate(
        self, x: Block, rows: KeyRows, member: Array, m: Array, column_sum: Array, *, dk: Any, dv: Any, edge: bool
    ) -> Array:
        """dV += wᵀ dY and dK += dSᵀ Q for a tile of queries, left in flight."""
        n = member * x.tiles + m
        slot, first = x.ring.slot(n), self.first_query(x, m)
        q_smem, dy_smem = x.smem["q"].at[slot], x.smem["dy"].at[slot]
        acc = accumulator(self.tile.width)

        def scores(score: Any) -> Array:
            plgpu.wgmma(score, rows.k_smem, q_smem.transpose((1, 0)))
            return score[...]  # waits for it, and for the sums of the tile before

        x.ring.await_full(n)
        u = pl.run_scoped(scores, acc)
        x.ring.release(n - 1, loaded=True)
        u *= self.coefficients(x, rows, slot, first, edge=edge)
        lower = None if self.call.deg == 1 else power(u, self.call.deg - 1)
        weight = u if lower is None else lower * u
        rounded = self.round(x, weight, "weight")

        def dweights(moved: Any) -> Array:
            start(moved, spread_columns(-compat.load(x.smem["delta"].at[slot], COLUMN), tiles.ROWS))
            plgpu.wgmma(moved, rows.v_smem, dy_smem.transpose((1, 0)))
            plgpu.wgmma(dv, rounded, dy_smem)
            return moved[...]  # waits for both

        moved = pl.run_scoped(dweights, acc)
        if self.gated:
            product = weight * moved
            product = jnp.where(up_to_diagonal(rows.first - first), 0.0, product) if edge else product
            column_sum += product.sum(1)
        moved *= self.coefficients(x, rows, slot, first, edge=edge)
        plgpu.wgmma(dk, self.round(x, moved if lower is None else lower * moved, "dscore"), q_smem)
        return column_sum

    def coefficients(self, x: Block, rows: KeyRows, slot: Array, first: Array, *, edge: bool) -> Array:
        """a_ij of a tile, keys down and queries across; 0 where the query comes before the key."""
        a = compat.load(x.smem["alpha"].at[slot], COLUMN)
        if not self.gated:
            a = spread_columns(a, tiles.ROWS)
        else:
            query_gate = compat.load(x.smem["sum"].at[slot], COLUMN)
            if edge:
                key_gate = compat.load(rows.vectors_smem.at[0], ROW)
                root = jnp.exp2(spread_columns(query_gate, tiles.ROWS) - spread_rows(key_gate, self.tile.width))
                a = root * spread_columns(a, tiles.ROWS)
            else:
                edges = x.gmem["edges"].at[x.batch, x.head_kv]
                query_block, key_block = (4 * lax.div(i, jnp.int32(tiles.GATE_BLOCK)) for i in (first, rows.first))
                between = (edges[query_block] - edges[key_block + 2]) + (edges[query_block + 1] - edges[key_block + 3])
                rest = compat.load(rows.vectors_smem.at[1], ROW) * jnp.exp2(between)
                a = spread_rows(rest, self.tile.width) * spread_columns(a * jnp.exp2(query_gate), tiles.ROWS)
        return jnp.where(up_to_diagonal(rows.first - first - 1), 0.0, a) if edge and self.call.causal else a

    def round(self, x: Block, value: Array, packing: str) -> Array:
        """`value` as an operand; float16 packs it into its range first."""
        return (clamp(value * x.gmem[packing][x.batch, x.head_kv]) if self.half else value).astype(self.dtype)

    def store(self, x: Block, rows: KeyRows, warpgroup: Array, column_sum: Array, dk: Array, dv: Array) -> None:
        whole = plain(self.call)
        results = ("k", "dk", dk, self.call.deg * whole, "dscore"), ("v", "dv", dv, whole, "weight")
        here = pl.ds(rows.first, tiles.ROWS)
        for name, _, gradient, factor, packing in results:
            factor = factor / x.gmem[packing][x.batch, x.head_kv] if self.half else factor
            x.smem[name].at[warpgroup][...] = (gradient * factor).astype(self.dtype)
        if self.gated:
            rows.vectors_smem[0] = column_sum * whole
        plgpu.commit_smem()
        for name, target, *_ in results:
            plgpu.copy_smem_to_gmem(x.smem[name].at[warpgroup], x.gmem[target].at[x.batch, here, x.head_kv])
        if self.gated:
            plgpu.copy_smem_to_gmem(rows.vectors_smem.at[0], x.gmem["column_sum"].at[x.batch, x.head_kv, here])
        plgpu.wait_smem_to_gmem(0)
