/* The gates' gradient (scaling: chunked_backward.cuh).
 *
 * dlog_g_l = Σ over pairs (i ≥ l > j) of ∂L/∂w_ij w_ij = <ds0, s0> + <dz0, z0> + Σ_{j < l} (½ <k_j, dk_j> − row part of j): what tokens
 * before l gave to later rows, less what their own rows took. With normalize the row part, <dnum, num> + dden · den, is 0.
 * Summed over all of t, rounding errors grow with √t, while the exact terms of distant tokens cancel (d = 64, t = 262144: 8.0e-3 of dlog_g, its bound
 * is 5e-3). So the sum starts anew in three ways:
 *   anchors     every ANCHOR_TOKENS (tiles.h): of the pairs over the start of chunk c the state S_c before it is one side and the state gradient
 *               dS_{c − 1} behind the chunk before the other, so that the sum there is <S_c, dS_{c − 1}> + <M_c, dM_{c − 1}>
 *               (M is taken as symmetric within diagonal tiles, as every sum of k kᵀ is).
 *               The first is <ds0, s0> + <dz0, z0>; behind the last token the sum is 0 if no gradient arrives there.
 *   chunk ends  from one anchor to the next by the parts through the state alone, to which pairs inside a chunk add nothing; what misses the next
 *               anchor is spread over the chunks. Between two chunk ends the full terms are summed, and what misses the second is spread over the chunk.
 *   cuts        gates that let nothing through (mixed with weak ones, where sums over a chunk would drown the few pairs behind each): at 0.
 *
 * anchor_kernel         block (pair of feature tiles, or the moments; anchor; key-value head): its part of an anchor.
 * gate_sums_kernel      block (chunk, key-value head): the chunk's sums, and its share of the products of the first state.
 * gate_gradient_kernel  block (chunk, key-value head): the running sum through the chunk.
 */
#pragma once
#include "chunked_backward.cuh"

namespace power {

/* Chunks from one anchor to the next; anchors behind the first, which comes from the caller's state; blocks, and so summands, of each. */
__host__ __device__ inline int anchor_chunks(const Sizes &z) { return ANCHOR_TOKENS / z.chunk > 1 ? ANCHOR_TOKENS / z.chunk : 1; }
__host__ __device__ inline int anchor_count(const Sizes &z) { return (z.chunks - 1) / anchor_chunks(z); }
__host__ __device__ inline int anchor_parts(const Sizes &z) { return z.pairs + 1; }

/* States before the anchors' chunks, as the update stores those of all chunks; [chunk / stride − 1] if only those were kept. */
struct AnchorStates {
  const __half *states, *moments;
  const int *state_units, *moment_units;
  int first, stride; /* of the first anchor's, from one anchor's to the next, in chunks */
};

struct AnchorParams {
  Sizes z;
  AnchorStates before;
  StateStore gradient_states;
  const __half *gradient_moments;
  const int *gradient_state_units, *gradient_moment_units;
  Maxima maxima;
  double *anchors; /* [key-value head][anchor][anchor_parts] */
};

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
  const double *anchors;            /* as in AnchorParams */
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

/* Multiplicity is folded into both factors: a pair I < J counts half. A thread's float32 sum is of a few dozen products; what errs are the roundings of S and
 * dS to float16, 4e-4 to 6e-4 of dlog_g's root mean square, with strong gates and weak ones. */
static __global__ void __launch_bounds__(GATE_THREADS) anchor_kernel(const __grid_constant__ AnchorParams p) {
  const int pair = blockIdx.x, anchor = blockIdx.y, kv = blockIdx.z, heads = p.z.b * p.z.h_kv;
  const int64_t before = int64_t(p.before.first + anchor * p.before.stride) * heads + kv;
  const int behind = (anchor + 1) * anchor_chunks(p.z) - 1;
  const bool moments = pair == p.z.pairs;
  const int64_t size = moments ? p.z.padded_d * p.z.padded_d : 64 * p.z.padded_e, state_size = p.z.pairs * size;
  const __half *x = moments ? p.before.moments + before * size : p.before.states + before * state_size + pair * size;
  const __half *dx = moments ? p.gradient_moments + (int64_t(behind) * heads + kv) * size
                             : p.gradient_states.at(p.z, behind, kv / p.z.h_kv, kv % p.z.h_kv, state_size) + pair * size;
  float sum = 0.f;
  for (int64_t i = threadIdx.x * 8; i < size; i += GATE_THREADS * 8) {
    const uint4 a = *reinterpret_cast<const uint4 *>(x + i), b = *reinterpret_cast<const uint4 *>(dx + i);
    const uint32_t *u = &a.x, *w = &b.x;
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const float2 s = Pair<__half>::unpack(u[n]), ds = Pair<__half>::unpack(w[n]);
      sum += s.x * ds.x + s.y * ds.y;
    }
  }
  const double total = block_sum(sum);
  if (threadIdx.x != 0) return;
  const int64_t gradient = int64_t(behind) * heads + kv;
  const int unit = moments ? p.before.moment_units[before] + p.gradient_moment_units[gradient] : p.before.state_units[before] + p.gradient_state_units[gradient];
  const int from = scaling_exponent(p.maxima.dy[kv], DY_RANGE) + scaling_exponent(p.maxima.v[kv], V_RANGE) + STATE_GRADIENT_SHIFT;
  int j = 0;
  while ((j + 1) * (j + 2) / 2 <= pair) j++;
  const bool diagonal = moments || pair == j * (j + 3) / 2;
  p.anchors[(int64_t(kv) * anchor_count(p.z) + anchor) * anchor_parts(p.z) + pair] = ldexp(diagonal ? total : 0.5 * total, unit - from);
}

