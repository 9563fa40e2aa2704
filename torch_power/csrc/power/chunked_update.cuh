/* update_state_kernel: the state before every chunk, S ← 2^(chunk_sum) S + Σ_tokens φ(w x^) ⊗ y^, scanned over the chunks in registers;
 * φ is never in memory. Forward: x = k, y = v, w = chunk_decay. Backward: the gradient of the state behind every chunk, chunks
 * taken last to first, x = q, y = dy, w = the query's weight (chunked_backward.cuh).
 *
 * Block (set, head): UPDATE_GROUPS consumer warpgroups, each with one pair (I, J) of feature tiles: 64 state rows (α, β) by e columns
 * in accumulators, for the whole sequence; one warp loads tiles of 64 tokens. The block with set = gridDim.x − 1 keeps the
 * moments Σ w x x^T of the normaliser instead.
 *   A (registers): x[8J + β] from the row tile by transposing ldmatrix, times x[8I + α] · w, one row of the transposed tile which
 *   ldmatrix hands to all lanes by giving eight times the same address.      B (shared memory): the y tile, MN-major.
 * Shared memory: ring of [x rows | y rows | 8 rows of x transposed a warpgroup], and a staging tile for the states written.
 */
#pragma once
#include "chunked_layout.cuh"

namespace power {

constexpr int UPDATE_GROUPS = 3; /* 8 heads × 12 blocks = 96 of 132 SMs; 2 groups (144 blocks) leave a second wave */

struct UpdateParams {
  Sizes z;
  const __half *rows, *transposed, *values; /* staged x, w·x transposed, y; `group` heads of x per state head */
  const __half *row_values;                 /* backward: −dy^·y^ per token, the moments' "value"; null means 1 */
  int group, reverse;
  const float *chunk_sum, *weight; /* [state head][chunk]; [head of x][chunk][weight_parts], to be added up */
  int weight_parts;
  __half *states, *moments;
  int *state_units, *moment_units; /* [chunk][state head] */
  const float *s_in, *z_in;        /* public layout: the first state, or null */
  float *s_out, *z_out;            /* public layout: the last state, or null */
  Maxima maxima;
  int state_bits, moment_bits; /* entries grow by at most 2^bits a unit of weight */
  int weight_shift;            /* backward: the query weights are 2^weight_shift too large */
};

/* Exponents from the caller's state to the scaled one. Forward: κ, ν of keys and values. Backward: a gradient divides by them
 * and carries those of dy and of the query weights. */
__device__ __forceinline__ void state_exponents(const UpdateParams &p, int head, int &s_exponent, int &z_exponent) {
  const int k = scaling_exponent(p.maxima.k[head], K_RANGE), v = scaling_exponent(p.maxima.v[head], V_RANGE);
  if (!p.reverse) {
    s_exponent = 2 * k + v, z_exponent = 2 * k;
  } else {
    const int dy = scaling_exponent(p.maxima.dy[head], DY_RANGE);
    s_exponent = -2 * k + dy + p.weight_shift, z_exponent = -2 * k + dy + v + p.weight_shift;
  }
}

template <int PADDED_D, int PADDED_E>
struct UpdateTiles {
  static constexpr int D_TILES = PADDED_D / 64, E_TILES = PADDED_E / 64;
  static constexpr int PAIR_BYTES = (D_TILES + E_TILES) * TILE_BYTES + UPDATE_GROUPS * 1024;
  static constexpr int MOMENT_BYTES = 2 * D_TILES * TILE_BYTES + 1024;
  static constexpr int STAGE_BYTES = PAIR_BYTES > MOMENT_BYTES ? PAIR_BYTES : MOMENT_BYTES;
  static constexpr int OUT_TILES = E_TILES > D_TILES ? E_TILES : D_TILES;
  static constexpr int OUT_BYTES = UPDATE_GROUPS * OUT_TILES * TILE_BYTES;
  static constexpr int STAGES = STAGE_BYTES > 32768 ? 4 : STAGE_BYTES > 24576 ? 5 : 8;
  static constexpr int SMEM_BYTES = 1024 + STAGES * STAGE_BYTES + OUT_BYTES + Ring<STAGES>::BYTES;
};

/* Rounds an accumulator of 64 rows × 64·TILES columns into swizzled tiles at `out` and sends them to `gmem`. */
template <int TILES>
__device__ __forceinline__ void write_state(float (&acc)[32 * TILES], float factor, uint32_t out, __half *gmem, const Lane &at, int group) {
  if ((threadIdx.x & 127) == 0) bulk_wait_read<0>(); /* the copy before last may still read the staging tile */
  named_barrier_sync(CONSUMER + group, 128);
  const int row = at.warp * 16 + at.group;
#pragma unroll
  for (int n = 0; n < 8 * TILES; n++) {
    const uint32_t tile = out + (n / 8) * TILE_BYTES + at.quad * 4;
    store_shared_32(tile + swizzled(row, n % 8), Pair<__half>::pack(acc[4 * n] * factor, acc[4 * n + 1] * factor));
    store_shared_32(tile + swizzled(row + 8, n % 8), Pair<__half>::pack(acc[4 * n + 2] * factor, acc[4 * n + 3] * factor));
  }
  fence_proxy_async();
  named_barrier_sync(CONSUMER + group, 128);
  if ((threadIdx.x & 127) == 0) bulk_store(gmem, out, TILES * TILE_BYTES), bulk_commit();
}

/* Decay of a chunk, and the bound of what its tokens add (the same in every lane). */
__device__ __forceinline__ float2 chunk_factors(const UpdateParams &p, int head, int chunk, int lane) {
  float weight = 0.f;
  for (int member = 0; member < p.group; member++)
    for (int i = lane; i < p.weight_parts; i += 32) weight += p.weight[(int64_t(head * p.group + member) * p.z.chunks + chunk) * p.weight_parts + i];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) weight += __shfl_xor_sync(~0u, weight, offset);
  return make_float2(exp2f(p.chunk_sum[head * p.z.chunks + chunk]), weight);
}

