/* update_state_kernel: the state before every chunk, S ← 2^(chunk_sum) S + Σ_tokens φ(w x^) ⊗ y^, scanned over the chunks in registers;
 * φ is never in memory. Forward: x = k, y = v, w = chunk_decay. Backward: the gradient of the state behind every chunk, chunks
 * taken last to first, x = q, y = dy, w = the query's weight (chunked_backward.cuh).
 *
 * A block keeps four slices Sᵀ[e, (β, ·)] of one head for the whole sequence: features 8J + β of x, two neighbouring β, for two feature tiles J whose
 * columns (J + 1 tiles I ≤ J of eight) add up to the same number in every block. Two consumer warpgroups, one loading warp; each warpgroup takes 64
 * columns of y: with e ≤ 64 one β, otherwise half of y for both.
 *   A (registers): yᵀ, loaded once a tile by a transposing ldmatrix, times x[·, 8J + β] · w token by token
 *   B (shared memory): columns 0 … 8J + 7 of the x tile, MN-major.
 * The last blocks keep the normaliser's moments Σ w x xᵀ instead, a warpgroup 64 rows of one head's.
 * Two blocks of a head make a cluster: each loads half of an x and a y tile into both, which halves what L2 has to give. (In a build for racecheck each
 * loads all of its own: the tool does not follow copies into two blocks, and reports what else the slot's barrier waits for.)
 * Shared memory: a ring of [x rows | y rows | four feature rows x[·, 8J + β] · w | w], in the last blocks [x rows and token weights of a head or two]. The
 * feature rows are written by a second warp of the loading warpgroup once x and w have arrived: as tiles in memory they were 67 MB to write.
 * Cycles a 64-token tile at d = e = 64: products 288; shared memory 144 (B) + 128 (yᵀ twice) + 32 + 132 (arriving) = 436. (A = φ in registers and
 * B = y, the form before this one: 624 on 104 multiprocessors instead of 132.)
 */
#pragma once
#include "../sm90/cluster.cuh"
#include "../sm90/wgmma_widths.cuh"
#include "chunked_layout.cuh"

