"""Backward of scaled dot-product attention on Hopper, without atomics: one kernel for dq, one for dk and dv.

    P = exp(S − L)      dP = dO Vᵀ      dS = P ∘ (dP − δ)      dQ = scale · dS K      dK = scale · dSᵀ Q      dV = Pᵀ dO

`gradient_q`: a consumer warpgroup holds 64 queries and walks over tiles of keys. `gradient_kv`: it holds 64 keys, computes Sᵀ
and dPᵀ, and walks over tiles of queries, for every query head that reads its key-value head. In both the last warpgroup loads
by TMA into a ring, P and dS go back to the matrix units from registers, and a tile's last products run while the first ones of
the next tile are issued. The accumulators of S and dP start at −L and −δ instead of 0, which saves both subtractions.
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
from jax_power.mosaic_gpu import compat, sdpa_tiles
from jax_power.mosaic_gpu.sdpa_scores import COL, LOG2_E, ROW, ROWS, Accumulator, Extra, Extras, Visible, item, walk


class Operands(NamedTuple):
    """What both kernels read. q, dout `[b, t, h_q, ·]`, k, v `[b, s, h_kv, ·]`, lengths padded to 8, sizes to 64.

    stats `[b, h_q, 2, ·]`: where the accumulators of a query's S and dP start, −L / scale and −δ; −∞ and 0 behind the end.
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

    def body(*refs: Any) -> None:
        (q_gmem, k_gmem, v_gmem, dout_gmem, stats_gmem), extras, lengths, (dq_gmem, *sums_gmem) = operands.split(refs)
        batch, head, block = item(call.b, call.h_q, row_blocks, last_first=True)
        kv_head = lax.div(head, jnp.int32(call.group))
        visible = Visible.of(call, batch, lengths, width)
        row = block * rows
        blocks = visible.key_blocks(row, rows, width)

        def run(q_smem, dout_smem, k_smem, v_smem, extras_smem, sums_smem, own_full, k_full, v_full, k_empty, v_empty):
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
            def differentiate() -> None:
                if tiles.registers is not None:
                    plgpu.set_max_registers(tiles.registers[0], action="increase")
                own_row = row + group * ROWS
                own_at = pl.ds(own_row, ROWS)
                plgpu.copy_gmem_to_smem(q_gmem.at[batch, own_at, head], q_smem.at[group], own_full.at[group])
                plgpu.copy_gmem_to_smem(dout_gmem.at[batch, own_at, head], dout_smem.at[group], own_full.at[group])
                starts = [compat.load(stats_gmem.at[batch, head, n, own_at], ROW, optimized=False) for n in (0, 1)]
                row_extras = extras.rows(batch, head, own_at)
                plgpu.barrier_wait(own_full.at[group])
                own_q, own_dout = q_smem.at[group], dout_smem.at[group]

                def step(i, row_sums, dq_acc, *, masked):
                    n = i - blocks.first
                    slot, slot_before = (lax.rem(n + back, jnp.int32(ring)) for back in (0, ring - 1))
                    plgpu.barrier_wait(k_full.at[slot])

                    def products(s_acc, dp_acc):
                        s_acc[...], dp_acc[...] = (lax.broadcast_in_dim(x, (ROWS, width), [0]) for x in starts)
                        plgpu.wgmma(s_acc, own_q, k_smem.at[slot].T)
                        plgpu.barrier_wait(v_full.at[slot])
                        plgpu.wgmma(dp_acc, own_dout, v_smem.at[slot].T)
                        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1) * (call.scale * LOG2_E)
                        # S is there, so dQ of the tile before, which was issued earlier, is too.
                        if ring > 1:
                            pl.when(n > 0)(lambda: plgpu.barrier_arrive(k_empty.at[slot_before]))
                        own_tiles = [x.at[slot, pl.ds(group * ROWS, ROWS)] for x in extras_smem]
                        p = jnp.exp2(extras.add(s, batch, head, row_extras, pl.ds(i * width, width), own_tiles))
                        seen = visible.mask(own_row, i * width, p.shape) if masked else None
                        return p if seen is None else jnp.where(seen, p, 0.0), dp_acc[...]

                    tile = Accumulator((ROWS, width), jnp.float32)
                    p, dp = pl.run_scoped(products, tile, tile)
                    plgpu.barrier_arrive(v_empty.at[slot])
                    ds = p * dp
                    plgpu.wgmma(dq_acc, ds.astype(dtype), k_smem.at[slot])
                    if ring == 1:
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(k_empty.at[slot])
                    return row_sums + ds.sum(axis=1) if sums else None

                def walk_keys(dq_acc):
                    row_sums = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW) if sums else None
                    own = visible.key_blocks(own_row, ROWS, width)
                    masks = visible.left is not None, visible.right is not None or visible.counts_keys
                    one = functools.partial(step, dq_acc=dq_acc)
                    row_sums = walk(one, row_sums, blocks.first, blocks, own, masks)
                    return (dq_acc[...], row_sums) if sums else (dq_acc[...],)

                dq, *row_sums = pl.run_scoped(walk_keys, Accumulator((ROWS, d), jnp.float32))
                q_smem[group] = (dq * call.scale).astype(dtype)
                if sums:
                    sums_smem[group] = row_sums[0]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_smem.at[group], dq_gmem.at[batch, own_at, head])
                if sums:
                    plgpu.copy_smem_to_gmem(sums_smem.at[group], sums_gmem[0].at[batch, head, own_at])
                plgpu.wait_smem_to_gmem(0)

        tile_extras = Extras.tiles(operands.extras, ring, rows, width)
        pl.run_scoped(
            run,
            plgpu.SMEM((tiles.groups, ROWS, d), dtype),
            plgpu.SMEM((tiles.groups, ROWS, e), dtype),
            plgpu.SMEM((ring, width, d), dtype),
            plgpu.SMEM((ring, width, e), dtype),
            tile_extras,
            plgpu.SMEM((tiles.groups, ROWS), jnp.float32) if sums else None,
            plgpu.Barrier(num_barriers=tiles.groups, num_arrivals=2),
            plgpu.Barrier(num_barriers=ring, num_arrivals=1 + len(tile_extras)),
            plgpu.Barrier(num_barriers=ring),
            plgpu.Barrier(num_barriers=ring, num_arrivals=tiles.groups),
            plgpu.Barrier(num_barriers=ring, num_arrivals=tiles.groups),
            collective_axes="group",
        )

    out_type = [jax.ShapeDtypeStruct(q.shape, dtype)]
    if sums:
        out_type.append(jax.ShapeDtypeStruct((call.b, call.h_q, row_blocks * rows), jnp.float32))
    return _kernel(body, tiles, out_type, row_blocks * call.b * call.h_q)(*operands.arrays())


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

    def body(*refs: Any) -> None:
        (q_gmem, k_gmem, v_gmem, dout_gmem, stats_gmem), extras, lengths, outs = operands.split(refs)
        batch, kv_head, block = item(call.b, call.h_kv, col_blocks, last_first=False)
        visible = Visible.of(call, batch, lengths, width)
        col = block * cols
        blocks = visible.query_blocks(col, cols, width)
        count = blocks.last - blocks.first

        def run(k_smem, v_smem, q_smem, dout_smem, stats_smem, extras_smem, sums_smem, own_full, full, empty):
            group = lax.axis_index("group")

            @pl.when(group == tiles.groups)
            def load() -> None:
                if tiles.registers is not None:
                    plgpu.set_max_registers(tiles.registers[1], action="decrease")

                @pl.loop(0, call.group)
                def _(member):
                    head = kv_head * call.group + member

                    @pl.loop(blocks.first, blocks.last)
                    def _(i):
                        step = member * count + i - blocks.first
                        slot = lax.rem(step, jnp.int32(ring))
                        at = pl.ds(i * width, width)
                        pl.when(step >= ring)(lambda: plgpu.barrier_wait(empty.at[slot]))
                        plgpu.copy_gmem_to_smem(q_gmem.at[batch, at, head], q_smem.at[slot], full.at[slot])
                        plgpu.copy_gmem_to_smem(dout_gmem.at[batch, at, head], dout_smem.at[slot], full.at[slot])
                        plgpu.copy_gmem_to_smem(stats_gmem.at[batch, head, :, at], stats_smem.at[slot], full.at[slot])
                        extras.copy(batch, head, pl.ds(col, cols), at, extras_smem, slot, full.at[slot])

            @pl.when(group < tiles.groups)
            def differentiate() -> None:
                if tiles.registers is not None:
                    plgpu.set_max_registers(tiles.registers[0], action="increase")
                own_col = col + group * ROWS
                own_at = pl.ds(own_col, ROWS)
                plgpu.copy_gmem_to_smem(k_gmem.at[batch, own_at, kv_head], k_smem.at[group], own_full.at[group])
                plgpu.copy_gmem_to_smem(v_gmem.at[batch, own_at, kv_head], v_smem.at[group], own_full.at[group])
                plgpu.barrier_wait(own_full.at[group])
                own_k, own_v = k_smem.at[group], v_smem.at[group]

                def counted():
                    """Which of this warpgroup's keys exist and count."""
                    return plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW) < visible.keys - own_col

                def step(i, key_sums, member, row_extras, accs, *, masked):
                    head = kv_head * call.group + member
                    n = member * count + i - blocks.first
                    slot, slot_before = (lax.rem(n + back, jnp.int32(ring)) for back in (0, ring - 1))
                    plgpu.barrier_wait(full.at[slot])

                    def start(which):
                        numbers = compat.load(stats_smem.at[slot, which], COL)
                        return lax.broadcast_in_dim(numbers, (ROWS, width), [1])

                    def scores(s_acc):
                        s_acc[...] = start(0)
                        plgpu.wgmma(s_acc, own_k, q_smem.at[slot].T)
                        return s_acc[...]

                    tile = Accumulator((ROWS, width), jnp.float32)
                    s = pl.run_scoped(scores, tile) * (call.scale * LOG2_E)
                    # All products have been waited for, so the tile before is done with.
                    if ring > 1:
                        pl.when(n > 0)(lambda: plgpu.barrier_arrive(empty.at[slot_before]))

                    def release():
                        if ring == 1:
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(empty.at[slot])

                    own_tiles = [x.at[slot, pl.ds(group * ROWS, ROWS)] for x in extras_smem]
                    p = jnp.exp2(extras.add(s, batch, head, row_extras, pl.ds(i * width, width), own_tiles))
                    seen = visible.mask(i * width, own_col, p.shape, keys_first=True) if masked else None
                    if seen is not None:
                        p = jnp.where(seen, p, 0.0)
                    if wanted == "v":
                        plgpu.wgmma(accs["v"], p.astype(dtype), dout_smem.at[slot])
                        release()
                        return None

                    def weights(dp_acc):
                        dp_acc[...] = start(1)
                        plgpu.wgmma(dp_acc, own_v, dout_smem.at[slot].T)
                        if "v" in wanted:
                            plgpu.wgmma(accs["v"], p.astype(dtype), dout_smem.at[slot])
                        return plgpu.wgmma_accumulator_load(dp_acc, wait_n=len(wanted) - 1)

                    ds = p * pl.run_scoped(weights, tile)
                    plgpu.wgmma(accs["k"], ds.astype(dtype), q_smem.at[slot])
                    release()
                    return key_sums + ds.sum(axis=1) if sums else None

                def walk_queries(*accs):
                    own = visible.query_blocks(own_col, ROWS, width)
                    masks = visible.right is not None, visible.left is not None

                    @pl.loop(0, call.group)
                    def _(member):
                        head = kv_head * call.group + member
                        key_sums = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW) if sums else None
                        of_member = {"member": member, "row_extras": extras.rows(batch, head, own_at)}
                        one = functools.partial(step, **of_member, accs=dict(zip(wanted, accs, strict=True)))
                        key_sums = walk(one, key_sums, blocks.first, blocks, own, masks)
                        if sums:
                            plgpu.wait_smem_to_gmem(0)
                            sums_smem[group] = jnp.where(counted(), key_sums, 0.0)
                            plgpu.commit_smem()
                            plgpu.copy_smem_to_gmem(sums_smem.at[group], outs[-1].at[batch, head, own_at])

                    return tuple(acc[...] for acc in accs)

                sizes = {"k": d, "v": e}
                found = pl.run_scoped(walk_queries, *(Accumulator((ROWS, sizes[x]), jnp.float32) for x in wanted))
                for name, out, out_gmem in zip(wanted, found, outs, strict=False):
                    if call.key_lengths:
                        out = jnp.where(lax.broadcast_in_dim(counted(), out.shape, [0]), out, 0.0)
                    out_smem = k_smem if name == "k" else v_smem
                    out_smem[group] = (out * call.scale if name == "k" else out).astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(out_smem.at[group], out_gmem.at[batch, own_at, kv_head])
                plgpu.wait_smem_to_gmem(0)

        tile_extras = Extras.tiles(operands.extras, ring, cols, width)
        pl.run_scoped(
            run,
            plgpu.SMEM((tiles.groups, ROWS, d), dtype),
            plgpu.SMEM((tiles.groups, ROWS, e), dtype),
            plgpu.SMEM((ring, width, d), dtype),
            plgpu.SMEM((ring, width, e), dtype),
            plgpu.SMEM((ring, 2, width), jnp.float32),
            tile_extras,
            plgpu.SMEM((tiles.groups, ROWS), jnp.float32) if sums else None,
            plgpu.Barrier(num_barriers=tiles.groups, num_arrivals=2),
            plgpu.Barrier(num_barriers=ring, num_arrivals=3 + len(tile_extras)),
            plgpu.Barrier(num_barriers=ring, num_arrivals=tiles.groups),
            collective_axes="group",
        )

    out_type = [jax.ShapeDtypeStruct({"k": k, "v": v}[x].shape, dtype) for x in wanted]
    if sums:
        out_type.append(jax.ShapeDtypeStruct((call.b, call.h_q, col_blocks * cols), jnp.float32))
    return _kernel(body, tiles, out_type, col_blocks * call.b * call.h_kv)(*operands.arrays())


def _kernel(body: Any, tiles: sdpa_tiles.Backward, out_type: Sequence[Any], items: int) -> Any:
    """A kernel of one thread block an item: `groups` consumer warpgroups and one that loads."""
    return compat.kernel(
        body,
        out_type=tuple(out_type),
        grid=(items,),
        grid_names=("item",),
        num_threads=tiles.groups + 1,
        thread_name="group",
    )
