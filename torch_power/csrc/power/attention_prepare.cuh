/* Small kernels around the products of the attention form: running sums of the gates, their gradient, and largest row norms. */
#pragma once

#include "attention_common.cuh"

namespace power::attention {

constexpr int kCounters = 2;  // of dealt items: one for each kernel of a call

/* An array [b, t, h, x] whose last axis is contiguous. */
template <typename T>
struct Rows {
  T *data;
  int64_t stride[3];
  int size;
  /* Columns 8·piece … 8·piece + 7 of a row; zeros past the end of it. */
  __device__ __forceinline__ uint4 load(int batch, int row, int head, int piece) const {
    if (8 * piece >= size) return make_uint4(0, 0, 0, 0);
    return *reinterpret_cast<const uint4 *>(data + batch * stride[0] + row * stride[1] + head * stride[2] + 8 * piece);
  }
};

constexpr double kLog2E = 1.4426950408889634;

/* Exclusive sum of x over the lanes below this one, and through `total` the sum over the warp; float64, one order. */
__device__ __forceinline__ double sum_below(double x, double &total) {
  const int lane = threadIdx.x & 31;
  double inclusive = x;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const double below = __shfl_up_sync(~0u, inclusive, offset);
    if (lane >= offset) inclusive += below;
  }
  total = __shfl_sync(~0u, inclusive, 31);
  return inclusive - x;
}

/* The gate records of one head of log_g: 8 warps take a block of 128 tokens each, a lane 4 tokens, all sums in float64.
 * records [b, h_kv, 2 · blocks]; tokens past the end, and all without log_g, have no gate. */
static __global__ void __launch_bounds__(256) sum_gates_kernel(const float *log_g, int64_t stride_b, int64_t stride_t, int64_t stride_h, int t,
                                                               int blocks, int heads, int deg, GateRecord *records) {
  __shared__ double totals[8];
  const int batch = blockIdx.x / heads, head = blockIdx.x % heads, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  if (log_g) log_g += batch * stride_b + head * stride_h;
  records += int64_t(blockIdx.x) * blocks * 2;
  double carry = 0.0;
  for (int first = 0; first < blocks; first += 8) {
    const int block = first + warp;
    double g[4], sum = 0.0, total;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t token = int64_t(block) * kGateBlock + lane * 4 + i;
      g[i] = sum += log_g && token < t ? log_g[token * stride_t] * (kLog2E / deg) : 0.0;
    }
    const double below = sum_below(sum, total);
    if (lane == 0) totals[warp] = total;
    __syncthreads();
    double start = carry;
    for (int w = 0; w < 8; ++w) {
      if (w < warp) start += totals[w];
      carry += totals[w];
    }
    __syncthreads();
    if (block >= blocks) continue;
    GateRecord &record = records[2 * block + (lane >> 4)];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      record.sum[(lane & 15) * 4 + i] = float(below + g[i]);
      record.rest[(lane & 15) * 4 + i] = exp2f(float(total - (below + g[i])));
    }
    if ((lane & 15) == 0) {
      const double end = start + total;
      record.start[0] = float(start), record.start[1] = float(start - float(start));
      record.end[0] = float(end), record.end[1] = float(end - float(end));
    }
  }
}

/* dlog_g_m = Σ_{i ≥ m} (Σ_h row_sum_hi − column_sum_i), h over the query heads that read this key-value head: a running sum from
 * the last token to the first, 1024 at a time, in float64 and in one order. */
static __global__ void __launch_bounds__(256) sum_gate_gradient_kernel(const float *row_sum, const float *column_sum, float *dlog_g,
                                                                int64_t stride_b, int64_t stride_t, int64_t stride_h, int t, int heads,
                                                                int group) {
  __shared__ double totals[8];
  const int batch = blockIdx.x / heads, head = blockIdx.x % heads, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  row_sum += int64_t(blockIdx.x) * group * t;
  column_sum += int64_t(blockIdx.x) * t;
  dlog_g += batch * stride_b + head * stride_h;
  double carry = 0.0;
  for (int first = 0; first < t; first += 1024) {
    double x[4], sum = 0.0, total;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = t - 1 - (first + int(threadIdx.x) * 4 + i);
      if (token >= 0) {
        for (int h = 0; h < group; ++h) sum += row_sum[int64_t(h) * t + token];
        sum -= column_sum[token];
      }
      x[i] = sum;
    }
    const double below = sum_below(sum, total);
    if (lane == 0) totals[warp] = total;
    __syncthreads();
    double start = carry;
    for (int w = 0; w < 8; ++w) {
      if (w < warp) start += totals[w];
      carry += totals[w];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = t - 1 - (first + int(threadIdx.x) * 4 + i);
      if (token >= 0) dlog_g[token * stride_t] = float(start + below + x[i]);
    }
  }
}

