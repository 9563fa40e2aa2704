/* The derivative of x ↦ Σ_{I ≤ J} Σ_{αβ} x[8I + α] x[8J + β] U_IJ[αβ], U_IJ = S_IJ g, which both gradients of the state products are:
 *   dq^: x = q^, g = dy^, S the state before the chunk         dk^: x = k^, g = v^, S the state gradient behind it
 * U is a plain product with the state tile as an MN-major B; its accumulators (row of x; β = n, α = 2·quad + {0, 1}) are then contracted
 * with x in float32, once from each side:
 *   dx[8I + α] += Σ_β U[αβ] x[8J + β]        dx[8J + β] += Σ_α U[αβ] x[8I + α]
 * 2·64·64 multiply-adds on the CUDA cores beside 64³ on the matrix unit, instead of 1.8 times the matrix work of an A = x ⊗ g product.
 * Pairs come in the order in which they are stored, I ≤ J inside. dx lives in shared memory, one float32 slot a thread and column pair (no
 * sharing, so no barrier); the sums over α for the current J stay in registers until I has passed.
 */
#pragma once
#include "chunked_layout.cuh"

namespace power {

/* Producer: the state tiles of one head and chunk; for consumers with two sets (contract_pairs) an even number of them, the last twice if need be, so that
 * they can alternate between two accumulators without a condition. */
template <int SETS, int PADDED_E, class Fill>
__device__ __forceinline__ void load_pairs(const __half *states, int pairs, Fill fill) {
  for (int pair = 0; pair < (pairs + SETS - 1) / SETS * SETS; pair++)
    fill(states + int64_t(min(pair, pairs - 1)) * 64 * PADDED_E, StateTile<PADDED_E>::BYTES);
}

template <int PADDED_D>
struct Contraction {
  static constexpr int PITCH = PADDED_D + 8; /* floats; 8 rows on different banks */
  static constexpr int BYTES = TILE * PITCH * 4;

  int feature_tiles;
  /* Of this thread's row of x, in swizzled float16: its first piece, and in that its pair of α; of dx, in float32: its slot of feature tile 0. */
  uint32_t j_row, i_row, slot_row;
  int i = 0, j = 0; /* the pair to be contracted next, in the order in which states are stored */
  float x_j[2][8], dx_j[2][8];
  float2 x_i[2], dx_i[2]; /* fetched for that pair: features of tile I, and their slots */

  /* `slots`: this warpgroup's dx, [64][PITCH]. */
  __device__ __forceinline__ Contraction(uint32_t x_tile, uint32_t slots, int feature_tiles, const Lane &at) : feature_tiles(feature_tiles) {
    const int row = at.warp * 16 + at.group;
    j_row = x_tile + swizzled(row, 0), i_row = j_row + at.quad * 4, slot_row = slots + row * (PITCH * 4) + at.quad * 8;
    keep(j_row), keep(i_row), keep(slot_row);
  }
  __device__ __forceinline__ uint32_t i_piece() const { return row_piece<PADDED_D / 64>(i_row, i); }
  __device__ __forceinline__ uint32_t j_piece() const { return row_piece<PADDED_D / 64>(j_row, j); }

  /* dx of row `r` (0, or 1 for eight on) and this thread's two columns of a feature tile. */
  __device__ __forceinline__ float2 slot(int r, int tile) const {
    const uint2 bits = load_shared_64(slot_row + r * (8 * PITCH * 4) + tile * 32);
    return make_float2(__uint_as_float(bits.x), __uint_as_float(bits.y));
  }
  __device__ __forceinline__ void set_slot(int r, int tile, float2 dx) const {
    store_shared_64(slot_row + r * (8 * PITCH * 4) + tile * 32, make_uint2(__float_as_uint(dx.x), __float_as_uint(dx.y)));
  }

