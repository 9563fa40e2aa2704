/* Before the matrix kernels: sum the gates, find each head's range, and write keys and values as scaled float16 tiles.
 *
 * measure_kernel   block (MEASURE_ROWS rows, head): largest |k| and |v|, into `Maxima` by integer maximum (order-free, so two runs agree); the first
 *                  of a chunk also sums its gates.
 * stage_kernel     block (tile, head): 64 rows of one array, scaled; optionally also transposed with a weight per token.
 * Both read each input once and are bound by device memory. Heads come first in the order of blocks: their rows are neighbours in memory.
 */
#pragma once
#include "chunked_layout.cuh"

namespace power {

constexpr int MEASURE_THREADS = 256, MEASURE_ROWS = 256, STAGE_THREADS = 256;

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

/* Largest magnitude in rows [first, last) of one head, of this thread's share. */
template <typename In>
__device__ __forceinline__ float measure_rows(const View &x, int64_t head_offset, int first, int last, int columns) {
  const int pieces = columns / 8;
  float largest = 0.f;
#pragma unroll 4
  for (int i = threadIdx.x; i < (last - first) * pieces; i += MEASURE_THREADS) {
    const int row = i / pieces, piece = i - row * pieces;
    largest = fmaxf(largest, largest_of<In>(load_piece<In>(x, head_offset + (first + row) * x.time, piece * 8, columns)));
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
  const int part = blockIdx.x / heads, chunk = part / (p.z.chunk / MEASURE_ROWS);
  const int first = min(part * MEASURE_ROWS, p.z.t), last = min(first + MEASURE_ROWS, p.z.t);
  const float k_largest = measure_rows<In>(p.k, batch * p.k.batch + kv_head * p.k.head, first, last, p.z.d);
  const float v_largest = measure_rows<In>(p.v, batch * p.v.batch + kv_head * p.v.head, first, last, p.z.e);
  note_largest(k_largest, p.maxima.k + head);
  note_largest(v_largest, p.maxima.v + head);
  if (part % (p.z.chunk / MEASURE_ROWS) > 0) return;
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

/* How stage_kernel scales rows: by a power of two per key-value head, or each row into [1, 2) (queries). */
enum class Scaling { HEAD, ROW };

struct StageParams {
  Sizes z;
  View x;
  int heads, columns; /* heads per batch of x, and its feature size */
  const unsigned *largest;
  int range;
  __half *rows;         /* staged tiles, or null */
  __half *transposed;   /* weighted transposed tiles, or null */
  const float *weights; /* per head of x and token */
  __half *moment_weights; /* with transposed, in token_order: the weights, or 0 for gradient_q_kernel to replace */
  int moments_later;
  float *row_scale;     /* per head of x and token, or null: a further factor on the row; with Scaling::ROW, replaced by the whole factor */
};

/* One tile: WIDTH padded columns, WIDTH / 8 neighbouring lanes to a row. */
template <typename In, int WIDTH, Scaling SCALING>
__global__ void __launch_bounds__(STAGE_THREADS) stage_kernel(const __grid_constant__ StageParams p) {
  constexpr int PIECES = WIDTH / 8, PITCH = WIDTH + 2; /* an odd number of words: a row's writers spread over the banks */
  __shared__ __half tile_smem[TILE * PITCH];
  const int heads = p.z.b * p.heads, tile = blockIdx.x / heads, head = blockIdx.x % heads, batch = head / p.heads, own = head % p.heads;
  const int kv = batch * p.z.h_kv + own / (p.heads / p.z.h_kv);
  const int64_t out = (int64_t(head) * p.z.tiles + tile) * (TILE * WIDTH);
  const float head_factor = SCALING == Scaling::HEAD ? power_of_two(scaling_exponent(p.largest[kv], p.range)) : 1.f;
#pragma unroll
  for (int i = threadIdx.x; i < TILE * PIECES; i += STAGE_THREADS) {
    const int row = i / PIECES, piece = i % PIECES, token = tile * TILE + row;
    uint4 values = make_uint4(0, 0, 0, 0);
    if (token < p.z.t)
      values = load_piece<In>(p.x, batch * p.x.batch + token * p.x.time + own * p.x.head, piece * 8, p.columns);
    float factor = head_factor;
    if (SCALING == Scaling::ROW) factor = row_factor(group_max<PIECES>(largest_of<In>(values)));
    if (p.row_scale != nullptr) {
      float *row_scale = p.row_scale + head * p.z.tokens + token;
      factor *= *row_scale;
      __syncwarp(); /* all of the row's lanes have read it */
      if (SCALING == Scaling::ROW && piece == 0) *row_scale = factor;
    }
    values = to_half<In>(values, factor);
    if (p.rows != nullptr)
      *reinterpret_cast<uint4 *>(reinterpret_cast<char *>(p.rows + out) + (piece / 8) * TILE_BYTES + swizzled(row, piece % 8)) = values;
    const uint32_t *pairs = reinterpret_cast<const uint32_t *>(&values);
#pragma unroll
    for (int j = 0; j < 4; j++) *reinterpret_cast<uint32_t *>(tile_smem + row * PITCH + piece * 8 + 2 * j) = pairs[j];
  }
  if (p.transposed == nullptr) return;
  __syncthreads();
  const float *weights = p.weights + head * p.z.tokens + tile * TILE;
  if (threadIdx.x < TILE)
    p.moment_weights[head * p.z.tokens + tile * TILE + threadIdx.x] = __float2half(p.moments_later ? 0.f : weights[token_at(threadIdx.x)]);
#pragma unroll
  for (int i = threadIdx.x; i < TILE * PIECES; i += STAGE_THREADS) {
    const int row = i / 8, piece = i % 8; /* row of the transpose: a feature; piece: eight tokens; a warp writes whole rows */
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int token = token_at(piece * 8 + 2 * j);
      pairs[j] = Pair<__half>::pack(__half2float(tile_smem[token * PITCH + row]) * weights[token],
                                    __half2float(tile_smem[(token + 1) * PITCH + row]) * weights[token + 1]);
    }
    *reinterpret_cast<uint4 *>(p.transposed + out + i * 8) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

}  // namespace power
