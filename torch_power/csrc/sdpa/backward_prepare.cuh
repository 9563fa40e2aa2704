/* What precedes the one-pass backward kernel: lse and δ of every query. */
#pragma once

#include "backward.cuh"

namespace power::sdpa {

/* Where y and dy lie, [b, h_q, t_q, ·] with a contiguous last axis. */
struct RowArrays {
  const void *y, *dy;
  int64_t y_stride[3], dy_stride[3];
};

/* No additions made yet; lse · log2 e and δ = dy·y of 64 queries a block; kD / 8 threads share a row. */
template <typename T, int kD>
__global__ void __launch_bounds__(256) prepare_kernel(const __grid_constant__ OnePassProblem p, const __grid_constant__ RowArrays x) {
  constexpr int kThreads = kD / 8, kStep = 256 / kThreads;
  const int tile = blockIdx.x % p.table.tiles, flat = blockIdx.x / p.table.tiles;
  const int batch = flat / p.h_q, head = flat % p.h_q, chunk = threadIdx.x % kThreads;
  if (threadIdx.x == 0) p.turns[blockIdx.x] = 0;
#pragma unroll
  for (int at = threadIdx.x / kThreads; at < kRows; at += kStep) {
    const int row = tile * kRows + at;
    float sum = 0.f;
    if (row < p.t_q && 8 * chunk < p.e) {
      const T *y = static_cast<const T *>(x.y) + row_offset(x.y_stride, batch, head, row) + 8 * chunk;
      const T *dy = static_cast<const T *>(x.dy) + row_offset(x.dy_stride, batch, head, row) + 8 * chunk;
      const int64_t rest = row_offset(p.residual_stride, batch, head, row) + 8 * chunk;
      sum = multiply_chunk<T>(*reinterpret_cast<const uint4 *>(dy), y, p.residual ? p.residual + rest : nullptr);
    }
#pragma unroll
    for (int lanes = 1; lanes < kThreads; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (chunk == 0) {
      float lse = row < p.t_q ? p.lse[row_offset(p.lse_stride, batch, head, row)] * kLog2E : kNegativeInfinity;
      if (lse == kNegativeInfinity) lse = -kNegativeInfinity;
      float *pair = &p.records[blockIdx.x].lse_delta[at >> 1].x + (at & 1);
      pair[0] = lse - kLogWeight, pair[2] = sum * (1.f / kWeight);
    }
  }
}

}  // namespace power::sdpa
