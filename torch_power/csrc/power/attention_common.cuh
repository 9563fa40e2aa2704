/* What the kernels of the attention form share.
 *
 * All of them keep one tile of 64 rows a warpgroup in shared memory, stream tiles of the other side past it, and feed the
 * weights back to the matrix units from registers. Tiles are [rows][64 columns] slabs in the 128-byte swizzle, so a head of
 * 128 is two slabs; smaller heads are filled up with zeros by the copy engine, and so are rows past the end of a sequence.
 *
 * Scale. Row i of q is multiplied by c_i, a power of two that brings its largest entry to [1, 2) (float16: its norm, and a
 * second factor that bounds s^p by 2^15). It cancels against the normaliser or is divided out at the end, and nothing over-
 * or underflows in between. The contract's `scale` never enters a product: it cancels too, or is a factor scale^p at the end.
 *
 * Gates. exp(G_i − G_j) is taken apart so that no large G is ever subtracted: within a block of 128 tokens as
 * exp(g_i − g_j), g counted from the start of the block; across blocks as exp(g_i) · exp(H_i − H_j) · exp(rest_j), where H is
 * the sum up to the start of i's block, respectively to the end of j's, in two floats. Everything is kept as log2, divided
 * by p, and multiplied to s before s is raised to the power p, so one formula serves every degree.
 */
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../sm90/mbarrier.cuh"
#include "../sm90/registers.cuh"
#include "../sm90/tma.cuh"
#include "../sm90/wgmma.cuh"
#include "attention_deck.h"

