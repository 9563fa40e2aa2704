/* What the kernels of the chunked form share: array views, sizes, the workspace, scaling exponents.
 *
 * Inside, everything is float16 scaled by powers of two (exact for bfloat16 inputs, three bits better than bfloat16 for products):
 *   q^ = q · 2^a (a per row)    k^ = k · 2^κ    v^ = v · 2^ν    dy^ = dy · 2^δ     (κ, ν, δ per key-value head)
 * so  s^ = <q^, k^>,  num^ = Σ s^² γ v^ · 2^PS,  den^ = Σ s^² γ · 2^PS,  y = num^ / den^ · 2^−ν   with PS = score_exponent(d).
 *
 * Staged operands, tiles of 64 tokens, 128-byte swizzle, zero outside t, d and e, so that no kernel masks loads:
 *   [head][tile][⌈d/64⌉][64 tokens][64]
 * Weights per token in token_order: the order in which a lane of an A fragment needs them.
 * States before each chunk (behind it, for gradients), the B operands of the query: tile pair (I ≤ J) number J(J+1)/2 + I
 *   [chunk][head][pair][β][e padded to 64][α]  in units 2^σ, multiplicity folded in, without swizzle: eight by eight matrices of 128 bytes, whose
 *   columns (β, α) are feature x[8I + α] x[8J + β];  moments (normaliser) [chunk][head][⌈d/64⌉²][64][64]
 */
#pragma once
#include "../abi.h"
#include "../sm90/mbarrier.cuh"
#include "../sm90/registers.cuh"
#include "../sm90/tma.cuh"
#include "../sm90/wgmma.cuh"
#include "tiles.h"

