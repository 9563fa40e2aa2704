/* query_kernel: y for a block of queries, its three sums in one pass and its normaliser:
 *   num_i = 2^(chunk_prefix_i) ψ(q^_i) S  +  Σ_{j ≤ i in the chunk} P_ij v^_j,    P_ij = s^_ij² γ_ij 2^PS
 *   den_i = 2^(chunk_prefix_i) q^_iᵀ M q^_i  +  Σ P_ij,                            y_i = num_i / den_i · 2^−ν
 *
 * Work item: a row block of a chunk, one query head (RowBlock). Consumer warpgroups with 64 queries each, one loading warp (four where
 * registers allow: 0.45 ms at the flagship where two with 128 queries each took 0.48).
 *   1. consumers bring their queries in, scale each row by a power of two and keep it as float16 in shared memory;
 *   2. normaliser from the moments: Q^ M, dotted with Q^ in registers;
 *   3. state: A = q^[8J + β] · q^[8I + α] in registers, B = the state tile as update_state_kernel wrote it;
 *   4. inside the chunk, from the diagonal key tile backwards so that gate sums stay local: S = Q^ K^ᵀ, P from S in registers, P V^.
 * Shared memory: queries (their rows become y's at the end) and a ring whose slots hold a state tile or a key and a value tile.
 */
#pragma once
#include "chunked_layout.cuh"

namespace power {

struct QueryParams {
  Sizes z;
  View q, y;
  float *norm; /* [b, t, h_q], contiguous */
  const __half *k, *v, *states, *moments;
  const int *state_units, *moment_units;
  Gates gates;
  Maxima maxima;
  int has_state, normalize;
  float scale_squared; /* normalize = 0 */
};

template <int PADDED_D, int PADDED_E>
struct QueryTiles {
  static constexpr int D_TILES = PADDED_D / 64, E_TILES = PADDED_E / 64, GROUPS = query_warpgroups(PADDED_D, PADDED_E);
  static constexpr int SCORE_EXPONENT = score_exponent(PADDED_D);
  static constexpr int ROWS = GROUPS * TILE, ROW_HALVES = D_TILES > E_TILES ? D_TILES : E_TILES;
  static constexpr int STAGE_BYTES = (D_TILES + E_TILES) * TILE_BYTES + 1024; /* and TILE_FACTORS */
  static constexpr int STAGES = STAGE_BYTES > 32768 ? 4 : STAGE_BYTES > 17408 ? 6 : 8;
  static constexpr int ROWS_BYTES = ROWS * 128 * ROW_HALVES;
  static constexpr int SMEM_BYTES = 1024 + ROWS_BYTES + STAGES * STAGE_BYTES + Ring<STAGES>::BYTES + 2 * ROWS * 4;
};

/* A fragments of STEPS k-steps, of two β each, of ψ(q). In the q^ rows, for this lane's row g (row g + 8 is 1024 bytes on): `i_address` of its pair
 * of α in feature tile I, `j_address` of the first β in feature tile J. */
template <int STEPS>
__device__ __forceinline__ void expand_queries(uint32_t (&a)[STEPS][4], uint32_t i_address, uint32_t j_address) {
  const uint32_t alpha0 = load_shared_32(i_address), alpha1 = load_shared_32(i_address + 1024);
  uint32_t beta0[STEPS], beta1[STEPS];
  if constexpr (STEPS == 4) {
    const uint4 x = load_shared_128(j_address), y = load_shared_128(j_address + 1024);
    beta0[0] = x.x, beta0[1] = x.y, beta0[2] = x.z, beta0[3] = x.w;
    beta1[0] = y.x, beta1[1] = y.y, beta1[2] = y.z, beta1[3] = y.w;
  } else {
    const uint2 x = load_shared_64(j_address), y = load_shared_64(j_address + 1024);
    beta0[0] = x.x, beta0[1] = x.y, beta1[0] = y.x, beta1[1] = y.y;
  }
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    a[s][0] = Pair<__half>::multiply(alpha0, twice_low(beta0[s])), a[s][1] = Pair<__half>::multiply(alpha1, twice_low(beta1[s]));
    a[s][2] = Pair<__half>::multiply(alpha0, twice_high(beta0[s])), a[s][3] = Pair<__half>::multiply(alpha1, twice_high(beta1[s]));
  }
}

