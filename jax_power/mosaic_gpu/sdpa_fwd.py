"""Forward of scaled dot-product attention on Hopper: online softmax over tiles of keys (Dao, "FlashAttention-2", 2023).

An item is `groups` × 64 queries of one head; a block works on one after the other (`sdpa_schedule`). Its last warpgroup loads:
queries, and tiles of K and V by TMA into a ring of `stages`, as far ahead as there is room, into the next item too.
Each consumer warpgroup holds 64 rows: S = Q Kᵀ from shared memory, the running maximum, sum and O in registers, and P fed
back from registers as the A operand of O += P V. Two consumers take turns at the matrix units (ping-pong: Shah et al.,
"FlashAttention-3", 2024): while one computes exponentials the other multiplies.
Memory: Q, and O in its place or apart, 2 bytes · rows · (d · slots + e) at most; K and V (d + e) · 2 bytes · keys · stages.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from bridge.spec_sdpa import SdpaCall
from jax_power.mosaic_gpu import sdpa_block, sdpa_schedule, sdpa_tiles
from jax_power.mosaic_gpu.attention_common import Ring
from jax_power.mosaic_gpu.sdpa_scores import LOG2_E, ROW, WGMMA, Accumulator, Blocks, Extra, Extras, Visible, item, walk
from jax_power.mosaic_gpu.tiles import ROWS


def residual_scale(dtype: Any) -> float:
    """What the residual of the output is multiplied by: float16's small numbers have few digits."""
    return 2048.0 if dtype == jnp.float16 else 1.0


