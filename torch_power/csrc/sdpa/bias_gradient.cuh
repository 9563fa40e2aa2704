/* Gradient of an additive mask: dbias = dS, summed over the axes that the bias is broadcast over, in a fixed order.
 *
 * A block of one warpgroup owns 64 × 64 positions of the bias and goes through everything that reads them, S and dP from shared memory,
 * dS summed in registers: all batch elements, heads, tiles of queries or of keys along an axis of stride 0, else its own. Sums within
 * a tile come last. No memory but the gradient's own.
 */
#pragma once

#include "backward_q.cuh"

namespace power::sdpa {

struct BiasGradient {
  Operand out;
  int b;
  __host__ __device__ bool sums(int axis) const { return out.stride[axis] == 0; }
};

template <typename T, int kD>
struct BiasGradientSmem {
  T q[kRows * kD], dy[kRows * kD], k[kRows * kD], v[kRows * kD];
  float sum[4][kRows];
  Barrier full;
};

__device__ __forceinline__ void store_gradient(const Operand &out, int64_t at, float x) {
  if (out.dtype == POWER_FLOAT32) static_cast<float *>(const_cast<void *>(out.data))[at] = x;
  else if (out.dtype == POWER_BFLOAT16) static_cast<__nv_bfloat16 *>(const_cast<void *>(out.data))[at] = __float2bfloat16(x);
  else static_cast<__half *>(const_cast<void *>(out.data))[at] = __float2half(x);
}

template <typename T, int kD>
__global__ void __launch_bounds__(kWarpgroup)
    bias_gradient_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                         const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap dy_map,
                         const __grid_constant__ BackwardProblem p, const __grid_constant__ General general,
                         const __grid_constant__ BiasGradient gradient) {
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  auto &smem = *reinterpret_cast<BiasGradientSmem<T, kD> *>(smem_bytes);
  if (threadIdx.x == 0) {
    smem.full.init(1);
    mbarrier_init_fence();
  }
  __syncthreads();
  const Fragment at(threadIdx.x);
  const int row_tiles = (p.t_q + kRows - 1) / kRows, key_tiles = (p.t_kv + kRows - 1) / kRows;
  const auto range = [](bool all, int own, int size) { return all ? Range{0, size} : Range{own, own + 1}; };
  const int heads_owned = gradient.sums(1) ? 1 : p.h_q;
  const Range batches = range(gradient.sums(0), blockIdx.z / heads_owned, gradient.b);
  const Range heads = range(gradient.sums(1), blockIdx.z % heads_owned, p.h_q);
  const Range rows = range(gradient.sums(2), blockIdx.y, row_tiles), keys = range(gradient.sums(3), blockIdx.x, key_tiles);

  float sum[kRows / 2];
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) sum[i] = 0.f;
  uint32_t parity = 0;
#pragma unroll 1
  for (int batch = batches.begin; batch < batches.end; ++batch)
#pragma unroll 1
    for (int head = heads.begin; head < heads.end; ++head) {
      const HeadMasks masks(general, batch, head);
#pragma unroll 1
      for (int m = rows.begin; m < rows.end; ++m) {
        const Range seen = keys_seen(p, m * kRows, kRows, kRows);
        const QueryRecord &record = p.records[int64_t(batch * p.h_q + head) * row_tiles + m];
        const float *lse_delta = &record.lse_delta[at.row >> 1].x + (at.row & 1);  // row + 8 is four float4 on
        const float lse[2] = {lse_delta[0], lse_delta[16]}, delta[2] = {lse_delta[2], lse_delta[18]};
#pragma unroll 1
        for (int n = max(keys.begin, seen.begin); n < min(keys.end, seen.end); ++n, parity ^= 1) {
          __syncthreads();  // the products of the tile before have been read
          if (threadIdx.x == 0) {
            smem.full.expect(4 * kRows * kD * sizeof(T));
            load_tile<kD>(smem.q, &q_map, kRows, m * kRows, head, batch, smem.full);
            load_tile<kD>(smem.dy, &dy_map, kRows, m * kRows, head, batch, smem.full);
            load_tile<kD>(smem.k, &k_map, kRows, n * kRows, head / (p.h_q / p.h_kv), batch, smem.full);
            load_tile<kD>(smem.v, &v_map, kRows, n * kRows, head / (p.h_q / p.h_kv), batch, smem.full);
          }
          smem.full.wait(parity);
          if (p.negative) negate_rows<kD>(smem_address(smem.q), at.thread, 0);
          float score[kRows / 2], dweight[kRows / 2];
          pin(score);
          pin(dweight);
          wgmma_fence();
          multiply_rows<T, kD, kRows>(score, smem_address(smem.q), smem_address(smem.k));
          multiply_rows<T, kD, kRows>(dweight, smem_address(smem.dy), smem_address(smem.v));
          wgmma_commit();
          wgmma_wait<0>();
          pin(score);
          pin(dweight);
          mask_rows<kRows>(score, p, masks, at, m * kRows, n * kRows);
          if (general.seed) drop_rows<kRows>(dweight, masks, at, m * kRows, n * kRows);
#pragma unroll
          for (int i = 0; i < kRows / 2; ++i)
            sum[i] += exp2_fast(score[i] - lse[(i >> 1) & 1]) * (dweight[i] - delta[(i >> 1) & 1]);
        }
      }
    }

  const int64_t base = batches.begin * gradient.out.stride[0] + heads.begin * gradient.out.stride[1];
  const int first = rows.begin * kRows, from = keys.begin * kRows;
  if (gradient.sums(3)) {  // over the columns
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = 0.f;
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n) total += sum[4 * n + 2 * r] + sum[4 * n + 2 * r + 1];
      total = sum_of_quad(total);
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n) sum[4 * n + 2 * r] = sum[4 * n + 2 * r + 1] = total;
    }
  }
  if (!gradient.sums(2)) {
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) {
      const int row = first + at.row + 8 * ((i >> 1) & 1), column = from + 8 * (i >> 2) + 2 * at.quad + (i & 1);
      if (row < p.t_q && column < p.t_kv && (!gradient.sums(3) || column == 0))
        store_gradient(gradient.out, base + row * gradient.out.stride[2] + column * gradient.out.stride[3], sum[i]);
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n)  // over the rows: those of a warp, then the four warps
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float total = sum[4 * n + c] + sum[4 * n + 2 + c];
      for (int lanes = 4; lanes < 32; lanes *= 2) total += __shfl_xor_sync(~0u, total, lanes);
      if ((at.thread & 31) < 4) smem.sum[at.thread >> 5][8 * n + 2 * at.quad + c] = total;
    }
  __syncthreads();
  const int column = from + threadIdx.x;
  if (threadIdx.x < kRows && column < p.t_kv && (!gradient.sums(3) || column == 0)) {
    const float(&x)[4][kRows] = smem.sum;
    store_gradient(gradient.out, base + column * gradient.out.stride[3],
                   (x[0][threadIdx.x] + x[1][threadIdx.x]) + (x[2][threadIdx.x] + x[3][threadIdx.x]));
  }
}

}  // namespace power::sdpa
