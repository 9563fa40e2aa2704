/* Scaling of the backward pass, and its small kernels.
 *
 * With L the loss, D = dy^ = dy · 2^δ (per key-value head; with normalize = 0 also times den_i · ∂y/∂num_i, a row's own factor, so that
 * the formulas below serve both), ΔD_i = <D_i, y^_i> (0 with normalize = 0) and everything in units of 2^−(δ + ν):
 *   q~_i = q^_i 2^(C − l_i),  4^l_i ≈ den_i / 2^PS    rescaled so that each row's normaliser is about one: float16 then holds P / den and its
 *   h_i  = 4^(l_i − C) 2^PS / den_i                   derivative for every row, however many keys it saw
 *   P_ij / den_i = s~² γ h_i,   ds~_ij = 2 s~ γ h_i (<D_i, v^_j> − ΔD_i),   dq~_i = Σ_j ds~ k^_j,  dk^_j = Σ_i ds~ q~_i,  dv^_j = Σ_i P/den D_i
 * and through the state, with w_i = 2^(chunk_prefix_i) h_i:  dS = Σ w_i ψ(q~_i) D_i,  dM = −Σ w_i ΔD_i q~_i q~_iᵀ.
 *
 * prepare_backward_kernel   block (chunk, query head): den, ΔD, h, l per token, range of D.
 * gate_gradient_kernel      block (key-value head): dlog_g by a running sum of  Σ_e … = ½ <k, dk> − (row part).
 */
#pragma once
#include "chunked_stage.cuh"

namespace power {

/* C above; factors 2^x on ds~, on P / den and on the weights of the state gradient that centre them in float16's range:
 * at t = 65536 without gates P / den is 2^−16 and ds~ 2^−11. */
constexpr int Q_SHIFT = 4, DS_SHIFT = 6, P_SHIFT = 10, W_SHIFT = 8;
/* What a stored state gradient carries beside its unit: w is kept times 2^(2C + W_SHIFT). */
constexpr int STATE_GRADIENT_SHIFT = 2 * Q_SHIFT + W_SHIFT;

/* Per query head and token (padded with zeros), float32. */
struct RowFactors {
  float *q_scale;       /* 2^(C − l); stage_kernel replaces it by the whole factor from q to q~ */
  float *dy_scale;      /* 1, or with normalize = 0 the row's factor on dy */
  float *h;             /* h above */
  float *h_decayed;     /* h · 2^(tile_prefix) */
  float *delta;         /* <dy, y>, unscaled: of the gates and, normalised, of ΔD */
  float *state_weight;  /* w · 2^STATE_GRADIENT_SHIFT */
  float *chunk_weight;  /* [query head][chunk]: bound of what a chunk adds to the state gradient */
};

struct PrepareBackwardParams {
  Sizes z;
  View q, y, dy;
  const float *norm;
  Gates gates;
  RowFactors rows;
  Maxima maxima;
  int normalize, has_state, score_exponent;
  float scale_squared;
};

/* Rows are taken by WIDTH neighbouring lanes, 16 bytes each. */
template <typename In>
__global__ void __launch_bounds__(MEASURE_THREADS) prepare_backward_kernel(const __grid_constant__ PrepareBackwardParams p) {
  constexpr int WIDTH = 16;
  __shared__ float weight_sum[MEASURE_THREADS / 32];
  const int chunk = blockIdx.x, head = blockIdx.y, batch = head / p.z.h_q, own = head % p.z.h_q;
  const int kv = batch * p.z.h_kv + own / p.z.group, lane = threadIdx.x & 31, piece = lane % WIDTH;
  const int k_exponent = scaling_exponent(p.maxima.k[kv], K_RANGE);
  float largest = 0.f, weights = 0.f;
  for (int i = threadIdx.x / WIDTH; i < p.z.chunk; i += MEASURE_THREADS / WIDTH) {
    const int token = chunk * p.z.chunk + i;
    const bool inside = token < p.z.t;
    float dot = 0.f, dy_largest = 0.f, q_largest = 0.f;
    if (inside) {
      const uint4 y = load_piece<In>(p.y, batch * p.y.batch + token * p.y.time + own * p.y.head, piece * 8, p.z.e);
      const uint4 dy = load_piece<In>(p.dy, batch * p.dy.batch + token * p.dy.time + own * p.dy.head, piece * 8, p.z.e);
      const uint32_t *a = &y.x, *b = &dy.x;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float2 u = Pair<In>::unpack(a[j]), v = Pair<In>::unpack(b[j]);
        dot += u.x * v.x + u.y * v.y;
      }
      dy_largest = largest_of<In>(dy);
      if (!p.normalize)
        q_largest = largest_of<In>(load_piece<In>(p.q, batch * p.q.batch + token * p.q.time + own * p.q.head, piece * 8, p.z.d));
    }
#pragma unroll
    for (int offset = WIDTH / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(~0u, dot, offset);
    dy_largest = group_max<WIDTH>(dy_largest), q_largest = group_max<WIDTH>(q_largest);
    const float den = inside ? p.norm[(int64_t(batch) * p.z.t + token) * p.z.h_q + own] : 0.f;
    float dy_scale = 1.f;
    if (!p.normalize) {
      const float undo = 1.f / row_factor(q_largest);
      dy_scale = den * power_of_two(-2 * k_exponent - p.score_exponent) * undo * undo * p.scale_squared;
    }
    if (den > 0.f) largest = fmaxf(largest, dy_largest * fabsf(dy_scale));
    const int l = den > 0.f ? max((ilogbf(den) - p.score_exponent) >> 1, Q_SHIFT - 12) : 0;
    const float h = den > 0.f ? power_of_two(2 * (l - Q_SHIFT) + p.score_exponent) / den : 0.f;
    if (piece == 0) {
      const int64_t at = int64_t(head) * p.z.tokens + token, gate = int64_t(kv) * p.z.tokens + token;
      const float decay = exp2f(p.gates.chunk_prefix[gate]);
      const bool used = chunk > 0 || p.has_state; /* the first chunk's gradient only goes to an initial state */
      /* w q~² < 2^15, or the update's float16 features overflow: reached only by rows nearly orthogonal to all they remember */
      const float range = power_of_two(15 - 2 * (Q_RANGE + Q_SHIFT - l));
      p.rows.q_scale[at] = power_of_two(Q_SHIFT - l);
      p.rows.dy_scale[at] = den > 0.f ? dy_scale : 0.f;
      p.rows.h[at] = h;
      p.rows.h_decayed[at] = h * exp2f(p.gates.tile_prefix[gate]);
      p.rows.delta[at] = dot;
      p.rows.state_weight[at] = used ? fminf(decay * h * power_of_two(STATE_GRADIENT_SHIFT), range) : 0.f;
      if (used && den > 0.f) weights += decay * power_of_two(p.score_exponent + STATE_GRADIENT_SHIFT) / den;
    }
  }
  largest = group_max<32>(largest);
  if (lane == 0) atomicMax(p.maxima.dy + kv, __float_as_uint(largest));
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) weights += __shfl_xor_sync(~0u, weights, offset);
  if (lane == 0) weight_sum[threadIdx.x >> 5] = weights;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.f;
    for (int i = 0; i < MEASURE_THREADS / 32; i++) total += weight_sum[i];
    p.rows.chunk_weight[int64_t(head) * p.z.chunks + chunk] = total;
  }
}

