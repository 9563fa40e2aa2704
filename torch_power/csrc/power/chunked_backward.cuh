/* Scaling of the backward pass, and its first kernel. (That of the gates' gradient: chunked_gate_gradient.cuh.)
 *
 * With L the loss, D = dy^ = dy · 2^δ (per key-value head; with normalize = 0 also times den_i · ∂y/∂num_i, a row's own factor, so that
 * the formulas below serve both), ΔD_i = <D_i, y^_i> (0 with normalize = 0) and everything in units of 2^−(δ + ν):
 *   q~_i = q^_i 2^(C − l_i),  4^l_i ≈ den_i / 2^PS    rescaled so that each row's normaliser is about one: float16 then holds P / den and its
 *   h_i  = 4^(l_i − C) 2^PS / den_i                   derivative for every row, however many keys it saw
 *   P_ij / den_i = s~² γ h_i,   ds~_ij = 2 s~ γ h_i (<D_i, v^_j> − ΔD_i),   dq~_i = Σ_j ds~ k^_j,  dk^_j = Σ_i ds~ q~_i,  dv^_j = Σ_i P/den D_i
 * and through the state, with w_i = 2^(chunk_prefix_i) h_i:  dS = Σ w_i ψ(q~_i) D_i,  dM = −Σ w_i ΔD_i q~_i q~_iᵀ.
 *
 * prepare_backward_kernel  block (tile, query head): den, ΔD, h, l per token, range of D; writes q~.
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

}  // namespace power
