/* Scaling of the backward pass, and its small kernels.
 *
 * With L the loss, D = dy^ = dy · 2^δ (per key-value head; with normalize = 0 also times den_i · ∂y/∂num_i, a row's own factor, so that
 * the formulas below serve both), ΔD_i = <D_i, y^_i> (0 with normalize = 0) and everything in units of 2^−(δ + ν):
 *   q~_i = q^_i 2^(C − l_i),  4^l_i ≈ den_i / 2^PS    rescaled so that each row's normaliser is about one: float16 then holds P / den and its
 *   h_i  = 4^(l_i − C) 2^PS / den_i                   derivative for every row, however many keys it saw
 *   P_ij / den_i = s~² γ h_i,   ds~_ij = 2 s~ γ h_i (<D_i, v^_j> − ΔD_i),   dq~_i = Σ_j ds~ k^_j,  dk^_j = Σ_i ds~ q~_i,  dv^_j = Σ_i P/den D_i
 * and through the state, with w_i = 2^(chunk_prefix_i) h_i:  dS = Σ w_i ψ(q~_i) D_i,  dM = −Σ w_i ΔD_i q~_i q~_iᵀ.
 *
 * prepare_backward_kernel               block (tile, query head): den, ΔD, h, l per token, range of D; writes q~.
 * gate_sums_kernel, gate_gradient_kernel  block (chunk, key-value head): dlog_g by a running sum of ½ <k, dk> − (row part).
 */
#pragma once
#include "chunked_stage.cuh"