/* The scan over chunks, the same for both kinds of block: `store(chunk, bound)` before a chunk, `accumulate(slot, half, undrained)` per tile.
 * Returns the decay over all chunks. */
template <int STAGES, int N, class Store, class Accumulate>
__device__ __forceinline__ float scan_chunks(const UpdateParams &p, const Ring<STAGES> &ring, float (&acc)[N], int head, float bound, bool has_first,
                                             int lane, Store store, Accumulate accumulate) {
  RingPosition<STAGES> at;
  int undrained = -1; /* slot of the tile before, whose product may still run */
  float total_decay = 1.f;
  float2 factors = chunk_factors(p, head, p.reverse ? p.z.chunks - 1 : 0, lane);
#pragma unroll 1
  for (int step = 0; step < p.z.chunks; step++) {
    const int chunk = p.reverse ? p.z.chunks - 1 - step : step;
    if (step > 0 || has_first) store(chunk, bound);
    bound = bound * factors.x + factors.y, total_decay *= factors.x;
#pragma unroll
    for (int i = 0; i < N; i++) acc[i] *= factors.x;
    if (step + 1 < p.z.chunks) factors = chunk_factors(p, head, p.reverse ? chunk - 1 : chunk + 1, lane); /* arrives during the tiles */
#pragma unroll 1
    for (int tile = 0; tile < p.group * p.z.chunk_tiles; tile += 2) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        ring.wait(at);
        accumulate(at.slot, half, undrained);
        undrained = at.slot;
        at.advance();
      }
    }
    wgmma_wait<0>();
    pin(acc);
    ring.release(undrained);
    undrained = -1;
  }
  return total_decay;
}

/* The loading warp. Every lane owns at most one copy a tile, its addresses worked out once: a single lane that issued them all and found its
 * pairs anew per tile took twice as long as the products (NOTES, "Chunked CUDA"). */
