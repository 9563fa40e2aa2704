// Scaled dot-product attention forward: one task a block of queries, which walks the keys with a running maximum and sum.
// Queries run along the vector lanes, so the maximum and the sum of a row are plain vector operations, never a reduction.
#pragma once

#include "parallel.h"
#include "power_common.h"

namespace power_cpu {
namespace POWER_ISA {

constexpr int64_t kSdpaBlock = 192;  // queries and keys held at once, as in power attention

template <class T> struct SdpaSizes {
  const PowerSdpaShape &shape;
  int64_t group, block, lanes, d, e, d_ld, e_ld;
  explicit SdpaSizes(const PowerSdpaShape &s) : shape(s) {
    group = s.h_q / s.h_kv;
    block = min64(kSdpaBlock, max64(1, max64(s.t_q, s.t_kv)));
    lanes = round_up(block, kTileM<T>);
    d = s.d;
    e = s.e;
    d_ld = round_up(d, kTileM<T>);
    e_ld = round_up(max64(e, 1), kTileM<T>);
  }
  int64_t blocks(int64_t t) const { return (t + block - 1) / block; }
};

// Rows [start, start + n) of array `a` of head (b, h), times `scale`, as T; zero past the end.
template <class T>
inline void load_rows(const PowerArray &a, int64_t b, int64_t h, int64_t start, int64_t n, int64_t columns, const T *scale, T *rows,
                      int64_t ld, int64_t n_padded) {
  pack_rows(rows_from(a, b, h, start, 2), n, columns, scale, rows, ld, n_padded);
}

// ---- Dropout ----------------------------------------------------------------------------------------------------------

// Philox 4×32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), counter (key / 4, query, head, 0):
// out[word, i] are the four words of query `query + i`, one for each of four neighbouring keys.
inline void philox(uint64_t seed, uint32_t key4, uint32_t query, uint32_t head, int64_t n, int64_t ld, uint32_t *out) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t x0 = key4, x1 = query + uint32_t(i), x2 = head, x3 = 0, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 7; ++round) {
      uint64_t first = uint64_t(0xD2511F53u) * x0, second = uint64_t(0xCD9E8D57u) * x2;
      x0 = uint32_t(second >> 32) ^ x1 ^ k0;
      x2 = uint32_t(first >> 32) ^ x3 ^ k1;
      x1 = uint32_t(second);
      x3 = uint32_t(first);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    out[i] = x0;
    out[ld + i] = x1;
    out[2 * ld + i] = x2;
    out[3 * ld + i] = x3;
  }
}

// keep[j, i] = 1/(1 − p) where the weight of (query start + i, key key_start + j) is kept, else 0. key_start % 4 == 0.
// `words` [4, ld] is scratch.
template <class T>
inline void dropout_factors(double p, uint64_t seed, int64_t h, int64_t start, int64_t key_start, int64_t n, int64_t lanes, int64_t ld,
                            uint32_t *words, T *keep) {
  uint64_t threshold = uint64_t(p * 4294967296.0 + 0.5);
  T kept = p < 1 ? T(1.0 / (1.0 - p)) : T(0);
  for (int64_t j = 0; j < n; j += 4) {
    philox(seed, uint32_t((key_start + j) / 4), uint32_t(start), uint32_t(h), lanes, ld, words);
    for (int64_t word = 0; word < min64(4, n - j); ++word)
      for (int64_t i = 0; i < lanes; ++i) keep[(j + word) * ld + i] = words[word * ld + i] < threshold ? T(0) : kept;
  }
}

// ---- Masks ------------------------------------------------------------------------------------------------------------

template <class T> constexpr T kMinusInfinity = -__builtin_inf();

