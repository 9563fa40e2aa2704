// Scaled dot-product attention backward: with P = exp(score − lse) and D = dropout's factors,
//     dv_j = Σ_i (P D)_ij dout_i,   dscore_ij = P_ij (D_ij <dout_i, v_j> − <dout_i, out_i>),
//     dq_i = scale Σ_j dscore_ij k_j,   dk_j = scale Σ_i dscore_ij q_i,   dbias = dscore summed over what was broadcast.
// One task a key-value head and group of key blocks, as in power attention's attention form. The gradient of a bias is a second
// walk, one task a slice of the bias's own storage, so that a bias shared by heads is summed in a fixed order.
#pragma once

#include "sdpa_forward.h"

namespace power_cpu {
namespace POWER_ISA {

template <class T> struct SdpaBackward {
  const PowerSdpaShape &shape;
  const PowerSdpaArrays &a;
  SdpaSizes<T> z;
  int64_t groups;

  struct Scratch {
    T *q, *columns, *k, *v, *out, *dout, *dout_columns, *stripe, *dstripe, *keep, *dk, *dv, *lse, *delta, *scale;
    uint32_t *words;
    void reserve(Arena &arena, const SdpaSizes<T> &z) {
      q = arena.take<T>(z.lanes * z.d_ld);
      columns = arena.take<T>(z.d_ld * z.lanes);
      k = arena.take<T>(z.lanes * z.d_ld);
      v = arena.take<T>(z.lanes * z.e_ld);
      out = arena.take<T>(z.lanes * z.e_ld);
      dout = arena.take<T>(z.lanes * z.e_ld);
      dout_columns = arena.take<T>(z.e_ld * z.lanes);
      stripe = arena.take<T>(kScoreRows * z.lanes);
      dstripe = arena.take<T>(kScoreRows * z.lanes);
      keep = arena.take<T>(z.shape.dropout_p > 0 ? kScoreRows * z.lanes : 0);
      dk = arena.take<T>(z.lanes * z.d_ld);
      dv = arena.take<T>(z.lanes * z.e_ld);
      lse = arena.take<T>(z.lanes);
      delta = arena.take<T>(z.lanes);
      scale = arena.take<T>(z.lanes);
      words = arena.take<uint32_t>(4 * z.lanes);
    }
  };

  SdpaBackward(const PowerSdpaShape &s, const PowerSdpaArrays &arrays, int threads) : shape(s), a(arrays), z(s), groups(1) {
    int64_t heads = max64(1, s.b * s.h_kv);
    if (2 * int64_t(threads) > 3 * heads) groups = max64(1, min64((threads + heads - 1) / heads, z.blocks(s.t_kv)));
  }
  int64_t dq_size() const { return z.group * z.blocks(shape.t_q) * z.d * z.lanes; }

  // q times `scale` in both layouts, dout likewise, lse and <dout, out>.
  void load_queries(Scratch &w, int64_t b, int64_t h, int64_t start, int64_t n) const {
    int64_t ld = z.lanes;
    for (int64_t i = 0; i < ld; ++i) {
      w.scale[i] = T(shape.scale);
      T lse = i < n ? *pointer<T>(a.lse, b, h, start + i) : T(0);
      w.lse[i] = lse == kMinusInfinity<T> ? T(sizeof(T) == 4 ? 1e30 : 1e300) : lse;  // exp(score − lse) = 0
    }
    load_rows(a.q, b, h, start, n, z.d, w.scale, w.q, z.d_ld, ld);
    transpose(w.q, z.d_ld, ld, z.d, w.columns, ld);
    load_rows(a.dout, b, h, start, n, z.e, (const T *)nullptr, w.dout, z.e_ld, ld);
    transpose(w.dout, z.e_ld, ld, z.e, w.dout_columns, ld);
    load_rows(a.out, b, h, start, n, z.e, (const T *)nullptr, w.out, z.e_ld, ld);
    for (int64_t i = 0; i < ld; ++i) {
      T sum = 0;
      for (int64_t c = 0; c < z.e; ++c) sum += w.out[i * z.e_ld + c] * w.dout[i * z.e_ld + c];
      w.delta[i] = sum;
    }
  }
  void load_keys(Scratch &w, int64_t b, int64_t h, int64_t key_start, int64_t n) const {
    load_rows(a.k, b, h, key_start, n, z.d, (const T *)nullptr, w.k, z.d_ld, n);
    load_rows(a.v, b, h, key_start, n, z.e, (const T *)nullptr, w.v, z.e_ld, n);
  }

  // For one stripe of keys: weights after dropout into w.stripe, gradients of scores into w.dstripe.
  void stripe_gradient(Scratch &w, int64_t b, int64_t h, int64_t start, int64_t n, int64_t lanes, int64_t key_start, int64_t j,
                       int64_t keys, Visible visible) const {
    int64_t ld = z.lanes;
    stripe_products(w.columns, ld, w.k + j * z.d_ld, z.d_ld, z.d, keys, lanes, visible, w.stripe);
    stripe_products(w.dout_columns, ld, w.v + j * z.e_ld, z.e_ld, z.e, keys, lanes, visible, w.dstripe);
    apply_masks(a, b, h, start, key_start + j, keys, n, lanes, ld, visible, w.stripe);
    if (shape.dropout_p > 0) dropout_factors(shape.dropout_p, *pointer<uint64_t>(a.seed, b), h, start, key_start + j, keys, lanes, ld, w.words, w.keep);
    for (int64_t row = 0; row < keys; ++row)
      for (int64_t i = visible.first_lane<T>(row); i < lanes; i += kLanes<T>) {
        T *at = w.stripe + row * ld + i, *dat = w.dstripe + row * ld + i;
        Vec<T> p = exp_nonpositive(load(at) - load(w.lse + i)), dp = load(dat), kept = p;
        if (shape.dropout_p > 0) {
          Vec<T> keep = load(w.keep + row * ld + i);
          kept *= keep;
          dp *= keep;
        }
        store(at, kept);
        store(dat, p * (dp - load(w.delta + i)));
      }
  }

  void task(Scratch &w, T *dq, int64_t b, int64_t h_kv, int64_t group) const {
    int64_t blocks = z.blocks(shape.t_q), ld = z.lanes;
    memset(dq, 0, size_t(dq_size()) * sizeof(T));
    for (int64_t key_block = group; key_block < z.blocks(shape.t_kv); key_block += groups) {
      int64_t key_start = key_block * z.block, n_keys = min64(z.block, shape.t_kv - key_start);
      load_keys(w, b, h_kv, key_start, n_keys);
      memset(w.dk, 0, size_t(ld * z.d_ld) * sizeof(T));
      memset(w.dv, 0, size_t(ld * z.e_ld) * sizeof(T));
      for (int64_t block = shape.causal ? key_block : 0; block < blocks; ++block)
        for (int64_t r = 0; r < z.group; ++r) {
          int64_t start = block * z.block, n = min64(z.block, shape.t_q - start), lanes = round_up(n, kTileM<T>);
          load_queries(w, b, h_kv * z.group + r, start, n);
          for (int64_t j = 0; j < n_keys; j += kScoreRows) {
            int64_t keys = min64(kScoreRows, n_keys - j);
            Visible visible{shape.causal ? key_start + j - start : kSeeAll};
            stripe_gradient(w, b, h_kv * z.group + r, start, n, lanes, key_start, j, keys, visible);
            add_over_keys(w.dstripe, ld, w.k + j * z.d_ld, z.d_ld, keys, lanes, visible, z.d, dq + (r * blocks + block) * z.d * ld);
            add_over_queries(w.dstripe, ld, w.q, z.d_ld, keys, n, visible, round_up(z.d, kLanes<T>), w.dk + j * z.d_ld);
            add_over_queries(w.stripe, ld, w.dout, z.e_ld, keys, n, visible, round_up(z.e, kLanes<T>), w.dv + j * z.e_ld);
          }
        }
      const T *one = nullptr;  // dk needs no scale: it is in the q it was made of
      unpack_rows(w.dk, z.d_ld, n_keys, z.d, one, rows_from(a.dk, b, h_kv, key_start, 2));
      unpack_rows(w.dv, z.e_ld, n_keys, z.e, one, rows_from(a.dv, b, h_kv, key_start, 2));
    }
  }

  // dq of one head from the partial sums of its groups.
  void finish(Scratch &w, T *dq, int64_t b, int64_t h_kv) const {
    int64_t blocks = z.blocks(shape.t_q), ld = z.lanes;
    for (int64_t i = 0; i < ld; ++i) w.scale[i] = T(shape.scale);
    for (int64_t r = 0; r < z.group; ++r)
      for (int64_t block = 0; block < blocks; ++block) {
        int64_t start = block * z.block, n = min64(z.block, shape.t_q - start);
        T *sum = dq + (r * blocks + block) * z.d * ld;
        for (int64_t g = 1; g < groups; ++g)
          for (int64_t i = 0; i < z.d * ld; ++i) sum[i] += sum[g * dq_size() + i];
        transpose(sum, ld, z.d, ld, w.q, z.d_ld);
        unpack_rows(w.q, z.d_ld, n, z.d, w.scale, rows_from(a.dq, b, h_kv * z.group + r, start, 2));
      }
  }

  // dbias: task = one slice of the bias as it is stored, (batch, head, block of queries), each axis 1 long where broadcast.
  void bias_task(Scratch &w, int64_t index) const {
    const int64_t *stride = a.dbias.stride;
    int64_t n_blocks = stride[2] ? z.blocks(shape.t_q) : 1, n_heads = stride[1] ? shape.h_q : 1;
    int64_t block0 = index % n_blocks, h0 = index / n_blocks % n_heads, b0 = index / n_blocks / n_heads;
    int64_t b_end = stride[0] ? b0 + 1 : shape.b, h_end = stride[1] ? h0 + 1 : shape.h_q;
    int64_t block_end = stride[2] ? block0 + 1 : z.blocks(shape.t_q);
    int64_t first_row = block0 * z.block, rows = stride[2] ? min64(z.block, shape.t_q - first_row) : 1;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < (stride[3] ? shape.t_kv : 1); ++j) pointer<T>(a.dbias, b0, h0, first_row + i)[j * stride[3]] = 0;
    for (int64_t b = b0; b < b_end; ++b)
      for (int64_t h = h0; h < h_end; ++h)
        for (int64_t block = block0; block < block_end; ++block) {
          int64_t start = block * z.block, n = min64(z.block, shape.t_q - start), lanes = round_up(n, kTileM<T>);
          load_queries(w, b, h, start, n);
          int64_t end = shape.causal ? min64(start + n, shape.t_kv) : shape.t_kv;
          for (int64_t key_start = 0; key_start < end; key_start += z.block) {
            int64_t n_keys = min64(z.block, end - key_start);
            load_keys(w, b, h / z.group, key_start, n_keys);
            for (int64_t j = 0; j < n_keys; j += kScoreRows) {
              int64_t keys = min64(kScoreRows, n_keys - j);
              Visible visible{shape.causal ? key_start + j - start : kSeeAll};
              stripe_gradient(w, b, h, start, n, lanes, key_start, j, keys, visible);
              for (int64_t i = 0; i < n; ++i) {
                T *row = pointer<T>(a.dbias, b, h, start + i) + (key_start + j) * stride[3];
                for (int64_t key = 0; key < keys; ++key)
                  if (i >= key + visible.offset) row[key * stride[3]] += w.dstripe[key * z.lanes + i];
              }
            }
          }
        }
  }
  int64_t bias_tasks() const {
    const int64_t *stride = a.dbias.stride;
    return (stride[0] ? shape.b : 1) * (stride[1] ? shape.h_q : 1) * (stride[2] ? z.blocks(shape.t_q) : 1);
  }