/* Brings this warp's 16 rows of a query tile in, scaled each by 2^a, and notes 2^−a in factors[row]. */
template <typename In, int PADDED_D>
__device__ __forceinline__ void stage_queries(const View &q, int64_t head_offset, int first_token, int t, int d, uint32_t tile, float *factors) {
  using Rows = WarpRows<In, PADDED_D>;
  const Rows rows(q, head_offset, first_token, t, d);
  rows.store(tile, [&](uint4 values, int row) {
    const float factor = row_factor(group_max<Rows::PIECES>(largest_of<In>(values)));
    if (rows.piece == 0) factors[row] = 1.f / factor;
    return factor;
  });
}

/* P = s² γ in place, from the product tile on the diagonal: γ = 2^(prefix_i − prefix_j) for j ≤ i. Adds P to the rows' normalisers. */
__device__ __forceinline__ void weigh_diagonal(float (&s)[32], float (&den)[2], const float (&row_prefix)[2], const float *tile_prefix,
                                               float score_factor, const Lane &at) {
  const int row = at.warp * 16 + at.group;
#pragma unroll
  for (int n = 0; n < 8; n++) {
    const int column = 8 * n + 2 * at.quad;
    const float2 prefix = *reinterpret_cast<const float2 *>(tile_prefix + column);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float &p0 = s[4 * n + 2 * r], &p1 = s[4 * n + 2 * r + 1];
      p0 *= column <= row + 8 * r ? p0 * exp2_fast(row_prefix[r] - prefix.x) * score_factor : 0.f;
      p1 *= column + 1 <= row + 8 * r ? p1 * exp2_fast(row_prefix[r] - prefix.y) * score_factor : 0.f;
      den[r] += p0 + p1;
    }
  }
}

/* The same off the diagonal, where γ = (decay from the key to its tile's end: `key_factors`, in shared memory) · (from there to the row). */
__device__ __forceinline__ void weigh_scores(float (&s)[32], float (&den)[2], const float (&row_factors)[2], uint32_t key_factors, const Lane &at) {
#pragma unroll
  for (int n = 0; n < 8; n++) {
    const uint2 bits = load_shared_64(key_factors + (8 * n + 2 * at.quad) * 4);
    const float x = __uint_as_float(bits.x), y = __uint_as_float(bits.y);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float &p0 = s[4 * n + 2 * r], &p1 = s[4 * n + 2 * r + 1];
      p0 *= p0 * (x * row_factors[r]), p1 *= p1 * (y * row_factors[r]);
      den[r] += p0 + p1;
    }
  }
}

/* Rounds P, its rows times `factors`, into A fragments. */
__device__ __forceinline__ void round_weights(const float (&s)[32], uint32_t (&p)[4][4], const float (&factors)[2]) {
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int r = 0; r < 2; r++) p[n / 2][(n % 2) * 2 + r] = Pair<__half>::pack(s[4 * n + 2 * r] * factors[r], s[4 * n + 2 * r + 1] * factors[r]);
}

/* A power of two that lifts a row's P into float16's range when all of it is small (few keys since a strong gate, none of them along
 * the query): near 1 / den, as known after the diagonal tile. Earlier keys have s^² 2^PS < 2^15 and are at least 2^prefix down, which
 * bounds the lift; without it such a row would be rounded to nothing. */
__device__ __forceinline__ float row_lift(float den_so_far, float row_prefix, bool first_tile) {
  const int by_den = den_so_far > 0.f ? -ilogbf(den_so_far) : 0, by_range = first_tile ? 120 : int(-row_prefix);
  return power_of_two(max(0, min(min(by_den, by_range), 120)));
}

