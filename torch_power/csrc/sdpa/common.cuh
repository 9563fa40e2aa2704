/* What the kernels of scaled dot-product attention share.
 *
 * They are built like those of power attention (power/attention_common.cuh: tiles in 128-byte swizzled slabs, smaller heads and
 * the ends of sequences filled up with zeros by the copy engine, items dealt by a counter), on softmax weights:
 *
 *     S = |scale| · Q Kᵀ in base 2 (q negated for a negative scale, so that the largest S is the largest q·k),
 *     P_ij = 2^(S_ij − top_i), top_i the running maximum.
 *
 * A query sees the keys of a band, i − left ≤ j ≤ i + right; causal is right = 0 and no left end.
 */
#pragma once

#include "../power/attention_common.cuh"

namespace power::sdpa {

using namespace ::sm90;
using attention::accumulate;
using attention::Barrier;
using attention::chunk_address;
using attention::Dealer;
using attention::Deck;
using attention::Fragment;
using attention::is_half;
using attention::Item;
using attention::kRows;
using attention::kSlabColumns;
using attention::kWarpgroup;
using attention::load_fragments;
using attention::load_tile;
using attention::multiply_fragments;
using attention::multiply_rows;
using attention::pack;
using attention::store_tile;
using attention::store_tile_to_global;
using attention::sum_of_quad;
using attention::warpgroup_sync;

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kNegativeInfinity = -__builtin_huge_valf();
constexpr int kUnbounded = 1 << 30;  // an end of the band that is not there

/* Sizes and switches, the same for all kernels of a call. */
struct Problem {
  int t_q, t_kv, h_q, h_kv;
  int left, right;   // the band
  float scale_log2;  // |scale| · log2 e; at least 2^-126, so that −∞ times it is −∞ (what it then weighs is as for 0)
  int negative;      // scale < 0
  int e;             // head size of v
  Deck deck;
  float *lse;
  int64_t lse_stride[3];
  uint8_t *residual;  // may be null
  int64_t residual_stride[3];
};
/* What the second backward kernel needs of 64 queries, from the first: lse · log2 e (+∞ for a row that sees nothing, whose P is 0)
 * and δ. */
struct QueryRecord {
  float4 lse_delta[kRows / 2];  // lse_i, lse_{i+1}, δ_i, δ_{i+1}, for even i
};
static_assert(sizeof(QueryRecord) == 8 * kRows, "the workspace has room for this");

/* float16: P is at most 1 and 1/t on average, which its small numbers have few digits for. What Pᵀ is multiplied by as an operand. */
template <typename T>
constexpr float kWeightScale = is_half<T> ? 4096.f : 1.f;

/* `residual`: the eight binary digits that follow those of T, with a sign, as a difference of bit patterns of float32. */
template <typename T>
constexpr int kDigitsDropped = is_half<T> ? 13 : 16;
template <typename T>
__device__ __forceinline__ uint32_t digits_after(float exact, float rounded) {
  return uint32_t(min(max((__float_as_int(exact) - __float_as_int(rounded)) >> (kDigitsDropped<T> - 8), -128), 127)) & 255;
}
/* The number in the middle of those that have these digits. */
template <typename T>
__device__ __forceinline__ float with_digits(float rounded, uint32_t digits) {
  return __int_as_float(__float_as_int(rounded) + (int(int8_t(digits)) << (kDigitsDropped<T> - 8)) + (1 << (kDigitsDropped<T> - 9)));
}

/* Σ dy·y of eight columns, y with the digits of `residual` if there is one. */
template <typename T>
__device__ __forceinline__ float multiply_chunk(const uint4 &dy, const T *y, const uint8_t *residual) {
  const uint4 z = *reinterpret_cast<const uint4 *>(y);
  const uint2 w = residual ? *reinterpret_cast<const uint2 *>(residual) : make_uint2(0, 0);
  const uint32_t a[4] = {dy.x, dy.y, dy.z, dy.w}, b[4] = {z.x, z.y, z.z, z.w};
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 u = Pair<T>::unpack(a[j]);
    float2 x = Pair<T>::unpack(b[j]);
    const uint32_t digits = (j < 2 ? w.x : w.y) >> (j & 1) * 16;
    if (residual) x = make_float2(with_digits<T>(x.x, digits), with_digits<T>(x.y, digits >> 8));
    sum += u.x * x.x + u.y * x.y;
  }
  return sum;
}

/* Tiles of keys begin … end − 1. */
struct Range {
  int begin, end;
};

/* Tiles of `keys` keys that rows first … first + rows − 1 see; none for rows past the end. */
__device__ __forceinline__ Range keys_seen(const Problem &p, int first, int rows, int keys) {
  const int last = min(first + rows, p.t_q) - 1;
  const int low = max(0, first - p.left), high = min(p.t_kv, last + p.right + 1);
  if (last < first || low >= high) return {0, 0};
  return {low / keys, (high + keys - 1) / keys};
}

/* Tiles of 64 queries that see any of the keys first … first + rows − 1. */
__device__ __forceinline__ Range queries_seeing(const Problem &p, int first, int rows) {
  const int last = min(first + rows, p.t_kv) - 1;
  const int low = max(0, first - p.right), high = min(p.t_q, last + p.left + 1);
  if (last < first || low >= high) return {0, 0};
  return {low / kRows, (high + kRows - 1) / kRows};
}

/* Hands a stage back: every warp of every consumer warpgroup does, as its waits cover its own quarter of a product only. */
__device__ __forceinline__ void release(Barrier &barrier) {
  __syncwarp();
  if (ARRIVALS_A_WARP == 32 || (threadIdx.x & 31) == 0) barrier.arrive();
}
constexpr int kArrivals = 4 * ARRIVALS_A_WARP;  // of a warpgroup

__device__ __forceinline__ float max_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

/* c += a · b for 16 × 8 results by one warp: a four fragments of 16 × 16, b two of 16 × 8. Fragments as in sm90/wgmma.cuh. */
template <typename T>
__device__ __forceinline__ void multiply_by_warp(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (is_half<T>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* As `pin`, for accumulators that a product starts anew: what they held before is not kept. */
template <int N>
__device__ __forceinline__ void claim(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "=f"(x[i])::"memory");
}

/* What was done before a release is seen by whoever acquires the value, on any multiprocessor; what the copy engine did or will do in
 * device memory, with this fence between. */
__device__ __forceinline__ int load_acquire(const int *address) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(address) : "memory");
  return x;
}
__device__ __forceinline__ void store_release(int *address, int x) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

__device__ __forceinline__ int64_t row_offset(const int64_t (&stride)[3], int batch, int head, int row) {
  return batch * stride[0] + head * stride[1] + row * stride[2];
}

/* Flips the sign of a warpgroup's 64-row tile. */
template <int kD>
__device__ __forceinline__ void negate_rows(uint32_t tile, int thread, int warpgroup) {
#pragma unroll 1
  for (int i = 0; i < kD / 16; ++i) {
    const uint32_t address = chunk_address(tile, kRows, thread >> 1, (thread & 1) * (kD / 16) + i);
    const uint4 x = load_shared_128(address);
    store_shared_128(address, make_uint4(x.x ^ 0x80008000u, x.y ^ 0x80008000u, x.z ^ 0x80008000u, x.w ^ 0x80008000u));
  }
  fence_proxy_async();
  warpgroup_sync(warpgroup);
}

}  // namespace power::sdpa
