/* Backward of the attention form in one pass: dk, dv and dq from five products, without gates. What its two kernels share.
 *
 *     dv_j = Σ_i u_ij^p dy_i,    dk_j = p Σ_i dS_ij q_i,    dq_i = p Σ_j dS_ij k_j,    dS_ij = u_ij^(p−1) α_i (dp_ij − δ_i)
 *
 * with u_ij = α_i s_ij, so that u_ij^p is the weight over the normaliser. A block holds 128 keys of one key-value head, and tiles of 64
 * queries stream past in the order of softmax attention's timetable (sdpa/schedule.cuh). dq is a sum over key blocks: the copy engine adds a
 * block's part to device memory, in float32, when it is the block's turn, so that every number has one order of additions.
 * `prepare_queries_kernel` works out α and δ before.
 */
#pragma once

#include "../sdpa/backward.cuh"
#include "attention_backward_kv.cuh"
#include "attention_prepare.cuh"

namespace power::attention {

struct OnePassProblem : sdpa::OnePassProblem {
  int normalize;
  float plain;  // what sums are multiplied by for dv; for dk and dq p times as much
};

/* u from S, in place. kEdge: queries before a key (columns < first_column + 8r) do not see it. */
template <bool kEdge>
__device__ __forceinline__ void scale_columns(float (&score)[kRows / 2], const QueryRecord &record, const Fragment &at, int first_column) {
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const float2 alpha = *reinterpret_cast<const float2 *>(&record.alpha_delta[4 * n + at.quad].x);
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float &x = score[4 * n + 2 * r + c];
        x *= c ? alpha.y : alpha.x;
        if (kEdge && 8 * n + 2 * at.quad + c < first_column + 8 * r) x = 0.f;
      }
  }
}

/* The weights u^p, rounded, as A operand. */
template <typename T, int kDeg>
__device__ __forceinline__ void pack_weights(const float (&u)[kRows / 2], uint32_t (&weight)[kRows / 16][4]) {
#pragma unroll
  for (int i = 0; i < kRows / 2; i += 2) weight[i / 8][i / 2 % 4] = pack<T>(power_of<kDeg>(u[i]), power_of<kDeg>(u[i + 1]));
}

/* dSᵀ as A operand, and into its tile [keys][queries] of shared memory, kBatch · 8 columns at a time: no load of records passes a store, so larger
 * batches wait less and take more registers. */
template <typename T, int kDeg, int kBatch>
__device__ __forceinline__ void differentiate_tile(const float (&u)[kRows / 2], const float (&dweight)[kRows / 2],
                                                   uint32_t (&dscore)[kRows / 16][4], uint32_t tile, const QueryRecord &record,
                                                   const Fragment &at) {
  const uint32_t start = chunk_address(tile, kRows, at.row, 0) + at.quad * 4;  // chunk n is at ^ 16n
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const float4 query = record.alpha_delta[4 * n + at.quad];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = 4 * n + 2 * r;
      dscore[n >> 1][2 * (n & 1) + r] = pack<T>(lower_power_of<kDeg>(u[i]) * fmaf(query.x, dweight[i], -query.z),
                                                lower_power_of<kDeg>(u[i + 1]) * fmaf(query.y, dweight[i + 1], -query.w));
    }
    if ((n + 1) % kBatch == 0)
#pragma unroll
      for (int m = n + 1 - kBatch; m <= n; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) store_shared_32((start + r * 1024) ^ (m * 16), dscore[m >> 1][2 * (m & 1) + r]);
  }
}

/* Σ_j u_ij^p (dp_ij − δ_i) should be 0, and is the error that δ has from the rounding of y. Queries that see few keys feel it: for the
 * first 64, whose keys are all here, it is taken off dp. `scratch`: 4 × 64 floats. */
template <int kDeg>
__device__ __forceinline__ void correct_first_rows(const float (&u)[kRows / 2], float (&dweight)[kRows / 2], const QueryRecord &record,
                                                   const Fragment &at, float *scratch, int group) {
  const int lane = at.thread & 31, warp = at.thread >> 5;
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const float4 query = record.alpha_delta[4 * n + at.quad];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float alpha = c ? query.y : query.x, delta = c ? query.w : query.z;
      float sum = 0.f;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        sum += power_of<kDeg>(u[4 * n + 2 * r + c]) * (alpha * dweight[4 * n + 2 * r + c] - delta);
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
      if (lane < 4) scratch[warp * kRows + 8 * n + 2 * at.quad + c] = sum;
    }
  }
  warpgroup_sync(group);
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const float4 query = record.alpha_delta[4 * n + at.quad];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float alpha = c ? query.y : query.x;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarpgroup / 32; ++w) sum += scratch[w * kRows + 8 * n + 2 * at.quad + c];
      const float shift = alpha == 0.f ? 0.f : sum / alpha;
      dweight[4 * n + c] -= shift, dweight[4 * n + 2 + c] -= shift;
    }
  }
  warpgroup_sync(group);
}

}  // namespace power::attention
