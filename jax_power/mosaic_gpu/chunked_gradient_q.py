"""dq of the chunked form in Pallas, for a block of queries, through the state before the chunk and through the chunk
(chunked_bwd.py).

The state's part of numᵢ is Σ_a,j q[a] q[j] S[a][j], symmetric in a and j, so its gradient is twice Σ_a q[a] (S[a] dy): products
A = D · q~[a] made in registers with whole matrices S[a]; of those, columns of earlier blocks come from the matrices of these
columns. A block takes 64 · groups queries of a chunk of one head, one consumer warpgroup 64 of them:
  1. state: for each a, dq += (D · q~[a]) S[a]ᵀ;        2. moments: q~ M;        3. from both dq~, and its part of <q~, dq~>;
  4. from the diagonal key tile backwards: S = Q~ K^ᵀ, D V^ᵀ, ds~ from both in registers, dq~ += ds~ K^;
  5. ΔD is corrected to what these sums say it is.
One more warpgroup loads. Shared memory: q~ and D transposed (dq leaves through q~), a ring of state tiles, one of key tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from jax_power.mosaic_gpu import compat, tiles
from jax_power.mosaic_gpu.chunked_fwd import decay_on_diagonal, load_fragments, store_rows
from jax_power.mosaic_gpu.chunked_prepare import Gates, Keys, Sizes
from jax_power.mosaic_gpu.chunked_update import COLUMNS, ROWS, TILE, TILED, WGMMA, release_loaded

HALF_MAX = 65504.0


class QueryRows(NamedTuple):
    """Per query head and token, float32 `[b · h_q, t]` (chunked_bwd.py says what they are).

    Fields:
      h: h 2^DS_SHIFT.
      mean: ΔD.
      state, moment: what the products with state and moments are multiplied by to give dq~ and −ΔD dq~.
      mass: what <q~, M q~> is multiplied by to give Σ P/den through the state.
      finish: from dq~ to dq.
    """

    h: Array
    mean: Array
    state: Array
    moment: Array
    mass: Array
    finish: Array


def load_matrices(states_gmem: Any, features: Any, state_smem: Any, full: Any, empty: Any) -> None:
    """The loading warpgroup: S[a] of one chunk and head for a = 0 … features − 1, one a slot."""
    stages = state_smem.shape[0]

    def load(a: Any, _: None) -> None:
        slot = lax.rem(a, jnp.int32(stages))
        pl.when(a >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
        plgpu.copy_gmem_to_smem(states_gmem.at[a], state_smem.at[slot], full.at[slot])

    lax.fori_loop(0, features, load, None)


def gradient_q(
    z: Sizes,
    q: Array,
    dy: Array,
    keys: Keys,
    gates: Gates,
    rows: QueryRows,
    states: Array | None,
    moments: Array | None,
    *,
    normalize: bool,
    first_chunk_has_state: bool,
    ds_scale: float,
    out_dtype: Any,
) -> tuple[Array, Array, Array]:
    """dq `[b, padded t, h_q, padded d]` in `out_dtype`, ΔD corrected and the row's sum through the state, float32 `[b · h_q,
    t]`.

    Args:
      q, dy: q~ᵀ and Dᵀ, float16 `[b · h_q, feature, t]`.
      states, moments: before every chunk, float16; none if the call is one chunk from nothing.
      ds_scale: 2^DS_SHIFT.
    """
    d, e, row = z.padded, z.padded, tiles.gradient(z.padded)
    groups, stages, key_stages = row.groups, row.stages, row.tile_stages
    blocks, has_states = z.chunk // (groups * TILE), states is not None
    prefix_rows = jnp.repeat(gates.tile_prefix, z.group, axis=0)
    vectors = [prefix_rows, rows.h, rows.mean, rows.finish, *((rows.state, rows.moment, rows.mass) if has_states else ())]

    def gradient_q_kernel(
        q_gmem: Any, dy_gmem: Any, k_gmem: Any, v_gmem: Any, decay_gmem: Any, total_gmem: Any, rows_gmem: Any, *refs: Any
    ) -> None:
        states_gmem, moments_gmem = refs[:2] if has_states else (None, None)
        dq_gmem, sums_gmem, scratch = refs[-3:]
        q_smem, factors_smem, dy_smem, vectors_smem, state_smem, k_smem, v_smem, decay_smem, *others = scratch
        rows_full, state_full, state_empty, keys_full, keys_empty = others[-5:]
        item, thread = lax.axis_index("item"), lax.axis_index("warpgroup")
        chunk, rest = lax.rem(item, jnp.int32(z.chunks)), lax.div(item, jnp.int32(z.chunks))
        block, q_head = blocks - 1 - lax.rem(rest, jnp.int32(blocks)), lax.div(rest, jnp.int32(blocks))
        batch, own_head = lax.div(q_head, jnp.int32(z.h_q)), lax.rem(q_head, jnp.int32(z.h_q))
        head = batch * z.h_kv + lax.div(own_head, jnp.int32(z.group))
        last_tile = block * groups + (groups - 1)
        features = d if first_chunk_has_state else jnp.where(chunk > 0, d, 0)

        @pl.when(thread < groups)
        def _consume() -> None:
            plgpu.set_max_registers(row.consumer_registers, action="increase")
            own_tile = block * groups + thread
            token = chunk * z.chunk + own_tile * TILE
            here, mine = pl.ds(token, TILE), rows_full.at[thread]
            plgpu.copy_gmem_to_smem(q_gmem.at[q_head, :, here], q_smem.at[thread], mine)
            plgpu.copy_gmem_to_smem(dy_gmem.at[q_head, :, here], dy_smem.at[thread], mine)
            plgpu.copy_gmem_to_smem(rows_gmem.at[:, q_head, here], vectors_smem.at[thread], mine)
            if has_states:
                plgpu.copy_gmem_to_smem(q_gmem.at[q_head, :, here], factors_smem.at[thread], mine)
                plgpu.copy_gmem_to_smem(moments_gmem.at[head, chunk], others[0].at[thread], mine)
            plgpu.barrier_wait(mine)
            prefix, h, mean, finish, *through = (compat.load(vectors_smem.at[thread, n], ROWS) for n in range(len(vectors)))
            first_mean = mean

            def spread(x: Array, width: int) -> Array:
                return lax.broadcast_in_dim(x, (TILE, width), [0])

            def row_products(x: Array) -> Array:
                """<q~, x> of each row."""
                return (load_fragments(q_smem.at[thread]).astype(jnp.float32) * x).sum(axis=1)

            def products_with_states(acc: Any) -> Array:
                grad = load_fragments(dy_smem.at[thread])

                def pair(i: Any, _: None) -> None:
                    for u in range(2):
                        feature = 2 * i + u
                        slot = lax.rem(feature, jnp.int32(stages))
                        a = grad * spread(compat.load(factors_smem.at[thread, feature], ROWS), e)
                        plgpu.barrier_wait(state_full.at[slot])
                        plgpu.wgmma(acc, a, state_smem.at[slot].transpose((1, 0)))
                        plgpu.wgmma_wait(1)

                        def release(feature: Any = feature) -> None:
                            plgpu.barrier_arrive(state_empty.at[lax.rem(feature + (stages - 1), jnp.int32(stages))])

                        pl.when(i > 0)(release) if u == 0 else release()

                lax.fori_loop(0, features // 2 if isinstance(features, int) else lax.div(features, jnp.int32(2)), pair, None)
                return acc[...]

            if has_states:

                def product(acc: Any) -> Array:
                    plgpu.wgmma(acc, q_smem.at[thread].transpose((1, 0)), others[0].at[thread])
                    return acc[...]

                of_state, of_moments, of_mass = through
                # States first: sums of moments beside theirs would take registers that d = 128 has not.
                dq = pl.run_scoped(products_with_states, plgpu.WGMMAAccumulatorRef((TILE, d), jnp.float32))
                qm = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((TILE, d), jnp.float32))
                state_mass = row_products(qm) * of_mass
                dq = dq * spread(of_state, d) - qm * spread(of_moments * mean, d)
                state_part = row_products(dq)
            else:
                state_part = state_mass = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), ROWS)
                dq = plgpu.layout_cast(jnp.zeros((TILE, d), jnp.float32), WGMMA)

            def products(slot: Any) -> tuple[Array, Array]:
                """Scores and <D, v^> of this warpgroup's rows with a tile of keys."""

                def both(accs: Any) -> None:
                    plgpu.wgmma(accs[0], q_smem.at[thread].transpose((1, 0)), k_smem.at[slot])
                    plgpu.wgmma(accs[1], dy_smem.at[thread].transpose((1, 0)), v_smem.at[slot])

                zeros = plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), WGMMA)
                return pl.run_state(both)((plgpu.WGMMAAccumulatorRef.init(zeros), plgpu.WGMMAAccumulatorRef.init(zeros)))

            def add_keys(dq: Array, ds: Array, slot: Any) -> Array:
                def product(acc: Any) -> None:
                    plgpu.wgmma(acc, ds.astype(jnp.float16), k_smem.at[slot].transpose((1, 0)))

                return pl.run_state(product)(plgpu.WGMMAAccumulatorRef.init(dq))

            @pl.loop(0, last_tile - own_tile)
            def _skip(i: Any) -> None:  # keys after all of this warpgroup's rows
                slot = lax.rem(i, jnp.int32(key_stages))
                plgpu.barrier_wait(keys_full.at[slot])
                plgpu.barrier_arrive(keys_empty.at[slot])

            slot = lax.rem(last_tile - own_tile, jnp.int32(key_stages))
            plgpu.barrier_wait(keys_full.at[slot])
            s, dp = products(slot)
            decay = s * decay_on_diagonal(prefix, compat.load(vectors_smem.at[thread, 0], COLUMNS))
            if normalize:
                # ΔD of rows that see all but 2^−12 of their keys here, from these keys: what came with a rounded y is good
                # enough for a mean over many keys, not for one where <D, v^> − ΔD nearly vanishes.
                mass = (decay * s).sum(axis=1)
                exact = (decay * s * dp).sum(axis=1) / jnp.maximum(mass, 2.0**-120)
                mean = jnp.where(mass * h > ds_scale * (1.0 - 2.0**-12), exact, mean)
            reach = h + h
            ds = decay * (dp - spread(mean, TILE)) * spread(reach, TILE)
            dq = add_keys(dq, jnp.maximum(jnp.minimum(ds, HALF_MAX), -HALF_MAX), slot)
            plgpu.barrier_arrive(keys_empty.at[slot])

            def earlier_tile(i: Any, carry: Any) -> Any:
                dq, reach = carry
                tile = own_tile - 1 - i
                slot = lax.rem(last_tile - tile, jnp.int32(key_stages))
                plgpu.barrier_wait(keys_full.at[slot])
                s, dp = products(slot)
                of_keys = lax.broadcast_in_dim(compat.load(decay_smem.at[slot], COLUMNS), (TILE, TILE), [1])
                dq = add_keys(dq, s * (dp - spread(mean, TILE)) * (spread(reach, TILE) * of_keys), slot)
                release_loaded(keys_empty.at[slot])
                return dq, reach * total_gmem[head, chunk * z.chunk_tiles + tile]

            dq, _ = lax.fori_loop(0, own_tile, earlier_tile, (dq, reach * jnp.exp2(prefix)))

            # ½ <q~, dq~> = Σ_j P/den <D, v^> − ΔD is the error of ΔD, which came from a rounded y: corrected for dk and the
            # gates, whose sums over rows it would dominate. Without normaliser ΔD is 0, and this is the row's part of the gate
            # gradient.
            exact = mean + row_products(dq) * (0.5 / ds_scale)
            part = state_part * (0.5 / ds_scale)
            if normalize:
                part = part - (exact - first_mean) * state_mass
            vectors_smem.at[thread, 0][...] = exact
            vectors_smem.at[thread, 1][...] = part
            result = lax.bitcast_convert_type((dq * spread(finish, d)).astype(out_dtype), jnp.float16)
            store_rows(result, q_smem.at[thread], dq_gmem.at[batch, here, own_head])
            plgpu.copy_smem_to_gmem(vectors_smem.at[thread, pl.ds(0, 2)], sums_gmem.at[:, q_head, here])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(thread == groups)
        def _load() -> None:
            plgpu.set_max_registers(row.producer_registers, action="decrease")

            def load_keys(i: Any) -> None:
                slot, token = lax.rem(i, jnp.int32(key_stages)), pl.ds(chunk * z.chunk + (last_tile - i) * TILE, TILE)
                plgpu.copy_gmem_to_smem(k_gmem.at[head, :, token], k_smem.at[slot], keys_full.at[slot])
                plgpu.copy_gmem_to_smem(v_gmem.at[head, :, token], v_smem.at[slot], keys_full.at[slot])
                plgpu.copy_gmem_to_smem(decay_gmem.at[head, token], decay_smem.at[slot], keys_full.at[slot])

            first_keys = min(key_stages, groups)
            for i in range(first_keys):
                load_keys(jnp.int32(i))
            if has_states:
                load_matrices(states_gmem.at[head, chunk], features, state_smem, state_full, state_empty)

            @pl.loop(first_keys, last_tile + 1)
            def _(i: Any) -> None:
                pl.when(i >= key_stages)(lambda: plgpu.barrier_wait(keys_empty.at[lax.rem(i, jnp.int32(key_stages))]))
                load_keys(i)

    arrays: list[Any] = [q, dy, keys.k, keys.v, gates.tile_decay, gates.tile_total, jnp.stack(vectors)]
    arrays += [states, moments] if has_states else []
    run = compat.kernel(
        gradient_q_kernel,
        out_type=[
            jax.ShapeDtypeStruct((z.b, z.tokens, z.h_q, d), jnp.float16),
            jax.ShapeDtypeStruct((2, z.q_heads, z.tokens), jnp.float32),
        ],
        scratch_types=[
            (
                plgpu.SMEM((groups, d, TILE), jnp.float16, transforms=TILED),
                plgpu.SMEM((groups, d, TILE), jnp.float16),
                plgpu.SMEM((groups, e, TILE), jnp.float16, transforms=TILED),
                plgpu.SMEM((groups, len(vectors), TILE), jnp.float32),
                plgpu.SMEM((stages, d, e), jnp.float16, transforms=TILED),
                plgpu.SMEM((key_stages, d, TILE), jnp.float16, transforms=TILED),
                plgpu.SMEM((key_stages, e, TILE), jnp.float16, transforms=TILED),
                plgpu.SMEM((key_stages, TILE), jnp.float32),
                *([plgpu.SMEM((groups, d, d), jnp.float16, transforms=TILED)] if has_states else []),
                plgpu.Barrier(num_arrivals=3 + 2 * has_states, num_barriers=groups),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
                plgpu.Barrier(num_arrivals=3, num_barriers=key_stages),
                plgpu.Barrier(num_arrivals=groups, num_barriers=key_stages),
            )
        ],
        grid=(z.chunks * blocks * z.q_heads,),
        grid_names=("item",),
        num_threads=groups + 1,
        thread_name="warpgroup",
    )
    dq, (mean, part) = run(*arrays)
    return lax.bitcast_convert_type(dq, out_dtype), mean, part