  T *reserve(Arena &arena, int threads, Scratch *scratch) const {
    for (int i = 0; i < threads; ++i) {
      Scratch unused;
      (scratch ? scratch[i] : unused).reserve(arena, z);
    }
    return arena.take<T>(dq_size() * (groups > 1 ? shape.b * shape.h_kv * groups : threads));
  }
  static int64_t workspace(const PowerSdpaShape &shape, int threads) {
    PowerSdpaArrays none = {};
    Arena arena{0, 0};
    arena.take<Scratch>(threads);
    SdpaBackward(shape, none, threads).reserve(arena, threads, nullptr);
    return arena.used;
  }

  static void run(const PowerSdpaShape &shape, const PowerSdpaArrays &arrays, void *workspace, const PowerExecutor *executor) {
    int threads = thread_count(executor);
    SdpaBackward backward(shape, arrays, threads);
    Arena arena{reinterpret_cast<uintptr_t>(workspace), 0};
    Scratch *scratch = arena.take<Scratch>(threads);
    T *dq = backward.reserve(arena, threads, scratch);
    int64_t heads = shape.b * shape.h_kv, groups = backward.groups, size = backward.dq_size();
    parallel(executor, heads * groups, [&](int64_t index, int slot) {
      int64_t head = index / groups, b = head / shape.h_kv, h = head % shape.h_kv;
      T *own = dq + (groups > 1 ? index : slot) * size;
      backward.task(scratch[slot], own, b, h, index % groups);
      if (groups == 1) backward.finish(scratch[slot], own, b, h);
    });
    if (groups > 1)
      parallel(executor, heads, [&](int64_t head, int slot) {
        backward.finish(scratch[slot], dq + head * groups * size, head / shape.h_kv, head % shape.h_kv);
      });
    if (arrays.dbias.data)
      parallel(executor, backward.bias_tasks(), [&](int64_t index, int slot) { backward.bias_task(scratch[slot], index); });
  }
};

}  // namespace POWER_ISA
}  // namespace power_cpu