namespace power::attention {

using namespace ::sm90;

constexpr int kRows = 64;         // rows of a warpgroup's tile: the M of wgmma
constexpr int kGateBlock = 128;   // tokens whose gates are summed from the same start
constexpr int kWarpgroup = 128;   // threads
constexpr int kSlabColumns = 64;  // columns of a 128-byte swizzled slab of 16-bit numbers
constexpr int kMaxDegree = 4;

/* Gates of 64 tokens of one key-value head, written by `sum_gates_kernel`. */
struct GateRecord {
  float rest[kRows];  // exp(rest_j)^(1/p): from token j to the end of its block of 128
  float sum[kRows];   // g_j: log2 of the decay from the start of its block to token j, over p
  float end[2];       // H at the end of the block of 128, high and low part
  float start[2];     // H at its start
};
static_assert(sizeof(GateRecord) % 16 == 0, "bulk copies move multiples of 16 bytes");

/* What the second backward kernel needs of 64 queries, written by the first: w_ij / n_i = (alpha_i s_ij)^p. */
struct QueryRecord {
  float4 alpha_delta[kRows / 2];  // alpha_i, alpha_{i+1}, alpha_i delta_i, alpha_{i+1} delta_{i+1}, for even i
};
struct GatedQueryRecord : QueryRecord {  // with delta itself in alpha_delta, as alpha changes from key to key
  float2 sum[kRows / 2];  // g_i as in GateRecord
  float start[4];         // H at the start of the block of 128, high and low part; two unused
};
static_assert(sizeof(GatedQueryRecord) % 16 == 0, "bulk copies move multiples of 16 bytes");

/* Sizes and switches, the same for all kernels of a call. */
struct Problem {
  int b, t_q, t_kv, h_q, h_kv;
  int causal, normalize;
  int zero;         // 1: scale is 0 and cancels against nothing; every weight is 0
  float scale_p;    // scale^p, for normalize = 0
  Deck deck;
  const GateRecord *gates;                           // [b, h_kv, blocks of 64]; null without gates
  int gate_records;                                  // of a head: those of whole blocks of 128
  const float *q_max, *k_max, *v_max, *dy_max;       // float16: largest row norm of a head [b, h]; else null
  float *norm;
  int64_t norm_stride[3];
  __device__ __forceinline__ const GateRecord *gates_of(int batch, int head_kv) const {
    return gates + int64_t(batch * h_kv + head_kv) * gate_records;
  }
};

/* A barrier that counts arrivals and bytes, in shared memory. */
struct Barrier {
  uint64_t word;
  __device__ __forceinline__ uint32_t address() const { return smem_address(&word); }
  __device__ __forceinline__ void init(int arrivals) { mbarrier_init(address(), arrivals); }
  __device__ __forceinline__ void init_released(int warps) { init(warps * ARRIVALS_A_WARP); }  // by `release`
  __device__ __forceinline__ void expect(uint32_t bytes) { mbarrier_expect(address(), bytes); }
  __device__ __forceinline__ void wait(uint32_t parity) const { mbarrier_wait(address(), parity); }
  __device__ __forceinline__ void arrive() { mbarrier_arrive(address()); }
  /* A stage is released by each warp of each consumer warpgroup: a warp's wait covers its own quarter of a product only. */
  __device__ __forceinline__ void release() {
    __syncwarp();
    if (ARRIVALS_A_WARP == 32 || (threadIdx.x & 31) == 0) arrive();
  }
};

/* How one thread deals items to the loading and storing threads and the consumers, up to kSeats ahead: an entry for each slot of
 * resident tiles.
 * An item goes to whichever block is free. (Dealing a fixed list round by round left blocks idle: groups and rounds do not divide
 * each other.) Which block computes a tile changes nothing in the result. */
template <int kSeats>
struct Dealer {
  Item item[kSeats];
  Barrier dealt[kSeats];
  __device__ void init() {
    for (int seat = 0; seat < kSeats; ++seat) dealt[seat].init(1);
  }
  __device__ Item receive(const RingPosition<kSeats> &seat) const {
    dealt[seat.slot].wait(seat.parity);
    const volatile Item &x = item[seat.slot];
    return {x.head, x.batch, x.tile};
  }
  /* The dealing thread: draws items and announces each once all consumer warpgroups have `left` its slot, until there are none. */
  template <int kGroups>
  __device__ void deal(Barrier (&left)[kSeats][kGroups], const Deck &deck) {
    RingPosition<kSeats> seat;
    for (int index = blockIdx.x, next;; index = next, seat.advance()) {
      next = gridDim.x + atomicAdd(deck.dealt, 1);  // long before it is needed
      const Item next_item = deck.item(index);
#pragma unroll 1
      for (int g = 0; g < kGroups; ++g) left[seat.slot][g].wait(seat.parity ^ 1);
      item[seat.slot] = next_item;
      dealt[seat.slot].arrive();
      if (index >= deck.items) return;
    }
  }
};

template <typename T>
constexpr bool is_half = std::is_same_v<T, __half>;

template <int kDeg>
__device__ __forceinline__ float power_of(float x) {
  static_assert(kDeg >= 1 && kDeg <= kMaxDegree);
  if constexpr (kDeg == 1) return x;
  if constexpr (kDeg == 2) return x * x;
  if constexpr (kDeg == 3) return x * x * x;
  const float square = x * x;
  return square * square;
}

/* x^(p−1), the factor a derivative leaves. */
template <int kDeg>
__device__ __forceinline__ float lower_power_of(float x) {
  if constexpr (kDeg == 1) return 1.f;
  else return power_of<kDeg - 1>(x);
}

/* x^(−1/p) for x > 0 and an even p, 0 for x = 0 (a row that sees nothing). */
template <int kDeg>
__device__ __forceinline__ float inverse_root(float x) {
  if (x == 0.f) return 0.f;
  return kDeg == 4 ? sqrtf(rsqrtf(x)) : rsqrtf(x);
}

/* Two floats rounded to T, the first in the low half. */
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t r;
  if constexpr (is_half<T>) asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

/* Sum over the four threads that hold one row of an accumulator. */
__device__ __forceinline__ float sum_of_quad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ __forceinline__ float power_of_two(int exponent) { return exp2f(float(min(max(exponent, -126), 126))); }

/* Least e with x < 2^e, for x > 0. */
__device__ __forceinline__ int exponent_above(float x) { return ilogbf(x) + 1; }

/* float16: scores are scaled to |s| ≤ 2^score_bits, so that s^p ≤ 2^15. */
template <int kDeg>
constexpr int score_bits = kDeg == 1 ? 10 : 15 / kDeg;

/* float16: the power of two, one a head, that bounds the scores of rows of norm < 2; 1 for bfloat16. */
template <typename T, int kDeg>
__device__ __forceinline__ float head_scale(const Problem &p, int batch, int head_kv) {
  if constexpr (!is_half<T>) return 1.f;
  const float largest = p.k_max[batch * p.h_kv + head_kv];
  return largest > 0.f ? power_of_two(score_bits<kDeg> - 1 - exponent_above(largest)) : 1.f;
}

/* Address of 16-byte chunk `chunk` of row `row` in a tile of 64-column slabs, `rows` rows each. */
__device__ __forceinline__ uint32_t chunk_address(uint32_t tile, int rows, int row, int chunk) {
  return tile + (chunk >> 3) * rows * 128 + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
}

__device__ __forceinline__ void warpgroup_sync(int warpgroup) { named_barrier_sync(CONSUMER + warpgroup, kWarpgroup); }

/* Synchronises a warpgroup; whether `x` holds for any of its threads. */
__device__ __forceinline__ bool warpgroup_any(int warpgroup, bool x) {
  uint32_t any;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nbarrier.cta.red.or.pred.aligned q, %2, %3, p;\nselp.u32 %0, 1, 0, q;\n}"
      : "=r"(any)
      : "r"(uint32_t(x)), "r"(CONSUMER + warpgroup), "n"(kWarpgroup)
      : "memory");
  return any;
}