// stripe[j, i] += bias, or −inf where the mask is false or the key is not visible. Rows are valid as in `Visible`.
template <class T>
inline void apply_masks(const PowerSdpaArrays &a, int64_t b, int64_t h, int64_t start, int64_t key_start, int64_t n, int64_t n_queries,
                        int64_t lanes, int64_t ld, Visible visible, T *stripe) {
  for (int64_t i = 0; i < n_queries; ++i) {
    if (a.bias.data) {
      const T *row = pointer<T>(a.bias, b, h, start + i) + key_start * a.bias.stride[3];
      for (int64_t j = 0; j < n; ++j) stripe[j * ld + i] += row[j * a.bias.stride[3]];
    }
    if (a.mask.data) {
      const uint8_t *row = pointer<uint8_t>(a.mask, b, h, start + i) + key_start * a.mask.stride[3];
      for (int64_t j = 0; j < n; ++j) stripe[j * ld + i] = row[j * a.mask.stride[3]] ? stripe[j * ld + i] : kMinusInfinity<T>;
    }
  }
  for (int64_t j = 0; j < n; ++j) {
    int64_t first = j + visible.offset;
    for (int64_t i = visible.first_lane<T>(j); i < min64(first, lanes); i += kLanes<T>)
      store(stripe + j * ld + i,
            select<T>(lane_index<T>() + T(i) >= T(first), load(stripe + j * ld + i), broadcast(kMinusInfinity<T>)));
  }
}

