/* What only the general kernels do: additive and boolean masks of any strides, bands that are not plain causal, and dropout. */
#pragma once

#include "../abi.h"
#include "common.cuh"

namespace power::sdpa {

/* An operand [b, h_q, t_q, t_kv] with stride 0 along the axes it is broadcast over. */
struct Operand {
  const void *data;
  int64_t stride[4];
  int dtype;
  __device__ __forceinline__ int64_t head_offset(int batch, int head) const { return batch * stride[0] + head * stride[1]; }
};

struct General {
  Operand bias, mask;  // data null: absent
  const int64_t *seed;  // null without dropout
  int64_t seed_stride;
  uint32_t last_dropped;  // a weight is dropped when its 32 random bits are at most this
  float gain;             // of a weight that is kept
};

/* The masks and the dropout of one head of one batch element. */
struct HeadMasks {
  const General &general;
  int64_t bias, mask;  // where the head starts
  uint32_t head, seed[2];

  __device__ __forceinline__ HeadMasks(const General &g, int batch, int head)
      : general(g), bias(g.bias.head_offset(batch, head)), mask(g.mask.head_offset(batch, head)), head(uint32_t(head)) {
    const int64_t x = g.seed ? g.seed[batch * g.seed_stride] : 0;
    seed[0] = uint32_t(x), seed[1] = uint32_t(uint64_t(x) >> 32);
  }

  /* The score in base 2 of query i and key j from q·k · scale · log2 e: the bias added, −∞ where it is hidden. */
  __device__ __forceinline__ float score(const Problem &p, float scaled, int i, int j) const {
    if (i >= p.t_q || j >= p.t_kv || j > i + p.right || j < i - p.left) return kNegativeInfinity;
    if (general.mask.data &&
        !static_cast<const uint8_t *>(general.mask.data)[mask + i * general.mask.stride[2] + j * general.mask.stride[3]])
      return kNegativeInfinity;
    if (general.bias.data == nullptr) return scaled;
    const int64_t at = bias + i * general.bias.stride[2] + j * general.bias.stride[3];
    const float x = general.bias.dtype == POWER_FLOAT32    ? static_cast<const float *>(general.bias.data)[at]
                    : general.bias.dtype == POWER_BFLOAT16 ? __bfloat162float(static_cast<const __nv_bfloat16 *>(general.bias.data)[at])
                                                           : __half2float(static_cast<const __half *>(general.bias.data)[at]);
    return fmaf(x, kLog2E, scaled);
  }

  /* Philox 4×32-7 (csrc/abi.h): the words of keys 4·quad … 4·quad + 3 of query i. */
  __device__ __forceinline__ uint4 random(int quad, int i) const {
    uint32_t x0 = uint32_t(quad), x1 = uint32_t(i), x2 = head, x3 = 0, k0 = seed[0], k1 = seed[1];
#pragma unroll
    for (int round = 0; round < 7; ++round) {
      const uint32_t low0 = 0xD2511F53u * x0, high0 = __umulhi(0xD2511F53u, x0);
      const uint32_t low1 = 0xCD9E8D57u * x2, high1 = __umulhi(0xCD9E8D57u, x2);
      x0 = high1 ^ x1 ^ k0, x1 = low1;
      x2 = high0 ^ x3 ^ k1, x3 = low0;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return make_uint4(x0, x1, x2, x3);
  }
  __device__ __forceinline__ float gain_of(uint32_t word) const { return word <= general.last_dropped ? 0.f : general.gain; }
};

/* The scores of a tile whose rows are queries from `first` on and whose columns are keys from `from` on. */
template <int kKeys>
__device__ __forceinline__ void mask_rows(float (&score)[kKeys / 2], const Problem &p, const HeadMasks &masks, const Fragment &at, int first,
                                          int from) {
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float &x = score[4 * n + 2 * r + c];
        x = masks.score(p, x * p.scale_log2, first + at.row + 8 * r, from + 8 * n + 2 * at.quad + c);
      }
}

/* x *= dropout's gains, x as in `mask_rows`. Two threads share four keys: one draws the words of the upper row for both, the other
 * those of the lower. */
template <int kKeys>
__device__ __forceinline__ void drop_rows(float (&x)[kKeys / 2], const HeadMasks &masks, const Fragment &at, int first, int from) {
  const bool odd = at.quad & 1;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
    const uint4 drawn = masks.random((from + 8 * n) / 4 + (at.quad >> 1), first + at.row + (odd ? 8 : 0));
    const uint2 own = odd ? make_uint2(drawn.z, drawn.w) : make_uint2(drawn.x, drawn.y);
    const uint2 other = odd ? make_uint2(drawn.x, drawn.y) : make_uint2(drawn.z, drawn.w);
    const uint2 got = make_uint2(__shfl_xor_sync(~0u, other.x, 1), __shfl_xor_sync(~0u, other.y, 1));
    const uint2 upper = odd ? got : own, lower = odd ? own : got;
    x[4 * n] *= masks.gain_of(upper.x), x[4 * n + 1] *= masks.gain_of(upper.y);
    x[4 * n + 2] *= masks.gain_of(lower.x), x[4 * n + 3] *= masks.gain_of(lower.y);
  }
}

/* As `mask_rows`, for a tile whose rows are keys and whose columns are queries. */
__device__ __forceinline__ void mask_columns(float (&score)[kRows / 2], const Problem &p, const HeadMasks &masks, const Fragment &at,
                                             int first_key, int first_query) {
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float &x = score[4 * n + 2 * r + c];
        x = masks.score(p, x * p.scale_log2, first_query + 8 * n + 2 * at.quad + c, first_key + at.row + 8 * r);
      }
}

/* Dropout's gains of a tile as in `mask_columns`, eight columns at a time. The four keys of a draw belong to four threads: each draws
 * for one of the four (row, column) that they have in eight columns, and they exchange the words. */
struct ColumnGains {
  const HeadMasks &masks;
  int own, key, query;
  __device__ __forceinline__ ColumnGains(const HeadMasks &masks, const Fragment &at, int first_key, int first_query)
      : masks(masks), own(at.row & 3), key(first_key + at.row), query(first_query + 2 * at.quad) {}

  /* gain[2r + c] is that of row r and column 8n + c of this thread's. */
  __device__ __forceinline__ void get(int n, float (&gain)[4]) const {
    const uint4 drawn = masks.random((key >> 2) + (own >> 1) * 2, query + 8 * n + (own & 1));
    const uint32_t word[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
    float got[4];
#pragma unroll
    for (int step = 0; step < 4; ++step) {  // the neighbour own ^ step draws for element own ^ step; its word `own` is this thread's
      const int other = own ^ step;
      const uint32_t sent = other == 0 ? word[0] : other == 1 ? word[1] : other == 2 ? word[2] : word[3];
      got[step] = masks.gain_of(__shfl_xor_sync(~0u, sent, 4 * step));
    }
#pragma unroll
    for (int element = 0; element < 4; ++element) {
      const int step = element ^ own;
      gain[element] = step == 0 ? got[0] : step == 1 ? got[1] : step == 2 ? got[2] : got[3];
    }
  }
};
struct NoGains {};

}  // namespace power::sdpa