/* Sizes of rows, as `normalize_rows` measures them, within which they stay as they are. */
constexpr float kSmallRow = 0x1p-6f, kLargeRow = 0x1p6f;

/* The power of two that brings `size` to [1, 2), 1 for 0. It is a normal number of T, so the product is exact but for entries that become
 * subnormal beside the largest. */
template <typename T>
__device__ __forceinline__ float row_factor(float size) {
  const int least = is_half<T> ? -14 : -126, most = is_half<T> ? 15 : 126;
  return size > 0.f ? power_of_two(min(max(-ilogbf(size), least), most)) : 1.f;
}

/* Multiplies every row of a warpgroup's tile by a power of two (see "Scale" above), for the products that follow. Two threads share
 * a row, rows 16w … 16w+15 are warp w's; returns the factor of this thread's row (1 for a row of zeros). With bfloat16, a tile whose
 * rows all have their largest entry in [2^-6, 2^6) stays as it is: s^p keeps a margin of 2^±24 at most, and nothing is rewritten. */
template <typename T, int kD>
__device__ __forceinline__ float normalize_rows(uint32_t tile, int thread, int warpgroup) {
  const int row = thread >> 1, first = (thread & 1) * (kD / 16);
  float size = 0.f;
#pragma unroll
  for (int i = 0; i < kD / 16; ++i) {
    const uint4 x = load_shared_128(chunk_address(tile, kRows, row, first + i));
    const uint32_t word[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 f = Pair<T>::unpack(word[j]);
      if constexpr (is_half<T>) size += f.x * f.x + f.y * f.y;
      else size = fmaxf(size, fmaxf(fabsf(f.x), fabsf(f.y)));
    }
  }
  const float other = __shfl_xor_sync(~0u, size, 1);
  size = is_half<T> ? sqrtf(size + other) : fmaxf(size, other);
  const bool zero = !(size > 0.f);
  if constexpr (!is_half<T>)
    if (!warpgroup_any(warpgroup, !zero && !(size >= kSmallRow && size < kLargeRow))) return 1.f;
  const float factor = row_factor<T>(size);
  const uint32_t pair = pack<T>(factor, factor);
#pragma unroll
  for (int i = 0; i < kD / 16; ++i) {
    const uint32_t address = chunk_address(tile, kRows, row, first + i);
    const uint4 x = load_shared_128(address);
    store_shared_128(address, make_uint4(Pair<T>::multiply(x.x, pair), Pair<T>::multiply(x.y, pair), Pair<T>::multiply(x.z, pair),
                                         Pair<T>::multiply(x.w, pair)));
  }
  fence_proxy_async();  // the products read through the copy engine's path what these threads just wrote
  warpgroup_sync(warpgroup);
  return factor;
}

/* Rows and columns of a 64-row accumulator that this thread holds: element 4·n + 2·r + c is row `row[r]`, column 8·n + 2·quad + c. */
struct Fragment {
  int thread, row, quad;
  __device__ explicit Fragment(int thread_in_warpgroup)
      : thread(thread_in_warpgroup),
        row((thread_in_warpgroup >> 5) * 16 + ((thread_in_warpgroup & 31) >> 2)),
        quad(thread_in_warpgroup & 3) {}
  /* The value that `normalize_rows` and its kin computed for row `row` + 8·r. */
  __device__ float of_row(float value, int r) const { return __shfl_sync(~0u, value, 2 * ((row & 15) + 8 * r)); }
};