template <class T> struct SdpaForward {
  const PowerSdpaShape &shape;
  const PowerSdpaArrays &a;
  SdpaSizes<T> z;

  struct Scratch {
    T *q, *columns, *k, *v, *stripe, *keep, *out, *rows, *largest, *sum, *scale;
    uint32_t *words;
    void reserve(Arena &arena, const SdpaSizes<T> &z) {
      q = arena.take<T>(z.lanes * z.d_ld);
      columns = arena.take<T>(z.d_ld * z.lanes);
      k = arena.take<T>(z.lanes * z.d_ld);
      v = arena.take<T>(z.lanes * z.e_ld);
      stripe = arena.take<T>(kScoreRows * z.lanes);
      keep = arena.take<T>(z.shape.dropout_p > 0 ? kScoreRows * z.lanes : 0);
      out = arena.take<T>(z.e_ld * z.lanes);
      rows = arena.take<T>(z.lanes * z.e_ld);
      largest = arena.take<T>(z.lanes);
      sum = arena.take<T>(z.lanes);
      scale = arena.take<T>(z.lanes);
      words = arena.take<uint32_t>(4 * z.lanes);
    }
  };

  // stripe = exp(stripe − running maximum); the sum and what was accumulated so far move to the new maximum.
  void soften(Scratch &w, int64_t n, int64_t lanes, Visible visible) const {
    int64_t ld = z.lanes;
    Mask<T> moved = {};
    for (int64_t i = 0; i < lanes; i += kTileM<T>) {  // two vectors: a cache line or two of every row
      int64_t keys = visible.offset <= -n ? n : visible.keys(i + kTileM<T>, n);
      T *stripe = w.stripe + i, *stripe1 = stripe + kLanes<T>;
      Vec<T> old0 = load(w.largest + i), old1 = load(w.largest + i + kLanes<T>), top0 = old0, top1 = old1;
      for (int64_t j = 0; j < keys; ++j) {
        top0 = maximum<T>(top0, load(stripe + j * ld));
        top1 = maximum<T>(top1, load(stripe1 + j * ld));
      }
      // A row that has seen no key has maximum −inf; exp(−inf − 0) = 0 is then what its weights should be.
      Vec<T> from0 = select<T>(top0 == kMinusInfinity<T>, Vec<T>{}, top0), from1 = select<T>(top1 == kMinusInfinity<T>, Vec<T>{}, top1);
      Vec<T> factor0 = exp_nonpositive(old0 - from0), factor1 = exp_nonpositive(old1 - from1);
      Vec<T> sum0 = load(w.sum + i) * factor0, sum1 = load(w.sum + i + kLanes<T>) * factor1;
      for (int64_t j = 0; j < keys; ++j) {
        Vec<T> p0 = exp_nonpositive(load(stripe + j * ld) - from0), p1 = exp_nonpositive(load(stripe1 + j * ld) - from1);
        sum0 += p0;
        sum1 += p1;
        store(stripe + j * ld, p0);
        store(stripe1 + j * ld, p1);
      }
      store(w.largest + i, top0);
      store(w.largest + i + kLanes<T>, top1);
      store(w.sum + i, sum0);
      store(w.sum + i + kLanes<T>, sum1);
      store(w.scale + i, factor0);
      store(w.scale + i + kLanes<T>, factor1);
      moved |= (factor0 != T(1)) | (factor1 != T(1));
    }
    bool any = false;
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) any |= moved[lane] != 0;
    if (!any) return;
    for (int64_t c = 0; c < z.e; ++c)
      for (int64_t i = 0; i < lanes; i += kLanes<T>) store(w.out + c * ld + i, load(w.out + c * ld + i) * load(w.scale + i));
  }

  void task(Scratch &w, int64_t index) const {
    int64_t blocks = z.blocks(shape.t_q), block = blocks - 1 - index % blocks;  // causal: the longest first
    int64_t h = index / blocks % shape.h_q, b = index / blocks / shape.h_q, h_kv = h / z.group;
    int64_t start = block * z.block, n = min64(z.block, shape.t_q - start), lanes = round_up(n, kTileM<T>), ld = z.lanes;
    for (int64_t i = 0; i < ld; ++i) {
      w.scale[i] = T(shape.scale);
      w.largest[i] = kMinusInfinity<T>;
      w.sum[i] = 0;
    }
    load_rows(a.q, b, h, start, n, z.d, w.scale, w.q, z.d_ld, ld);
    transpose(w.q, z.d_ld, ld, z.d, w.columns, ld);
    memset(w.out, 0, size_t(z.e_ld * ld) * sizeof(T));
    int64_t end = shape.causal ? min64(start + n, shape.t_kv) : shape.t_kv;
    for (int64_t key_start = 0; key_start < end; key_start += z.block) {
      int64_t n_keys = min64(z.block, end - key_start);
      load_rows(a.k, b, h_kv, key_start, n_keys, z.d, (const T *)nullptr, w.k, z.d_ld, n_keys);
      load_rows(a.v, b, h_kv, key_start, n_keys, z.e, (const T *)nullptr, w.v, z.e_ld, n_keys);
      for (int64_t j = 0; j < n_keys; j += kScoreRows) {
        int64_t keys = min64(kScoreRows, n_keys - j);
        Visible visible{shape.causal ? key_start + j - start : kSeeAll};
        stripe_products(w.columns, ld, w.k + j * z.d_ld, z.d_ld, z.d, keys, lanes, visible, w.stripe);
        apply_masks(a, b, h, start, key_start + j, keys, n, lanes, ld, visible, w.stripe);
        soften(w, keys, lanes, visible);
        if (shape.dropout_p > 0) {
          dropout_factors(shape.dropout_p, *pointer<uint64_t>(a.seed, b), h, start, key_start + j, keys, lanes, ld, w.words, w.keep);
          for (int64_t row = 0; row < keys; ++row)
            for (int64_t i = visible.first_lane<T>(row); i < lanes; ++i) w.stripe[row * ld + i] *= w.keep[row * ld + i];
        }
        add_over_keys(w.stripe, ld, w.v + j * z.e_ld, z.e_ld, keys, lanes, visible, z.e, w.out);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      T sum = w.sum[i];
      w.scale[i] = sum > 0 ? T(1) / sum : sum == 0 ? T(0) : sum;  // a NaN stays one
      *pointer<T>(a.lse, b, h, start + i) = sum == 0 ? kMinusInfinity<T> : w.largest[i] + T(__builtin_log(double(sum)));
    }
    transpose(w.out, ld, z.e, lanes, w.rows, z.e_ld);
    unpack_rows(w.rows, z.e_ld, n, z.e, w.scale, rows_from(a.out, b, h, start, 2));
  }

  static int64_t workspace(const PowerSdpaShape &shape, int threads) {
    Arena arena{0, 0};
    arena.take<Scratch>(threads);
    for (int i = 0; i < threads; ++i) Scratch().reserve(arena, SdpaSizes<T>(shape));
    return arena.used;
  }

  static void run(const PowerSdpaShape &shape, const PowerSdpaArrays &arrays, void *workspace, const PowerExecutor *executor) {
    SdpaForward forward{shape, arrays, SdpaSizes<T>(shape)};
    int threads = thread_count(executor);
    Arena arena{reinterpret_cast<uintptr_t>(workspace), 0};
    Scratch *scratch = arena.take<Scratch>(threads);
    for (int i = 0; i < threads; ++i) scratch[i].reserve(arena, forward.z);
    parallel(executor, shape.b * shape.h_q * forward.z.blocks(shape.t_q),
             [&](int64_t index, int slot) { forward.task(scratch[slot], index); });
  }
};

}  // namespace POWER_ISA
}  // namespace power_cpu
