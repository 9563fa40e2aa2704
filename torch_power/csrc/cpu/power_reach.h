// Which keys the gates have made a block of queries forget, decided from the numbers themselves.
//
// By Cauchy and Schwarz, all keys up to the end of block b together weigh at most
//     Σ_j |w_ij| ≤ |q'_i|^p · exp(G_i − G_end of b) · r_b,     r_b = Σ_{j ≤ end of b} |k_j|^p · exp(G_end of b − G_j),
// and r is a recurrence over blocks: exp(sum of the block's log gates)·r + the block's own sum. Where that bound is below kNegligible
// of the normaliser for every query of a block, leaving these keys out changes less than rounding does. An odd power has no
// normaliser to compare with: there the bound must be below the least number that is not 0.
#pragma once

#include "parallel.h"
#include "power_common.h"

namespace power_cpu {
namespace POWER_ISA {

template <class T> constexpr double kNegligible = sizeof(T) == 4 ? 0x1p-30 : 0x1p-59;  // 1/64 of a rounding error
template <class T> constexpr double kLeastNumber = sizeof(T) == 4 ? 0x1p-149 : 0x1p-1074;
// −log kNegligible, and what |q|^p·r is typically above the normaliser (e^6): tokens farther back than this many nats are forgotten.
template <class T> constexpr double kForgottenNats = (sizeof(T) == 4 ? 20.8 : 40.9) + 6;

// |x|^p, or for odd p something above it, from |x|².
inline double norm_power(double squared, int p) {
  double result = p % 2 ? (1 + squared) / 2 : 1;
  for (int i = 0; i < p / 2; ++i) result *= squared;
  return result;
}

template <class T> struct Reach {
  double *older;  // [b, h_kv, blocks]: r
  double *sum;    // [b, h_kv, blocks]: of the log gates of a block

  void reserve(Arena &arena, const Sizes<T> &z) {
    int64_t count = z.shape.b * z.shape.h_kv * z.blocks(z.shape.t_kv);
    older = arena.take<double>(count);
    sum = arena.take<double>(count);
  }
  // One head's part of the tables.
  void measure(const Sizes<T> &z, const PowerAttentionArrays &a, int64_t head) const {
    int64_t b = head / z.shape.h_kv, h = head % z.shape.h_kv, blocks = z.blocks(z.shape.t_kv);
    const T *log_g = pointer<T>(a.log_g, b, 0, h);
    double all = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      int64_t start = block * z.block, n = min64(z.block, z.shape.t_kv - start);
      double gates = 0, own = 0;
      with_dtype<T>(rows_from(a.k, b, start, h, 1), [&](auto *k) {
        for (int64_t j = n - 1; j >= 0; --j) {
          T squared = 0;
          for (int64_t c = 0; c < z.d; ++c) {
            T x = widen(k[j * a.k.stride[1] + c * a.k.stride[3]]);
            squared += x * x;
          }
          own += norm_power(double(squared), z.deg) * exp_scalar(gates);
          gates += double(log_g[(start + j) * a.log_g.stride[1]]);
        }
      });
      all = exp_scalar(gates) * all + own;
      older[head * blocks + block] = all;
      sum[head * blocks + block] = gates;
    }
  }
  // Whether queries that need `need` (below), `between` nats after the end of a block of keys, have forgotten it and all before.
  bool forgotten(int64_t entry, double between, double need) const { return need * exp_scalar(between) * older[entry] <= 1; }
};

// The largest |q'_i|^p·exp(g_i) of a block of queries, as a multiple of the weight that may be left out.
template <class T>
inline double largest_need(const Sizes<T> &z, const QueryBlock<T> &queries, const Gates<T> &gates, const T *norm, int64_t stride,
                           int64_t n) {
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T *q = queries.rows + i * z.d_ld;
    double allowed = z.deg % 2 ? 0 : kNegligible<T> * double(norm[i * stride]);
    if (!(allowed > kLeastNumber<T>)) allowed = kLeastNumber<T>;
    double need = norm_power(double(dot(q, q, z.d_ld)), z.deg) * double(gates.since_start[i]) / allowed;
    if (!(need <= largest)) largest = need;  // a NaN stays one, and forgets nothing
  }
  return largest;
}

// The cheaper of the two forms where that was left open and depends on how fast the gates forget. In multiply-adds, of which each
// form has seven times as many: a pair of blocks in the attention form against a block's query and update of the state.
template <class T> inline int32_t cheaper_form(const PowerAttentionShape &shape, const PowerAttentionArrays &a) {
  if (a.s0.data || a.z0.data || a.s.data || a.z.data || a.ds.data || a.dz.data) return POWER_CHUNKED;
  PowerAttentionShape attention = shape;
  attention.form = POWER_ATTENTION;
  Sizes<T> z(attention);
  int64_t blocks = z.blocks(shape.t), heads = shape.b * shape.h_kv;
  double pair = double(z.block) * double(z.d + z.e) / 2;
  double most = double(z.rows()) * double(z.E) * double(blocks) * double(heads) / pair, pairs = 0;
  for (int64_t head = 0; head < heads; ++head) {
    const T *log_g = pointer<T>(a.log_g, head / shape.h_kv, 0, head % shape.h_kv);
    double total = 0;  // nats from the oldest block still remembered to here
    auto block_sum = [&](int64_t block) {
      double gates = 0;
      for (int64_t i = block * z.block; log_g && i < min64((block + 1) * z.block, shape.t); ++i)
        gates += double(log_g[i * a.log_g.stride[1]]);
      return gates;
    };
    for (int64_t block = 1, oldest = 0; block < blocks; ++block) {
      if (block > 1) total += block_sum(block - 1);
      while (oldest < block - 1 && total < -kForgottenNats<T>) total -= block_sum(++oldest);
      pairs += double(block - oldest);
      if (pairs > most) return POWER_CHUNKED;
    }
  }
  return POWER_ATTENTION;
}

template <class T> inline PowerAttentionShape with_form_chosen(PowerAttentionShape shape, const PowerAttentionArrays &a) {
  if (shape.form == POWER_AUTO) shape.form = cheaper_form<T>(shape, a);
  return shape;
}
// Of a form left open: enough for either.
inline int64_t largest_workspace(PowerAttentionShape shape, int threads, int64_t (*of)(const PowerAttentionShape &, int)) {
  if (shape.form != POWER_AUTO) return of(shape, threads);
  shape.form = POWER_ATTENTION;
  int64_t attention = of(shape, threads);
  shape.form = POWER_CHUNKED;
  return max64(attention, of(shape, threads));
}

}  // namespace POWER_ISA
}  // namespace power_cpu
