"""Backward of scaled dot-product attention on Hopper, without atomics: one kernel for dq, one for dk and dv.

    P = exp(S − L)      dP = dO Vᵀ      dS = P ∘ (dP − δ)      dQ = scale · dS K      dK = scale · dSᵀ Q      dV = Pᵀ dO

`gradient_q`: a consumer warpgroup holds 64 queries and walks over tiles of keys. `gradient_kv`: it holds 64 keys, computes Sᵀ
and dPᵀ, and walks over tiles of queries, for every query head that reads its key-value head. In both the last warpgroup loads
by TMA into a ring, P and dS go back to the matrix units from registers, and a tile's last products run while the first ones of
the next tile are issued. −L is added where the scale is multiplied; an accumulator of dP that starts at −δ saves an addition.
Memory: the operands that stay, (d + e) · 2 bytes · 64 · groups, their gradients in the same place; a ring of the others.
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
from jax_power.mosaic_gpu import attention_common, compat, sdpa_block, sdpa_tiles
from jax_power.mosaic_gpu.attention_common import Ring
from jax_power.mosaic_gpu.sdpa_scores import COL, LOG2_E, ROW, Accumulator, Extra, Extras, Visible, item, walk
from jax_power.mosaic_gpu.tiles import ROWS


class Operands(NamedTuple):
    """What both kernels read. q, dout `[b, t, h_q, ·]`, k, v `[b, s, h_kv, ·]`, lengths padded to 8, sizes to 64.

    stats `[b, h_q, 2, ·]`: what is added to a query's S, in base 2, and to its dP, −L and −δ; −∞ and 0 behind the end.
    extras: additive operands; lengths: int32 `[b]` of queries and keys, those that the call has.
    """

    q: Array
    k: Array
    v: Array
    dout: Array
    stats: Array
    extras: Sequence[Extra]
    lengths: Sequence[Array]

    def arrays(self) -> list[Array]:
        return [*self[:5], *(x.array for x in self.extras), *self.lengths]

    def split(self, refs: Sequence[Any]) -> tuple[Sequence[Any], Extras, Sequence[Any], Sequence[Any]]:
        """A kernel's references as those of the first five, the extras, the lengths and the outputs."""
        extras, rest = refs[5 : 5 + len(self.extras)], refs[5 + len(self.extras) :]
        return refs[:5], Extras(self.extras, extras), rest[: len(self.lengths)], rest[len(self.lengths) :]


