"""Forward of the chunked form in Pallas: y for a block of queries, its three sums in one pass and its normaliser.

    num_i = 2^(chunk_prefix_i) ψ(q^_i) S  +  Σ_{j ≤ i in the chunk} P_ij v^_j,    P_ij = s^_ij² γ_ij 2^PS,   s^ = <q^, k^>
    den_i = 2^(chunk_prefix_i) q^_iᵀ M q^_i  +  Σ P_ij,                            y_i = num_i / den_i · 2^−ν

A block takes 64 · groups queries of a chunk of one head. Each consumer warpgroup owns 64 of them:
  1. normaliser from the moments: Q^ M, dotted with Q^ in registers;
  2. state: for each feature a, A = Q^[:, j ≥ 16 ⌊a / 16⌋] · q^[a] in registers (off-diagonal blocks doubled), B = these rows of
  S[a]; 3. inside the chunk, from the diagonal key tile backwards so that gate sums stay local: S = Q^ K^ᵀ, P from
  S in registers, P V^.
One more warpgroup loads. Shared memory: queries (y leaves through them), queries transposed, a ring of pairs of state matrices,
one of key tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from bridge import spec
from jax_power.mosaic_gpu import chunked_prepare as prepare
from jax_power.mosaic_gpu import compat, tiles
from jax_power.mosaic_gpu.chunked_prepare import Gates, Keys, Sizes
from jax_power.mosaic_gpu.chunked_stage import moments as moments_of
from jax_power.mosaic_gpu.chunked_stage import stage
from jax_power.mosaic_gpu.chunked_update import BLOCK, COLUMNS, ROWS, TILE, TILED, WGMMA, release_loaded, update, walk_of

# Swizzle of state tiles: a product's depth is a multiple of its width, here the 16 features of a block.
NARROW = (plgpu.TilingTransform((8, 16)), plgpu.SwizzleTransform(32))


def load_fragments(ref: Any) -> Array:
    """A tile that lies transposed in shared memory as the left operand of a product."""
    return plgpu.layout_cast(compat.load(ref.transpose((1, 0)), plgpu.Layout.WGMMA_TRANSPOSED), WGMMA)


def store_rows(x: Array, x_smem: Any, x_gmem: Any) -> None:
    """Rows of a warpgroup, `[64, n]`, to device memory by way of `[n, 64]` of its shared memory: column blocks as squares.

    The first barrier is for the slowest warp's reads of what the memory held. The caller waits for the copies.
    """
    plgpu.commit_smem()
    columns = range(0, x.shape[1], TILE)
    for n in columns:
        x_smem.at[pl.ds(n, TILE)][...] = lax.slice(x, (0, n), (TILE, n + TILE))
    plgpu.commit_smem()
    for n in columns:
        plgpu.copy_smem_to_gmem(x_smem.at[pl.ds(n, TILE)], x_gmem.at[:, pl.ds(n, TILE)])


def decay_on_diagonal(prefix_rows: Array, prefix_columns: Array, *, rows_first: bool = True) -> Array:
    """2^(prefix_i − prefix_j) for j ≤ i on a square tile, else 0; queries i are its rows, or its columns."""
    shape = (TILE, TILE)
    row, column = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA) for axis in (0, 1))
    difference = lax.broadcast_in_dim(prefix_rows, shape, [0]) - lax.broadcast_in_dim(prefix_columns, shape, [1])
    if not rows_first:
        return jnp.where(row <= column, jnp.exp2(-difference), 0.0)
    return jnp.where(column <= row, jnp.exp2(difference), 0.0)


def query(
    z: Sizes,
    q: Array,
    keys: Keys,
    gates: Gates,
    states: Array | None,
    moments: Array | None,
    state_row: Array | None,
    moment_row: Array | None,
    finish: Array,
    *,
    normalize: bool,
    first_chunk_has_state: bool,
    out_dtype: Any,
) -> tuple[Array, Array]:
    """y `[b, padded t, h_q, padded e]` in `out_dtype` and norm `[b · h_q, padded t]` (den above).

    Args:
      q: q^ᵀ, float16 `[b · h_q, d, t]`.
      states, moments: before every chunk, float16; none if the call is one chunk from nothing.
      state_row, moment_row: what the products with state and moments are multiplied by, float32 `[h, t]`.
      finish: last factor on y, float32: `[h_q]` with `normalize` (2^−ν), else `[h_q, t]`.
    """
    d, e, row = z.padded, z.padded, tiles.query(z.padded)
    groups, stages, key_stages, together = row.groups, row.stages, row.tile_stages, row.together
    score, blocks, has_states, steps = 2.0**z.score_exponent, z.chunk // (groups * TILE), states is not None, BLOCK // together
    vectors = [gates.tile_prefix, *(x for x in (state_row, moment_row) if x is not None)]

    def query_kernel(q_gmem: Any, k_gmem: Any, v_gmem: Any, *refs: Any) -> None:
        decay_gmem, total_gmem, finish_gmem, rows_gmem, *others = refs
        if has_states:
            states_gmem, moments_gmem, *others = others
        y_gmem, norm_gmem, scratch = others
        q_smem, factors_smem, vectors_smem, state_smem, k_smem, v_smem, decay_smem, *barriers = scratch
        rows_full, state_full, state_empty, keys_full, keys_empty = barriers
        moments_smem = state_smem.at[0, 0]  # moments arrive before the first states
        item, thread = lax.axis_index("item"), lax.axis_index("warpgroup")
        chunk, block = lax.rem(item, jnp.int32(z.chunks)), lax.div(item, jnp.int32(z.chunks))
        q_head, block = lax.div(block, jnp.int32(blocks)), blocks - 1 - lax.rem(block, jnp.int32(blocks))
        batch, own_head = lax.div(q_head, jnp.int32(z.h_q)), lax.rem(q_head, jnp.int32(z.h_q))
        head = batch * z.h_kv + lax.div(own_head, jnp.int32(z.group))
        with_state = True if first_chunk_has_state else chunk > 0

        block_steps = steps if with_state is True else jnp.where(with_state, steps, 0)

        @pl.when(thread < groups)
        def _consume() -> None:
            plgpu.set_max_registers(row.consumer_registers, action="increase")
            own_tile = block * groups + thread
            token = chunk * z.chunk + own_tile * TILE
            here, mine = pl.ds(token, TILE), rows_full.at[thread]
            plgpu.copy_gmem_to_smem(q_gmem.at[q_head, :, here], q_smem.at[thread], mine)
            plgpu.copy_gmem_to_smem(rows_gmem.at[:, head, here], vectors_smem.at[thread, pl.ds(0, len(vectors))], mine)
            if has_states:
                plgpu.copy_gmem_to_smem(q_gmem.at[q_head, :, here], factors_smem.at[thread], mine)
            plgpu.barrier_wait(mine)

            def row_vector(n: int) -> Array:
                return compat.load(vectors_smem.at[thread, n], ROWS)

            def spread(x: Array, width: int) -> Array:
                return lax.broadcast_in_dim(x, (TILE, width), [0])

            def query_moments() -> Array:
                """q^ᵀ M q^ of each row."""
                q = load_fragments(q_smem.at[thread])
                plgpu.barrier_wait(state_full.at[0])

                def product(acc: Any) -> Array:
                    plgpu.wgmma(acc, q, moments_smem)
                    return acc[...]

                qm = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((TILE, d), jnp.float32))
                plgpu.barrier_arrive(state_empty.at[0])
                return (qm * q.astype(jnp.float32)).sum(axis=1)

            def query_state(acc: Any) -> Array:
                """ψ(q^) S: products over pairs (a, j), those with j in a later block than a twice, as (j, a) is not in the
                state.
                """
                q = load_fragments(q_smem.at[thread])
                column = plgpu.broadcasted_iota(jnp.int32, (TILE, d), 1, layout=WGMMA)
                for b, width in enumerate(range(d, 0, -BLOCK)):
                    doubled = jnp.where(column >= BLOCK * (b + 1), q + q, q)
                    doubled = lax.slice(doubled, (0, BLOCK * b), (TILE, d))

                    def add_pair(i: Any, _: None, doubled: Array = doubled, b: int = b, width: int = width) -> None:
                        slot = lax.rem(1 + steps * b + i, jnp.int32(stages))
                        features = [BLOCK * b + i * together + n for n in range(together)]
                        factors = [compat.load(factors_smem.at[thread, a], ROWS) for a in features]
                        operands = [doubled * spread(x, width) for x in factors]
                        plgpu.barrier_wait(state_full.at[slot])
                        for n, a in enumerate(operands):
                            plgpu.wgmma(acc, a, state_smem.at[slot, n, pl.ds(0, width)])
                        # Drained, while the other warpgroups make their operands: four of them leave no registers for operands
                        # in flight (ptxas then serialises every instruction, C7512).
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(state_empty.at[slot])

                    lax.fori_loop(0, block_steps, add_pair, None)
                return acc[...]

            if has_states:
                den = query_moments() * row_vector(2)
                acc = pl.run_scoped(query_state, plgpu.WGMMAAccumulatorRef((TILE, e), jnp.float32)) * spread(row_vector(1), e)
            else:
                den = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), ROWS)
                acc = plgpu.layout_cast(jnp.zeros((TILE, e), jnp.float32), WGMMA)

            def scores(slot: Any) -> Array:
                def product(s: Any) -> Array:
                    plgpu.wgmma(s, q_smem.at[thread].transpose((1, 0)), k_smem.at[slot])
                    return s[...]

                return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((TILE, TILE), jnp.float32))

            def add_values(acc: Array, p: Array, slot: Any) -> Array:
                def product(acc: Any) -> None:
                    plgpu.wgmma(acc, p.astype(jnp.float16), v_smem.at[slot].transpose((1, 0)))

                return pl.run_state(product)(plgpu.WGMMAAccumulatorRef.init(acc))

            last_tile = block * groups + (groups - 1)

            def slot_of(tile: Any) -> Any:
                return lax.rem(last_tile - tile, jnp.int32(key_stages))

            @pl.loop(0, last_tile - own_tile)
            def _skip(i: Any) -> None:  # keys after all of this warpgroup's rows
                slot = lax.rem(i, jnp.int32(key_stages))
                plgpu.barrier_wait(keys_full.at[slot])
                plgpu.barrier_arrive(keys_empty.at[slot])

            slot = slot_of(own_tile)
            plgpu.barrier_wait(keys_full.at[slot])
            prefix = row_vector(0)
            p = scores(slot)
            p = p * p * score * decay_on_diagonal(prefix, compat.load(vectors_smem.at[thread, 0], COLUMNS))
            den = den + p.sum(axis=1)
            # Lifts a row's P into float16's range when all of it is small (few keys since a strong gate, none of them along
            # the query): near 1 / den, as known after the diagonal tile. Earlier keys are at least 2^prefix down, which bounds
            # the lift.
            most = jnp.exp2(jnp.minimum(jnp.where(own_tile == 0, 120.0, 0.0) - prefix, 120.0))
            lift = jnp.minimum(jnp.maximum(1.0 / jnp.maximum(den, 2.0**-120), 1.0), most)
            lift = jnp.where(den > 0.0, lift, 1.0)
            acc, den = acc * spread(lift, e), den * lift
            acc = add_values(acc, p * spread(lift, TILE), slot)
            plgpu.barrier_arrive(keys_empty.at[slot])

            def earlier_tile(i: Any, carry: Any) -> Any:
                acc, den, reach = carry
                tile = own_tile - 1 - i
                slot = slot_of(tile)
                plgpu.barrier_wait(keys_full.at[slot])
                p = scores(slot)
                p = (
                    p
                    * p
                    * (spread(reach, TILE) * lax.broadcast_in_dim(compat.load(decay_smem.at[slot], COLUMNS), (TILE, TILE), [1]))
                )
                den = den + p.sum(axis=1)
                acc = add_values(acc, p, slot)
                release_loaded(keys_empty.at[slot])
                return acc, den, reach * total_gmem[head, chunk * z.chunk_tiles + tile]

            reach = jnp.exp2(prefix) * (score * lift)
            acc, den, _ = lax.fori_loop(0, own_tile, earlier_tile, (acc, den, reach))

            if normalize:
                factor = jnp.where(den > 0.0, finish_gmem[q_head] / jnp.maximum(den, 2.0**-120), 0.0)
            else:
                factor = compat.load(finish_gmem.at[q_head, here], ROWS, optimized=False) / lift
            vectors_smem.at[thread, 1][...] = den / lift
            y = lax.bitcast_convert_type((acc * spread(factor, e)).astype(out_dtype), jnp.float16)
            store_rows(y, q_smem.at[thread], y_gmem.at[batch, here, own_head])
            plgpu.copy_smem_to_gmem(vectors_smem.at[thread, 1], norm_gmem.at[q_head, here])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(thread == groups)
        def _load() -> None:
            plgpu.set_max_registers(row.producer_registers, action="decrease")
            last_tile = block * groups + (groups - 1)
            first_token = chunk * z.chunk

            def load_keys(i: Any) -> None:
                slot, token = lax.rem(i, jnp.int32(key_stages)), pl.ds(first_token + (last_tile - i) * TILE, TILE)
                plgpu.copy_gmem_to_smem(k_gmem.at[head, :, token], k_smem.at[slot], keys_full.at[slot])
                plgpu.copy_gmem_to_smem(v_gmem.at[head, :, token], v_smem.at[slot], keys_full.at[slot])
                plgpu.copy_gmem_to_smem(decay_gmem.at[head, token], decay_smem.at[slot], keys_full.at[slot])

            if has_states:
                for half in (pl.ds(n * d // together, d // together) for n in range(together)):  # as many copies as a step
                    plgpu.copy_gmem_to_smem(moments_gmem.at[head, chunk, half], moments_smem.at[half], state_full.at[0])
            first_keys = min(key_stages, groups)
            for i in range(first_keys):
                load_keys(jnp.int32(i))
            for b in range(d // BLOCK if has_states else 0):
                needed = pl.ds(BLOCK * b, d - BLOCK * b)

                def load_pair(i: Any, _: None, b: int = b, needed: Any = needed) -> None:
                    step = 1 + steps * b + i
                    slot = lax.rem(step, jnp.int32(stages))
                    pl.when(step >= stages)(lambda: plgpu.barrier_wait(state_empty.at[slot]))
                    for n in range(together):
                        source = states_gmem.at[head, chunk, BLOCK * b + i * together + n, needed]
                        plgpu.copy_gmem_to_smem(source, state_smem.at[slot, n, pl.ds(0, needed.size)], state_full.at[slot])

                lax.fori_loop(0, block_steps, load_pair, None)

            @pl.loop(first_keys, last_tile + 1)
            def _(i: Any) -> None:
                pl.when(i >= key_stages)(lambda: plgpu.barrier_wait(keys_empty.at[lax.rem(i, jnp.int32(key_stages))]))
                load_keys(i)

    arrays: list[Any] = [q, keys.k, keys.v, gates.tile_decay, gates.tile_total, finish, jnp.stack(vectors)]
    if has_states:
        arrays += [states, moments]
    run = compat.kernel(
        query_kernel,
        out_type=[
            jax.ShapeDtypeStruct((z.b, z.tokens, z.h_q, e), jnp.float16),
            jax.ShapeDtypeStruct((z.q_heads, z.tokens), jnp.float32),
        ],
        scratch_types=[
            (
                plgpu.SMEM((groups, d, TILE), jnp.float16, transforms=TILED),
                plgpu.SMEM((groups, d, TILE), jnp.float16),
                plgpu.SMEM((groups, 3, TILE), jnp.float32),
                plgpu.SMEM((stages, together, d, e), jnp.float16, transforms=NARROW),
                plgpu.SMEM((key_stages, d, TILE), jnp.float16, transforms=TILED),
                plgpu.SMEM((key_stages, e, TILE), jnp.float16, transforms=TILED),
                plgpu.SMEM((key_stages, TILE), jnp.float32),
                plgpu.Barrier(num_arrivals=3 if has_states else 2, num_barriers=groups),
                plgpu.Barrier(num_arrivals=together, num_barriers=stages),
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
    y, norm = run(*arrays)
    return lax.bitcast_convert_type(y, out_dtype), norm


class States(NamedTuple):
    """States and moments before every chunk, float16 `[h, chunks, …]`, and what undoes their units `[h, chunks]`."""

    states: Array
    moments: Array
    state_unit: Array
    moment_unit: Array


class Saved(NamedTuple):
    """What the backward pass takes from the forward pass; of `States` and what they came from, leading axes `[b, h_kv]`.

    Fields:
      norm: the row normaliser, in units of its own, `[b, t, h_q]` float32.
      q_factor: from q to q^, a row each, `[b, t, h_q]`.
      states: None if the call is one chunk from nothing.
    """

    norm: Array
    q_factor: Array
    keys: Keys
    gates: Gates
    states: States | None


class Last(NamedTuple):
    """The state and the moments after all chunks, float32, in scaled units."""

    state: tuple[Array, ...] | None
    moments: Array


def update_states(
    z: Sizes, keys: Keys, weighted: Array, gates: Gates, s0: Array | None, z0: Array | None, *, want_last: bool
) -> tuple[States, Last]:
    """The states before every chunk from keys and values; s0 and z0 as `prepare.to_square` leaves them, in scaled units."""
    weight = gates.chunk_decay.reshape(z.heads, z.chunks, z.chunk).sum(2)
    largest = None if s0 is None or z0 is None else (jnp.max(jnp.abs(s0), (1, 2, 3)), jnp.max(jnp.abs(z0), (1, 2)))
    bits = 2 * tiles.K_RANGE + tiles.V_RANGE, 2 * tiles.K_RANGE
    of_chunks = moments_of(keys.k, gates.chunk_decay, chunk=z.chunk, group=1)
    scanned = prepare.scan_moments(gates.chunk_sum, of_chunks, weight, z0, largest, bits)
    states, last = update(
        weighted, keys.k, keys.v, jnp.exp2(gates.chunk_sum), scanned.state_factor,
        None if s0 is None else prepare.to_blocks(z, s0), walk_of(gates.chunk_sum, reverse=False),
        chunk_tiles=z.chunk_tiles, group=1, want_last=want_last,
    )  # fmt: skip
    units = 1.0 / scanned.state_factor, 1.0 / scanned.moment_factor
    return States(states, scanned.moments, *units), Last(last, scanned.last)


def scaled_first(z: Sizes, keys: Keys, s0: Array | None, z0: Array | None) -> tuple[Array | None, Array | None]:
    """The initial state as symmetric moments in the units of k^ and v^: `[h, a, j, e]` and `[h, a, j]`."""
    if s0 is None or z0 is None:
        return None, None
    of_k, of_v = prepare.power_of_two(2 * keys.k_exponent), prepare.power_of_two(keys.v_exponent)
    s = prepare.to_square(z, s0.reshape(z.heads, -1, z.e)) * (of_k * of_v)[:, None, None, None]
    return s, prepare.to_square(z, z0.reshape(z.heads, -1, 1))[..., 0] * of_k[:, None, None]


def forward(
    call: spec.PowerCall, q: Array, k: Array, v: Array, log_g: Array | None, s0: Array | None, z0: Array | None
) -> tuple[Array, Saved, Array | None, Array | None]:
    """y `[b, t, h_q, e]` in the dtype of v, what the backward pass takes, and the last state if the call returns it."""
    z = prepare.sizes_of(call)
    gates = prepare.sum_gates(z, log_g)
    keys, weighted = prepare.prepare_keys(z, k, v, gates)
    row_factor = prepare.row_factor(q)
    q_factor = prepare.rows_of(z, row_factor)
    (queries,) = stage(prepare.fill_up(z, q, z.padded), q_factor)
    first_s, first_z = scaled_first(z, keys, s0, z0)
    states = last = None
    if z.chunks > 1 or s0 is not None or call.return_state:
        states, last = update_states(z, keys, weighted, gates, first_s, first_z, want_last=call.return_state)
    rows: dict[str, Any] = {"states": None, "moments": None, "state_row": None, "moment_row": None}
    if z.chunks == 1 and s0 is None:
        states = None  # before the only chunk there is nothing
    if states is not None:
        reach = jnp.exp2(gates.chunk_prefix) * 2.0**z.score_exponent
        units = [jnp.repeat(unit, z.chunk, axis=1) for unit in (states.state_unit, states.moment_unit)]
        rows = {"states": states.states, "moments": states.moments}
        rows |= {"state_row": reach * units[0], "moment_row": reach * units[1]}
    finish = jnp.repeat(prepare.power_of_two(-keys.v_exponent), z.group)
    if not call.normalize:
        of_k = jnp.repeat(prepare.power_of_two(-2 * keys.k_exponent), z.group) * call.scale**2 * 2.0**-z.score_exponent
        finish = (finish * of_k)[:, None] / jnp.where(q_factor > 0, q_factor, 1.0) ** 2
    y, norm = query(
        z, queries, keys, gates, **rows, finish=finish, normalize=call.normalize,
        first_chunk_has_state=s0 is not None, out_dtype=v.dtype,
    )  # fmt: skip
    norm = jnp.moveaxis(norm.reshape(z.b, z.h_q, -1)[..., : z.t], 1, 2)
    y = y[:, : z.t, :, : z.e]
    by_batch = jax.tree.map(lambda x: x.reshape(z.b, z.h_kv, *x.shape[1:]), (keys, gates, states))
    saved = Saved(norm, row_factor, *by_batch)
    if not call.return_state or last is None:
        return y, saved, None, None
    return y, saved, *last_state(z, keys, gates, last, s0, z0)


def last_state(z: Sizes, keys: Keys, gates: Gates, last: Last, s0: Array | None, z0: Array | None) -> tuple[Array, Array]:
    """The public state after the last token. Of an initial state, moments kept the half that is symmetric inside a tile's
    own block.
    """
    of_k, of_v = prepare.power_of_two(-2 * keys.k_exponent), prepare.power_of_two(-keys.v_exponent)
    assert last.state is not None
    s = prepare.from_blocks(z, last.state) * (of_k * of_v)[:, None, None]
    moments = prepare.from_square(z, last.moments[..., None])[..., 0] * of_k[:, None]
    if s0 is not None and z0 is not None:
        across = jnp.exp2(gates.chunk_sum.sum(1))[:, None]
        s0, z0 = s0.reshape(s.shape), z0.reshape(moments.shape)
        s = s + across[..., None] * (s0 - prepare.from_square(z, prepare.to_square(z, s0)))
        moments = moments + across * (z0 - prepare.from_square(z, prepare.to_square(z, z0[..., None]))[..., 0])
    return s.reshape(z.b, z.h_kv, -1, z.e), moments.reshape(z.b, z.h_kv, -1)
