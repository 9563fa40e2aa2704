/* Before the matrix kernels: sum the gates, find each head's range, and write keys and values as scaled float16 tiles.
 *
 * measure_kernel   block (measure_rows, head): largest |k| and |v|, into `Maxima` by integer maximum (order-free, so two runs agree); the first
 *                  of a chunk also sums its gates.
 * stage_kernel     block (STAGE_PIECES pieces of 16 bytes, head, array): rows, scaled.
 * Both read each input once and are bound by device memory. Heads come first in the order of blocks: their rows are neighbours in memory.
 */
#pragma once
#include "chunked_layout.cuh"

namespace power {

constexpr int MEASURE_THREADS = 256, MEASURE_LOADS = 4, STAGE_THREADS = 256;

/* The block's largest `x`, into *result. */
__device__ __forceinline__ void note_largest(float x, unsigned *result) {
  __shared__ float warp_largest[MEASURE_THREADS / 32];
  x = group_max<32>(x);
  if ((threadIdx.x & 31) == 0) warp_largest[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < MEASURE_THREADS / 32; i++) x = fmaxf(x, warp_largest[i]);
    atomicMax(result, __float_as_uint(x));
  }
  __syncthreads();
}

/* Largest magnitude in rows [first, last) of one head, of this thread's share: neighbouring lanes a row, MEASURE_LOADS rows under way at a time. */
template <typename In>
__device__ __forceinline__ float measure_rows(const View &x, int64_t head_offset, int first, int last, int columns) {
  const int lanes = columns <= 64 ? 8 : 16, step = MEASURE_THREADS / lanes, column = threadIdx.x % lanes * 8;
  float largest = 0.f;
  for (int row = first + threadIdx.x / lanes; row < last; row += MEASURE_LOADS * step) {
    uint4 values[MEASURE_LOADS];
#pragma unroll
    for (int i = 0; i < MEASURE_LOADS; i++) {
      values[i] = make_uint4(0, 0, 0, 0);
      if (row + i * step < last) values[i] = load_piece<In>(x, head_offset + (row + i * step) * x.time, column, columns);
    }
#pragma unroll
    for (int i = 0; i < MEASURE_LOADS; i++) largest = fmaxf(largest, largest_of<In>(values[i]));
  }
  return largest;
}

/* Largest magnitude of `count` floats, into *result. */
__device__ __forceinline__ void measure_floats(const float *x, int64_t count, int part, int parts, unsigned *result) {
  float largest = 0.f;
  for (int64_t i = int64_t(part) * blockDim.x + threadIdx.x; i < count; i += int64_t(parts) * blockDim.x) largest = fmaxf(largest, fabsf(x[i]));
  note_largest(largest, result);
}