def gradient_q(call: SdpaCall, tiles: sdpa_tiles.Backward, operands: Operands, *, sums: bool) -> tuple[Array, ...]:
    """dq in the shape of q; with `sums`, also Σ_j dS of every query `[b, h_q, ·]`, the gradient of a bias of queries."""
    q, k, v = operands[:3]
    d, e, dtype = q.shape[-1], v.shape[-1], q.dtype
    rows, width, ring = tiles.groups * ROWS, tiles.width, tiles.stages
    row_blocks = -(-call.t // rows)
    factor = call.scale * LOG2_E

    def gradient_of_queries(gmem: Sequence[Any], smem: sdpa_block.Smem) -> None:
        (q_gmem, k_gmem, v_gmem, dout_gmem, stats_gmem), extras, lengths, (dq_gmem, *sums_gmem) = operands.split(gmem)
        batch, head, block = item(lax.axis_index("item"), call.b, call.h_q, row_blocks, last_first=True)
        kv_head = lax.div(head, jnp.int32(call.group))
        visible = Visible.of(call, batch, lengths, width)
        row = block * rows
        blocks = visible.key_blocks(row, rows, width)
        k_ring, v_ring = (Ring.of(smem, name, ring) for name in ("k", "v"))

        def load() -> None:
            @pl.loop(blocks.first, blocks.last)
            def _(i):
                n, at = i - blocks.first, pl.ds(i * width, width)
                more = extras.copies(batch, head, pl.ds(row, rows), at, smem["extras"])
                sdpa_block.fill(k_ring, n, [(k_gmem.at[batch, at, kv_head], smem["k"]), *more])
                sdpa_block.fill(v_ring, n, [(v_gmem.at[batch, at, kv_head], smem["v"])])

        def differentiate(group: Array) -> None:
            own_row = row + group * ROWS
            own_at = pl.ds(own_row, ROWS)
            own = {"q": q_gmem.at[batch, own_at, head], "dout": dout_gmem.at[batch, own_at, head]}
            sdpa_block.load_own(smem, group, own)
            stats = [compat.load(stats_gmem.at[batch, head, n, own_at], ROW, optimized=False) for n in (0, 1)]
            lse, delta = (lax.broadcast_in_dim(x, (ROWS, width), [0]) for x in stats)
            row_extras = extras.rows(batch, head, own_at)
            sdpa_block.await_own(smem, group)
            own_q, own_dout = smem["q"].at[group], smem["dout"].at[group]

            def step(i, row_sums, dq_acc, *, masked):
                n = i - blocks.first
                slot = k_ring.slot(n)
                k_ring.await_full(n)

                def products(s_acc, dp_acc):
                    attention_common.start(dp_acc, delta)
                    plgpu.wgmma(s_acc, own_q, smem["k"].at[slot].T)
                    v_ring.await_full(n)
                    plgpu.wgmma(dp_acc, own_dout, smem["v"].at[slot].T)
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1) * factor + lse
                    # S is there, so dQ of the tile before, which was issued earlier, is too.
                    own_tiles = [x.at[slot, pl.ds(group * ROWS, ROWS)] for x in smem["extras"]]
                    if ring > 1:
                        k_ring.release(n - 1, loaded=bool(own_tiles))
                    p = jnp.exp2(extras.add(s, batch, head, row_extras, pl.ds(i * width, width), own_tiles))
                    seen = visible.mask(own_row, i * width, p.shape) if masked else None
                    return p if seen is None else jnp.where(seen, p, 0.0), dp_acc[...]

                tile = Accumulator((ROWS, width), jnp.float32)
                p, dp = pl.run_scoped(products, tile, tile)
                plgpu.barrier_arrive(v_ring.empty.at[slot])
                ds = p * dp
                plgpu.wgmma(dq_acc, ds.astype(dtype), smem["k"].at[slot])
                _release_last(k_ring, n)
                return row_sums + ds.sum(axis=1) if sums else None

            def skip(i):
                n = i - blocks.first
                _pass_over(k_ring, n)
                v_ring.skip(n)

            def walk_keys(dq_acc):
                row_sums = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW) if sums else None
                seen = visible.key_blocks(own_row, ROWS, width)
                masks = visible.left is not None, visible.right is not None or visible.counts_keys
                one = functools.partial(step, dq_acc=dq_acc)
                row_sums = walk(one, skip, row_sums, blocks, seen, masks)
                return (dq_acc[...], row_sums) if sums else (dq_acc[...],)

            dq, *row_sums = pl.run_scoped(walk_keys, Accumulator((ROWS, d), jnp.float32))
            sdpa_block.store(own_q, (dq * call.scale).astype(dtype), dq_gmem.at[batch, own_at, head])
            if sums:
                sdpa_block.store(smem["sums"].at[group], row_sums[0], sums_gmem[0].at[batch, head, own_at])
            plgpu.wait_smem_to_gmem(0)

        sdpa_block.part(tiles, load, differentiate)

    tiled = Extras.tiles(operands.extras, ring, rows, width)
    smem = sdpa_block.staying(tiles, dtype, {"q": d, "dout": e}) | {"extras": tiled}
    smem |= sdpa_block.streaming(tiles, dtype, "k", {"k": d}, beside=tiled)
    smem |= sdpa_block.streaming(tiles, dtype, "v", {"v": e})
    out_type = [jax.ShapeDtypeStruct(q.shape, dtype)]
    if sums:
        smem["sums"] = plgpu.SMEM((tiles.groups, ROWS), jnp.float32)
        out_type.append(jax.ShapeDtypeStruct((call.b, call.h_q, row_blocks * rows), jnp.float32))
    grid = {"item": row_blocks * call.b * call.h_q}
    return sdpa_block.launch(gradient_of_queries, tiles, smem, grid=grid, out_type=out_type, operands=operands.arrays())