/* First pass. */
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

/* This thread's part of the sum at an anchor. */
__device__ __forceinline__ double anchor_part(const GateGradientParams &p, int kv, int anchor) {
  double part = 0.;
  if (anchor == 0) {
    for (int i = threadIdx.x; i < p.z.chunks; i += GATE_THREADS) part += p.sums[kv * p.z.chunks + i].start;
  } else {
    const int parts = anchor_parts(p.z);
    const double *x = p.anchors + (int64_t(kv) * anchor_count(p.z) + anchor - 1) * parts;
    for (int i = threadIdx.x; i < parts; i += GATE_THREADS) part += x[i];
  }
  return part;
}

static __global__ void __launch_bounds__(GATE_THREADS) gate_gradient_kernel(const __grid_constant__ GateGradientParams p) {
  __shared__ double warp_sum[GATE_THREADS / 32];
  __shared__ bool warp_cut[GATE_THREADS / 32];
  const int chunk = blockIdx.x, kv = blockIdx.y, batch = kv / p.z.h_kv, kv_head = kv % p.z.h_kv;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, first = chunk * p.z.chunk, last = min(first + p.z.chunk, p.z.t);
  const GateSums *sums = p.sums + kv * p.z.chunks;
  const int step = anchor_chunks(p.z), anchor = chunk / step, first_chunk = anchor * step, last_chunk = min(first_chunk + step, p.z.chunks);
  const bool followed = last_chunk < p.z.chunks; /* by another anchor */
  double running = 0., missed = 0.; /* at the chunk's start; by which the sum over the stretch fails to reach the next anchor */
  for (int i = first_chunk + threadIdx.x; i < last_chunk; i += GATE_THREADS)
    running += i < chunk ? sums[i].state_terms : 0., missed -= sums[i].state_terms;
  const double at_anchor = block_sum(anchor_part(p, kv, anchor));
  const double at_next = block_sum(followed ? anchor_part(p, kv, anchor + 1) : 0.);
  running = block_sum(running) + at_anchor, missed = block_sum(missed) + at_next - at_anchor;
  const double chunk_correction = followed || p.closed ? missed / (last_chunk - first_chunk) : 0.;
  running += chunk_correction * (chunk - first_chunk);
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