class Work(NamedTuple):
    """An item of a block: its number there, the rows it is about, the tiles of keys they see, and how many came before."""

    number: Any
    batch: Any
    head: Any
    row: Any
    visible: Visible
    blocks: Blocks
    before: Any

    def tile(self, i: Any) -> Any:
        """The number of the i-th tile of keys among all that pass through the rings."""
        return self.before + i - self.blocks.first


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
    table = sdpa_schedule.table(call, rows, width)
    operands = [q, k, v, *(x.array for x in extras), *lengths, jnp.asarray(table)]

    def forward_of_softmax_attention(gmem: Sequence[Any], smem: sdpa_block.Smem) -> None:
        q_gmem, k_gmem, v_gmem, *rest, table_gmem = gmem[: len(operands)]
        out_gmem, lse_gmem, *rest_gmem = gmem[len(operands) :]
        added = Extras(extras, rest[: len(extras)])
        hand = table_gmem.at[lax.axis_index("block")]
        q_ring = Ring.of(smem, "q", tiles.slots)
        k_ring, v_ring = (Ring.of(smem, name, ring) for name in ("k", "v"))
        turn = smem["turn"]

        def each(work):
            """`work` on every item of this block. Their numbers are read one ahead: device memory is far away."""

            def do(j, carry):
                index, before = carry
                following = hand[j + 2]
                batch, head, block = item(index, call.b, call.h_q, row_blocks, last_first=True)
                visible = Visible.of(call, batch, rest[len(extras) :], width)
                blocks = visible.key_blocks(block * rows, rows, width)
                work(Work(j, batch, head, block * rows, visible, blocks, before))
                return following, before + blocks.last - blocks.first

            lax.fori_loop(0, hand[0], do, (hand[1], jnp.int32(0)))

        def load() -> None:
            each(load_item)

        def load_item(x: Work) -> None:
            kv_head = lax.div(x.head, jnp.int32(call.group))
            own = pl.ds(x.row, rows)
            sdpa_block.fill(q_ring, x.number, [(q_gmem.at[x.batch, own, x.head], smem["q"])])

            @pl.loop(x.blocks.first, x.blocks.last)
            def _(i):
                n, at = x.tile(i), pl.ds(i * width, width)
                more = added.copies(x.batch, x.head, own, at, smem["extras"])
                sdpa_block.fill(k_ring, n, [(k_gmem.at[x.batch, at, kv_head], smem["k"]), *more])
                sdpa_block.fill(v_ring, n, [(v_gmem.at[x.batch, at, kv_head], smem["v"])])

        def attend(group: Array) -> None:
            each(functools.partial(attend_item, group))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def attend_item(group: Array, x: Work) -> None:
            own_row = x.row + group * ROWS
            batch, head, visible = x.batch, x.head, x.visible
            own_at, part = pl.ds(own_row, ROWS), pl.ds(group * ROWS, ROWS)
            own = visible.key_blocks(own_row, ROWS, width)
            masks = visible.left is not None, visible.right is not None or visible.counts_keys
            row_extras = added.rows(batch, head, own_at)
            own_q = smem["q"].at[q_ring.slot(x.number), part]
            q_ring.await_full(x.number)

            def take_turn():
                if tiles.ping_pong:
                    plgpu.barrier_wait(turn.at[group])

            def pass_turn():
                if tiles.ping_pong:
                    plgpu.barrier_arrive(turn.at[1 - group])

            def finish(s, i, masked):
                """Scores of tile i, in base 2 but for `factor`, with extras; −∞ where hidden. Frees the tile of keys."""
                n = x.tile(i)
                if factor == 1.0:
                    s = s * (call.scale * LOG2_E)
                own_tiles = [tile.at[k_ring.slot(n), part] for tile in smem["extras"]]
                s = added.add(s, batch, head, row_extras, pl.ds(i * width, width), own_tiles)
                k_ring.release(n, loaded=bool(own_tiles))
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
                    plgpu.wgmma(acc_ref, p, smem["v"].at[slot])

                return pl.run_state(product)(Accumulator.init(acc))

            def step(i, carry, *, masked):
                acc, top, total = carry
                n = x.tile(i)
                slot = k_ring.slot(n)
                k_ring.await_full(n)

                def scores(s_acc):
                    plgpu.wgmma(s_acc, own_q, smem["k"].at[slot].T)
                    pass_turn()
                    return s_acc[...]

                s = pl.run_scoped(scores, Accumulator((ROWS, width), jnp.float32))
                p, top, total, shrink = softmax(finish(s, i, masked), top, total)
                acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
                acc, total, top, p = lax.optimization_barrier((acc, total, top, p.astype(dtype)))
                v_ring.await_full(n)
                take_turn()
                acc = weigh(acc, p, slot)
                v_ring.release(n)
                return acc, top, total

            def skip(i):
                n = x.tile(i)
                k_ring.skip(n)
                pass_turn()
                take_turn()
                v_ring.skip(n)

            top = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
            total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
            acc = plgpu.layout_cast(jnp.zeros((ROWS, e), jnp.float32), WGMMA)
            # The first warpgroup has the turn at the start, and passes it once more at the end: left to the next item, the
            # second would wait for it with a slot that the next item's queries may need.
            if tiles.ping_pong:
                pl.when(group == 1)(take_turn)
            acc, top, total = walk(step, skip, (acc, top, total), x.blocks, own, masks)
            if tiles.ping_pong:
                pl.when(group == 0)(pass_turn)
            if tiles.apart:
                q_ring.release(x.number)

            if call.query_lengths:
                index = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
                total = jnp.where(index < visible.queries - own_row, total, 0.0)
            empty = total == 0.0
            inverse = jnp.where(empty, 0.0, 1.0 / total)
            exact = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
            out_smem = smem["out"].at[group] if tiles.apart else own_q
            lse = jnp.where(empty, -jnp.inf, top * (1 / LOG2_E) + jnp.log(total))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last item's results
            sdpa_block.store(smem["lse"].at[group], lse, lse_gmem.at[batch, head, own_at])
            sdpa_block.store(out_smem, exact.astype(dtype), out_gmem.at[batch, own_at, head])
            if residual:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                left_over = (exact - exact.astype(dtype).astype(jnp.float32)) * residual_scale(dtype)
                sdpa_block.store(out_smem, left_over.astype(dtype), rest_gmem[0].at[batch, own_at, head])
            if not tiles.apart:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                q_ring.release(x.number, loaded=True)

        sdpa_block.part(tiles, load, attend)

    tiled = Extras.tiles(extras, ring, rows, width)
    smem = {"q": plgpu.SMEM((tiles.slots, rows, d), dtype)}
    smem |= Ring.barriers("q", tiles.slots, tiles.groups, copies=1)
    smem |= sdpa_block.streaming(tiles, dtype, "k", {"k": d}, beside=tiled)
    smem |= sdpa_block.streaming(tiles, dtype, "v", {"v": e}) | {"extras": tiled, "turn": plgpu.Barrier(num_barriers=2)}
    smem["lse"] = plgpu.SMEM((tiles.groups, ROWS), jnp.float32)
    if tiles.apart:
        smem["out"] = plgpu.SMEM((tiles.groups, ROWS, e), dtype)
    out = jax.ShapeDtypeStruct((*q.shape[:3], e), dtype)
    lse = jax.ShapeDtypeStruct((call.b, call.h_q, row_blocks * rows), jnp.float32)
    return sdpa_block.launch(
        forward_of_softmax_attention, tiles, smem,
        grid={"block": len(table)}, out_type=[out, lse, *([out] if residual else [])], operands=operands,
    )  # fmt: skip