template <int PADDED_D, int PADDED_E, class UpdateRing>
__device__ __forceinline__ void load_tiles(const UpdateParams &p, const UpdateRing &ring, uint32_t stages_smem, int head, int first_pair, int workers,
                                           bool moments, int lane) {
  using T = UpdateTiles<PADDED_D, PADDED_E>;
  constexpr uint32_t D_BYTES = T::D_TILES * TILE_BYTES, E_BYTES = T::E_TILES * TILE_BYTES;
  const char *source = nullptr;
  int64_t tile_bytes = D_BYTES;
  uint32_t offset = 0, bytes = 0;
  if (lane == 0) {
    source = reinterpret_cast<const char *>(p.rows), bytes = D_BYTES;
  } else if (moments) {
    if (lane == 1) source = reinterpret_cast<const char *>(p.transposed), offset = D_BYTES, bytes = D_BYTES;
    if (lane == 2 && p.row_values != nullptr)
      source = reinterpret_cast<const char *>(p.row_values), offset = 2 * D_BYTES, bytes = tile_bytes = 2 * TILE;
  } else if (lane == 1) {
    source = reinterpret_cast<const char *>(p.values), offset = D_BYTES, bytes = tile_bytes = E_BYTES;
  } else if (lane - 2 < workers) {
    int tile_i, tile_j;
    pair_tiles(first_pair + lane - 2, tile_i, tile_j);
    source = reinterpret_cast<const char *>(p.transposed) + tile_i * 1024, offset = D_BYTES + E_BYTES + (lane - 2) * 1024, bytes = 1024;
  }
  uint32_t total = bytes;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(~0u, total, distance);
  RingPosition<T::STAGES> at;
  for (int step = 0; step < p.z.chunks; step++) {
    const int chunk = p.reverse ? p.z.chunks - 1 - step : step;
    for (int member = 0; member < p.group; member++) {
      const int64_t first_tile = int64_t(head * p.group + member) * p.z.tiles + chunk * p.z.chunk_tiles;
      const char *from = source + first_tile * tile_bytes;
#pragma unroll 1
      for (int i = 0; i < p.z.chunk_tiles; i++, from += tile_bytes) {
        if (lane == 0) ring.acquire(at, total);
        __syncwarp();
        if (bytes > 0) bulk_load(stages_smem + at.slot * T::STAGE_BYTES + offset, from, bytes, ring.full(at.slot));
        at.advance();
      }
    }
  }
}

