/* gradient_q_kernel: dq for a block of queries, through the state before the chunk and through the chunk (scaling: chunked_backward.cuh).
 *
 * Work item: a row block of a chunk, one query head (RowBlock). Consumer warpgroups of 64 rows each (tiles.h), one loading warp.
 *   1. moments: dx ← −2 ΔD_i 2^(units) Q~ M, into the dx slots;          2. state: dx += contraction of S with D (chunked_contract.cuh);
 *   3. dq~ ← 2^(chunk_prefix) h 2^(unit) dx, then from the diagonal key tile backwards: S = Q~ K^ᵀ, D V^ᵀ, ds~ from both in registers,
 *      dq~ += ds~ K^;          4. ΔD is corrected to what these sums say it is.
 * Shared memory: rows of q~ and D, the dx slots, and a ring of a state tile, or a key and a value tile and their gate factors.
 */
#pragma once
#include "chunked_backward.cuh"
#include "chunked_contract.cuh"

namespace power {

struct GradientQParams {
  Sizes z;
  View dq;
  const __half *q, *dy, *k, *v, *states, *moments;
  const int *state_units, *moment_units;
  Gates gates;
  RowFactors rows;
  __half *moment_weights; /* −w ΔD for the moments of the state gradient, in token_order */
  Maxima maxima;
  int has_state, normalize;
};

template <int PADDED_D, int PADDED_E>
struct GradientQTiles {
  static constexpr int D_TILES = PADDED_D / 64, E_TILES = PADDED_E / 64, GROUPS = gradient_warpgroups(PADDED_D, PADDED_E), ROWS = GROUPS * TILE;
  static constexpr int STAGE_BYTES = (D_TILES + E_TILES) * TILE_BYTES + 1024;
  static constexpr int ROWS_BYTES = GROUPS * (D_TILES + E_TILES) * TILE_BYTES, SLOTS_BYTES = GROUPS * Contraction<PADDED_D>::BYTES;
  static constexpr int STAGES = STAGE_BYTES > 24576 + 1024 ? 2 : STAGE_BYTES > 17408 ? 4 : 6;
  static constexpr int SMEM_BYTES = 1024 + ROWS_BYTES + STAGES * STAGE_BYTES + SLOTS_BYTES + Ring<STAGES>::BYTES + 16;
  static constexpr int SETS = D_TILES + E_TILES > 2 ? 1 : 2; /* of contract_pairs */
};

/* ds~ = s~ γ (<D, v^> − ΔD) times the rows' factors, rounded into A fragments; on the diagonal tile γ = 2^(prefix_i − prefix_j) for
 * j ≤ i, elsewhere `key_factors` (shared memory) · what the row factor holds. */
template <bool DIAGONAL>
__device__ __forceinline__ void score_gradients(const float (&s)[32], const float (&dp)[32], uint32_t (&ds)[4][4], const float (&row_factors)[2],
                                                const float (&delta)[2], const float (&row_prefix)[2], const float *tile_prefix,
                                                uint32_t key_factors, const Lane &at) {
  const int row = at.warp * 16 + at.group;
#pragma unroll
  for (int n = 0; n < 8; n++) {
    const int column = 8 * n + 2 * at.quad;
    float2 key;
    if constexpr (DIAGONAL) {
      key = *reinterpret_cast<const float2 *>(tile_prefix + column);
    } else {
      const uint2 bits = load_shared_64(key_factors + column * 4);
      key = make_float2(__uint_as_float(bits.x), __uint_as_float(bits.y));
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int i = 4 * n + 2 * r;
      float x = s[i] * (dp[i] - delta[r]) * row_factors[r], y = s[i + 1] * (dp[i + 1] - delta[r]) * row_factors[r];
      if constexpr (DIAGONAL) {
        x = column <= row + 8 * r ? x * exp2_fast(row_prefix[r] - key.x) : 0.f;
        y = column + 1 <= row + 8 * r ? y * exp2_fast(row_prefix[r] - key.y) : 0.f;
      } else {
        x *= key.x, y *= key.y;
      }
      uint32_t &pair = ds[n / 2][(n % 2) * 2 + r];
      pair = Pair<__half>::pack(x, y);
      if constexpr (DIAGONAL) pair = saturate(pair);
    }
  }
}

/* ΔD of rows that see (all but 2^−12 of) their keys in the diagonal tile, from those keys: Σ P/den <D, v^>. The ΔD that came with a rounded y
 * is good enough for a mean over many keys, not for one where <D, v^> − ΔD nearly vanishes. `h` is the rows' h. */
__device__ __forceinline__ void exact_mean(float (&delta)[2], const float (&s)[32], const float (&dp)[32], const float (&h)[2],
                                           const float (&row_prefix)[2], const float *tile_prefix, const Lane &at) {
  const int row = at.warp * 16 + at.group;
  float mass[2] = {0.f, 0.f}, sum[2] = {0.f, 0.f};
#pragma unroll
  for (int n = 0; n < 8; n++) {
    const int column = 8 * n + 2 * at.quad;
    const float2 prefix = *reinterpret_cast<const float2 *>(tile_prefix + column);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int i = 4 * n + 2 * r;
      const float x = column <= row + 8 * r ? s[i] * s[i] * exp2_fast(row_prefix[r] - prefix.x) : 0.f;
      const float y = column + 1 <= row + 8 * r ? s[i + 1] * s[i + 1] * exp2_fast(row_prefix[r] - prefix.y) : 0.f;
      mass[r] += x + y, sum[r] += x * dp[i] + y * dp[i + 1];
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    mass[r] = quad_sum(mass[r]), sum[r] = quad_sum(sum[r]);
    if (mass[r] * h[r] > 1.f - 1.f / 4096) delta[r] = sum[r] / mass[r];
  }
}

template <typename Out, int PADDED_D, int PADDED_E>
__global__ void __launch_bounds__(threads(GradientQTiles<PADDED_D, PADDED_E>::GROUPS), 1) gradient_q_kernel(const __grid_constant__ GradientQParams p) {
  using T = GradientQTiles<PADDED_D, PADDED_E>;
  constexpr int D_TILES = T::D_TILES, E_TILES = T::E_TILES;
  extern __shared__ uint8_t smem_raw[];
  const uint32_t rows_smem = (smem_address(smem_raw) + 1023) & ~1023u, stages_smem = rows_smem + T::ROWS_BYTES;
  const uint32_t slots_smem = stages_smem + T::STAGES * T::STAGE_BYTES;
  const Ring<T::STAGES> ring{slots_smem + T::SLOTS_BYTES};
  const uint32_t rows_full = ring.barriers + Ring<T::STAGES>::BYTES;

  const RowBlock block(p.z, blockIdx.x, T::ROWS, true, 0, p.z.chunks);
  if (block.empty) return;
  const int heads = p.z.b * p.z.h_kv, group = __shfl_sync(~0u, int(threadIdx.x) >> 7, 0);
  if (threadIdx.x == 0) {
    ring.init(4 * T::GROUPS);
    mbarrier_init(rows_full, 1);
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
      const int chunk = block.chunk, kv = block.head / p.z.group, last_tile = block.first_tile + T::ROWS / TILE - 1;
      const int64_t q_tile = int64_t(block.head) * p.z.tiles + chunk * p.z.chunk_tiles + block.first_tile;
      const int64_t k_tile = int64_t(kv) * p.z.tiles + chunk * p.z.chunk_tiles;
      mbarrier_expect(rows_full, T::ROWS_BYTES);
      bulk_load(rows_smem, p.q + q_tile * D_TILES * 4096, T::GROUPS * D_TILES * TILE_BYTES, rows_full);
      bulk_load(rows_smem + T::GROUPS * D_TILES * TILE_BYTES, p.dy + q_tile * E_TILES * 4096, T::GROUPS * E_TILES * TILE_BYTES, rows_full);
      if (chunk > 0 || p.has_state) {
        const __half *moments = p.moments + int64_t(chunk * heads + kv) * D_TILES * D_TILES * 4096;
        for (int i = 0; i < D_TILES; i++) fill(moments + i * D_TILES * 4096, D_TILES * TILE_BYTES);
        load_pairs<T::SETS, PADDED_E>(p.states + int64_t(chunk * heads + kv) * p.z.pairs * E_TILES * 4096, p.z.pairs, fill);
      }
#pragma unroll 1
      for (int tile = last_tile; tile >= 0; tile--) {
        const uint32_t slot = stages_smem + at.slot * T::STAGE_BYTES, full = ring.full(at.slot);
        ring.acquire(at, (D_TILES + E_TILES) * TILE_BYTES + TILE_FACTORS * 4);
        bulk_load(slot, p.k + (k_tile + tile) * D_TILES * 4096, D_TILES * TILE_BYTES, full);
        bulk_load(slot + D_TILES * TILE_BYTES, p.v + (k_tile + tile) * E_TILES * 4096, E_TILES * TILE_BYTES, full);
        bulk_load(slot + (D_TILES + E_TILES) * TILE_BYTES, p.gates.tile_decay + (k_tile + tile) * TILE_FACTORS, TILE_FACTORS * 4, full);
        at.advance();
      }
    }
  } else {
    registers_raise<consumer_registers(T::GROUPS)>();
    RingPosition<T::STAGES> at;
    const Lane lane;
    const int chunk = block.chunk, kv = block.head / p.z.group, last_tile = block.first_tile + T::GROUPS - 1, own_tile = block.first_tile + group;
    const int row = lane.warp * 16 + lane.group;
    const int64_t q_tile = int64_t(block.head) * p.z.tiles + chunk * p.z.chunk_tiles, k_tile = int64_t(kv) * p.z.tiles + chunk * p.z.chunk_tiles;
    const bool has_state = chunk > 0 || p.has_state;
    const uint32_t q_rows = rows_smem + group * D_TILES * TILE_BYTES;
    const uint32_t dy_rows = rows_smem + (T::GROUPS * D_TILES + group * E_TILES) * TILE_BYTES;
    const int64_t q_row = (q_tile + own_tile) * TILE + row, k_row = (k_tile + own_tile) * TILE + row;
    const int dy_exponent = scaling_exponent(p.maxima.dy[kv], DY_RANGE), v_exponent = scaling_exponent(p.maxima.v[kv], V_RANGE);
    float h[2], delta[2], chunk_decay[2], row_prefix[2], dq[PADDED_D / 2];
    float state_part[2] = {0.f, 0.f}, state_mass[2] = {0.f, 0.f}; /* through the state: Σ P/den (<D, v^> − ΔD), Σ P/den */
#pragma unroll
    for (int r = 0; r < 2; r++) {
      chunk_decay[r] = exp2f(p.gates.chunk_prefix[k_row + 8 * r]), row_prefix[r] = p.gates.tile_prefix[k_row + 8 * r];
      h[r] = p.rows.h[q_row + 8 * r] * float(1 << DS_SHIFT);
      delta[r] = p.normalize ? p.rows.delta[q_row + 8 * r] * power_of_two(dy_exponent) * power_of_two(v_exponent) : 0.f;
    }
    mbarrier_wait(rows_full, 0);
    RowOperand<E_TILES> dy(dy_rows, lane);

    if (has_state) {
      Contraction<PADDED_D> contraction(q_rows, slots_smem + group * Contraction<PADDED_D>::BYTES, p.z.feature_tiles, lane);
      const int state_unit = p.state_units[chunk * heads + kv], moment_unit = p.moment_units[chunk * heads + kv];
      {
        uint32_t a[D_TILES][4][4];
#pragma unroll
        for (int i = 0; i < D_TILES; i++) load_fragments(a[i], q_rows + i * TILE_BYTES, lane);
#pragma unroll
        for (int i = 0; i < D_TILES; i++) {
          ring.wait(at);
          pin(a[i]);
          pin(dq);
          wgmma_fence();
          const uint64_t b = matrix_descriptor(stages_smem + at.slot * T::STAGE_BYTES, 1024, TILE_BYTES);
#pragma unroll
          for (int s = 0; s < 4; s++)
            Wgmma<PADDED_D, __half>::template rs<MN_MAJOR>(dq, a[i][s], b + descriptor_offset(s * 2048), i + s > 0);
          wgmma_commit();
          wgmma_wait<0>();
          pin(dq);
          ring.release(at.slot);
          at.advance();
        }
        row_products<PADDED_D>(state_mass, dq, q_rows, lane);
#pragma unroll
        for (int r = 0; r < 2; r++) state_mass[r] *= chunk_decay[r] * h[r] * power_of_two(moment_unit - DS_SHIFT);
        const float unit = -2.f * power_of_two(moment_unit - state_unit);
#pragma unroll
        for (int n = 0; n < PADDED_D / 8; n++)
#pragma unroll
          for (int r = 0; r < 2; r++)
            contraction.set_slot(r, n, make_float2(dq[4 * n + 2 * r] * delta[r] * unit, dq[4 * n + 2 * r + 1] * delta[r] * unit));
      }
      constexpr int SETS = T::SETS;
      float u[SETS][32];
      contraction.load_j();
      RingPosition<T::STAGES> done = at;
      contract_pairs<SETS, 0>(
          p.z.pairs, contraction, u, lane,
          [&](auto half) {
            ring.wait(at);
            pin(u[half.value]);
            dy.hold();
            wgmma_fence();
            dy.times_state(u[half.value], stages_smem + at.slot * T::STAGE_BYTES);
            wgmma_commit();
            at.advance();
          },
          [&] {
            ring.release(done.slot);
            done.advance();
          });
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float factor = chunk_decay[r] * h[r] * power_of_two(state_unit);
#pragma unroll
        for (int n = 0; n < PADDED_D / 8; n++) {
          const float2 dx = contraction.slot(r, n);
          dq[4 * n + 2 * r] = dx.x * factor, dq[4 * n + 2 * r + 1] = dx.y * factor;
        }
      }
      row_products<PADDED_D>(state_part, dq, q_rows, lane);
    } else {
#pragma unroll
      for (int i = 0; i < PADDED_D / 2; i++) dq[i] = 0.f;
    }