/* largest[b, h] = max over t of ‖x[b, t, h, :]‖, for a float16 x whose rows are multiples of 8 long; zeroed before. A maximum does
 * not depend on the order it is taken in, and of non-negative floats it is that of their bits. */
static __global__ void __launch_bounds__(256) max_norm_kernel(const __half *x, int64_t stride_b, int64_t stride_t, int64_t stride_h, int t,
                                                       int heads, int size, float *largest) {
  const int batch = blockIdx.y / heads, head = blockIdx.y % heads, piece = threadIdx.x & 15;  // 16 threads a row
  float most = 0.f;
  for (int row = blockIdx.x * 16 + (threadIdx.x >> 4); row < (t + 15) / 16 * 16; row += gridDim.x * 16) {
    float sum = 0.f;
    if (row < t)
      for (int column = piece * 8; column < size; column += 128) {
        const uint4 v = *reinterpret_cast<const uint4 *>(x + batch * stride_b + row * stride_t + head * stride_h + column);
        const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 f = Pair<__half>::unpack(word[j]);
          sum += f.x * f.x + f.y * f.y;
        }
      }
#pragma unroll
    for (int offset = 8; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    most = fmaxf(most, sum);
  }
  most = fmaxf(most, __shfl_xor_sync(~0u, most, 16));
  if ((threadIdx.x & 31) == 0) atomicMax(reinterpret_cast<int *>(largest + blockIdx.y), __float_as_int(sqrtf(most)));
}

/* α and δ of 64 queries of one head, whose sums have had no additions yet. kD / 8 threads a row; q's factors are those of `normalize_rows`. */
template <typename T, int kD, int kDeg>
__global__ void __launch_bounds__(256, 2) prepare_queries_kernel(const Rows<const T> q, const Rows<const T> y, const Rows<const T> dy,
                                                              const Problem p, QueryRecord *records, int *turns) {
  constexpr int kThreads = kD / 8, kRound = 256 / kThreads, kRounds = kRows / kRound;
  const int row_tiles = (p.t_q + kRows - 1) / kRows, head_and_batch = blockIdx.x / row_tiles, tile = blockIdx.x % row_tiles;
  const int batch = head_and_batch / p.h_q, head = head_and_batch % p.h_q, piece = threadIdx.x % kThreads;
  uint4 x[kRounds][3];
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int row = tile * kRows + i * kRound + threadIdx.x / kThreads;
    x[i][0] = x[i][1] = x[i][2] = make_uint4(0, 0, 0, 0);
    if (row < p.t_q) x[i][0] = q.load(batch, row, head, piece), x[i][2] = dy.load(batch, row, head, piece);
    if (row < p.t_q && p.normalize) x[i][1] = y.load(batch, row, head, piece);
  }
  float size[kRounds], delta[kRounds];
  bool rescaled = false;
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const uint32_t a[4] = {x[i][0].x, x[i][0].y, x[i][0].z, x[i][0].w}, b[4] = {x[i][1].x, x[i][1].y, x[i][1].z, x[i][1].w};
    const uint32_t c[4] = {x[i][2].x, x[i][2].y, x[i][2].z, x[i][2].w};
    size[i] = delta[i] = 0.f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 f = Pair<T>::unpack(a[j]), u = Pair<T>::unpack(b[j]), w = Pair<T>::unpack(c[j]);
      size[i] = fmaxf(size[i], fmaxf(fabsf(f.x), fabsf(f.y)));
      delta[i] += u.x * w.x + u.y * w.y;
    }
#pragma unroll
    for (int offset = kThreads / 2; offset; offset /= 2) {
      size[i] = fmaxf(size[i], __shfl_xor_sync(~0u, size[i], offset));
      delta[i] += __shfl_xor_sync(~0u, delta[i], offset);
    }
    rescaled = rescaled || (size[i] > 0.f && !(size[i] >= kSmallRow && size[i] < kLargeRow));
  }
  rescaled = __syncthreads_or(rescaled);
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int in_tile = i * kRound + threadIdx.x / kThreads, row = tile * kRows + in_tile;
    float alpha = 0.f;
    if (row < p.t_q && !p.zero) {
      const float norm = p.normalize ? p.norm[batch * p.norm_stride[0] + row * p.norm_stride[1] + head * p.norm_stride[2]] : 1.f;
      alpha = p.normalize ? (rescaled ? row_factor<T>(size[i]) : 1.f) * inverse_root<kDeg>(norm) : 1.f;
    }
    float *pair = &records[blockIdx.x].alpha_delta[in_tile >> 1].x + (in_tile & 1);
    if (piece == 0) pair[0] = alpha, pair[2] = alpha * delta[i];
  }
  if (threadIdx.x == 0) turns[blockIdx.x] = 0;
}

}  // namespace power::attention