template <typename In, int PADDED_D, int PADDED_E>
__global__ void __launch_bounds__(threads(QueryTiles<PADDED_D, PADDED_E>::GROUPS), 1) query_kernel(const __grid_constant__ QueryParams p) {
  using T = QueryTiles<PADDED_D, PADDED_E>;
  constexpr int D_TILES = T::D_TILES, E_TILES = T::E_TILES, PS = T::SCORE_EXPONENT;
  extern __shared__ uint8_t smem_raw[];
  const uint32_t rows_smem = (smem_address(smem_raw) + 1023) & ~1023u, stages_smem = rows_smem + T::ROWS_BYTES;
  const Ring<T::STAGES> ring{stages_smem + T::STAGES * T::STAGE_BYTES};
  float *unscale = reinterpret_cast<float *>(smem_raw + (ring.barriers + Ring<T::STAGES>::BYTES - smem_address(smem_raw))); /* 2^−a of every row */
  float *lifts = unscale + T::ROWS;

  const RowBlock block(p.z, blockIdx.x, T::ROWS, true, 0, p.z.chunks);
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
      const int chunk = block.chunk, kv = block.head / p.z.group, last_tile = block.first_tile + T::GROUPS - 1;
      const int64_t chunk_tile = int64_t(kv) * p.z.tiles + chunk * p.z.chunk_tiles;
      if (chunk > 0 || p.has_state) {
        const __half *moments = p.moments + int64_t(chunk * heads + kv) * D_TILES * D_TILES * 4096;
        for (int i = 0; i < D_TILES; i++) fill(moments + i * D_TILES * 4096, D_TILES * TILE_BYTES);
        const __half *states = p.states + int64_t(chunk * heads + kv) * p.z.pairs * E_TILES * 4096;
        for (int pair = 0; pair < p.z.pairs; pair++) fill(states + int64_t(pair) * E_TILES * 4096, E_TILES * TILE_BYTES);
      }
      for (int tile = last_tile; tile >= 0; tile--) {
        const uint32_t slot = stages_smem + at.slot * T::STAGE_BYTES, full = ring.full(at.slot);
        ring.acquire(at, (D_TILES + E_TILES) * TILE_BYTES + TILE_FACTORS * 4);
        bulk_load(slot, p.k + (chunk_tile + tile) * D_TILES * 4096, D_TILES * TILE_BYTES, full);
        bulk_load(slot + D_TILES * TILE_BYTES, p.v + (chunk_tile + tile) * E_TILES * 4096, E_TILES * TILE_BYTES, full);
        bulk_load(slot + (D_TILES + E_TILES) * TILE_BYTES, p.gates.tile_decay + (chunk_tile + tile) * TILE_FACTORS, TILE_FACTORS * 4, full);
        at.advance();
      }
    }
  } else {
    registers_raise<consumer_registers(T::GROUPS)>();
    RingPosition<T::STAGES> at;
    const Lane lane;
    const int row = lane.warp * 16 + lane.group;
    const int chunk = block.chunk, kv = block.head / p.z.group;
    const int first_tile = block.first_tile, last_tile = first_tile + T::GROUPS - 1;
    const int64_t chunk_tile = int64_t(kv) * p.z.tiles + chunk * p.z.chunk_tiles;
    const bool has_state = chunk > 0 || p.has_state;
    const int own_tile = first_tile + group; /* of the chunk */
    const uint32_t q_tile = rows_smem + group * T::ROW_HALVES * TILE_BYTES;
    float acc[PADDED_E / 2], den[2] = {0.f, 0.f};
    stage_queries<In, PADDED_D>(p.q, block.head / p.z.h_q * p.q.batch + block.head % p.z.h_q * p.q.head, chunk * p.z.chunk + own_tile * TILE, p.z.t,
                                p.z.d, q_tile, unscale + group * TILE);
#pragma unroll
    for (int i = 0; i < PADDED_E / 2; i++) acc[i] = 0.f;
    fence_proxy_async();                       /* the score products read the queries through the matrix unit, */
    named_barrier_sync(CONSUMER + group, 128); /* all 64 rows */

    if (has_state) {
      /* Loads that the end of this part needs are started here: there each would be waited for. */
      const float state_factor = power_of_two(p.state_units[chunk * heads + kv] + PS);
      const float moment_factor = power_of_two(p.moment_units[chunk * heads + kv] + PS);
      float decay[2];
#pragma unroll
      for (int r = 0; r < 2; r++) decay[r] = exp2f(p.gates.chunk_prefix[(chunk_tile + own_tile) * TILE + row + 8 * r]);
      /* Normaliser: (Q^ M) · Q^. */
      {
        float qm[PADDED_D / 2];
        uint32_t a[D_TILES][4][4];
#pragma unroll
        for (int h = 0; h < D_TILES; h++) load_fragments(a[h], q_tile + h * TILE_BYTES, lane);
#pragma unroll
        for (int h = 0; h < D_TILES; h++) {
          ring.wait(at);
          pin(a[h]);
          pin(qm);
          wgmma_fence();
          const uint64_t b = matrix_descriptor(stages_smem + at.slot * T::STAGE_BYTES, 1024, TILE_BYTES);
#pragma unroll
          for (int s = 0; s < 4; s++)
            Wgmma<PADDED_D, __half>::template rs<MN_MAJOR>(qm, a[h][s], b + descriptor_offset(s * 2048), h + s > 0);
          wgmma_commit();
          wgmma_wait<0>();
          pin(qm);
          ring.release(at.slot);
          at.advance();
        }
#pragma unroll
        for (int n = 0; n < PADDED_D / 8; n++)
#pragma unroll
          for (int r = 0; r < 2; r++) {
            const float2 x = Pair<__half>::unpack(a[n / 8][(n % 8) / 2][(n % 2) * 2 + r]);
            den[r] += qm[4 * n + 2 * r] * x.x + qm[4 * n + 2 * r + 1] * x.y;
          }
      }
      /* State: per pair two groups of products, alternating between two sets of fragments. */
      constexpr int STEPS = 2;
      uint32_t a[2][STEPS][4];
      uint32_t j_row = q_tile + swizzled(row, 0), i_row = j_row + lane.quad * 4;
      keep(i_row), keep(j_row);
      int tile_i = 0, tile_j = 0, undrained = -1;
#pragma unroll 1
      for (int pair = 0; pair < p.z.pairs; pair++) {
        ring.wait(at);
        const StateTile<PADDED_E> state{stages_smem + at.slot * T::STAGE_BYTES};
        const uint32_t i_piece = row_piece<D_TILES>(i_row, tile_i), j_piece = row_piece<D_TILES>(j_row, tile_j);
#pragma unroll
        for (int u = 0; u < 2; u++) {
          wgmma_wait<1>(); /* all but the group before this one have ended: a[u] is free, and when u = 1 the slot before */
          if (u == 1 && undrained >= 0) ring.release(undrained);
          expand_queries<STEPS>(a[u], i_piece, j_piece + u * 8);
          pin(a[u]);
          pin(acc);
          wgmma_fence();
#pragma unroll
          for (int s = 0; s < STEPS; s++)
            Wgmma<PADDED_E, __half>::template rs<K_MAJOR>(acc, a[u][s], state.features(u * STEPS + s), 1);
          wgmma_commit();
        }
        undrained = at.slot;
        at.advance();
        if (++tile_i > tile_j) tile_i = 0, tile_j++;
      }
      wgmma_wait<0>();
      ring.release(undrained);
      pin(acc);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float factor = decay[r] * state_factor;
        den[r] *= decay[r] * moment_factor;
#pragma unroll
        for (int n = 0; n < PADDED_E / 8; n++) acc[4 * n + 2 * r] *= factor, acc[4 * n + 2 * r + 1] *= factor;
      }
    }

    /* Inside the chunk. reach: decay from a key tile's end to each row, times the row's lift and 2^PS. From the diagonal tile on, sums are `lift`
     * times what they were. */
    {
      uint32_t weights[4][4];
      float scores[32], reach[2];
      const float score_factor = power_of_two(PS);
      auto attend_tile = [&](auto diagonal_constant, int tile) {
        constexpr bool DIAGONAL = decltype(diagonal_constant)::value;
        ring.wait(at);
        const uint32_t keys = stages_smem + at.slot * T::STAGE_BYTES, values = keys + D_TILES * TILE_BYTES, factors = values + E_TILES * TILE_BYTES;
        pin(scores);
        wgmma_fence();
        const uint64_t q_a = matrix_descriptor(q_tile), k_b = matrix_descriptor(keys);
#pragma unroll
        for (int h = 0; h < D_TILES; h++)
#pragma unroll
          for (int s = 0; s < 4; s++)
            Wgmma<64, __half>::template ss<K_MAJOR, K_MAJOR>(scores, q_a + descriptor_offset(h * TILE_BYTES + s * 32),
                                                             k_b + descriptor_offset(h * TILE_BYTES + s * 32), h + s > 0);
        wgmma_commit();
        wgmma_wait<0>();
        pin(scores);
        if constexpr (DIAGONAL) {
          const float *prefix = p.gates.tile_prefix + (chunk_tile + tile) * TILE;
          const float row_prefix[2] = {prefix[row], prefix[row + 8]};
          float lift[2];
          weigh_diagonal(scores, den, row_prefix, prefix, score_factor, lane);
#pragma unroll
          for (int r = 0; r < 2; r++) {
            lift[r] = row_lift(quad_sum(den[r]), row_prefix[r], tile == 0);
            if (lane.quad == 0) lifts[group * TILE + row + 8 * r] = lift[r];
            reach[r] = exp2_fast(row_prefix[r]) * score_factor * lift[r];
            den[r] *= lift[r];
#pragma unroll
            for (int n = 0; n < PADDED_E / 8; n++) acc[4 * n + 2 * r] *= lift[r], acc[4 * n + 2 * r + 1] *= lift[r];
          }
          round_weights(scores, weights, lift);
        } else {
          weigh_scores(scores, den, reach, factors, lane);
          const float one[2] = {1.f, 1.f}, decay = __uint_as_float(load_shared_32(factors + TILE * 4));
          round_weights(scores, weights, one);
          reach[0] *= decay, reach[1] *= decay;
        }
        pin(weights);
        pin(acc);
        wgmma_fence();
        const uint64_t b = matrix_descriptor(values, 1024, TILE_BYTES);
#pragma unroll
        for (int s = 0; s < 4; s++) Wgmma<PADDED_E, __half>::template rs<MN_MAJOR>(acc, weights[s], b + descriptor_offset(s * 2048), 1);
        wgmma_commit();
        wgmma_wait<0>();
        pin(acc);
        ring.release(at.slot);
        at.advance();
      };
      int tile = last_tile;
#pragma unroll 1
      for (; tile > own_tile; tile--) { /* keys after all of this warpgroup's rows */
        ring.wait(at);
        ring.release(at.slot);
        at.advance();
      }
      attend_tile(std::true_type{}, tile--);
#pragma unroll 1
      for (; tile >= 0; tile--) attend_tile(std::false_type{}, tile);
    }

    /* Divide, round, and write whole rows: through the shared memory of this warp's own queries. */
    const int k_exponent = scaling_exponent(p.maxima.k[kv], K_RANGE), v_exponent = scaling_exponent(p.maxima.v[kv], V_RANGE);
    const int batch = block.head / p.z.h_q, q_head = block.head % p.z.h_q;
    const int64_t head_offset = batch * p.y.batch + q_head * p.y.head;
    named_barrier_sync(CONSUMER + group, 128); /* every warp has done with the queries; lifts are written */
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int own_row = group * TILE + row + 8 * r;
      const float sum = quad_sum(den[r]), undo = unscale[own_row], lift = lifts[own_row];
      const int token = chunk * p.z.chunk + own_tile * TILE + row + 8 * r;
      if (lane.quad == 0 && token < p.z.t) p.norm[(int64_t(batch) * p.z.t + token) * p.z.h_q + q_head] = sum / lift;
      factor[r] = power_of_two(-v_exponent);
      if (p.normalize) factor[r] = sum == 0.f ? 0.f : factor[r] / sum;
      else factor[r] *= power_of_two(-2 * k_exponent - PS) * undo * undo * p.scale_squared / lift;
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < PADDED_E / 8; n++)
#pragma unroll
      for (int r = 0; r < 2; r++)
        store_shared_32(q_tile + (n / 8) * TILE_BYTES + swizzled(row + 8 * r, n % 8) + lane.quad * 4,
                        Pair<In>::pack(acc[4 * n + 2 * r] * factor[r], acc[4 * n + 2 * r + 1] * factor[r]));
    __syncwarp();
    constexpr int PIECES = PADDED_E / 8, ROWS_A_STEP = 32 / PIECES;
#pragma unroll
    for (int i = 0; i < 16 / ROWS_A_STEP; i++) {
      const int r = lane.warp * 16 + i * ROWS_A_STEP + lane.lane / PIECES, piece = lane.lane % PIECES;
      const int token = chunk * p.z.chunk + own_tile * TILE + r;
      if (token < p.z.t)
        store_piece<In>(p.y, head_offset + token * p.y.time, piece * 8, p.z.e,
                        load_shared_128(q_tile + (piece / 8) * TILE_BYTES + swizzled(r, piece % 8)));
    }
  }
}

}  // namespace power
