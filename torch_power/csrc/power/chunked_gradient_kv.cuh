/* gradient_kv_kernel: dk and dv for a block of keys, through the state gradient behind the chunk and through the chunk, and ½ <k, dk> for
 * the gates (scaling: chunked_backward.cuh).
 *
 * Work item: a row block of a chunk, one key-value head (RowBlock). Consumer warpgroups of 64 rows each (tiles.h), one loading warp.
 *   1. keys and values come from the caller's arrays, as k^ and v^ into shared memory; moments: dx ← 2 2^(units) K^ dM, into the dx slots;
 *   2. per pair of the state gradient dS, one tile for two products: dv^ += φ(K^) dS (as in the query), dx += contraction of dS with V^;
 *   3. dk^, dv^ ← chunk_decay times these; then every query head of the group, query tiles from the diagonal on:
 *      Sᵀ = K^ Q~ᵀ, V^ Dᵀ, and from both P/den and ds~ in registers:  dv^ += P/den D,  dk^ += ds~ Q~.
 * Shared memory: rows of k^ and v^, the dx slots, and a ring of a state tile, or a q~ and a D tile with their row factors.
 */
#pragma once
#include "chunked_backward.cuh"
#include "chunked_contract.cuh"
#include "chunked_query.cuh"

namespace power {

struct GradientKVParams {
  Sizes z;
  View k, v, dk, dv;
  const __half *q, *dy, *moments; /* moments, states: of the state gradient */
  StateStore states;
  const int *state_units, *moment_units;
  Gates gates;
  RowFactors rows;
  Maxima maxima;
  float2 *column; /* ½ <k, dk> per key-value head and token: all of it, and what comes through the state */
  int first_chunk, chunks; /* of this launch */
  int has_state;
};

template <int PADDED_D, int PADDED_E>
struct GradientKVTiles {
  static constexpr int D_TILES = PADDED_D / 64, E_TILES = PADDED_E / 64, GROUPS = gradient_warpgroups(PADDED_D, PADDED_E), ROWS = GROUPS * TILE;
  static constexpr int STAGE_BYTES = (D_TILES + E_TILES) * TILE_BYTES + 1024;
  static constexpr int ROWS_BYTES = GROUPS * (D_TILES + E_TILES) * TILE_BYTES, SLOTS_BYTES = GROUPS * Contraction<PADDED_D>::BYTES;
  static constexpr int STAGES = STAGE_BYTES > 24576 + 1024 ? 2 : STAGE_BYTES > 17408 ? 4 : 6;
  static constexpr int SMEM_BYTES = 1024 + ROWS_BYTES + STAGES * STAGE_BYTES + SLOTS_BYTES + Ring<STAGES>::BYTES;
};

/* From s~ (rows j, columns i) and <v^, D>: P/den 2^P_SHIFT and ds~ 2^DS_SHIFT as A fragments. `row_factors` hold 2^P_SHIFT and, off the diagonal, the
 * decay from j to the query tile; columns, COLUMNS of the query tile from first_column on, bring h_i 2^(tile_prefix_i) and ΔD_i TO_DS from shared
 * memory. On the diagonal γ is one exponential. */
template <bool DIAGONAL, int COLUMNS>
__device__ __forceinline__ void key_gradients(const float (&s)[COLUMNS / 2], const float (&dp)[COLUMNS / 2], uint32_t (&weights)[COLUMNS / 16][4],
                                              uint32_t (&ds)[COLUMNS / 16][4], const float (&row_factors)[2], const float (&row_prefix)[2],
                                              const float *tile_prefix, const float *tile_h, uint32_t column_factors, int first_column,
                                              const Lane &at) {
  const int row = at.warp * 16 + at.group;
#pragma unroll
  for (int n = 0; n < COLUMNS / 8; n++) {
    const int column = first_column + 8 * n + 2 * at.quad;
    const uint2 h_bits = load_shared_64(column_factors + column * 4), delta_bits = load_shared_64(column_factors + 256 + column * 4);
    float2 h = make_float2(__uint_as_float(h_bits.x), __uint_as_float(h_bits.y)), prefix = make_float2(0.f, 0.f);
    const float delta_x = __uint_as_float(delta_bits.x), delta_y = __uint_as_float(delta_bits.y);
    if constexpr (DIAGONAL) {
      h = *reinterpret_cast<const float2 *>(tile_h + column);
      prefix = *reinterpret_cast<const float2 *>(tile_prefix + column);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int i = 4 * n + 2 * r;
      float x = s[i] * (h.x * row_factors[r]), y = s[i + 1] * (h.y * row_factors[r]);
      if constexpr (DIAGONAL) {
        x = row + 8 * r <= column ? x * exp2_fast(prefix.x - row_prefix[r]) : 0.f;
        y = row + 8 * r <= column + 1 ? y * exp2_fast(prefix.y - row_prefix[r]) : 0.f;
      }
      weights[n / 2][(n % 2) * 2 + r] = Pair<__half>::pack(x * s[i], y * s[i + 1]);
      uint32_t &pair = ds[n / 2][(n % 2) * 2 + r];
      pair = Pair<__half>::pack(x * (dp[i] * TO_DS - delta_x), y * (dp[i + 1] * TO_DS - delta_y));
      if constexpr (DIAGONAL) pair = saturate(pair);
    }
  }
}

template <typename In, int PADDED_D, int PADDED_E>
__global__ void __launch_bounds__(threads(GradientKVTiles<PADDED_D, PADDED_E>::GROUPS), 1) gradient_kv_kernel(const __grid_constant__ GradientKVParams p) {
  using T = GradientKVTiles<PADDED_D, PADDED_E>;
  constexpr int D_TILES = T::D_TILES, E_TILES = T::E_TILES;
  extern __shared__ uint8_t smem_raw[];
  const uint32_t rows_smem = (smem_address(smem_raw) + 1023) & ~1023u, stages_smem = rows_smem + T::ROWS_BYTES;
  const uint32_t slots_smem = stages_smem + T::STAGES * T::STAGE_BYTES;
  const Ring<T::STAGES> ring{slots_smem + T::SLOTS_BYTES};

  const RowBlock block(p.z, blockIdx.x, T::ROWS, false, p.first_chunk, p.chunks);
  if (block.empty) return;
  const int heads = p.z.b * p.z.h_kv, group = __shfl_sync(~0u, int(threadIdx.x) >> 7, 0);
  if (threadIdx.x == 0) {
    ring.init(4 * T::GROUPS);
    mbarrier_init_fence();
  }
  __syncthreads();

  if (group == T::GROUPS) {
    registers_lower<loader_registers(T::GROUPS)>();
    if (threadIdx.x == 128 * T::GROUPS) {
      RingPosition<T::STAGES> at;
      auto fill = [&](const void *source, int bytes) {
        ring.acquire(at, bytes);
        bulk_load(stages_smem + at.slot * T::STAGE_BYTES, source, bytes, ring.full(at.slot));
        at.advance();
      };
      const int chunk = block.chunk, kv = block.head, first_tile = block.first_tile;
      const int query_tiles = min(p.z.chunk_tiles, (p.z.t - chunk * p.z.chunk + TILE - 1) / TILE);
      const int64_t k_tile = int64_t(kv) * p.z.tiles + chunk * p.z.chunk_tiles;
      if (chunk < p.z.chunks - 1 || p.has_state) {
        const __half *moments = p.moments + int64_t(chunk * heads + kv) * D_TILES * D_TILES * 4096;
        for (int i = 0; i < D_TILES; i++) fill(moments + i * D_TILES * 4096, D_TILES * TILE_BYTES);
        load_pairs<1, PADDED_E>(p.states.at(p.z, chunk, kv / p.z.h_kv, kv % p.z.h_kv, int64_t(p.z.pairs) * E_TILES * 4096), p.z.pairs, fill);
      }
      for (int member = 0; member < p.z.group; member++) {
        const int64_t q_tile = int64_t(kv * p.z.group + member) * p.z.tiles + chunk * p.z.chunk_tiles;
#pragma unroll 1
        for (int tile = first_tile; tile < query_tiles; tile++) {
          const uint32_t slot = stages_smem + at.slot * T::STAGE_BYTES, full = ring.full(at.slot), factors = slot + (D_TILES + E_TILES) * TILE_BYTES;
          ring.acquire(at, (D_TILES + E_TILES) * TILE_BYTES + 512 + 16);
          bulk_load(slot, p.q + (q_tile + tile) * D_TILES * 4096, D_TILES * TILE_BYTES, full);
          bulk_load(slot + D_TILES * TILE_BYTES, p.dy + (q_tile + tile) * E_TILES * 4096, E_TILES * TILE_BYTES, full);
          bulk_load(factors, p.rows.h_decayed + (q_tile + tile) * TILE, 256, full);
          bulk_load(factors + 256, p.rows.delta + (q_tile + tile) * TILE, 256, full);
          bulk_load(factors + 512, p.gates.tile_decay + (k_tile + tile) * TILE_FACTORS + TILE, 16, full);
          at.advance();
        }
      }
    }
  } else {
    registers_raise<consumer_registers(T::GROUPS)>();
    RingPosition<T::STAGES> at;
    const Lane lane;
    const int chunk = block.chunk, kv = block.head, first_tile = block.first_tile, own_tile = first_tile + group;
    const int row = lane.warp * 16 + lane.group;
    const int query_tiles = min(p.z.chunk_tiles, (p.z.t - chunk * p.z.chunk + TILE - 1) / TILE);
    const int64_t k_tile = int64_t(kv) * p.z.tiles + chunk * p.z.chunk_tiles;
    const bool has_state = chunk < p.z.chunks - 1 || p.has_state;
    const uint32_t k_rows = rows_smem + group * D_TILES * TILE_BYTES;
    const uint32_t v_rows = rows_smem + (T::GROUPS * D_TILES + group * E_TILES) * TILE_BYTES;
    const int64_t k_row = (k_tile + own_tile) * TILE + row;
    const int batch = kv / p.z.h_kv, own = kv % p.z.h_kv, token = chunk * p.z.chunk + own_tile * TILE;
    const WarpRows<In, PADDED_D> own_k(p.k, batch * p.k.batch + own * p.k.head, token, p.z.t, p.z.d);
    const WarpRows<In, PADDED_E> own_v(p.v, batch * p.v.batch + own * p.v.head, token, p.z.t, p.z.e);
    const int k_exponent = scaling_exponent(p.maxima.k[kv], K_RANGE), v_exponent = scaling_exponent(p.maxima.v[kv], V_RANGE);
    const int dy_exponent = scaling_exponent(p.maxima.dy[kv], DY_RANGE);
    float dk[PADDED_D / 2], dv[PADDED_E / 2], row_prefix[2], tile_decay[2], chunk_decay[2];
#pragma unroll
    for (int i = 0; i < PADDED_E / 2; i++) dv[i] = 0.f;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      row_prefix[r] = p.gates.tile_prefix[k_row + 8 * r], chunk_decay[r] = p.gates.chunk_decay[k_row + 8 * r];
      tile_decay[r] = p.gates.tile_decay[(k_tile + own_tile) * TILE_FACTORS + row + 8 * r];
    }
    own_k.store(k_rows, [&](uint4, int) { return power_of_two(k_exponent); });
    own_v.store(v_rows, [&](uint4, int) { return power_of_two(v_exponent); });
    fence_proxy_async();                       /* the products inside the chunk read these rows through the matrix unit, */
    named_barrier_sync(CONSUMER + group, 128); /* all 64 of them */

    if (has_state) {
      Contraction<PADDED_D> contraction(k_rows, slots_smem + group * Contraction<PADDED_D>::BYTES, p.z.feature_tiles, lane);
      const int state_unit = p.state_units[chunk * heads + kv], moment_unit = p.moment_units[chunk * heads + kv];
      {
        uint32_t a[D_TILES][4][4];
#pragma unroll
        for (int h = 0; h < D_TILES; h++) load_fragments(a[h], k_rows + h * TILE_BYTES, lane);
#pragma unroll
        for (int h = 0; h < D_TILES; h++) {
          ring.wait(at);
          pin(a[h]);
          pin(dk);
          wgmma_fence();
          const uint64_t b = matrix_descriptor(stages_smem + at.slot * T::STAGE_BYTES, 1024, TILE_BYTES);
#pragma unroll
          for (int s = 0; s < 4; s++)
            Wgmma<PADDED_D, __half>::template rs<MN_MAJOR>(dk, a[h][s], b + descriptor_offset(s * 2048), h + s > 0);
          wgmma_commit();
          wgmma_wait<0>();
          pin(dk);
          ring.release(at.slot);
          at.advance();
        }
        const float unit = 2.f * power_of_two(moment_unit - state_unit);
#pragma unroll
        for (int n = 0; n < PADDED_D / 8; n++)
#pragma unroll
          for (int r = 0; r < 2; r++) contraction.set_slot(r, n, make_float2(dk[4 * n + 2 * r] * unit, dk[4 * n + 2 * r + 1] * unit));
      }
      uint32_t fragments[4][4];
      float u[1][32];
      RowOperand<E_TILES> v(v_rows, lane);
      contraction.load_j();
      contract_pairs<1, 1>(
          p.z.pairs, contraction, u, lane,
          [&](auto) {
            ring.wait(at);
            const StateTile<PADDED_E> state{stages_smem + at.slot * T::STAGE_BYTES};
            expand_queries<4>(fragments, contraction.i_piece(), contraction.j_piece());
            pin(u[0]);
            pin(fragments);
            v.hold();
            pin(dv);
            wgmma_fence();
            v.times_state(u[0], state.smem);
            wgmma_commit();
#pragma unroll
            for (int s = 0; s < 4; s++) Wgmma<PADDED_E, __half>::template rs<K_MAJOR>(dv, fragments[s], state.features(s), 1);
            wgmma_commit();
          },
          [&] {
            ring.release(at.slot);
            at.advance();
          });
      pin(dv);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float factor = chunk_decay[r] * power_of_two(state_unit - STATE_GRADIENT_SHIFT);
        const float k_factor = factor * float(1 << DS_SHIFT), v_factor = factor * float(1 << P_SHIFT);
#pragma unroll
        for (int n = 0; n < PADDED_D / 8; n++) {
          const float2 dx = contraction.slot(r, n);
          dk[4 * n + 2 * r] = dx.x * k_factor, dk[4 * n + 2 * r + 1] = dx.y * k_factor;
        }
#pragma unroll
        for (int n = 0; n < PADDED_E / 8; n++) dv[4 * n + 2 * r] *= v_factor, dv[4 * n + 2 * r + 1] *= v_factor;
      }
      float products[2]; /* written at once: later they would need registers */
      row_products<PADDED_D>(products, dk, k_rows, lane);
      const float unit = power_of_two(-dy_exponent) * float(0.5 / (1 << DS_SHIFT)) * power_of_two(-v_exponent);
      if (lane.quad == 0) p.column[k_row].y = products[0] * unit, p.column[k_row + 8].y = products[1] * unit;
    } else {
      if (lane.quad == 0) p.column[k_row].y = 0.f, p.column[k_row + 8].y = 0.f;
#pragma unroll
      for (int i = 0; i < PADDED_D / 2; i++) dk[i] = 0.f;
    }

