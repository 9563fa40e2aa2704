"""Update and scan of the chunked form in Pallas: the state before every chunk, S ← decay · S + Σ_tokens x[a] w x[j] y[e].

The state of a head is kept as 64 (d) matrices, one a feature a: S[a][j, e] with j ≥ 16 ⌊a / 16⌋, so that features are products
of pairs (a, j) at 16-wide resolution: D' = Σ_a (d − 16 ⌊a / 16⌋), 2560 rows at d = 64 against 2304 at 8-wide resolution, but
every slice of them that a matrix product takes starts at a multiple of 16 and needs no gather (`state_blocks`).

Sᵀ[a] = Σ_tokens (yᵀ · (w x)[a]) x is a product whose left operand is made in registers, the fragment of yᵀ times one number a
token, and whose right one is a plain tile of x: φ is nowhere. A block (member, kind, head, 64 columns of y) takes the features
16 b + member of four blocks b. Its two consumer warpgroups share their tokens, every other tile each, so that one fragment of
yᵀ serves four products (two features a warpgroup instead, all tokens: 0.433 ms at t = 65536, 8 heads of 64). At a chunk's end
they exchange halves of their sums: each goes on with two of the states, writes them before the next chunk, rounded to float16
and divided by the chunk's unit, and starts the others at zero. One more warpgroup loads.

States are written as whole symmetric matrices S[a][j, e], all j: queries read j ≥ 16 ⌊a / 16⌋ of them, gradients everything.

Forward: x = k, y = v, w the decay to the chunk's end. Backward: x = q, y = dy, chunks last to first (the state's gradient).
Both are one kernel, lowered and compiled once: the order of the chunks is data.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_power.mosaic_gpu import compat, tiles

# Side of the blocks of features: a k-step of a 16-bit matrix instruction.
BLOCK = 16
# Tokens of a tile: the 128 bytes of a swizzled row of 16-bit numbers.
TILE = 64
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
WGMMA = plgpu.Layout.WGMMA
ROWS, COLUMNS = WGMMA.reduce(1), WGMMA.reduce(0)
# Sums handed over, float32: rows of 64 bytes, so that widths are multiples of 16.
PARTIAL = (plgpu.TilingTransform((8, 16)), plgpu.SwizzleTransform(64))


def blocks_of(kind: int, blocks: int) -> tuple[int, int, int, int]:
    """The blocks of features that a block of threads takes: two wide ones and two narrow ones, so that all have the same
    work.
    """
    return 2 * kind, 2 * kind + 1, blocks - 2 - 2 * kind, blocks - 1 - 2 * kind


def walk_of(decay: Array, *, reverse: bool) -> Array:
    """Order of the chunks whose decays are `[h, chunks]`: the first one, and the step to the next."""
    first, step = (decay.shape[1] - 1, -1) if reverse else (0, 1)
    return jnp.zeros_like(decay, jnp.int32, shape=(2,)) + np.array([first, step], np.int32)


def release_loaded(empty: Any) -> None:
    """Releases a stage that was loaded into registers, not only multiplied.

    The copy engine fills it again through another proxy than loads read through, and a barrier alone does not order the two.
    (Products read as the copy engine writes.)
    """
    plgpu.commit_smem()
    plgpu.barrier_arrive(empty)


@functools.partial(jax.jit, static_argnames=("chunk_tiles", "group", "want_last"))
def update(
    weighted: Array,
    x: Array,
    y: Array,
    decay: Array,
    factor: Array,
    first: Sequence[Array] | None,
    walk: Array,
    *,
    chunk_tiles: int,
    group: int,
    want_last: bool,
) -> tuple[Array, tuple[Array, ...] | None]:
    """States before every chunk of the walk, and the one after all.

    Args:
      weighted, x: (w x)ᵀ and xᵀ, float16 `[h · group, d, t]`, t a multiple of 64 · chunk_tiles.
      y: yᵀ, float16 `[h · group, e, t]`.
      decay: of every chunk, float32 `[h, chunks]`.
      factor: what a state before a chunk is multiplied by when it is rounded, float32 `[h, chunks]`.
      first: the first state, float32, per block b `[h, 16, e, d − 16 b]`; None is zero.
      walk: the order of the chunks, as `walk_of` gives it.
      chunk_tiles: tiles of 64 tokens a chunk.
      group: heads of x and y that share a state.
      want_last: also return the state after all chunks, like `first`.
    Returns:
      Float16 `[h, chunks, d, d, e]`, and the last state or None.
    """
    d, tokens = x.shape[1:]
    e, (h, chunks) = y.shape[1], decay.shape
    blocks = d // BLOCK
    widths = [d - BLOCK * b for b in range(blocks)]
    kinds, halves = blocks // 4, e // 64
    step_tiles = group * chunk_tiles
    total = chunks * step_tiles
    row = tiles.update(d, total)
    stages = row.tile_stages
    has_first = first is not None
    places = [max(widths[blocks_of(kind, blocks)[n]] for kind in range(kinds)) for n in range(4)]

    def update_kernel(
        weighted_gmem: Any, x_gmem: Any, y_gmem: Any, decay_gmem: Any, factor_gmem: Any, walk_gmem: Any, *refs: Any
    ) -> None:
        first_gmem, (states_gmem, *others) = refs[: blocks * has_first], refs[blocks * has_first :]
        last_gmem, (scratch,) = others[: blocks * want_last], others[blocks * want_last :]
        rows_smem, x_smem, y_smem, out_smem, partial_smem, full, empty, written, read = scratch
        item, thread = lax.axis_index("item"), lax.axis_index("warpgroup")
        member, rest = lax.rem(item, jnp.int32(BLOCK)), lax.div(item, jnp.int32(BLOCK))
        kind, rest = lax.rem(rest, jnp.int32(kinds)), lax.div(rest, jnp.int32(kinds))
        half, head = lax.rem(rest, jnp.int32(halves)), lax.div(rest, jnp.int32(halves))
        columns = pl.ds(half * 64, 64)
        first_chunk, stride = walk_gmem[0], walk_gmem[1]

        def consume(thread: int, kind: int) -> None:
            taken = blocks_of(kind, blocks)
            kept, given = (taken[0], taken[3]), (taken[1], taken[2])
            if thread == 1:
                kept, given = given, kept
            order = (*kept, *given)

            def partial(b: int) -> Any:
                return partial_smem[taken.index(b)].at[:, pl.ds(0, widths[b])]

            def tile_products(accs: Any, i: Any) -> None:
                slot = lax.rem(i, jnp.int32(stages))
                plgpu.barrier_wait(full.at[slot])
                y_tile = compat.load(y_smem.at[slot], WGMMA)
                for n, (acc, b) in enumerate(zip(accs, order, strict=True)):
                    if n == 2 and d > 64:  # sums of 288 columns leave no registers for four left operands (C7512)
                        plgpu.wgmma_wait(0)
                    row = compat.load(rows_smem.at[slot, b], COLUMNS)
                    a = y_tile * lax.broadcast_in_dim(row, (64, TILE), [1])
                    keys = x_smem.at[slot] if b == 0 else x_smem.at[slot, pl.ds(BLOCK * b, widths[b])]
                    plgpu.wgmma(acc, a, keys.transpose((1, 0)))
                # Drained, while the other warpgroup makes its operands: with products in flight at the next tile, their left
                # operands and the sums need more registers than there are, or ptxas serialises every instruction (C7512,
                # C7515).
                plgpu.wgmma_wait(0)
                release_loaded(empty.at[slot])

            def write_states(accs: Any, chunk: Any) -> None:
                scale = factor_gmem[head, chunk]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                outs = [out_smem.at[thread, n, pl.ds(0, widths[b])] for n, b in enumerate(kept)]
                for out, acc in zip(outs, accs, strict=True):
                    rounded = plgpu.layout_cast((acc * scale).astype(jnp.float16), plgpu.Layout.WGMMA_TRANSPOSED)
                    out.transpose((1, 0))[...] = rounded
                plgpu.commit_smem()
                for n, (out, b) in enumerate(zip(outs, kept, strict=True)):
                    a, later = BLOCK * b + member, widths[b] - BLOCK
                    plgpu.copy_smem_to_gmem(out, states_gmem.at[head, chunk, a, pl.ds(BLOCK * b, widths[b]), columns])
                    if later:  # S[j] at a, for j in later blocks
                        out = out_smem.at[thread, n, pl.ds(BLOCK, later)]
                        plgpu.copy_smem_to_gmem(out, states_gmem.at[head, chunk, pl.ds(d - later, later), a, columns])

            def exchange(accs: Any) -> Any:
                """Hands over the sums of the other warpgroup's features, and adds what it has of this one's."""
                for acc, b in zip(accs[2:], given, strict=True):
                    partial(b)[...] = acc
                plgpu.barrier_arrive(written)
                plgpu.barrier_wait(written)
                sums = tuple(acc + compat.load(partial(b), WGMMA) for acc, b in zip(accs[:2], kept, strict=True))
                plgpu.barrier_arrive(read)
                plgpu.barrier_wait(read)
                return sums

            def zeros(b: int) -> Array:
                return plgpu.layout_cast(jnp.zeros((64, widths[b]), jnp.float32), WGMMA)

            def chunk_step(step: Any, accs: Any) -> Any:
                chunk = first_chunk + step * stride
                write_states(accs, chunk)
                across = decay_gmem[head, chunk]
                base = step * step_tiles + thread

                def products(refs: Any) -> None:
                    lax.fori_loop(0, step_tiles // 2, lambda i, _: tile_products(refs, base + 2 * i), None)

                start = [*(acc * across for acc in accs), *map(zeros, given)]
                accs = pl.run_state(products)(tuple(plgpu.WGMMAAccumulatorRef.init(acc) for acc in start))
                return exchange(accs)

            plgpu.set_max_registers(row.consumer_registers, action="increase")
            if has_first:
                # By way of shared memory, behind which JAX no longer counts them as varying over a mesh, which sums do not.
                for b in kept:
                    partial(b)[...] = compat.load(first_gmem[b].at[head, member, columns], WGMMA, optimized=False)
                plgpu.commit_smem()
                accs = tuple(compat.load(partial(b), WGMMA) for b in kept)
                plgpu.barrier_arrive(read)  # before both have theirs, no sums may be handed over in this memory
                plgpu.barrier_wait(read)
            else:
                accs = tuple(map(zeros, kept))
            accs = lax.fori_loop(0, chunks, chunk_step, accs)
            if want_last:
                for acc, b in zip(accs, kept, strict=True):
                    last_gmem[b].at[head, member, columns][...] = acc
            plgpu.wait_smem_to_gmem(0)

        for own_thread in range(2):
            for own_kind in range(kinds):
                here = (thread == own_thread) & (kind == own_kind) if kinds > 1 else thread == own_thread
                pl.when(here)(functools.partial(consume, own_thread, own_kind))

        @pl.when(thread == 2)
        def _load() -> None:
            plgpu.set_max_registers(row.producer_registers, action="decrease")

            def load(i: Any, slot: Any) -> None:
                step, inside = lax.div(i, jnp.int32(step_tiles)), lax.rem(i, jnp.int32(step_tiles))
                source, tile = lax.div(inside, jnp.int32(chunk_tiles)), lax.rem(inside, jnp.int32(chunk_tiles))
                source = head * group + source
                token = pl.ds(((first_chunk + step * stride) * chunk_tiles + tile) * TILE, TILE)
                plgpu.copy_gmem_to_smem(weighted_gmem.at[source, :, member, token], rows_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(x_gmem.at[source, :, token], x_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(y_gmem.at[source, columns, token], y_smem.at[slot], full.at[slot])

            for i in range(stages):
                load(jnp.int32(i), i)

            @pl.loop(0, total - stages)
            def _(i: Any) -> None:
                slot = lax.rem(i, jnp.int32(stages))
                plgpu.barrier_wait(empty.at[slot])
                load(i + stages, slot)

    last_types = [jax.ShapeDtypeStruct((h, BLOCK, e, width), jnp.float32) for width in widths] if want_last else []
    states, *last = compat.kernel(
        update_kernel,
        out_type=[jax.ShapeDtypeStruct((h, chunks, d, d, e), jnp.float16), *last_types],
        scratch_types=[
            (
                plgpu.SMEM((stages, blocks, TILE), jnp.float16),
                plgpu.SMEM((stages, d, TILE), jnp.float16, transforms=TILED),
                plgpu.SMEM((stages, 64, TILE), jnp.float16, transforms=TILED),
                plgpu.SMEM((2, 2, d, 64), jnp.float16, transforms=TILED),
                [plgpu.SMEM((64, width), jnp.float32, transforms=PARTIAL) for width in places],
                plgpu.Barrier(num_arrivals=3, num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_arrivals=2),
                plgpu.Barrier(num_arrivals=2),
            )
        ],
        grid=(BLOCK * kinds * halves * h,),
        grid_names=("item",),
        num_threads=3,
        thread_name="warpgroup",
    )(weighted.reshape(-1, blocks, BLOCK, tokens), x, y, decay, factor, walk, *(first or ()))
    return states, tuple(last) if want_last else None