namespace power {

/* C above; factors 2^x on ds~, on P / den and on the weights of the state gradient that centre them in float16's range:
 * at t = 65536 without gates P / den is 2^−16 and ds~ 2^−11. */
constexpr int Q_SHIFT = 4, DS_SHIFT = 6, P_SHIFT = 10, W_SHIFT = 8;
/* From s~ times the factors of P / den to ds~. */
constexpr float TO_DS = 2.f * (1 << DS_SHIFT) / (1 << P_SHIFT);
/* What a stored state gradient carries beside its unit: w is kept times 2^(2C + W_SHIFT). */
constexpr int STATE_GRADIENT_SHIFT = 2 * Q_SHIFT + W_SHIFT;

/* Per query head and token (padded with zeros), float32. */
struct RowFactors {
  float *q_scale;       /* the whole factor from q to q~ */
  float *dy_scale;      /* 1, or with normalize = 0 the row's factor on dy */
  float *h;             /* h above */
  float *h_decayed;     /* h · 2^(tile_prefix) */
  float *delta;         /* <dy, y>, unscaled; from gradient_q_kernel on ΔD · TO_DS, for gradient_kv_kernel */
  float *state_weight;  /* w · 2^STATE_GRADIENT_SHIFT */
  float *row_part;      /* normalize = 0: <dy, y> as the sums of gradient_q_kernel have it, for the gates */
  float *state_part;    /* Σ P/den (<D, v^> − ΔD) through the state alone, in the units of <dy, y>: written by gradient_q_kernel */
  float *tile_weight;   /* [query head][tile]: bounds what a tile adds to the state gradient */
};

struct PrepareBackwardParams {
  Sizes z;
  View q, y, dy;
  const float *norm;
  Gates gates;
  RowFactors rows;
  __half *q_rows;         /* staged q~ */
  __half *moment_weights; /* of q: 0 till gradient_q_kernel writes them */
  Maxima maxima;
  int normalize, has_state, score_exponent;
  float scale_squared;
};

constexpr int PREPARE_LANES = 8, PREPARE_THREADS = 256, PREPARE_ROWS = PREPARE_THREADS / PREPARE_LANES;

/* One tile, in three steps: PREPARE_LANES neighbouring lanes to a row, 16 bytes each at a time, for what a whole row gives; a thread to a row; and
 * again lanes to a row for q~, from what the first step read. */
template <typename In, int PADDED_D, int PADDED_E>
__global__ void __launch_bounds__(PREPARE_THREADS) prepare_backward_kernel(const __grid_constant__ PrepareBackwardParams p) {
  constexpr int PASSES = TILE / PREPARE_ROWS, PIECES = PADDED_D / 8 / PREPARE_LANES, E_PIECES = PADDED_E / 8 / PREPARE_LANES;
  __shared__ float dots[TILE], dy_ranges[TILE], q_factors[TILE], largest_smem[TILE / 32], weight_smem[TILE / 32];
  const int heads = p.z.b * p.z.h_q, tile = blockIdx.x / heads, head = blockIdx.x % heads;
  const int batch = head / p.z.h_q, own = head % p.z.h_q, kv = batch * p.z.h_kv + own / p.z.group;
  const int part = threadIdx.x % PREPARE_LANES;
  uint4 q[PASSES][PIECES], y[PASSES][E_PIECES], dy[PASSES][E_PIECES];
  const auto load = [&](const View &x, int token, int i, int columns) { /* all before any is used */
    if (token >= p.z.t) return make_uint4(0, 0, 0, 0);
    return load_piece<In>(x, batch * x.batch + token * x.time + own * x.head, (part + i * PREPARE_LANES) * 8, columns);
  };
#pragma unroll
  for (int pass = 0; pass < PASSES; pass++) {
    const int token = tile * TILE + threadIdx.x / PREPARE_LANES + pass * PREPARE_ROWS;
#pragma unroll
    for (int i = 0; i < E_PIECES; i++) y[pass][i] = load(p.y, token, i, p.z.e), dy[pass][i] = load(p.dy, token, i, p.z.e);
#pragma unroll
    for (int i = 0; i < PIECES; i++) q[pass][i] = load(p.q, token, i, p.z.d);
  }
  const int own_token = tile * TILE + threadIdx.x; /* of the second step: what it reads is under way during the first */
  const int64_t at = int64_t(head) * p.z.tokens + own_token, gate = int64_t(kv) * p.z.tokens + own_token;
  float den = 0.f, chunk_prefix = 0.f, tile_prefix = 0.f;
  if (threadIdx.x < TILE) {
    if (own_token < p.z.t) den = p.norm[(int64_t(batch) * p.z.t + own_token) * p.z.h_q + own];
    chunk_prefix = p.gates.chunk_prefix[gate], tile_prefix = p.gates.tile_prefix[gate];
  }
#pragma unroll
  for (int pass = 0; pass < PASSES; pass++) {
    const int row = threadIdx.x / PREPARE_LANES + pass * PREPARE_ROWS;
    float dot = 0.f, dy_largest = 0.f, q_largest = 0.f;
#pragma unroll
    for (int i = 0; i < E_PIECES; i++) {
      const uint32_t *a = &y[pass][i].x, *b = &dy[pass][i].x;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float2 u = Pair<In>::unpack(a[j]), v = Pair<In>::unpack(b[j]);
        dot += u.x * v.x + u.y * v.y;
      }
      dy_largest = fmaxf(dy_largest, largest_of<In>(dy[pass][i]));
    }
#pragma unroll
    for (int i = 0; i < PIECES; i++) q_largest = fmaxf(q_largest, largest_of<In>(q[pass][i]));
#pragma unroll
    for (int offset = PREPARE_LANES / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(~0u, dot, offset);
    dy_largest = group_max<PREPARE_LANES>(dy_largest), q_largest = group_max<PREPARE_LANES>(q_largest);
    if (part == 0) dots[row] = dot, dy_ranges[row] = dy_largest, q_factors[row] = row_factor(q_largest);
  }
  __syncthreads();
  if (threadIdx.x < TILE) {
    float dy_scale = den > 0.f ? 1.f : 0.f;
    if (!p.normalize) {
      const float undo = 1.f / q_factors[threadIdx.x];
      const int k_exponent = scaling_exponent(p.maxima.k[kv], K_RANGE);
      dy_scale = den * power_of_two(-2 * k_exponent - p.score_exponent) * undo * undo * p.scale_squared;
    }
    const int l = den > 0.f ? max((ilogbf(den) - p.score_exponent) >> 1, Q_SHIFT - 12) : 0;
    const float h = den > 0.f ? power_of_two(2 * (l - Q_SHIFT) + p.score_exponent) / den : 0.f;
    const float decay = exp2f(chunk_prefix);
    const bool used = tile >= p.z.chunk_tiles || p.has_state; /* the first chunk's gradient only goes to an initial state */
    /* w q~² < 2^15, or the update's float16 features overflow: reached only by rows nearly orthogonal to all they remember */
    const float range = power_of_two(15 - 2 * (Q_RANGE + Q_SHIFT - l));
    const float q_factor = q_factors[threadIdx.x] * power_of_two(Q_SHIFT - l);
    q_factors[threadIdx.x] = q_factor, p.rows.q_scale[at] = q_factor;
    p.moment_weights[at] = __float2half(0.f);
    p.rows.dy_scale[at] = dy_scale;
    p.rows.h[at] = h;
    p.rows.h_decayed[at] = h * exp2f(tile_prefix);
    p.rows.delta[at] = dots[threadIdx.x];
    p.rows.state_weight[at] = used ? fminf(decay * h * power_of_two(STATE_GRADIENT_SHIFT), range) : 0.f;
    const float largest = group_max<32>(dy_ranges[threadIdx.x] * fabsf(dy_scale));
    float weight = used && den > 0.f ? decay * power_of_two(p.score_exponent + STATE_GRADIENT_SHIFT) / den : 0.f;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) weight += __shfl_xor_sync(~0u, weight, offset);
    if (threadIdx.x % 32 == 0) largest_smem[threadIdx.x / 32] = largest, weight_smem[threadIdx.x / 32] = weight;
    named_barrier_sync(CONSUMERS, TILE);
    if (threadIdx.x == 0) {
      atomicMax(p.maxima.dy + kv, __float_as_uint(fmaxf(largest_smem[0], largest_smem[1])));
      p.rows.tile_weight[int64_t(head) * p.z.tiles + tile] = weight_smem[0] + weight_smem[1];
    }
  }
  __syncthreads();
  char *out = reinterpret_cast<char *>(p.q_rows + (int64_t(head) * p.z.tiles + tile) * (TILE * PADDED_D));
#pragma unroll
  for (int pass = 0; pass < PASSES; pass++) {
    const int row = threadIdx.x / PREPARE_LANES + pass * PREPARE_ROWS;
#pragma unroll
    for (int i = 0; i < PIECES; i++)
      *reinterpret_cast<uint4 *>(out + i * TILE_BYTES + swizzled(row, part)) = to_half<In>(q[pass][i], q_factors[row]);
  }
}