namespace power {

using namespace sm90;

/* A [batch, time, head, feature] array of the caller's; strides in elements. */
struct View {
  char *data;
  int64_t batch, time, head, feature;
};

/* Gate sums, base-2 logarithms unless said otherwise, [head][tokens padded to tiles] and [head][chunks].
 * Nothing is a difference of long sums: strong decay keeps its digits (contract, "Chunked algorithm"). */
constexpr int TILE_FACTORS = TILE + 4; /* a multiple of 16 bytes, for the copy engine */

struct Gates {
  float *tile_prefix;  /* sum over the tile up to and with the token */
  float *tile_decay;   /* [head][tiles][TILE_FACTORS]: 2^(sum after the token to the tile's end), and behind them 2^(tile's sum) */
  float *chunk_prefix; /* sum over the chunk up to and with the token */
  float *chunk_decay;  /* 2^(sum after the token to the chunk's end): a key's weight in the chunk's update */
  float *chunk_sum;
  float *chunk_weight; /* Σ over the chunk of chunk_decay: bounds what the chunk adds to a state */
};

struct Sizes {
  int b, t, h_q, h_kv, d, e;
  int group, chunk, chunks, tiles, chunk_tiles; /* chunk_tiles · chunks = tiles */
  int pairs, feature_tiles, padded_d, padded_e;
  int measure_rows; /* of a block of measure_kernel: divides the chunk */
  int64_t tokens; /* per head, padded: 64 · tiles */
};

inline Sizes make_sizes(const PowerAttentionShape &s) {
  Sizes z;
  z.b = int(s.b), z.t = int(s.t), z.h_q = int(s.h_q), z.h_kv = int(s.h_kv), z.d = int(s.d), z.e = int(s.e);
  z.group = z.h_q / z.h_kv;
  z.chunk = chunk_length(s.t, z.d, z.e, s.dtype == POWER_FLOAT16);
  z.chunks = (z.t + z.chunk - 1) / z.chunk;
  z.chunk_tiles = z.chunk / TILE, z.tiles = z.chunks * z.chunk_tiles, z.tokens = int64_t(z.tiles) * TILE;
  z.measure_rows = z.chunk % 256 == 0 ? 256 : 192;
  z.feature_tiles = z.d / FEATURE_TILE, z.pairs = z.feature_tiles * (z.feature_tiles + 1) / 2;
  z.padded_d = z.d <= 64 ? 64 : 128, z.padded_e = z.e <= 64 ? 64 : 128;
  return z;
}

/* States, or state gradients, of the chunks: [chunk][head] in one array. Those of the chunks from `first_lent` on may be in what will be dk and dv of the
 * chunks before, two contiguous arrays [batch, time, head, feature]: of each batch element, as many whole states as fit one and then the other. */
struct StateStore {
  __half *states;
  int first_lent = 1 << 30;
  __half *lent[2] = {};
  int64_t batch[2] = {}, fit[2] = {}; /* elements from one batch element to the next; states that fit one */
  /* Of head `own` of batch element `element`. */
  __device__ __forceinline__ __half *at(const Sizes &z, int chunk, int element, int own, int64_t size) const {
    if (chunk < first_lent) return states + ((int64_t(chunk) * z.b + element) * z.h_kv + own) * size;
    const int64_t number = int64_t(chunk - first_lent) * z.h_kv + own;
    return number < fit[0] ? lent[0] + element * batch[0] + number * size : lent[1] + element * batch[1] + (number - fit[0]) * size;
  }
};

/* Largest magnitudes, as float bits (ordered like unsigned integers), per key-value head. */
struct Maxima {
  unsigned *k, *v, *dy, *s, *z;
};

/* Exponent x with largest · 2^x in [2^(range − 1), 2^range); 0 for an all-zero array. */
__device__ __forceinline__ int scaling_exponent(unsigned largest_bits, int range) {
  int exponent = int(largest_bits >> 23) - 127;
  return largest_bits == 0 ? 0 : min(max(range - 1 - exponent, -100), 100);
}
__device__ __forceinline__ float power_of_two(int exponent) { return exp2f(float(exponent)); }

/* Units of a state whose entries are below `bound` · 2^bits: the stored float16 is the value times 2^−unit, below 2^15. */
__device__ __forceinline__ int state_unit(float bound, int bits) { return bound > 0.f ? ilogbf(bound) + 1 + bits - 15 : 0; }

/* Number of the pair (I ≤ J) in the caller's state, which orders pairs lexicographically (here they are numbered J(J+1)/2 + I). */
__device__ __forceinline__ int public_pair(int i, int j, int feature_tiles) { return i * feature_tiles - i * (i - 1) / 2 + (j - i); }

/* Eight neighbouring 16-bit values of one row as they are in memory; columns at or beyond `columns` are zero. */
template <typename In>
__device__ __forceinline__ uint4 load_piece(const View &x, int64_t row_offset, int column, int columns) {
  if (column >= columns) return make_uint4(0, 0, 0, 0);
  const In *p = reinterpret_cast<const In *>(x.data) + row_offset + column * x.feature;
  if (x.feature == 1 && (reinterpret_cast<uintptr_t>(p) & 15) == 0) return *reinterpret_cast<const uint4 *>(p);
  uint4 r;
  uint16_t *values = reinterpret_cast<uint16_t *>(&r);
#pragma unroll
  for (int i = 0; i < 8; i++) values[i] = *reinterpret_cast<const uint16_t *>(p + i * x.feature);
  return r;
}
template <typename In>
__device__ __forceinline__ void store_piece(const View &x, int64_t row_offset, int column, int columns, uint4 r) {
  if (column >= columns) return;
  In *p = reinterpret_cast<In *>(x.data) + row_offset + column * x.feature;
  if (x.feature == 1 && (reinterpret_cast<uintptr_t>(p) & 15) == 0) {
    *reinterpret_cast<uint4 *>(p) = r;
    return;
  }
  const uint16_t *values = reinterpret_cast<const uint16_t *>(&r);
#pragma unroll
  for (int i = 0; i < 8; i++) *reinterpret_cast<uint16_t *>(p + i * x.feature) = values[i];
}

/* Largest magnitude among eight values. */
template <typename In>
__device__ __forceinline__ float largest_of(uint4 r) {
  float2 a = Pair<In>::unpack(r.x), b = Pair<In>::unpack(r.y), c = Pair<In>::unpack(r.z), d = Pair<In>::unpack(r.w);
  return fmaxf(fmaxf(fmaxf(fabsf(a.x), fabsf(a.y)), fmaxf(fabsf(b.x), fabsf(b.y))),
               fmaxf(fmaxf(fabsf(c.x), fabsf(c.y)), fmaxf(fabsf(d.x), fabsf(d.y))));
}
/* Eight values times `factor`, rounded to float16. */
template <typename In>
__device__ __forceinline__ uint4 to_half(uint4 r, float factor) {
  auto one = [&](uint32_t pair) {
    float2 x = Pair<In>::unpack(pair);
    return Pair<__half>::pack(x.x * factor, x.y * factor);
  };
  return make_uint4(one(r.x), one(r.y), one(r.z), one(r.w));
}
/* 2^a that brings a row whose largest magnitude is `largest` into [2^(Q_RANGE − 1), 2^Q_RANGE). */
__device__ __forceinline__ float row_factor(float largest) { return power_of_two(scaling_exponent(__float_as_uint(largest), Q_RANGE)); }

/* A warp's 16 rows of a tile of the caller's: the constructor starts the loads, `store` brings them to shared memory as a staged tile. */
template <typename In, int PADDED>
struct WarpRows {
  static constexpr int PIECES = PADDED / 8, ROWS_A_STEP = 32 / PIECES, STEPS = 16 / ROWS_A_STEP;
  uint4 values[STEPS];
  int first_row, piece; /* rows first_row + ROWS_A_STEP · step of the tile */
  __device__ __forceinline__ WarpRows(const View &x, int64_t head_offset, int first_token, int t, int columns)
      : first_row((threadIdx.x >> 5 & 3) * 16 + (threadIdx.x & 31) / PIECES), piece(threadIdx.x % PIECES) {
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      const int token = first_token + first_row + i * ROWS_A_STEP;
      values[i] = token < t ? load_piece<In>(x, head_offset + token * x.time, piece * 8, columns) : make_uint4(0, 0, 0, 0);
    }
  }
  /* `factor(values, row)`: of each row, from its lane's values. */
  template <class Factor>
  __device__ __forceinline__ void store(uint32_t tile, Factor factor) const {
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      const int row = first_row + i * ROWS_A_STEP;
      store_shared_128(tile + (piece / 8) * TILE_BYTES + swizzled(row, piece % 8), to_half<In>(values[i], factor(values[i], row)));
    }
  }
};