    /* Inside the chunk. */
    {
      float reach[2];
      const uint64_t k_a = matrix_descriptor(k_rows), v_a = matrix_descriptor(v_rows);
      auto attend_tile = [&](auto diagonal_constant, int64_t q_tile, int tile) {
        constexpr bool DIAGONAL = decltype(diagonal_constant)::value;
        constexpr int COLUMNS = D_TILES + E_TILES > 2 || (DIAGONAL && T::GROUPS > 2) ? 32 : 64; /* queries at a time, as registers allow */
        ring.wait(at);
        const uint32_t queries = uniform(stages_smem + at.slot * T::STAGE_BYTES), dy = queries + D_TILES * TILE_BYTES, factors = dy + E_TILES * TILE_BYTES;
        const uint64_t q_b = matrix_descriptor(queries, 1024, TILE_BYTES), dy_b = matrix_descriptor(dy, 1024, TILE_BYTES); /* of both majors */
        if constexpr (DIAGONAL) reach[0] = reach[1] = float(1 << P_SHIFT);
#pragma unroll
        for (int column = 0; column < TILE; column += COLUMNS) {
          float s[COLUMNS / 2], dp[COLUMNS / 2]; /* of this pass: declared outside, they would be kept from one to the next */
          uint32_t weights[COLUMNS / 16][4], ds[COLUMNS / 16][4];
          pin(s);
          pin(dp);
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < D_TILES; i++)
#pragma unroll
            for (int step = 0; step < 4; step++)
              Wgmma<COLUMNS, __half>::template ss<K_MAJOR, K_MAJOR>(
                  s, k_a + descriptor_offset(i * TILE_BYTES + step * 32),
                  q_b + descriptor_offset(i * TILE_BYTES + column * 128 + step * 32), i + step > 0);
#pragma unroll
          for (int i = 0; i < E_TILES; i++)
#pragma unroll
            for (int step = 0; step < 4; step++)
              Wgmma<COLUMNS, __half>::template ss<K_MAJOR, K_MAJOR>(
                  dp, v_a + descriptor_offset(i * TILE_BYTES + step * 32),
                  dy_b + descriptor_offset(i * TILE_BYTES + column * 128 + step * 32), i + step > 0);
          wgmma_commit();
          wgmma_wait<0>();
          pin(s);
          pin(dp);
          key_gradients<DIAGONAL, COLUMNS>(s, dp, weights, ds, reach, row_prefix, p.gates.tile_prefix + (k_tile + tile) * TILE,
                                           p.rows.h + (q_tile + tile) * TILE, factors, column, lane);
          pin(weights);
          pin(ds);
          pin(dk);
          pin(dv);
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < COLUMNS / 16; step++) {
            Wgmma<PADDED_E, __half>::template rs<MN_MAJOR>(dv, weights[step], dy_b + descriptor_offset(column * 128 + step * 2048), 1);
            Wgmma<PADDED_D, __half>::template rs<MN_MAJOR>(dk, ds[step], q_b + descriptor_offset(column * 128 + step * 2048), 1);
          }
          wgmma_commit();
          wgmma_wait<0>();
          pin(dk);
          pin(dv);
        }
        if constexpr (DIAGONAL) {
          reach[0] = tile_decay[0] * float(1 << P_SHIFT), reach[1] = tile_decay[1] * float(1 << P_SHIFT);
        } else {
          const float decay = __uint_as_float(load_shared_32(factors + 512));
          reach[0] *= decay, reach[1] *= decay;
        }
        ring.release(at.slot);
        at.advance();
      };
      for (int member = 0; member < p.z.group; member++) {
        const int64_t q_tile = int64_t(kv * p.z.group + member) * p.z.tiles + chunk * p.z.chunk_tiles;
        int tile = first_tile;
#pragma unroll 1
        for (; tile < min(own_tile, query_tiles); tile++) { /* queries before all of this warpgroup's rows */
          ring.wait(at);
          ring.release(at.slot);
          at.advance();
        }
        if (tile < query_tiles) attend_tile(std::true_type{}, q_tile, tile++);
#pragma unroll 1
        for (; tile < query_tiles; tile++) attend_tile(std::false_type{}, q_tile, tile);
      }
    }

    /* ½ <k^, dk^>: what later rows took from these keys, before rounding. */
    const float unit = power_of_two(-dy_exponent) * float(1.0 / (1 << DS_SHIFT)) * power_of_two(-v_exponent);
    float products[2];
    row_products<PADDED_D>(products, dk, k_rows, lane);
    if (lane.quad == 0) p.column[k_row].x = 0.5f * products[0] * unit, p.column[k_row + 8].x = 0.5f * products[1] * unit;
    const float k_factor = unit * power_of_two(k_exponent), v_factor = power_of_two(-dy_exponent) * float(1.0 / (1 << P_SHIFT));
    const float k_factors[2] = {k_factor, k_factor}, v_factors[2] = {v_factor, v_factor};
    named_barrier_sync(CONSUMER + group, 128); /* every warp has done with these rows, which now take the gradients */
    write_rows<In, PADDED_D>(dk, k_factors, k_rows, p.dk, batch * p.dk.batch + own * p.dk.head, token, p.z.t, p.z.d, lane);
    write_rows<In, PADDED_E>(dv, v_factors, v_rows, p.dv, batch * p.dv.batch + own * p.dv.head, token, p.z.t, p.z.e, lane);
  }
}

}  // namespace power
