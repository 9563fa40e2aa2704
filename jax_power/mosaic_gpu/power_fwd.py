"""Forward of the attention form in Pallas: y_i = Σ_j w_ij v_j / Σ_j w_ij, w_ij = s_ij^p · exp(G_i − G_j), s = c_i q_i·k_j.

A block of 64·groups query rows of one head; each consumer warpgroup owns 64 of them and shares the stream of 128-key tiles:
S = Q Kᵀ from shared memory, S → w in registers, O += w V with w from registers. There is no running maximum and nothing is
rescaled. The product with V is in flight while the next S is started. A row's last tile, on the diagonal, is computed in halves
of 64 keys: masks and the rounded sum of 128 would spill. One more warpgroup loads.

Shared memory: q (y leaves through it where it fits), k and v in a ring of stages each, gates of the keys beside k.
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
    Deck,
    Gates,
    Ring,
    RowGates,
    accumulator,
    allocate,
    plain,
    power,
    scale_rows,
    spread_rows,
    up_to_diagonal,
    zero_rows,
)


def attend(call: spec.PowerCall, q: Array, k: Array, v: Array, gates: Gates | None, scale: Array | None) -> tuple[Array, Array]:
    """y `[b, t, h_q, e]` and the normaliser of the scaled rows `[b, h_q, t]`, float32, t filled up to whole blocks.

    Args:
      q, k, v: as `fill_up` leaves them.
      gates: of the keys, or None.
      scale: float16: `head_scale(k)`.
    """
    kernel = Forward(call, q.shape[-1], v.shape[-1], q.dtype, gates is not None, scale is not None)
    out_type = (
        jax.ShapeDtypeStruct((*q.shape[:3], kernel.e), q.dtype),
        jax.ShapeDtypeStruct((call.b, call.h_q, kernel.deck.tiles * kernel.block_rows), jnp.float32),
    )
    run = compat.kernel(
        kernel.power_attention_forward,
        out_type=out_type,
        scratch_types=(kernel.scratch(),),
        grid=(kernel.deck.size,),
        grid_names=("block",),
        num_threads=kernel.tile.groups + 1,
        thread_name="warpgroup",
    )
    return run(q, k, v, *(gates or ()), *(() if scale is None else (scale,)))


class Block(NamedTuple):
    """What a block works on: arrays in device and shared memory by name, its head and rows, and the tiles of keys it sees."""

    gmem: dict[str, Any]
    smem: dict[str, Any]
    batch: Array
    head: Array
    head_kv: Array
    first: Array
    tiles: Array
    k_ring: Ring
    v_ring: Ring


class Rows(NamedTuple):
    """A warpgroup's 64 rows: their index, scaled queries in shared memory and what by, gates, float16's scale of the head."""

    first: Array
    q_smem: Any
    factor: Array
    gates: RowGates | None
    of_head: Array | None


@dataclasses.dataclass(frozen=True)
class Forward:
    """The kernel of a call: its sizes, and what its warpgroups do."""

    call: spec.PowerCall
    d: int
    e: int
    dtype: Any
    gated: bool
    half: bool

    @functools.cached_property
    def tile(self) -> tiles.Forward:
        return tiles.forward(self.d, self.e, gates=self.gated, half=self.half)

    @property
    def block_rows(self) -> int:
        return self.tile.groups * tiles.ROWS

    @functools.cached_property
    def deck(self) -> Deck:
        call = self.call
        head_bytes = call.t_kv * (self.d + self.e) * 2 // call.group
        return Deck.make(pl.cdiv(call.t, self.block_rows), call.h_q, call.b, head_bytes, longest_last=call.causal)

    def scratch(self) -> dict[str, Any]:
        groups, keys, stages = self.tile.groups, self.tile.keys, self.tile.stages
        operands = {"q": (groups, tiles.ROWS, self.d), "k": (stages, keys, self.d), "v": (stages, keys, self.e)}
        vectors = {"norm": (groups, tiles.ROWS)}
        if self.d != self.e:
            operands["y"] = (groups, tiles.ROWS, self.e)
        if self.gated:
            vectors |= {"row_sum": (groups, tiles.ROWS), "sum": (stages, keys), "rest": (stages, keys)}
        barriers = {"q_full": plgpu.Barrier(num_arrivals=2 if self.gated else 1, num_barriers=groups)}
        barriers |= Ring.barriers("k", stages, groups, copies=3 if self.gated else 1)
        barriers |= Ring.barriers("v", stages, groups, copies=1)
        return allocate("forward of the attention form", self.dtype, operands, vectors) | barriers

    def power_attention_forward(self, *refs: Any) -> None:
        *gmem, smem = refs
        names = ["q", "k", "v", *(Gates._fields if self.gated else ()), *(("scale",) if self.half else ()), "y", "norm"]
        batch, head, row_tile = self.deck.deal(lax.axis_index("block"))
        first, keys = row_tile * self.block_rows, self.tile.keys
        count = jnp.int32(pl.cdiv(self.call.t_kv, keys))
        if self.call.causal:
            count = jnp.minimum(count, pl.cdiv(first + self.block_rows, keys))
        block = Block(
            dict(zip(names, gmem, strict=True)), smem, batch, head, lax.div(head, jnp.int32(self.call.group)), first, count,
            *(Ring.of(smem, name, self.tile.stages) for name in ("k", "v")),
        )  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == self.tile.groups)
        def _() -> None:
            plgpu.set_max_registers(self.tile.producer_registers, action="decrease")
            self.load(block)

        @pl.when(warpgroup < self.tile.groups)
        def _() -> None:
            plgpu.set_max_registers(self.tile.consumer_registers, action="increase")
            self.consume(block, warpgroup)

    def load(self, x: Block) -> None:
        """The loading warpgroup: keys, with their gates, and values, as stages are released."""

        @pl.loop(0, x.tiles)
        def _(n: Array) -> None:
            slot, here = x.k_ring.slot(n), pl.ds(n * self.tile.keys, self.tile.keys)
            x.k_ring.await_empty(n)
            full = x.k_ring.full.at[slot]
            plgpu.copy_gmem_to_smem(x.gmem["k"].at[x.batch, here, x.head_kv], x.smem["k"].at[slot], full)
            for name in ("sum", "rest") if self.gated else ():
                plgpu.copy_gmem_to_smem(x.gmem[name].at[x.batch, x.head_kv, here], x.smem[name].at[slot], full)
            x.v_ring.await_empty(n)
            plgpu.copy_gmem_to_smem(x.gmem["v"].at[x.batch, here, x.head_kv], x.smem["v"].at[slot], x.v_ring.full.at[slot])

    def consume(self, x: Block, warpgroup: Array) -> None:
        rows = self.receive_rows(x, warpgroup)
        mine = x.tiles
        if self.call.causal:
            mine = jnp.minimum(mine, lax.div(rows.first, jnp.int32(self.tile.keys)) + 1)
        sums = functools.partial(self.sum_tiles, x, rows, mine)
        norm, mean, out = pl.run_scoped(sums, accumulator(self.e))

        @pl.loop(mine, x.tiles)
        def _(n: Array) -> None:  # tiles that only later rows of the block see
            x.k_ring.skip(n)
            x.v_ring.skip(n)

        self.store(x, rows, warpgroup, norm, mean, out)

    def receive_rows(self, x: Block, warpgroup: Array) -> Rows:
        first = x.first + warpgroup * tiles.ROWS
        here = pl.ds(first, tiles.ROWS)
        q_smem, full = x.smem["q"].at[warpgroup], x.smem["q_full"].at[warpgroup]
        plgpu.copy_gmem_to_smem(x.gmem["q"].at[x.batch, here, x.head], q_smem, full)
        if self.gated:
            sum_smem = x.smem["row_sum"].at[warpgroup]
            plgpu.copy_gmem_to_smem(x.gmem["sum"].at[x.batch, x.head_kv, here], sum_smem, full)
        plgpu.barrier_wait(full)
        factor = scale_rows(q_smem)
        gates = RowGates.load(sum_smem, x.gmem["edges"].at[x.batch, x.head_kv], first) if self.gated else None
        return Rows(first, q_smem, factor, gates, x.gmem["scale"][x.batch, x.head_kv] if self.half else None)

    def sum_tiles(self, x: Block, rows: Rows, mine: Array, out: Any) -> tuple[Array, Array, Array]:
        """Σ_j w_ij, the same with the last tile's weights rounded, and Σ_j w_ij v_j, over the first `mine` tiles of keys."""

        def whole_tile(n: Array, norm: Array) -> Array:
            x.k_ring.await_full(n)
            part, weights = self.weigh(x, rows, n)  # has ended O += w V of the tile before
            x.v_ring.release(n - 1)
            x.k_ring.release(n, loaded=self.gated)
            norm += weights.sum(1)
            rounded = weights.astype(self.dtype)
            x.v_ring.await_full(n)
            plgpu.wgmma(out, rounded, part("v"))
            return norm

        def half_tile(half: Array, sums: tuple[Array, Array], *, masked: bool = False) -> tuple[Array, Array]:
            part, weights = self.weigh(x, rows, last, half)
            if masked:
                weights = jnp.where(up_to_diagonal(0), weights, 0.0)
            rounded = weights.astype(self.dtype)
            plgpu.wgmma(out, rounded, part("v"))
            # The mean is taken with the rounded weights here, so that a row that sees one key gets just its v. (With many keys,
            # and so in all other tiles, the roundings cancel by themselves.)
            norm, mean = sums
            return norm + weights.sum(1), mean + rounded.astype(jnp.float32).sum(1)

        last = mine - 1
        norm = lax.fori_loop(0, last, whole_tile, zero_rows())
        x.k_ring.await_full(last)
        x.v_ring.await_full(last)
        halves = jnp.int32(self.tile.keys // tiles.ROWS)
        if self.call.causal:  # those before the diagonal
            halves = lax.div(lax.rem(rows.first, jnp.int32(self.tile.keys)), jnp.int32(tiles.ROWS))
        sums = lax.fori_loop(0, halves, half_tile, (norm, norm))
        if self.call.causal:
            sums = half_tile(halves, sums, masked=True)
        result = out[...]  # waits for all products
        x.v_ring.release(last - 1)
        x.k_ring.release(last, loaded=self.gated)
        x.v_ring.release(last)
        return *sums, result

    def weigh(self, x: Block, rows: Rows, n: Array, half: Array | None = None) -> tuple[Any, Array]:
        """Where tile n or one of its halves lies in shared memory, and its weights; ends the products that were in flight."""
        width = self.tile.keys if half is None else tiles.ROWS

        def part(name: str) -> Any:
            tile_smem = x.smem[name].at[x.k_ring.slot(n)]
            return tile_smem if half is None else tile_smem.at[pl.ds(pl.multiple_of(half * width, width), width)]

        def multiply(acc: Any) -> Array:
            plgpu.wgmma(acc, rows.q_smem, part("k").transpose((1, 0)))
            return acc[...]

        scores = pl.run_scoped(multiply, accumulator(width))
        if rows.gates is not None:  # a tile has one block of gates, a row's last tile that of the row
            edges = x.gmem["edges"].at[x.batch, x.head_kv]
            scores *= rows.gates.across(part("rest"), edges, n) if half is None else rows.gates.within(part("sum"))
        if rows.of_head is not None:
            scores *= rows.of_head
        return part, power(scores, self.call.deg)

    def store(self, x: Block, rows: Rows, warpgroup: Array, norm: Array, mean: Array, out: Array) -> None:
        if self.call.normalize:
            inverse = jnp.where(mean == 0.0, 0.0, 1.0 / mean)
        else:
            factor = rows.factor if rows.of_head is None else rows.factor * rows.of_head
            inverse = plain(self.call) / power(factor, self.call.deg)
        y_smem = rows.q_smem if self.d == self.e else x.smem["y"].at[warpgroup]
        norm_smem, here = x.smem["norm"].at[warpgroup], pl.ds(rows.first, tiles.ROWS)
        y_smem[...] = (out * spread_rows(inverse, self.e)).astype(self.dtype)
        norm_smem[...] = norm
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_smem, x.gmem["y"].at[x.batch, here, x.head])
        plgpu.copy_smem_to_gmem(norm_smem, x.gmem["norm"].at[x.batch, x.head, here])
        plgpu.wait_smem_to_gmem(0)