/* Largest of `x` over groups of WIDTH neighbouring lanes. */
template <int WIDTH>
__device__ __forceinline__ float group_max(float x) {
#pragma unroll
  for (int offset = WIDTH / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  return x;
}
/* Sum over the four lanes that hold one row of an accumulator. */
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

/* What a block of the kernels that take rows in blocks works on: ROWS rows of a chunk of one head. Heads come one after the other, since one head's states
 * fit in L2, where all row blocks of a chunk find them (chunks of all heads in turn: 8% to 60% slower); within a head the row blocks that meet
 * most tiles of their chunk come first. Row blocks beyond t come out as empty. */
struct RowBlock {
  int chunk, first_tile, head; /* first_tile: within the chunk */
  bool empty;
  /* `later_first`: rows late in a chunk meet most (queries); otherwise early ones do (keys). Of `chunks` chunks from `first_chunk` on. */
  __device__ __forceinline__ RowBlock(const Sizes &z, int item, int rows, bool later_first, int first_chunk, int chunks) {
    const int blocks = z.chunk / rows, order = item / chunks % blocks;
    chunk = first_chunk + item % chunks, head = item / (chunks * blocks);
    first_tile = (later_first ? blocks - 1 - order : order) * (rows / TILE);
    empty = chunk * z.chunk + first_tile * TILE >= z.t;
  }
  static int count(const Sizes &z, int heads, int rows, int chunks) { return chunks * (z.chunk / rows) * heads; }
};

/* A value that is the same in all lanes, which the compiler then knows: descriptors made from it need no moves to uniform registers. */
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __shfl_sync(~0u, x, 0); }