namespace power {

constexpr int UPDATE_THREADS = 384; /* two consumer warpgroups; one of which a warp loads and another weighs features */

struct UpdateParams {
  Sizes z;
  const __half *rows, *values;  /* staged x, y; `group` heads of x per state head */
  const float *token_weights;   /* w per head of x and token */
  const __half *moment_weights; /* per head of x and token, in token_order: w, backward −w dy^·y^ */
  int group, reverse;
  int summed;                      /* chunks whose tokens are added up: all but the last one if nobody asks for the state behind it */
  const float *chunk_sum, *weight; /* [state head][chunk]; [head of x][chunk][weight_parts], to be added up */
  int weight_parts;
  StateStore states;
  __half *moments;
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

/* A ring whose slots are ready for consumers when they have arrived and their features have been weighed, by one warp. That warp need not hand a slot
 * back: consumers wait for it before they do. */
template <int STAGES>
struct FeatureRing : PairRing<STAGES> {
  using PairRing<STAGES>::PairRing;
  static constexpr int BYTES = Ring<STAGES>::BYTES + STAGES * 8;
  __device__ __forceinline__ uint32_t weighed(int slot) const { return this->barriers + Ring<STAGES>::BYTES + slot * 8; }
  __device__ __forceinline__ void init(int consumers) const {
    PairRing<STAGES>::init(consumers);
    for (int slot = 0; slot < STAGES; slot++) mbarrier_init(weighed(slot), ARRIVALS_A_WARP);
  }
  __device__ __forceinline__ void wait_for_copies(const RingPosition<STAGES> &at) const { PairRing<STAGES>::wait(at); }
  __device__ __forceinline__ void wait(const RingPosition<STAGES> &at) const {
    wait_for_copies(at);
    mbarrier_wait(weighed(at.slot), at.parity);
  }
};

template <int PADDED_D, int PADDED_E>
struct UpdateTiles {
  static constexpr int D_TILES = PADDED_D / 64, E_TILES = PADDED_E / 64;
  static constexpr int FEATURE_TILES = PADDED_D / FEATURE_TILE;
  static constexpr int BLOCKS_A_HEAD = FEATURE_TILES / 2 * (FEATURE_TILE / 2); /* two J, two β */
  static constexpr int BETAS = E_TILES;                                        /* of a warpgroup */
  static constexpr int MOMENT_HEADS = 2 / D_TILES;                             /* of a block that keeps moments */
  /* Slices whose products go together, and are made ready while those of the group before run: two hide the latency of loading and multiplying, one
   * is what 136 accumulators leave registers for. */
  static constexpr int GROUP = PADDED_D + PADDED_E == 256 ? 1 : 2;
  static constexpr int TILES_A_STEP = 2 * BETAS / GROUP == 1 ? 2 : 1; /* an even number of groups, to alternate between two sets of fragments */
  static constexpr int WEIGHTED_BYTES = 2 * 128;                               /* two feature rows of one J */
  static constexpr int STAGE_BYTES = (D_TILES + E_TILES) * TILE_BYTES + 1024;
  static constexpr int STAGES = STAGE_BYTES > 32768 ? 5 : STAGE_BYTES > 24576 ? 7 : 8;
  static constexpr int FEATURES_AT = (D_TILES + E_TILES) * TILE_BYTES, WEIGHTS_AT = FEATURES_AT + 2 * WEIGHTED_BYTES; /* within a stage */
  static constexpr int SMEM_BYTES = 1024 + STAGES * STAGE_BYTES + FeatureRing<STAGES>::BYTES;
  static int blocks(int heads) { return heads * BLOCKS_A_HEAD + (heads + 2 * MOMENT_HEADS - 1) / (2 * MOMENT_HEADS) * 2; }
};

/* A chunk's decay and the bound of what its tokens add, in two steps: `ChunkTerms` starts the loads, which take a thousand cycles; `factors` is what uses
 * them (adding up behind the loads what each lane holds made every chunk wait for them). */
struct ChunkTerms {
  float sum, weight; /* weight: this lane's part */
  __device__ __forceinline__ ChunkTerms(const UpdateParams &p, int head, int chunk, int lane) {
    sum = p.chunk_sum[head * p.z.chunks + chunk], weight = 0.f;
    const float *parts = p.weight + (int64_t(head) * p.group * p.z.chunks + chunk) * p.weight_parts + lane;
    if (lane < p.weight_parts) weight = parts[0];
#pragma unroll 1
    for (int member = 0; member < p.group; member++, parts += int64_t(p.z.chunks) * p.weight_parts)
#pragma unroll 1
      for (int first = member == 0 ? 32 : 0; first < p.weight_parts; first += 32) /* as often in every lane, or the warp counts as split */
        if (first + lane < p.weight_parts) weight += parts[first];
  }
  /* Decay, bound: the same in every lane. */
  __device__ __forceinline__ float2 factors() const {
    float total = weight;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
    return make_float2(exp2f(sum), total);
  }
};

/* The scan over chunks, the same for both kinds of block: `store(chunk, bound)` before a chunk, `decay(factor)` of the accumulators, `accumulate(slot,
 * part, undrained)` per tile, `part` of TILES_A_STEP, which releases the slot of the tile before when its products have ended. Returns the decay over all chunks. */
template <int STAGES, int TILES_A_STEP, class Ring, class Store, class Decay, class Accumulate>
__device__ __forceinline__ float scan_chunks(const UpdateParams &p, const Ring &ring, int head, float bound, bool has_first, int lane,
                                             Store store, Decay decay, Accumulate accumulate) {
  RingPosition<STAGES> at;
  float total_decay = 1.f;
  float2 factors = ChunkTerms(p, head, p.reverse ? p.z.chunks - 1 : 0, lane).factors();
#pragma unroll 1
  for (int step = 0; step < p.z.chunks; step++) {
    const int chunk = p.reverse ? p.z.chunks - 1 - step : step;
    if (step > 0 || has_first) store(chunk, bound);
    if (step == p.summed) break;
    bound = bound * factors.x + factors.y, total_decay *= factors.x;
    decay(factors.x);
    const ChunkTerms next(p, head, step + 1 == p.summed ? chunk : p.reverse ? chunk - 1 : chunk + 1, lane);
    int undrained = -1;
#pragma unroll 1
    for (int tile = 0; tile < p.group * p.z.chunk_tiles; tile += TILES_A_STEP) {
#pragma unroll
      for (int part = 0; part < TILES_A_STEP; part++) {
        ring.wait(at);
        accumulate(at.slot, part, undrained);
        undrained = at.slot;
        at.advance();
      }
    }
    factors = next.factors(); /* while the last products run */
    wgmma_wait<0>();
    ring.release(undrained);
  }
  return total_decay;
}

/* A lane's copy of every tile: `source` + (tile of its head of x) · tile_bytes → slot + offset, in both blocks of the cluster if `to_both`. */
struct TileCopy {
  const void *source = nullptr;
  int64_t tile_bytes = 0;
  uint32_t offset = 0, bytes = 0;
  bool to_both = false;
};

/* The loading warp. Every lane owns at most one copy a tile, its addresses worked out once: a single lane that issued them all took twice
 * as long as the products (NOTES, "Chunked CUDA"). */
template <int STAGES, int STAGE_BYTES, class Ring>
__device__ __forceinline__ void load_tiles(const UpdateParams &p, const Ring &ring, uint32_t stages_smem, int head, const TileCopy &copy) {
  const int lane = threadIdx.x & 31;
  uint32_t total = copy.to_both ? 2 * copy.bytes : copy.bytes;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(~0u, total, distance);
  RingPosition<STAGES> at;
  for (int step = 0; step < p.summed; step++) {
    const int chunk = p.reverse ? p.z.chunks - 1 - step : step;
    for (int member = 0; member < p.group; member++) {
      const int64_t first_tile = int64_t(head * p.group + member) * p.z.tiles + chunk * p.z.chunk_tiles;
      const char *from = static_cast<const char *>(copy.source) + first_tile * copy.tile_bytes;
#pragma unroll 1
      for (int i = 0; i < p.z.chunk_tiles; i++, from += copy.tile_bytes) {
        if (lane == 0) ring.acquire(at, total);
        __syncwarp();
        const uint32_t to = stages_smem + at.slot * STAGE_BYTES + copy.offset;
        if (copy.to_both) bulk_load_to_both(to, from, copy.bytes, ring.full(at.slot));
        else if (copy.bytes > 0) bulk_load(to, from, copy.bytes, ring.full(at.slot));
        at.advance();
      }
    }
  }
}

/* The weighing warp: in every tile, the features 8j + first_beta and the next of both feature tiles, times w, rounded, in token_order. A lane takes two
 * neighbouring tokens. */
template <int PADDED_D, int PADDED_E>
__device__ __forceinline__ void weigh_features(const UpdateParams &p, const FeatureRing<UpdateTiles<PADDED_D, PADDED_E>::STAGES> &ring,
                                               uint32_t stages_smem, int j_high, int j_low, int first_beta) {
  using T = UpdateTiles<PADDED_D, PADDED_E>;
  const int lane = threadIdx.x & 31, token = 2 * lane;
  const uint32_t to = T::FEATURES_AT + token_position(token) * 2;
  const auto word = [&](int j) { return (j / 8) * TILE_BYTES + swizzled(token, j % 8) + first_beta * 2; };
  const auto next_word = [&](int j) { return (j / 8) * TILE_BYTES + swizzled(token + 1, j % 8) + first_beta * 2; };
  const uint32_t from[2][2] = {{word(j_high), next_word(j_high)}, {word(j_low), next_word(j_low)}};
  RingPosition<T::STAGES> at;
  const int tiles = p.summed * p.group * p.z.chunk_tiles;
#pragma unroll 1
  for (int tile = 0; tile < tiles; tile++) {
    ring.wait_for_copies(at);
    const uint32_t slot = stages_smem + at.slot * T::STAGE_BYTES;
    const uint2 bits = load_shared_64(slot + T::WEIGHTS_AT + lane * 8);
    const float w = __uint_as_float(bits.x), next_w = __uint_as_float(bits.y);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float2 x = Pair<__half>::unpack(load_shared_32(slot + from[i][0])), next_x = Pair<__half>::unpack(load_shared_32(slot + from[i][1]));
      store_shared_32(slot + to + i * T::WEIGHTED_BYTES, Pair<__half>::pack(x.x * w, next_x.x * next_w));
      store_shared_32(slot + to + i * T::WEIGHTED_BYTES + 128, Pair<__half>::pack(x.y * w, next_x.y * next_w));
    }
    __syncwarp();
    if (ARRIVALS_A_WARP == 32 || lane == 0) mbarrier_arrive(ring.weighed(at.slot));
    at.advance();
  }
}

/* A fragments: yᵀ with token t times factors[t], 64 float16 in token_order (chunked_layout.cuh) that all rows share. */
__device__ __forceinline__ void weigh_tokens(uint32_t (&a)[4][4], const uint32_t (&y)[4][4], uint32_t factors, const Lane &at) {
  const uint4 first = load_shared_128(factors + at.quad * 32), second = load_shared_128(factors + at.quad * 32 + 16);
  const uint32_t pairs[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
  for (int s = 0; s < 4; s++)
#pragma unroll
    for (int i = 0; i < 4; i++) a[s][i] = Pair<__half>::multiply(y[s][i], pairs[2 * s + i / 2]);
}

/* One warpgroup's slices of a head: columns of y from `y_tile` · 64 on, features 8 j_high + β and 8 j_low + β, β from `beta` on. A tile beyond the
 * head's features (j ≥ feature_tiles) is computed on zeros and not written. */
template <int PADDED_D, int PADDED_E, int HIGH_COLUMNS, int LOW_COLUMNS>
__device__ __forceinline__ void update_slices(const UpdateParams &p, const FeatureRing<UpdateTiles<PADDED_D, PADDED_E>::STAGES> &ring, uint32_t stages_smem,
                                              int head, int j_high, int j_low, int beta, int first_beta, int y_tile, bool writes_units) {
  using T = UpdateTiles<PADDED_D, PADDED_E>;
  constexpr int BETAS = T::BETAS;
  const Lane lane;
  const int heads = p.z.b * p.z.h_kv, element = head / p.z.h_kv, own = head % p.z.h_kv;
  const int row = y_tile * 64 + lane.warp * 16 + lane.group; /* of yᵀ, and row + 8 */
  float high[BETAS][HIGH_COLUMNS / 2], low[BETAS][LOW_COLUMNS / 2];
  uint32_t y[4][4], a[2][T::GROUP][4][4];

  auto each_slice = [&](auto visit) {
#pragma unroll
    for (int i = 0; i < BETAS; i++) visit(high[i], j_high, beta + i), visit(low[i], j_low, beta + i);
  };
  /* Visits (accumulator, element of the public state, whether I = J) of every entry that the caller's state has. */
  auto each_entry = [&](auto visit) {
    each_slice([&](auto &slice, int j, int b) {
      int element = (j * 64 + lane.quad * 16 + b) * p.z.e + row; /* of pair (0, j), α = 2 · quad */
#pragma unroll
      for (int i = 0; i < int(sizeof(slice) / 16); i++) {
        if (i <= j && j < p.z.feature_tiles) {
#pragma unroll
          for (int n = 0; n < 4; n++) { /* α + 1 if n is odd, column row + 8 if n ≥ 2 */
            const int column = n / 2 * 8;
            if (row + column < p.z.e) visit(slice[4 * i + n], element + n % 2 * 8 * p.z.e + column, i == j);
          }
        }
        __syncwarp(); /* a few entries at a time, or their addresses spill */
        element += (p.z.feature_tiles - i - 1) * 64 * p.z.e;
      }
    });
  };

  int s_exponent, z_exponent;
  state_exponents(p, head, s_exponent, z_exponent);
  const int64_t state_size = int64_t(p.z.pairs) * 64 * p.z.e;
  /* A gradient is of the public rows; accumulators are without multiplicity, which the query puts on them. */
  const float in_factor = power_of_two(s_exponent), off_diagonal = p.reverse ? 2.f : 1.f;
  each_slice([&](auto &slice, int, int) {
#pragma unroll
    for (int n = 0; n < int(sizeof(slice) / 4); n++) slice[n] = 0.f;
  });
  if (p.s_in != nullptr)
    each_entry([&](float &value, int element, bool diagonal) {
      value = p.s_in[head * state_size + element] * (diagonal ? in_factor : in_factor / off_diagonal);
    });
  const float first_bound = p.s_in == nullptr ? 0.f : __uint_as_float(p.maxima.s[head]) * in_factor * power_of_two(-p.state_bits);

  scan_chunks<T::STAGES, T::TILES_A_STEP>(
      p, ring, head, first_bound, p.s_in != nullptr, lane.lane,
      [&](int chunk, float bound) {
        const int unit = state_unit(bound, p.state_bits);
        if (writes_units && (threadIdx.x & 127) == 0) p.state_units[chunk * heads + head] = unit;
        const float factor = power_of_two(-unit);
        __half *states = p.states.at(p.z, chunk, element, own, int64_t(p.z.pairs) * 64 * PADDED_E) + row * 8 + lane.quad * 2;
        each_slice([&](auto &slice, int j, int b) {
          pin(slice);
          __half *tile = states + (j * (j + 1) / 2 * 8 + b) * (8 * PADDED_E);
#pragma unroll
          for (int i = 0; i < int(sizeof(slice) / 16); i++) {
            if (i > j || j >= p.z.feature_tiles) continue;
            const float unit_factor = i == j ? factor : 2.f * factor;
            uint32_t *to = reinterpret_cast<uint32_t *>(tile + i * (64 * PADDED_E));
            to[0] = Pair<__half>::pack(slice[4 * i] * unit_factor, slice[4 * i + 1] * unit_factor);
            to[32] = Pair<__half>::pack(slice[4 * i + 2] * unit_factor, slice[4 * i + 3] * unit_factor);
          }
        });
      },
      [&](float factor) {
        each_slice([&](auto &slice, int, int) {
#pragma unroll
          for (int n = 0; n < int(sizeof(slice) / 4); n++) slice[n] *= factor;
        });
      },
      [&](int slot, int part, int undrained) {
        const uint32_t rows = stages_smem + slot * T::STAGE_BYTES, values = rows + T::D_TILES * TILE_BYTES;
        const uint32_t weighted = rows + T::FEATURES_AT + (beta - first_beta) * 128;
        const uint64_t b = matrix_descriptor(rows, 1024, TILE_BYTES);
        load_fragments_transposed(y, values + y_tile * TILE_BYTES, lane);
        /* Slice n of the warpgroup: β = n / 2, the high J if n is even. */
#pragma unroll
        for (int first = 0; first < 2 * BETAS; first += T::GROUP) {
          uint32_t(&fragments)[T::GROUP][4][4] = a[(part * 2 * BETAS + first) / T::GROUP % 2]; /* the products that read them have ended */
#pragma unroll
          for (int n = first; n < first + T::GROUP; n++) {
            weigh_tokens(fragments[n - first], y, weighted + n % 2 * T::WEIGHTED_BYTES + n / 2 * 128, lane);
            pin(fragments[n - first]);
            if (n % 2 == 0) pin(high[n / 2]);
            else pin(low[n / 2]);
          }
          wgmma_fence();
#pragma unroll
          for (int n = first; n < first + T::GROUP; n++)
#pragma unroll
            for (int s = 0; s < 4; s++) {
              if (n % 2 == 0) Wgmma<HIGH_COLUMNS, __half>::template rs<MN_MAJOR>(high[n / 2], fragments[n - first][s], b + descriptor_offset(s * 2048), 1);
              else Wgmma<LOW_COLUMNS, __half>::template rs<MN_MAJOR>(low[n / 2], fragments[n - first][s], b + descriptor_offset(s * 2048), 1);
            }
          wgmma_commit();
          wgmma_wait<1>();
          if (first == 0 && undrained >= 0) ring.release(undrained);
        }
      });
  if (p.s_out == nullptr) return;
  each_slice([&](auto &slice, int, int) { pin(slice); });
  const float out_factor = power_of_two(-s_exponent);
  each_entry([&](float &value, int element, bool diagonal) {
    p.s_out[head * state_size + element] = value * (diagonal ? out_factor : out_factor * off_diagonal);
  });
}

/* Calls update_slices with the widths of the block's two feature tiles; HIGH counts down to `j_high`. */
template <int PADDED_D, int PADDED_E, int HIGH = PADDED_D / FEATURE_TILE - 1, class... Arguments>
__device__ __forceinline__ void dispatch_slices(const UpdateParams &p, int j_high, Arguments... arguments) {
  constexpr int TILES = PADDED_D / FEATURE_TILE;
  if (j_high >= p.z.feature_tiles) {
    if constexpr (HIGH == TILES - 1) update_slices<PADDED_D, PADDED_E, 8, PADDED_D / 2>(p, arguments...);
  } else if (j_high == HIGH) {
    update_slices<PADDED_D, PADDED_E, 8 * (HIGH + 1), 8 * (TILES - HIGH)>(p, arguments...);
  } else if constexpr (HIGH > TILES / 2) {
    dispatch_slices<PADDED_D, PADDED_E, HIGH - 1>(p, j_high, arguments...);
  }
}

/* 64 rows of the moments of features x (rows: 64·row_tile + row) and y (columns) of one head, from and to the public z, which has I ≤ J only; of a
 * diagonal block, whose (α, β) and (β, α) meet the same q_α q_β, the symmetric half, to which the other half is added when z leaves. A gradient of
 * z is of one of its rows; moments off the diagonal count such a row twice. `rows_offset`, `weights_offset`: of the head's tile within a stage. */
template <int PADDED_D, int PADDED_E>
__device__ __forceinline__ void update_moments(const UpdateParams &p, const Ring<UpdateTiles<PADDED_D, PADDED_E>::STAGES> &ring, uint32_t stages_smem,
                                               int head, int row_tile, uint32_t rows_offset, uint32_t weights_offset, bool real) {
  using T = UpdateTiles<PADDED_D, PADDED_E>;
  const Lane lane;
  const int heads = p.z.b * p.z.h_kv, row = lane.warp * 16 + lane.group;
  float acc[PADDED_D / 2];
  uint32_t x[4][4], a[4][4];
  int s_exponent, z_exponent;
  state_exponents(p, head, s_exponent, z_exponent);
  const int64_t state_rows = int64_t(p.z.pairs) * 64;
  const float *z_in = p.z_in == nullptr ? nullptr : p.z_in + head * state_rows;
  float *z_out = p.z_out == nullptr ? nullptr : p.z_out + head * state_rows;
  const float in_factor = power_of_two(z_exponent), out_factor = power_of_two(-z_exponent), rows_of_off_diagonal = p.reverse ? 2.f : 1.f;
  auto z_row = [&](int x, int y) { return public_pair(x / 8, y / 8, p.z.feature_tiles) * 64 + (x % 8) * 8 + y % 8; };
  auto each = [&](auto visit) {
#pragma unroll
    for (int i = 0; i < PADDED_D / 2; i++) {
      visit(acc[i], row_tile * 64 + row + ((i & 2) ? 8 : 0), (i / 4) * 8 + lane.quad * 2 + (i & 1));
      if (i % 4 == 3) asm volatile("" ::: "memory"); /* four loads at a time, or their addresses spill */
    }
  };
  each([&](float &value, int x, int y) {
    value = 0.f;
    if (z_in == nullptr || x >= p.z.d || y >= p.z.d) return;
    value = x / 8 == y / 8 ? 0.5f * (z_in[z_row(x, y)] + z_in[z_row(y, x)]) : z_in[x < y ? z_row(x, y) : z_row(y, x)] / rows_of_off_diagonal;
    value *= in_factor;
  });
  const float first_bound = z_in == nullptr ? 0.f : __uint_as_float(p.maxima.z[head]) * in_factor * power_of_two(-p.moment_bits);
  const float total_decay = scan_chunks<T::STAGES, 1>(
      p, ring, head, first_bound, z_in != nullptr, lane.lane,
      [&](int chunk, float bound) {
        pin(acc);
        if (!real) return;
        const int unit = state_unit(bound, p.moment_bits);
        const float factor = power_of_two(-unit);
        if (row_tile == 0 && (threadIdx.x & 127) == 0) p.moment_units[chunk * heads + head] = unit;
        char *moments = reinterpret_cast<char *>(p.moments + (int64_t(chunk * heads + head) * T::D_TILES + row_tile) * T::D_TILES * 4096);
#pragma unroll
        for (int n = 0; n < PADDED_D / 8; n++) {
          char *tile = moments + (n / 8) * TILE_BYTES + lane.quad * 4;
          *reinterpret_cast<uint32_t *>(tile + swizzled(row, n % 8)) = Pair<__half>::pack(acc[4 * n] * factor, acc[4 * n + 1] * factor);
          *reinterpret_cast<uint32_t *>(tile + swizzled(row + 8, n % 8)) = Pair<__half>::pack(acc[4 * n + 2] * factor, acc[4 * n + 3] * factor);
        }
      },
      [&](float factor) {
#pragma unroll
        for (int i = 0; i < PADDED_D / 2; i++) acc[i] *= factor;
      },
      [&](int slot, int, int undrained) {
        const uint32_t rows = stages_smem + slot * T::STAGE_BYTES + rows_offset;
        load_fragments_transposed(x, rows + row_tile * TILE_BYTES, lane);
        wgmma_wait<0>();
        if (undrained >= 0) ring.release(undrained);
        weigh_tokens(a, x, stages_smem + slot * T::STAGE_BYTES + weights_offset, lane);
        pin(a);
        pin(acc);
        wgmma_fence();
        const uint64_t b = matrix_descriptor(rows, 1024, TILE_BYTES);
#pragma unroll
        for (int s = 0; s < 4; s++) Wgmma<PADDED_D, __half>::template rs<MN_MAJOR>(acc, a[s], b + descriptor_offset(s * 2048), 1);
        wgmma_commit();
      });
  pin(acc);
  if (z_out == nullptr || !real) return;
  each([&](float &value, int x, int y) {
    if (x >= p.z.d || y >= p.z.d || x / 8 > y / 8) return;
    const bool diagonal = x / 8 == y / 8;
    const float other_half = diagonal && z_in != nullptr ? 0.5f * (z_in[z_row(x, y)] - z_in[z_row(y, x)]) * total_decay : 0.f;
    z_out[z_row(x, y)] = value * out_factor * (diagonal ? 1.f : rows_of_off_diagonal) + other_half;
  });
}

template <int PADDED_D, int PADDED_E>
__global__ void __cluster_dims__(2) __launch_bounds__(UPDATE_THREADS, 1) update_state_kernel(const __grid_constant__ UpdateParams p) {
  using T = UpdateTiles<PADDED_D, PADDED_E>;
  constexpr uint32_t D_BYTES = T::D_TILES * TILE_BYTES, E_BYTES = T::E_TILES * TILE_BYTES, WEIGHTS_BYTES = TILE * 2;
  extern __shared__ uint8_t smem_raw[];
  const uint32_t stages_smem = (smem_address(smem_raw) + 1023) & ~1023u, barriers = stages_smem + T::STAGES * T::STAGE_BYTES;
  const Ring<T::STAGES> ring{barriers};
  const FeatureRing<T::STAGES> feature_ring(barriers);
  const int group = __shfl_sync(~0u, int(threadIdx.x) >> 7, 0), lane = threadIdx.x & 31, heads = p.z.b * p.z.h_kv;
  const int moment_block = int(blockIdx.x) - heads * T::BLOCKS_A_HEAD;
  const int set = blockIdx.x % T::BLOCKS_A_HEAD, j_high = T::FEATURE_TILES - 1 - set / 4, j_low = set / 4, first_beta = set % 4 * 2;
  if (threadIdx.x == 0) {
    if (moment_block < 0) feature_ring.init(8);
    else ring.init(8);
    mbarrier_init_fence();
  }
  cluster_sync();

  if (group == 2) {
    registers_lower<40>();
    if (threadIdx.x >= 2 * 128 + 32) {
      if (threadIdx.x < 2 * 128 + 64 && moment_block < 0)
        weigh_features<PADDED_D, PADDED_E>(p, feature_ring, stages_smem, j_high, j_low, first_beta);
    } else {
      TileCopy copy;
      int head = blockIdx.x / T::BLOCKS_A_HEAD;
      if (moment_block < 0) {
        constexpr uint32_t PARTS = ARRIVALS_A_WARP == 32 ? 1 : 2;
        const uint32_t part = PARTS == 1 ? 0 : cluster_rank();
        if (lane == 0) copy = {p.rows + part * (D_BYTES / 4), D_BYTES, part * (D_BYTES / 2), D_BYTES / PARTS, PARTS == 2};
        if (lane == 1) copy = {p.values + part * (E_BYTES / 4), E_BYTES, D_BYTES + part * (E_BYTES / 2), E_BYTES / PARTS, PARTS == 2};
        if (lane == 2) copy = {p.token_weights, TILE * 4, T::WEIGHTS_AT, TILE * 4, false};
        load_tiles<T::STAGES, T::STAGE_BYTES>(p, feature_ring, stages_smem, head, copy);
      } else {
        const uint32_t member = lane / 2;
        head = min(moment_block * T::MOMENT_HEADS + int(member), heads - 1);
        if (member < T::MOMENT_HEADS && lane % 2 == 0) copy = {p.rows, D_BYTES, member * D_BYTES, D_BYTES, false};
        if (member < T::MOMENT_HEADS && lane % 2 == 1)
          copy = {p.moment_weights, WEIGHTS_BYTES, T::MOMENT_HEADS * D_BYTES + member * WEIGHTS_BYTES, WEIGHTS_BYTES, false};
        load_tiles<T::STAGES, T::STAGE_BYTES>(p, ring, stages_smem, head, copy);
      }
    }
  } else {
    registers_raise<232>();
    if (moment_block < 0) {
      const int beta = T::E_TILES == 1 ? first_beta + group : first_beta, y_tile = T::E_TILES == 1 ? 0 : group;
      dispatch_slices<PADDED_D, PADDED_E>(p, j_high, feature_ring, stages_smem, blockIdx.x / T::BLOCKS_A_HEAD, j_high, j_low, beta, first_beta, y_tile,
                                          set == 0 && group == 0);
    } else {
      const int member = T::MOMENT_HEADS == 1 ? 0 : group, head = moment_block * T::MOMENT_HEADS + member;
      update_moments<PADDED_D, PADDED_E>(p, ring, stages_smem, min(head, heads - 1), T::MOMENT_HEADS == 1 ? group : 0, member * D_BYTES,
                                         T::MOMENT_HEADS * D_BYTES + member * WEIGHTS_BYTES, head < heads);
    }
  }
  cluster_sync();
}

}  // namespace power