/* Gate sums of one chunk. A warp takes a tile: lane l the tokens 2l and 2l + 1. */
__device__ inline void sum_gates(const Sizes &z, const View &log_g, const Gates &gates, int batch, int kv_head, int chunk) {
  __shared__ float tile_sum[64], weight_sum[MEASURE_THREADS / 32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = batch * z.h_kv + kv_head;
  auto gate = [&](int token) {
    if (log_g.data == nullptr || token >= z.t) return 0.f;
    const float *p = reinterpret_cast<const float *>(log_g.data);
    return p[batch * log_g.batch + token * log_g.time + kv_head * log_g.head] * 1.44269504088896340736f;
  };
  auto inclusive = [&](float x) {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const float below = __shfl_up_sync(~0u, x, offset);
      if (lane >= offset) x += below;
    }
    return x;
  };
  auto exclusive_after = [&](float x) { /* sum over the lanes after this one */
    float all = x;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const float above = __shfl_down_sync(~0u, all, offset);
      if (lane + offset < 32) all += above;
    }
    const float next = __shfl_down_sync(~0u, all, 1);
    return lane == 31 ? 0.f : next;
  };
  for (int tile = warp; tile < z.chunk_tiles; tile += MEASURE_THREADS / 32) {
    const int token = chunk * z.chunk + tile * TILE + 2 * lane;
    const float sum = inclusive(gate(token) + gate(token + 1));
    if (lane == 31) tile_sum[tile] = sum;
  }
  __syncthreads();
  float weights = 0.f;
  for (int tile = warp; tile < z.chunk_tiles; tile += MEASURE_THREADS / 32) {
    const int token = chunk * z.chunk + tile * TILE + 2 * lane;
    const int64_t at = head * z.tokens + token;
    const float g0 = gate(token), g1 = gate(token + 1);
    const float prefix1 = inclusive(g0 + g1), left = __shfl_up_sync(~0u, prefix1, 1);
    const float prefix0 = lane == 0 ? g0 : left + g0;
    const float suffix1 = exclusive_after(g0 + g1), suffix0 = suffix1 + g1;
    float before = 0.f, after = 0.f;
    for (int i = 0; i < tile; i++) before += tile_sum[i];
    for (int i = z.chunk_tiles - 1; i > tile; i--) after += tile_sum[i];
    *reinterpret_cast<float2 *>(gates.tile_prefix + at) = make_float2(prefix0, prefix1);
    float *factors = gates.tile_decay + (int64_t(head) * z.tiles + chunk * z.chunk_tiles + tile) * TILE_FACTORS;
    *reinterpret_cast<float2 *>(factors + 2 * lane) = make_float2(exp2f(suffix0), exp2f(suffix1));
    if (lane < TILE_FACTORS - TILE) factors[TILE + lane] = exp2f(tile_sum[tile]);
    *reinterpret_cast<float2 *>(gates.chunk_prefix + at) = make_float2(before + prefix0, before + prefix1);
    const float w0 = exp2f(suffix0 + after), w1 = exp2f(suffix1 + after);
    *reinterpret_cast<float2 *>(gates.chunk_decay + at) = make_float2(w0, w1);
    weights += (token < z.t ? w0 : 0.f) + (token + 1 < z.t ? w1 : 0.f);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) weights += __shfl_xor_sync(~0u, weights, offset);
  if (lane == 0) weight_sum[warp] = weights;
  __syncthreads();
  if (threadIdx.x == 0) {
    float chunk_sum = 0.f, total = 0.f;
    for (int i = 0; i < z.chunk_tiles; i++) chunk_sum += tile_sum[i];
    for (int i = 0; i < MEASURE_THREADS / 32; i++) total += weight_sum[i];
    gates.chunk_sum[head * z.chunks + chunk] = chunk_sum;
    gates.chunk_weight[head * z.chunks + chunk] = total;
  }
}

struct MeasureParams {
  Sizes z;
  View k, v, log_g;
  const float *s0, *z0; /* public layout, contiguous; may be null */
  Gates gates;
  Maxima maxima;
};

template <typename In>
__global__ void __launch_bounds__(MEASURE_THREADS, 4) /* or ptxas keeps to 40 registers and spills */ measure_kernel(const __grid_constant__ MeasureParams p) {
  const int heads = p.z.b * p.z.h_kv, head = blockIdx.x % heads, batch = head / p.z.h_kv, kv_head = head % p.z.h_kv;
  const int part = blockIdx.x / heads, chunk = part / (p.z.chunk / p.z.measure_rows);
  const int first = min(part * p.z.measure_rows, p.z.t), last = min(first + p.z.measure_rows, p.z.t);
  const float k_largest = measure_rows<In>(p.k, batch * p.k.batch + kv_head * p.k.head, first, last, p.z.d);
  const float v_largest = measure_rows<In>(p.v, batch * p.v.batch + kv_head * p.v.head, first, last, p.z.e);
  note_largest(k_largest, p.maxima.k + head);
  note_largest(v_largest, p.maxima.v + head);
  if (part % (p.z.chunk / p.z.measure_rows) > 0) return;
  sum_gates(p.z, p.log_g, p.gates, batch, kv_head, chunk);
  const int64_t rows = int64_t(p.z.pairs) * 64;
  if (p.s0 != nullptr) measure_floats(p.s0 + head * rows * p.z.e, rows * p.z.e, chunk, p.z.chunks, p.maxima.s + head);
  if (p.z0 != nullptr) measure_floats(p.z0 + head * rows, rows, chunk, p.z.chunks, p.maxima.z + head);
}