/* A descriptor moved on by `bytes`. Only its low word changes, which saves half of the moves to uniform registers. */
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  return (descriptor & 0xFFFFFFFF00000000) | uint32_t(uint32_t(descriptor) + uint32_t(descriptor_offset(bytes)));
}

/* a[64, kD] · b[kN, kD]ᵀ, both operands with their rows in shared memory, b's in slabs of kSlab rows; starts a new accumulator. */
template <typename T, int kD, int kN, int kSlab = kN>
__device__ __forceinline__ void multiply_rows(float (&out)[kN / 2], uint32_t a, uint32_t b) {
  const uint64_t a_tile = matrix_descriptor(a), b_tile = matrix_descriptor(b);
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    const uint32_t column = (k & 3) * 32, slab = k >> 2;
    Wgmma<kN, T>::template ss<K_MAJOR, K_MAJOR>(out, advance(a_tile, slab * kRows * 128 + column),
                                                advance(b_tile, slab * kSlab * 128 + column), k != 0);
  }
}

/* The rows of a warpgroup's tile as A operands: fragment k is columns 16k … 16k + 15. Each warp loads its own 16 rows. */
template <int kD>
__device__ __forceinline__ void load_fragments(uint32_t (&a)[kD / 16][4], uint32_t tile, const Fragment &at) {
  const int lane = at.thread & 31, row = (at.thread >> 5) * 16 + (lane & 15);
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) load_matrices(a[k], chunk_address(tile, kRows, row, 2 * k + (lane >> 4)));
}

/* As `multiply_rows`, with a in registers: half of what a product of 64 columns otherwise reads from shared memory. */
template <typename T, int kD, int kN>
__device__ __forceinline__ void multiply_fragments(float (&out)[kN / 2], const uint32_t (&a)[kD / 16][4], uint32_t b) {
  const uint64_t b_tile = matrix_descriptor(b);
#pragma unroll
  for (int k = 0; k < kD / 16; ++k)
    Wgmma<kN, T>::template rs<K_MAJOR>(out, a[k], advance(b_tile, (k >> 2) * kN * 128 + (k & 3) * 32), k != 0);
}

/* out[64, kD] += a[64, kN] · b[kN, kD], a in registers, b in slabs of kSlab rows. */
template <typename T, int kD, int kN, int kSlab = kN>
__device__ __forceinline__ void accumulate(float (&out)[kD / 2], const uint32_t (&a)[kN / 16][4], uint32_t b) {
  const uint64_t b_tile = matrix_descriptor(b, 1024, kSlab * 128);
#pragma unroll
  for (int k = 0; k < kN / 16; ++k) Wgmma<kD, T>::template rs<MN_MAJOR>(out, a[k], advance(b_tile, k * 16 * 128), 1);
}

/* Writes a 64-row accumulator, its rows times factor[r], as T into a tile of shared memory. */
template <typename T, int kD>
__device__ __forceinline__ void store_tile(uint32_t tile, const float (&acc)[kD / 2], const Fragment &at, const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < kD / 8; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      store_shared_32(chunk_address(tile, kRows, at.row + 8 * r, n) + at.quad * 4,
                    pack<T>(acc[4 * n + 2 * r] * factor[r], acc[4 * n + 2 * r + 1] * factor[r]));
}

/* Loads `rows` rows from row t of one head into a tile of slabs; the caller has announced rows · kD · 2 bytes. */
template <int kD>
__device__ __forceinline__ void load_tile(void *tile, const CUtensorMap *map, int rows, int t, int head, int batch, const Barrier &full) {
#pragma unroll
  for (int slab = 0; slab < kD / kSlabColumns; ++slab)
    tma_load_4d(smem_address(tile) + slab * rows * 128, map, slab * kSlabColumns, head, t, batch, full.address());
}

/* Stores a warpgroup's 64-row tile to columns from `column` on; rows and columns past the array's end are not written. */
template <int kD>
__device__ __forceinline__ void store_tile_to_global(const CUtensorMap *map, const void *tile, int t, int head, int batch, int column = 0) {
#pragma unroll
  for (int slab = 0; slab < kD / kSlabColumns; ++slab)
    tma_store_4d(map, column + slab * kSlabColumns, head, t, batch, smem_address(tile) + slab * kRows * 128);
}

}  // namespace power::attention