    const float first_delta[2] = {delta[0], delta[1]}; /* what the state's part was computed with */
    /* Inside the chunk. reach: 2 h 2^(decay from a key tile's end to the row). */
    {
      float reach[2] = {2.f * h[0], 2.f * h[1]};
      const uint64_t q_a = matrix_descriptor(q_rows);
      auto attend_tile = [&](auto diagonal_constant, int tile) {
        constexpr bool DIAGONAL = decltype(diagonal_constant)::value;
        float s[32], dp[32]; /* of this tile: declared outside, they would be kept from one to the next */
        uint32_t ds[4][4];
        ring.wait(at);
        const uint64_t k_b = matrix_descriptor(stages_smem + at.slot * T::STAGE_BYTES);
        const uint32_t keys = stages_smem + at.slot * T::STAGE_BYTES, values = keys + D_TILES * TILE_BYTES, factors = values + E_TILES * TILE_BYTES;
        pin(s);
        pin(dp);
        dy.hold();
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < D_TILES; i++)
#pragma unroll
          for (int step = 0; step < 4; step++)
            Wgmma<64, __half>::template ss<K_MAJOR, K_MAJOR>(s, q_a + descriptor_offset(i * TILE_BYTES + step * 32),
                                                             k_b + descriptor_offset(i * TILE_BYTES + step * 32), i + step > 0);
        dy.times_rows(dp, values);
        wgmma_commit();
        wgmma_wait<0>(); /* also the last tile's dq: its slot may go */
        pin(s);
        pin(dp);
        pin(dq);
        const float *prefix = p.gates.tile_prefix + (k_tile + tile) * TILE;
        if constexpr (DIAGONAL) {
          const float plain_h[2] = {h[0] / (1 << DS_SHIFT), h[1] / (1 << DS_SHIFT)};
          if (p.normalize) exact_mean(delta, s, dp, plain_h, row_prefix, prefix, lane);
        }
        score_gradients<DIAGONAL>(s, dp, ds, reach, delta, row_prefix, prefix, factors, lane);
        if constexpr (DIAGONAL) {
          reach[0] *= exp2_fast(row_prefix[0]), reach[1] *= exp2_fast(row_prefix[1]);
        } else {
          const float decay = __uint_as_float(load_shared_32(factors + TILE * 4));
          reach[0] *= decay, reach[1] *= decay;
        }
        pin(ds);
        pin(dq);
        wgmma_fence();
        const uint64_t b = matrix_descriptor(keys, 1024, TILE_BYTES);
#pragma unroll
        for (int step = 0; step < 4; step++)
          Wgmma<PADDED_D, __half>::template rs<MN_MAJOR>(dq, ds[step], b + descriptor_offset(step * 2048), 1);
        wgmma_commit();
        wgmma_wait<0>();
        pin(dq);
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

    /* ½ <q~, dq~> = Σ_j P/den <D, v^> − ΔD: the error of ΔD, which came from a rounded y. Corrected for dk and the gates, whose sums over
     * rows it would dominate. Without normaliser ΔD is 0 and this is the row's part of the gate gradient. */
    const float unit = power_of_two(-DS_SHIFT - dy_exponent) * power_of_two(-v_exponent);
    float products[2], factor[2];
    row_products<PADDED_D>(products, dq, q_rows, lane);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float exact = delta[r] + 0.5f * products[r] / (1 << DS_SHIFT);
      const float state_row = 0.5f * state_part[r] / (1 << DS_SHIFT) - (p.normalize ? (exact - first_delta[r]) * state_mass[r] : 0.f);
      if (lane.quad == 0) {
        p.rows.delta[q_row + 8 * r] = p.normalize ? exact * TO_DS : 0.f;
        if (!p.normalize) p.rows.row_part[q_row + 8 * r] = exact * power_of_two(-dy_exponent) * power_of_two(-v_exponent);
        p.rows.state_part[q_row + 8 * r] = state_row * power_of_two(-dy_exponent) * power_of_two(-v_exponent);
        if (p.normalize) /* below 2^16 but for w near its bound */
          p.moment_weights[(q_tile + own_tile) * TILE + token_position(row + 8 * r)] =
              __float2half(fminf(fmaxf(-exact * p.rows.state_weight[q_row + 8 * r], -65504.f), 65504.f));
      }
      factor[r] = p.rows.q_scale[q_row + 8 * r] * unit;
    }
    named_barrier_sync(CONSUMER + group, 128); /* every warp has done with the queries, whose rows now take dq */
    write_rows<Out, PADDED_D>(dq, factor, q_rows, p.dq, block.head / p.z.h_q * p.dq.batch + block.head % p.z.h_q * p.dq.head,
                              chunk * p.z.chunk + own_tile * TILE, p.z.t, p.z.d, lane);
  }
}

}  // namespace power