struct GateGradientParams {
  Sizes z;
  const float *column; /* ½ <k_j, dk_j> per key-value head and token */
  const float *delta;  /* <dy_i, y_i> per query head and token */
  int normalize;
  const float *s0, *z0, *ds0, *dz0; /* may be null */
  float *dlog_g;
  int64_t batch, time, head;
};

constexpr int GATE_THREADS = 1024;

/* dlog_g_l = Σ over pairs (i ≥ l > j) of ∂L/∂w_ij w_ij = <ds0, s0> + <dz0, z0> + Σ_{j < l} (½ <k_j, dk_j> − row part of j): what tokens
 * before l gave to later rows, less what their own rows took. With normalize the row part, <dnum, num> + dden · den, is 0. */
static __global__ void __launch_bounds__(GATE_THREADS) gate_gradient_kernel(const __grid_constant__ GateGradientParams p) {
  __shared__ double partial[GATE_THREADS];
  const int kv = blockIdx.x, batch = kv / p.z.h_kv, kv_head = kv % p.z.h_kv, n = threadIdx.x;
  const int64_t rows = int64_t(p.z.pairs) * 64;
  double start = 0.;
  if (p.s0 != nullptr) {
    for (int64_t i = n; i < rows * p.z.e; i += GATE_THREADS) start += double(p.s0[kv * rows * p.z.e + i]) * p.ds0[kv * rows * p.z.e + i];
    for (int64_t i = n; i < rows; i += GATE_THREADS) start += double(p.z0[kv * rows + i]) * p.dz0[kv * rows + i];
  }
  auto term = [&](int token) {
    float row = 0.f;
    if (!p.normalize)
      for (int member = 0; member < p.z.group; member++)
        row += p.delta[int64_t(batch * p.z.h_q + kv_head * p.z.group + member) * p.z.tokens + token];
    return double(p.column[int64_t(kv) * p.z.tokens + token]) - row;
  };
  const int each = (p.z.t + GATE_THREADS - 1) / GATE_THREADS, first = min(n * each, p.z.t), last = min(first + each, p.z.t);
  double sum = 0.;
  for (int token = first; token < last; token++) sum += term(token);
  partial[n] = start;
  __syncthreads();
  for (int offset = GATE_THREADS / 2; offset > 0; offset /= 2) {
    if (n < offset) partial[n] += partial[n + offset];
    __syncthreads();
  }
  start = partial[0];
  __syncthreads();
  partial[n] = sum;
  __syncthreads();
  for (int offset = 1; offset < GATE_THREADS; offset *= 2) {
    const double below = n >= offset ? partial[n - offset] : 0.;
    __syncthreads();
    partial[n] += below;
    __syncthreads();
  }
  double running = start + partial[n] - sum;
  for (int token = first; token < last; token++) {
    p.dlog_g[batch * p.batch + token * p.time + kv_head * p.head] = float(running);
    running += term(token);
  }
}

}  // namespace power