struct GateSums {
  double terms, state_terms, start; /* Σ terms; Σ of their parts through the state; share of <ds0, s0> + <dz0, z0> */
  double cuts;                      /* gates that cut (CUT) */
};

struct GateGradientParams {
  Sizes z;
  View log_g;
  const float2 *column;           /* ½ <k_j, dk_j> per key-value head and token: all of it, and what comes through the state */
  const float *row, *row_state;   /* row parts per query head and token; the first is read with normalize = 0 */
  int normalize;
  const float *s0, *z0, *ds0, *dz0; /* may be null */
  GateSums *sums;                   /* [key-value head][chunk] */
  int closed;                       /* nothing follows the last token: the sum must end at 0 */
  float *dlog_g;
  int64_t batch, time, head;
};

constexpr int GATE_THREADS = 256;
/* A gate below this lets nothing through that a float16 sum would show: its own gradient is 0, and sums start again behind it. */
constexpr float CUT = -18.f;

__device__ __forceinline__ bool gate_cuts(const GateGradientParams &p, int kv, int token) {
  const float *log_g = reinterpret_cast<const float *>(p.log_g.data);
  return log_g[kv / p.z.h_kv * p.log_g.batch + token * p.log_g.time + kv % p.z.h_kv * p.log_g.head] < CUT;
}