/* Largest entries of a gradient of the last state, over those of the first state that `Maxima` held till then. */
static __global__ void __launch_bounds__(MEASURE_THREADS) measure_state_kernel(const float *s, const float *z, int64_t rows, int columns, Maxima maxima) {
  const int head = blockIdx.y;
  measure_floats(s + head * rows * columns, rows * columns, blockIdx.x, gridDim.x, maxima.s + head);
  measure_floats(z + head * rows, rows, blockIdx.x, gridDim.x, maxima.z + head);
}

/* One array for stage_kernel, scaled by a power of two per key-value head. */
struct StageArray {
  View x;
  int heads, columns, padded; /* heads per batch of x, its feature size, and what it is padded to */
  const unsigned *largest;
  int range;
  __half *rows;           /* staged tiles */
  const float *row_scale; /* per head of x and token, or null: a further factor on the row */
  const float *weights;   /* per head of x and token, or null, */
  __half *moment_weights; /* where they go, rounded, in token_order */
};
constexpr int STAGE_ARRAYS = 3, STAGE_PIECES = 2 * STAGE_THREADS; /* of eight values, of a block */
struct StageParams {
  Sizes z;
  StageArray arrays[STAGE_ARRAYS];
  int blocks[STAGE_ARRAYS]; /* of each array and those before it */
};

/* A block takes STAGE_PIECES pieces of a tile of one array, neighbouring lanes a row. */
template <typename In>
__global__ void __launch_bounds__(STAGE_THREADS) stage_kernel(const __grid_constant__ StageParams p) {
  int number = 0, block = blockIdx.x;
  while (block >= p.blocks[number]) number++;
  if (number > 0) block -= p.blocks[number - 1];
  const StageArray &a = p.arrays[number];
  const int pieces = a.padded / 8, parts = TILE * pieces / STAGE_PIECES, heads = p.z.b * a.heads;
  const int head = block % heads, part = block / heads % parts, tile = block / heads / parts;
  const int batch = head / a.heads, own = head % a.heads, kv = batch * p.z.h_kv + own / (a.heads / p.z.h_kv);
  const int row = (part * STAGE_PIECES + threadIdx.x) / pieces, piece = threadIdx.x % pieces, row_step = STAGE_THREADS / pieces;
  uint4 values[2];
  float factors[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int token = tile * TILE + row + i * row_step;
    values[i] = make_uint4(0, 0, 0, 0), factors[i] = a.row_scale == nullptr ? 1.f : a.row_scale[head * p.z.tokens + token];
    if (token < p.z.t) values[i] = load_piece<In>(a.x, batch * a.x.batch + token * a.x.time + own * a.x.head, piece * 8, a.columns);
  }
  const float head_factor = power_of_two(scaling_exponent(a.largest[kv], a.range));
  char *out = reinterpret_cast<char *>(a.rows + (int64_t(head) * p.z.tiles + tile) * (TILE * a.padded)) + (piece / 8) * TILE_BYTES;
#pragma unroll
  for (int i = 0; i < 2; i++)
    *reinterpret_cast<uint4 *>(out + swizzled(row + i * row_step, piece % 8)) = to_half<In>(values[i], factors[i] * head_factor);
  if (a.weights != nullptr && part == 0 && threadIdx.x < TILE) {
    const int64_t first = head * p.z.tokens + tile * TILE;
    a.moment_weights[first + threadIdx.x] = __float2half(a.weights[first + token_at(threadIdx.x)]);
  }
}

}  // namespace power