/* Address of 16-byte piece `piece` of a staged row, from that of its first piece (swizzle included): one instruction where rows have 64 columns. */
template <int COLUMN_TILES>
__device__ __forceinline__ uint32_t row_piece(uint32_t row, int piece) {
  return COLUMN_TILES == 1 ? row ^ piece * 16 : (row ^ piece % 8 * 16) + piece / 8 * TILE_BYTES;
}
/* Keeps an address in its register: worked out anew from the thread's number in every loop, it is a dozen instructions and a slow one. */
__device__ __forceinline__ void keep(uint32_t &address) { asm volatile("" : "+r"(address)); }

/* Where a thread sits in its warpgroup's fragments. */
struct Lane {
  int warp, group, quad, lane;
  __device__ __forceinline__ Lane()
      : warp((threadIdx.x >> 5) & 3), group((threadIdx.x & 31) >> 2), quad(threadIdx.x & 3), lane(threadIdx.x & 31) {}
};

/* Token at position `p` of a tile in token_order: lane quad c of an A fragment finds its tokens 16s + 8h + 2c + {0, 1} side by side, at
 * 16c + 4s + 2h. */
__device__ __forceinline__ int token_at(int p) { return p / 4 % 4 * 16 + p / 2 % 2 * 8 + p / 16 * 2 + p % 2; }
__device__ __forceinline__ int token_position(int token) { return token / 2 % 4 * 16 + token / 16 * 4 + token / 8 % 2 * 2 + token % 2; }

/* A state tile [β][E][α] as the B operand of products over its 64 features, STEPS of two β each, and over e, steps of 16. */
template <int PADDED_E>
struct StateTile {
  static constexpr int BYTES = 64 * PADDED_E * 2;
  uint32_t smem;
  /* N = e, K = (β, α): K-major. */
  __device__ __forceinline__ uint64_t features(int step) const {
    return matrix_descriptor<SWIZZLE_NONE>(smem, 128, 16 * PADDED_E) + descriptor_offset(step * 32 * PADDED_E);
  }
  /* N = (β, α), K = e: MN-major. */
  __device__ __forceinline__ uint64_t columns(int step) const {
    return matrix_descriptor<SWIZZLE_NONE>(smem, 16 * PADDED_E, 128) + descriptor_offset(step * 256);
  }
};

/* A fragments (four k-steps) of 64 swizzled 128-byte rows: this warp's rows 16w … 16w + 15. */
__device__ __forceinline__ void load_fragments(uint32_t (&a)[4][4], uint32_t tile, const Lane &at) {
  const int row = at.warp * 16 + (at.lane & 15);
#pragma unroll
  for (int step = 0; step < 4; step++) load_matrices(a[step], tile + swizzled(row, 2 * step + (at.lane >> 4)));
}
/* A fragments of the transpose of 64 swizzled 128-byte rows: this warp's columns 16w … 16w + 15, rows as k. */
__device__ __forceinline__ void load_fragments_transposed(uint32_t (&a)[4][4], uint32_t tile, const Lane &at) {
  const int row = (at.lane >> 4) * 8 + (at.lane & 7), piece = 2 * at.warp + (at.lane >> 3 & 1);
#pragma unroll
  for (int step = 0; step < 4; step++) load_matrices_transposed(a[step], tile + swizzled(16 * step + row, piece));
}

}  // namespace power