template <int PADDED_D, int PADDED_E>
__global__ void __launch_bounds__((UPDATE_GROUPS + 1) * 128, 1) update_state_kernel(const __grid_constant__ UpdateParams p) {
  using T = UpdateTiles<PADDED_D, PADDED_E>;
  constexpr int D_TILES = T::D_TILES, E_TILES = T::E_TILES;
  extern __shared__ uint8_t smem_raw[];
  const uint32_t stages_smem = (smem_address(smem_raw) + 1023) & ~1023u, out_smem = stages_smem + T::STAGES * T::STAGE_BYTES;
  const Ring<T::STAGES> ring{out_smem + T::OUT_BYTES};
  const int group = threadIdx.x >> 7, head = blockIdx.y, heads = p.z.b * p.z.h_kv;
  const bool moments = blockIdx.x == gridDim.x - 1;
  const int first_pair = blockIdx.x * UPDATE_GROUPS, workers = moments ? D_TILES : min(UPDATE_GROUPS, p.z.pairs - first_pair);
  if (threadIdx.x == 0) {
    ring.init(4 * workers);
    mbarrier_init_fence();
  }
  __syncthreads();

  if (group == UPDATE_GROUPS) {
    registers_lower<32>();
    const int lane = threadIdx.x - UPDATE_GROUPS * 128;
    if (lane < 32) load_tiles<PADDED_D, PADDED_E>(p, ring, stages_smem, head, first_pair, workers, moments, lane);
  } else {
    registers_raise<160>();
    if (group >= workers) return;
    const Lane lane;
    const uint32_t out = out_smem + group * T::OUT_TILES * TILE_BYTES;
    int s_exponent, z_exponent;
    state_exponents(p, head, s_exponent, z_exponent);
    const int64_t state_rows = int64_t(p.z.pairs) * 64;
    const int row = lane.warp * 16 + lane.group; /* and row + 8 */
    uint32_t a[2][4][4];

    if (moments) {
      float acc[PADDED_D / 2];
      /* Moments of features x (rows: 64·group + row) and y (columns), from and to the public z, which has I ≤ J only; of a diagonal block,
       * whose (α, β) and (β, α) meet the same q_α q_β, the symmetric half, to which the other half is added when z leaves. A gradient of z is
       * of one of its rows; moments off the diagonal count such a row twice. */
      const float *z_in = p.z_in == nullptr ? nullptr : p.z_in + head * state_rows;
      float *z_out = p.z_out == nullptr ? nullptr : p.z_out + head * state_rows;
      const float in_factor = power_of_two(z_exponent), out_factor = power_of_two(-z_exponent), rows_of_off_diagonal = p.reverse ? 2.f : 1.f;
      auto z_row = [&](int x, int y) { return public_pair(x / 8, y / 8, p.z.feature_tiles) * 64 + (x % 8) * 8 + y % 8; };
      auto each = [&](auto visit) {
#pragma unroll
        for (int i = 0; i < PADDED_D / 2; i++) {
          visit(acc[i], group * 64 + row + ((i & 2) ? 8 : 0), (i / 4) * 8 + lane.quad * 2 + (i & 1));
          if (i % 4 == 3) asm volatile("" ::: "memory"); /* four loads at a time, or their addresses spill */
        }
      };
      each([&](float &value, int x, int y) {
        value = 0.f;
        if (z_in == nullptr || x >= p.z.d || y >= p.z.d) return;
        value = x / 8 == y / 8 ? 0.5f * (z_in[z_row(x, y)] + z_in[z_row(y, x)]) : z_in[x < y ? z_row(x, y) : z_row(y, x)] / rows_of_off_diagonal;
        value *= in_factor;
      });
      const float first_bound = p.z_in == nullptr ? 0.f : __uint_as_float(p.maxima.z[head]) * in_factor * power_of_two(-p.moment_bits);
      const float total_decay = scan_chunks(
          p, ring, acc, head, first_bound, p.z_in != nullptr, lane.lane,
          [&](int chunk, float bound) {
            const int unit = state_unit(bound, p.moment_bits);
            if (threadIdx.x == 0) p.moment_units[chunk * heads + head] = unit;
            write_state<D_TILES>(acc, power_of_two(-unit), out, p.moments + (int64_t(chunk * heads + head) * D_TILES + group) * D_TILES * 4096,
                                 lane, group);
          },
          [&](int slot, int half, int undrained) {
            const uint32_t rows = stages_smem + slot * T::STAGE_BYTES, transposed = rows + D_TILES * TILE_BYTES;
            wgmma_wait<0>();
            if (undrained >= 0) ring.release(undrained);
            load_fragments(a[half], transposed + group * TILE_BYTES, lane);
            if (p.row_values != nullptr) {
#pragma unroll
              for (int step = 0; step < 4; step++) {
                const uint32_t values = transposed + D_TILES * TILE_BYTES + step * 32 + lane.quad * 4;
                const uint32_t low = load_shared_32(values), high = load_shared_32(values + 16);
                a[half][step][0] = Pair<__half>::multiply(a[half][step][0], low), a[half][step][1] = Pair<__half>::multiply(a[half][step][1], low);
                a[half][step][2] = Pair<__half>::multiply(a[half][step][2], high), a[half][step][3] = Pair<__half>::multiply(a[half][step][3], high);
              }
            }
            pin(a[half]);
            pin(acc);
            wgmma_fence();
            const uint64_t b = matrix_descriptor(rows, 1024, TILE_BYTES);
#pragma unroll
            for (int step = 0; step < 4; step++)
              Wgmma<PADDED_D, __half>::template rs<MN_MAJOR>(acc, a[half][step], b + descriptor_offset(step * 2048), 1);
            wgmma_commit();
          });
      if (z_out != nullptr)
        each([&](float &value, int x, int y) {
          if (x >= p.z.d || y >= p.z.d || x / 8 > y / 8) return;
          const bool diagonal = x / 8 == y / 8;
          const float other_half = diagonal && z_in != nullptr ? 0.5f * (z_in[z_row(x, y)] - z_in[z_row(y, x)]) * total_decay : 0.f;
          z_out[z_row(x, y)] = value * out_factor * (diagonal ? 1.f : rows_of_off_diagonal) + other_half;
        });
    } else {
      float acc[PADDED_E / 2];
      int tile_i, tile_j;
      pair_tiles(first_pair + group, tile_i, tile_j);
      const float multiplicity = tile_i == tile_j ? 1.f : 2.f;
      const int first_row = public_pair(tile_i, tile_j, p.z.feature_tiles) * 64 + row;
      const float *s_in = p.s_in == nullptr ? nullptr : p.s_in + head * state_rows * p.z.e;
      float *s_out = p.s_out == nullptr ? nullptr : p.s_out + head * state_rows * p.z.e;
      auto each = [&](auto visit) {
#pragma unroll
        for (int i = 0; i < PADDED_E / 2; i++) {
          visit(acc[i], first_row + ((i & 2) ? 8 : 0), (i / 4) * 8 + lane.quad * 2 + (i & 1));
          if (i % 4 == 3) asm volatile("" ::: "memory");
        }
      };
      /* A gradient that arrives is of the public rows; accumulators are without multiplicity, which the query puts on them. */
      const float in_factor = power_of_two(s_exponent) / (p.reverse ? multiplicity : 1.f);
      const float out_factor = power_of_two(-s_exponent) * (p.reverse ? multiplicity : 1.f);
      each([&](float &value, int r, int column) {
        value = s_in != nullptr && column < p.z.e ? s_in[r * p.z.e + column] * in_factor : 0.f;
      });
      const float first_bound =
          p.s_in == nullptr ? 0.f : __uint_as_float(p.maxima.s[head]) * power_of_two(s_exponent) * power_of_two(-p.state_bits);
      const int j_half = tile_j / 8, j_piece = tile_j % 8;
      scan_chunks(
          p, ring, acc, head, first_bound, p.s_in != nullptr, lane.lane,
          [&](int chunk, float bound) {
            const int unit = state_unit(bound, p.state_bits);
            if (blockIdx.x == 0 && threadIdx.x == 0) p.state_units[chunk * heads + head] = unit;
            write_state<E_TILES>(acc, multiplicity * power_of_two(-unit), out,
                                 p.states + (int64_t(chunk * heads + head) * p.z.pairs + first_pair + group) * E_TILES * 4096, lane, group);
          },
          [&](int slot, int half, int undrained) {
            const uint32_t rows = stages_smem + slot * T::STAGE_BYTES, values = rows + D_TILES * TILE_BYTES;
            const uint32_t weighted = values + E_TILES * TILE_BYTES + group * 1024; /* features 8I … 8I + 7 of x, times w */
            const int alpha = 2 * lane.warp;                                        /* fragment rows (2w, g) and (2w + 1, g) */
            uint32_t beta[2][4], even[2][4], odd[2][4];
#pragma unroll
            for (int part = 0; part < 2; part++) { /* 32 tokens each */
              load_matrices_transposed(beta[part], rows + j_half * TILE_BYTES + swizzled(part * 32 + lane.lane, j_piece));
              load_matrices(even[part], weighted + swizzled(alpha, part * 4 + lane.lane / 8));
              load_matrices(odd[part], weighted + swizzled(alpha + 1, part * 4 + lane.lane / 8));
            }
#pragma unroll
            for (int step = 0; step < 4; step++) { /* overwrites fragments of two tiles ago, whose product has ended */
              const int part = step / 2, low = 2 * (step % 2), high = low + 1;
              a[half][step][0] = Pair<__half>::multiply(beta[part][low], even[part][low]);
              a[half][step][1] = Pair<__half>::multiply(beta[part][low], odd[part][low]);
              a[half][step][2] = Pair<__half>::multiply(beta[part][high], even[part][high]);
              a[half][step][3] = Pair<__half>::multiply(beta[part][high], odd[part][high]);
            }
            pin(a[half]);
            pin(acc);
            wgmma_fence();
            const uint64_t b = matrix_descriptor(values, 1024, TILE_BYTES);
#pragma unroll
            for (int step = 0; step < 4; step++)
              Wgmma<PADDED_E, __half>::template rs<MN_MAJOR>(acc, a[half][step], b + descriptor_offset(step * 2048), 1);
            wgmma_commit();
            wgmma_wait<1>();
            if (undrained >= 0) ring.release(undrained);
          });
      if (s_out != nullptr)
        each([&](float &value, int r, int column) {
          if (column < p.z.e) s_out[r * p.z.e + column] = value * out_factor;
        });
    }
    if ((threadIdx.x & 127) == 0) bulk_wait<0>();
  }
}

}  // namespace power