def gradient_kv(
    call: SdpaCall, tiles: sdpa_tiles.Backward, operands: Operands, *, wanted: str, sums: bool
) -> tuple[Array, ...]:
    """dk and dv in the shapes of k and v, those that are named in `wanted`, "k", "v" or "kv".

    With `sums`, and dk wanted, also Σ_i dS of every key and query head `[b, h_q, ·]`, the gradient of a bias of keys. The
    extras are the transposed ones.
    """
    q, k, v = operands[:3]
    d, e, dtype = q.shape[-1], v.shape[-1], q.dtype
    cols, width, ring = tiles.groups * ROWS, tiles.width, tiles.stages
    col_blocks = -(-call.s // cols)
    factor = call.scale * LOG2_E

    def gradient_of_keys(gmem: Sequence[Any], smem: sdpa_block.Smem) -> None:
        (q_gmem, k_gmem, v_gmem, dout_gmem, stats_gmem), extras, lengths, outs = operands.split(gmem)
        batch, kv_head, block = item(lax.axis_index("item"), call.b, call.h_kv, col_blocks, last_first=False)
        visible = Visible.of(call, batch, lengths, width)
        col = block * cols
        blocks = visible.query_blocks(col, cols, width)
        q_ring = Ring.of(smem, "q", ring)

        def of_member(member, i):
            """The query head that is a member of the key-value head's group, and the number of its tile i in the stream."""
            return kv_head * call.group + member, member * (blocks.last - blocks.first) + i - blocks.first

        def load() -> None:
            @pl.loop(0, call.group)
            def _(member):
                @pl.loop(blocks.first, blocks.last)
                def _(i):
                    head, n = of_member(member, i)
                    at = pl.ds(i * width, width)
                    copies = [(q_gmem.at[batch, at, head], smem["q"]), (dout_gmem.at[batch, at, head], smem["dout"])]
                    copies.append((stats_gmem.at[batch, head, :, at], smem["stats"]))
                    copies += extras.copies(batch, head, pl.ds(col, cols), at, smem["extras"])
                    sdpa_block.fill(q_ring, n, copies)

        def differentiate(group: Array) -> None:
            own_col = col + group * ROWS
            own_at = pl.ds(own_col, ROWS)
            own = {"k": k_gmem.at[batch, own_at, kv_head], "v": v_gmem.at[batch, own_at, kv_head]}
            sdpa_block.load_own(smem, group, own)
            sdpa_block.await_own(smem, group)

            def counted():
                """Which of this warpgroup's keys exist and count."""
                return plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW) < visible.keys - own_col

            def step(i, key_sums, member, row_extras, accs, *, masked):
                head, n = of_member(member, i)
                slot = q_ring.slot(n)
                q_ring.await_full(n)

                def statistic(which):
                    """−L in base 2 or −δ of the tile's queries, one for each column."""
                    numbers = compat.load(smem["stats"].at[slot, which], COL)
                    return lax.broadcast_in_dim(numbers, (ROWS, width), [1])

                def products(s_acc, *dp_acc):
                    plgpu.wgmma(s_acc, smem["k"].at[group], smem["q"].at[slot].T)
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=0) * factor + statistic(0)
                    # All products have been waited for, so the tile before is done with.
                    if ring > 1:
                        q_ring.release(n - 1, loaded=True)
                    own_tiles = [x.at[slot, pl.ds(group * ROWS, ROWS)] for x in smem["extras"]]
                    p = jnp.exp2(extras.add(s, batch, head, row_extras, pl.ds(i * width, width), own_tiles))
                    seen = visible.mask(i * width, own_col, p.shape, keys_first=True) if masked else None
                    if seen is not None:
                        p = jnp.where(seen, p, 0.0)
                    for acc in dp_acc:
                        attention_common.start(acc, statistic(1))
                        plgpu.wgmma(acc, smem["v"].at[group], smem["dout"].at[slot].T)
                    if "v" in wanted:
                        plgpu.wgmma(accs["v"], p.astype(dtype), smem["dout"].at[slot])
                    return [p * plgpu.wgmma_accumulator_load(acc, wait_n=len(wanted) - 1) for acc in dp_acc]

                tile = Accumulator((ROWS, width), jnp.float32)
                for ds in pl.run_scoped(products, tile, *([tile] if "k" in wanted else [])):
                    plgpu.wgmma(accs["k"], ds.astype(dtype), smem["q"].at[slot])
                    key_sums = key_sums + ds.sum(axis=1) if sums else None
                _release_last(q_ring, n)
                return key_sums

            def walk_queries(*accs):
                seen = visible.query_blocks(own_col, ROWS, width)
                masks = visible.right is not None, visible.left is not None

                @pl.loop(0, call.group)
                def _(member):
                    head, _ = of_member(member, 0)
                    key_sums = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW) if sums else None
                    row_extras = extras.rows(batch, head, own_at)
                    one = functools.partial(
                        step, member=member, row_extras=row_extras, accs=dict(zip(wanted, accs, strict=True))
                    )

                    def skip(i):
                        _pass_over(q_ring, of_member(member, i)[1])

                    key_sums = walk(one, skip, key_sums, blocks, seen, masks)
                    if sums:
                        plgpu.wait_smem_to_gmem(0)
                        counting = jnp.where(counted(), key_sums, 0.0)
                        sdpa_block.store(smem["sums"].at[group], counting, outs[-1].at[batch, head, own_at])

                return tuple(acc[...] for acc in accs)

            sizes = {"k": d, "v": e}
            found = pl.run_scoped(walk_queries, *(Accumulator((ROWS, sizes[x]), jnp.float32) for x in wanted))
            for name, out, out_gmem in zip(wanted, found, outs, strict=False):
                if call.key_lengths:
                    out = jnp.where(lax.broadcast_in_dim(counted(), out.shape, [0]), out, 0.0)
                out = (out * call.scale if name == "k" else out).astype(dtype)
                sdpa_block.store(smem[name].at[group], out, out_gmem.at[batch, own_at, kv_head])
            plgpu.wait_smem_to_gmem(0)

        sdpa_block.part(tiles, load, differentiate)

    tiled = Extras.tiles(operands.extras, ring, cols, width)
    stats = plgpu.SMEM((ring, 2, width), jnp.float32)
    smem = sdpa_block.staying(tiles, dtype, {"k": d, "v": e}) | {"extras": tiled, "stats": stats}
    smem |= sdpa_block.streaming(tiles, dtype, "q", {"q": d, "dout": e}, beside=[stats, *tiled])
    out_type = [jax.ShapeDtypeStruct({"k": k, "v": v}[x].shape, dtype) for x in wanted]
    if sums:
        smem["sums"] = plgpu.SMEM((tiles.groups, ROWS), jnp.float32)
        out_type.append(jax.ShapeDtypeStruct((call.b, call.h_q, col_blocks * cols), jnp.float32))
    grid = {"item": col_blocks * call.b * call.h_kv}
    return sdpa_block.launch(gradient_of_keys, tiles, smem, grid=grid, out_type=out_type, operands=operands.arrays())


def _release_last(ring: Ring, n: Array) -> None:
    """With one stage: nothing is in flight under the next tile, since that takes this one's place."""
    if ring.stages == 1:
        plgpu.wgmma_wait(0)
        ring.release(n, loaded=True)


def _pass_over(ring: Ring, n: Array) -> None:
    """What a step does, for a tile that this warpgroup does not need: wait for it, and release what products are done with."""
    ring.await_full(n)
    plgpu.wgmma_wait(0)
    ring.release(n if ring.stages == 1 else n - 1, loaded=True)