  __device__ __forceinline__ void load_j() {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const uint4 x = load_shared_128(j_piece() + r * 1024);
      const float2 a = Pair<__half>::unpack(x.x), b = Pair<__half>::unpack(x.y), c = Pair<__half>::unpack(x.z), d = Pair<__half>::unpack(x.w);
      x_j[r][0] = a.x, x_j[r][1] = a.y, x_j[r][2] = b.x, x_j[r][3] = b.y, x_j[r][4] = c.x, x_j[r][5] = c.y, x_j[r][6] = d.x, x_j[r][7] = d.y;
#pragma unroll
      for (int beta = 0; beta < 8; beta++) dx_j[r][beta] = 0.f;
    }
  }

  /* Sums dx_j over the four lanes of a row, leaving β = 2·quad + {0, 1} in each, and adds it to its slots. */
  __device__ __forceinline__ void flush_j(const Lane &at) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const bool high = at.quad & 2, odd = at.quad & 1;
      float four[4], two[2];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const float keep = high ? dx_j[r][4 + k] : dx_j[r][k], give = high ? dx_j[r][k] : dx_j[r][4 + k];
        four[k] = keep + __shfl_xor_sync(~0u, give, 2);
      }
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const float keep = odd ? four[2 + k] : four[k], give = odd ? four[k] : four[2 + k];
        two[k] = keep + __shfl_xor_sync(~0u, give, 1);
      }
      const float2 dx = slot(r, j);
      set_slot(r, j, make_float2(dx.x + two[0], dx.y + two[1]));
    }
  }

  __device__ __forceinline__ void fetch() {
    const uint32_t piece = i_piece();
#pragma unroll
    for (int r = 0; r < 2; r++) x_i[r] = Pair<__half>::unpack(load_shared_32(piece + r * 1024)), dx_i[r] = slot(r, i);
  }

  /* Contracts one pair's U, what `fetch` brought being of that pair, and moves on. */
  __device__ __forceinline__ void add(const float (&u)[32], const Lane &at) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float2 x = x_i[r];
      float2 dx = dx_i[r];
#pragma unroll
      for (int beta = 0; beta < 8; beta++) {
        const float u0 = u[4 * beta + 2 * r], u1 = u[4 * beta + 2 * r + 1];
        dx_j[r][beta] = fmaf(u1, x.y, fmaf(u0, x.x, dx_j[r][beta])); /* two instructions; a sum of two products would be three */
        dx.x = fmaf(u0, x_j[r][beta], dx.x), dx.y = fmaf(u1, x_j[r][beta], dx.y);
      }
      set_slot(r, i, dx);
    }
    if (i == j) {
      flush_j(at);
      i = 0, j++;
      if (j < feature_tiles) load_j();
    } else {
      i++;
    }
  }
};

/* Consumers: over the pairs that load_pairs brings, `start(set)` begins and commits the products of the next pair, U in u[set]; when they have ended, `release()`
 * frees the pair's slot and U is contracted. With two sets the first pair's U is used while the second's products run; the second's leave
 * the matrix unit to the other warpgroup, and what a contraction reads is fetched before its wait. U carried over the loop's end would hide that too,
 * but ptxas then serialises every product (warning C7514). Where registers are for one set, other warpgroups fill the matrix unit meanwhile. Of each start's
 * groups of products the last BEHIND do not give U and may run on while it is contracted. */
template <int SETS, int BEHIND, class Contraction, class Start, class Release>
__device__ __forceinline__ void contract_pairs(int pairs, Contraction &contraction, float (&u)[SETS][32], const Lane &at, Start start, Release release) {
  using First = std::integral_constant<int, 0>;
  using Second = std::integral_constant<int, SETS - 1>;
  auto finish = [&](auto set, bool real) {
    pin(u[set.value]);
    release();
    if (real) contraction.add(u[set.value], at);
  };
  if constexpr (SETS == 1) {
#pragma unroll 1
    for (int pair = 0; pair < pairs; pair++) {
      start(First{});
      contraction.fetch();
      wgmma_wait<BEHIND>();
      pin(u[0]);
      contraction.add(u[0], at);
      if (BEHIND > 0) wgmma_wait<0>();
      release();
    }
  } else {
#pragma unroll 1
    for (int pair = 0; pair < pairs; pair += 2) {
      start(First{});
      start(Second{});
      contraction.fetch();
      wgmma_wait<1 + BEHIND>();
      finish(First{}, true);
      contraction.fetch();
      wgmma_wait<0>();
      finish(Second{}, pair + 1 < pairs);
    }
  }
}