/* What token j adds to the running sum: by way of all pairs (x), and of those that go through a state (y). */
__device__ __forceinline__ double2 gate_term(const GateGradientParams &p, int kv, int token) {
  float row = 0.f, row_state = 0.f;
  for (int member = 0; member < p.z.group; member++) {
    const int64_t at = int64_t(kv * p.z.group + member) * p.z.tokens + token;
    if (!p.normalize) row += p.row[at];
    row_state += p.row_state[at];
  }
  const float2 column = p.column[int64_t(kv) * p.z.tokens + token];
  return make_double2(double(column.x) - row, double(column.y) - row_state);
}
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double partial[GATE_THREADS / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  if ((threadIdx.x & 31) == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0.;
  for (int i = 0; i < GATE_THREADS / 32; i++) x += partial[i];
  __syncthreads();
  return x;
}

/* dlog_g_l = Σ over pairs (i ≥ l > j) of ∂L/∂w_ij w_ij = <ds0, s0> + <dz0, z0> + Σ_{j < l} (½ <k_j, dk_j> − row part of j): what tokens
 * before l gave to later rows, less what their own rows took. With normalize the row part, <dnum, num> + dden · den, is 0.
 * Summed over all of t, rounding errors would grow with √t. So chunk ends come from the parts through the state alone, to which pairs inside a
 * chunk add nothing; the last of them is 0 when no gradient arrives behind it, and what misses 0 is spread over the chunks. Between two chunk
 * ends the full terms are summed, and what misses the second end is spread over the chunk. Gates that cut (mixed with weak ones, where sums over a
 * chunk would drown the few pairs behind each) start the sum anew at 0.
 * First pass: each chunk's sums, and its share of the products of states. */
static __global__ void __launch_bounds__(GATE_THREADS) gate_sums_kernel(const __grid_constant__ GateGradientParams p) {
  const int chunk = blockIdx.x, kv = blockIdx.y, first = chunk * p.z.chunk, last = min(first + p.z.chunk, p.z.t);
  double sum = 0., state_sum = 0., start = 0., cuts = 0.;
  for (int token = first + threadIdx.x; token < last; token += GATE_THREADS) {
    const double2 term = gate_term(p, kv, token);
    sum += term.x, state_sum += term.y, cuts += gate_cuts(p, kv, token);
  }
  if (p.s0 != nullptr) {
    const int64_t rows = int64_t(p.z.pairs) * 64;
    for (int64_t i = chunk * GATE_THREADS + threadIdx.x; i < rows * p.z.e; i += gridDim.x * GATE_THREADS)
      start += double(p.s0[kv * rows * p.z.e + i]) * p.ds0[kv * rows * p.z.e + i];
    for (int64_t i = chunk * GATE_THREADS + threadIdx.x; i < rows; i += gridDim.x * GATE_THREADS)
      start += double(p.z0[kv * rows + i]) * p.dz0[kv * rows + i];
  }
  sum = block_sum(sum), state_sum = block_sum(state_sum), start = block_sum(start), cuts = block_sum(cuts);
  if (threadIdx.x == 0) p.sums[kv * p.z.chunks + chunk] = GateSums{sum, state_sum, start, cuts};
}

/* Second pass: the running sum through a chunk. */
static __global__ void __launch_bounds__(GATE_THREADS) gate_gradient_kernel(const __grid_constant__ GateGradientParams p) {
  __shared__ double warp_sum[GATE_THREADS / 32];
  __shared__ bool warp_cut[GATE_THREADS / 32];
  const int chunk = blockIdx.x, kv = blockIdx.y, batch = kv / p.z.h_kv, kv_head = kv % p.z.h_kv;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, first = chunk * p.z.chunk, last = min(first + p.z.chunk, p.z.t);
  const GateSums *sums = p.sums + kv * p.z.chunks;
  double running = 0., end = 0.;
  for (int i = threadIdx.x; i < p.z.chunks; i += GATE_THREADS)
    running += sums[i].start + (i < chunk ? sums[i].state_terms : 0.), end += sums[i].start + sums[i].state_terms;
  running = block_sum(running), end = block_sum(end);
  const double chunk_correction = p.closed ? -end / p.z.chunks : 0.;
  running += chunk_correction * chunk;
  const double missing = sums[chunk].state_terms + chunk_correction - sums[chunk].terms;
  const double correction = sums[chunk].cuts > 0. ? 0. : missing / (last - first);
  for (int block = first; block < last; block += GATE_THREADS) {
    const int token = block + threadIdx.x;
    const double term = token < last ? gate_term(p, kv, token).x + correction : 0.;
    double sum = term; /* since the last cut, or the warp's first token */
    bool cut = token < last && gate_cuts(p, kv, token);
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const double below = __shfl_up_sync(~0u, sum, offset);
      const bool cut_below = __shfl_up_sync(~0u, cut, offset);
      if (lane >= offset) sum += cut ? 0. : below, cut |= cut_below;
    }
    if (lane == 31) warp_sum[warp] = sum, warp_cut[warp] = cut;
    __syncthreads();
    double before = running;
    for (int i = 0; i < GATE_THREADS / 32; i++) {
      if (i < warp) before = warp_cut[i] ? warp_sum[i] : before + warp_sum[i];
      running = warp_cut[i] ? warp_sum[i] : running + warp_sum[i];
    }
    if (cut) before = 0.;
    if (token < last) p.dlog_g[batch * p.batch + token * p.time + kv_head * p.head] = float(before + sum - term);
    __syncthreads();
  }
}

}  // namespace power