/* 64 rows of g as the A operand of products over e: fragments, kept, for e ≤ 64; wider ones are left in shared memory, at twice the
 * traffic, for want of registers. */
template <int E_TILES>
struct RowOperand {
  uint32_t rows, fragments[4][4];
  __device__ __forceinline__ RowOperand(uint32_t rows, const Lane &at) : rows(rows) {
    if constexpr (E_TILES == 1) load_fragments(fragments, rows, at);
  }
  /* Starts u = g Bᵀ; `b(step)` describes 64 columns of B for 16 of e. (One descriptor an operand, advanced: made anew each takes four instructions.) */
  template <Major MAJOR, class Describe>
  __device__ __forceinline__ void times(float (&u)[32], Describe b) {
    const uint64_t a = matrix_descriptor(rows);
#pragma unroll
    for (int s = 0; s < 4 * E_TILES; s++) {
      if constexpr (E_TILES == 1) Wgmma<64, __half>::template rs<MAJOR>(u, fragments[s], b(s), s > 0);
      else Wgmma<64, __half>::template ss<K_MAJOR, MAJOR>(u, a + descriptor_offset((s / 4) * TILE_BYTES + s % 4 * 32), b(s), s > 0);
    }
  }
  __device__ __forceinline__ void times_rows(float (&u)[32], uint32_t tile) {
    const uint64_t b = matrix_descriptor(tile);
    times<K_MAJOR>(u, [=](int s) { return b + descriptor_offset((s / 4) * TILE_BYTES + s % 4 * 32); });
  }
  __device__ __forceinline__ void times_state(float (&u)[32], uint32_t tile) {
    times<MN_MAJOR>(u, [=](int s) { return StateTile<64 * E_TILES>{tile}.columns(s); });
  }
  __device__ __forceinline__ void hold() {
    if constexpr (E_TILES == 1) pin(fragments);
  }
};

/* <x, dx> of the two rows this thread shares, in every one of the row's four lanes: x in shared memory, dx in accumulators. */
template <int PADDED>
__device__ __forceinline__ void row_products(float (&products)[2], const float (&dx)[PADDED / 2], uint32_t x_tile, const Lane &at) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < PADDED / 8; n++) {
      const int row = at.warp * 16 + at.group + 8 * r;
      const float2 x = Pair<__half>::unpack(load_shared_32(x_tile + (n / 8) * TILE_BYTES + swizzled(row, n % 8) + at.quad * 4));
      sum += x.x * dx[4 * n + 2 * r] + x.y * dx[4 * n + 2 * r + 1];
    }
    products[r] = quad_sum(sum);
  }
}

/* Accumulators of a gradient times per-row factors, rounded, written as whole rows through this warp's 16 rows of `tile`. */
template <typename Out, int PADDED>
__device__ __forceinline__ void write_rows(const float (&acc)[PADDED / 2], const float (&factor)[2], uint32_t tile, const View &out,
                                           int64_t head_offset, int first_token, int t, int columns, const Lane &at) {
  const int row = at.warp * 16 + at.group;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < PADDED / 8; n++)
#pragma unroll
    for (int r = 0; r < 2; r++)
      store_shared_32(tile + (n / 8) * TILE_BYTES + swizzled(row + 8 * r, n % 8) + at.quad * 4,
                      Pair<Out>::pack(acc[4 * n + 2 * r] * factor[r], acc[4 * n + 2 * r + 1] * factor[r]));
  __syncwarp();
  constexpr int PIECES = PADDED / 8, ROWS_A_STEP = 32 / PIECES;
#pragma unroll
  for (int i = 0; i < 16 / ROWS_A_STEP; i++) {
    const int r = at.warp * 16 + i * ROWS_A_STEP + at.lane / PIECES, piece = at.lane % PIECES, token = first_token + r;
    if (token < t)
      store_piece<Out>(out, head_offset + token * out.time, piece * 8, columns, load_shared_128(tile + (piece / 8) * TILE_BYTES + swizzled(r, piece % 8)));
  }
}

}  // namespace power
