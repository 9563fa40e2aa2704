// Power attention backward.
//
// With dN = [dy/n, −<dy, y>/n] (n the normaliser; [dy, 0] without one) and V1 = [v 1], every weight w_ij has the gradient
// dw_ij = <dN_i, V1_j>, and A_ij = w_ij·dw_ij is the gradient of its exponent G_i − G_j. So
//     dlog_g_m = Σ_{j < m ≤ i} A_ij,
// computed chunk by chunk from sums that never cancel: for m in chunk c,
//     Σ_{i ≥ m} (A_i,before + A_i,inside − A_inside,i) + Σ_{j < m} A_after,j + X_c,
// where A_i,before sums over keys of earlier chunks, A_after,j over queries of later ones, `inside` leaves i = j out, and X_c is
// what spans chunk c whole.
//
// The chunked form walks time twice. Forward with the state S: dq and A_i,before = <q_i, dq_i>/p (Euler: the features are
// homogeneous of degree p). Backward with its gradient dS: dk, dv and A_after,j = <k_j, dk_j>/p. So no state is kept but every
// kCheckpoint-th, where the flow across a boundary, <dS, S>, is computed afresh; between them X follows from flow conservation.
// Where there are more threads than heads, both walks are cut into segments, whose first S and last dS are found beforehand.
#pragma once

#include "power_forward.h"

namespace power_cpu {
namespace POWER_ISA {

// Chunks between kept states. The recurrence for X loses about a float32 rounding a chunk; 16 keep it below that of the sums.
constexpr int64_t kCheckpoint = 16;

template <class T> struct PowerBackward {
  const PowerAttentionShape &shape;
  const PowerAttentionArrays &a;
  Sizes<T> z;
  Segments segments;  // chunked form
  int64_t groups;     // attention form: tasks a key-value head's key blocks are dealt to
  Reach<T> reach;     // attention form with gates
  double *need;       // the same: `largest_need` of a key-value head's queries, [b, h_kv, blocks]

  struct Scratch {
    KeyBlock<T> keys;
    QueryBlock<T> queries;
    Gates<T> gates, key_gates;
    double *running;
    T *u, *factor, *features, *stripe, *dstripe;
    T *dn_rows, *dn;            // [lanes, e_ld], [E, lanes]
    T *dn_decayed;              // [E, lanes]
    T *dq, *dq_rows;            // [d_ld, lanes], [lanes, d_ld]
    T *dk, *dv;                 // [lanes, d_ld], [lanes, e_ld]
    T *k_columns, *v_columns;   // [d_ld, lanes], [E, lanes]
    T *row_sum, *key_sum;       // [lanes]
    T *state, *checkpoints;     // chunked form
    double *crossing;           // [chunks + 1]
    void reserve(Arena &arena, const Sizes<T> &z, int64_t checkpoints_kept, int64_t chunks) {
      keys.reserve(arena, z);
      queries.reserve(arena, z);
      gates.reserve(arena, z.lanes);
      key_gates.reserve(arena, z.lanes);
      running = arena.take<double>(z.lanes);
      u = arena.take<T>(packed_size(z.lanes, z.E));
      factor = arena.take<T>(z.lanes);
      features = arena.take<T>(z.lanes * kPanelRows);
      stripe = arena.take<T>(kScoreRows * z.lanes);
      dstripe = arena.take<T>(kScoreRows * z.lanes);
      dn_rows = arena.take<T>(z.lanes * z.e_ld);
      dn = arena.take<T>(z.e_ld * z.lanes);
      dn_decayed = arena.take<T>(z.E * z.lanes);
      dq = arena.take<T>(z.d_ld * z.lanes);
      dq_rows = arena.take<T>(z.lanes * z.d_ld);
      dk = arena.take<T>(z.lanes * z.d_ld);
      dv = arena.take<T>(z.lanes * z.e_ld);
      k_columns = arena.take<T>(z.d_ld * z.lanes);
      v_columns = arena.take<T>(z.e_ld * z.lanes);
      row_sum = arena.take<T>(z.lanes);
      key_sum = arena.take<T>(z.lanes);
      state = arena.take<T>(2 * z.state_size());
      checkpoints = arena.take<T>(checkpoints_kept * z.state_size());
      crossing = arena.take<double>(chunks + 1);
    }
  };
  // What a task leaves behind: sums for dlog_g (`suffix` and `prefix` a token, `span` = X a block) and, attention form, dq.
  struct Partial {
    double *suffix, *prefix, *span;
    T *dq;  // [group, blocks, d_ld, lanes]
    void reserve(Arena &arena, const PowerBackward &p) {
      int64_t tokens = p.a.dlog_g.data ? p.shape.t : 0;
      suffix = arena.take<double>(tokens);
      prefix = arena.take<double>(tokens);
      span = arena.take<double>(tokens ? p.z.blocks(p.shape.t) + 1 : 0);
      dq = arena.take<T>(p.dq_size());
    }
  };

  PowerBackward(const PowerAttentionShape &s, const PowerAttentionArrays &arrays, int threads)
      : shape(s), a(arrays), z(s), segments(z, threads), groups(1), reach(), need(nullptr) {
    int64_t heads = max64(1, s.b * s.h_kv);
    if (s.form == POWER_ATTENTION && 2 * int64_t(threads) > 3 * heads)
      groups = max64(1, min64((threads + heads - 1) / heads, z.blocks(s.t_kv)));
  }
  int64_t dq_size() const { return shape.form == POWER_ATTENTION ? z.group * z.blocks(shape.t) * z.d_ld * z.lanes : 0; }
  // Partials of one task at a time when a head is one task; of all of them when they are added up afterwards.
  int64_t partials(int threads) const { return segments.count > 1 ? shape.b * shape.h_kv : groups > 1 ? shape.b * shape.h_kv * groups : threads; }
  // First states and last state gradients of all segments.
  int64_t boundary_states() const { return segments.count > 1 ? 2 * shape.b * shape.h_kv * segments.count : 0; }
  int64_t kept() const {
    return shape.form == POWER_ATTENTION || !shape.causal || !a.dlog_g.data ? 0 : (z.blocks(shape.t) + kCheckpoint - 1) / kCheckpoint;
  }

  void load_gates(Gates<T> &gates, double *running, int64_t b, int64_t h, int64_t start, int64_t n) const {
    gates.load(pointer<T>(a.log_g, b, start, h), a.log_g.stride[1], n, z.lanes, running);
  }

  void load_queries(Scratch &w, int64_t b, int64_t h, int64_t start, int64_t n) const {
    w.queries.load(z, a, b, h, start, n);
    const T *y = pointer<T>(a.y, b, start, h), *dy = pointer<T>(a.dy, b, start, h), *norm = pointer<T>(a.norm, b, start, h);
    memset(w.dn_rows, 0, size_t(z.lanes * z.e_ld) * sizeof(T));
    for (int64_t i = 0; i < n; ++i) {
      T *out = w.dn_rows + i * z.e_ld, divisor = shape.normalize ? norm[i * a.norm.stride[1]] : T(1);
      if (divisor == 0) continue;
      const T *dy_i = dy + i * a.dy.stride[1], *y_i = y + i * a.y.stride[1];
      if (a.dy.stride[3] == 1)
        memcpy(out, dy_i, size_t(z.e) * sizeof(T));
      else
        for (int64_t c = 0; c < z.e; ++c) out[c] = dy_i[c * a.dy.stride[3]];
      T product = 0;
      if (a.y.stride[3] == 1)
        product = dot(out, y_i, z.e);
      else
        for (int64_t c = 0; c < z.e; ++c) product += out[c] * y_i[c * a.y.stride[3]];
      for (int64_t c = 0; c < z.e; ++c) out[c] /= divisor;
      if (shape.normalize) out[z.e] = -product / divisor;
    }
    transpose(w.dn_rows, z.e_ld, z.lanes, z.E, w.dn, z.lanes);
  }

  // For one stripe of keys: weights into w.stripe, gradients of scores into w.dstripe, sums of A into row_sum and key_sum.
  void stripe_gradient(Scratch &w, int64_t j, int64_t n, int64_t lanes, const Decay<T> &decay, Visible visible) const {
    stripe_products(w.queries.columns, z.lanes, w.keys.k + j * z.d_ld, z.d_ld, z.d, n, lanes, visible, w.stripe);
    stripe_products(w.dn, z.lanes, w.keys.v + j * z.e_ld, z.e_ld, z.E, n, lanes, visible, w.dstripe);
    weigh_gradient(z.deg, decay, visible, n, lanes, z.lanes, w.stripe, w.dstripe, w.row_sum, w.key_sum + j);
  }

  enum Wanted { for_queries = 1, for_keys = 2 };
  // All stripes of a block of keys: adds to dq [d, lanes], or to dk and dv, or both.
  void attend_gradient(Scratch &w, int wanted, int64_t n_keys, int64_t n, int64_t lanes, typename Decay<T>::Kind kind,
                       const Gates<T> &key_gates, int64_t offset, T *dq) const {
    memset(w.row_sum, 0, size_t(z.lanes) * sizeof(T));
    memset(w.key_sum, 0, size_t(z.lanes) * sizeof(T));
    for (int64_t j = 0; j < n_keys; j += kScoreRows) {
      int64_t keys = min64(kScoreRows, n_keys - j);
      Visible visible{offset == kSeeAll ? kSeeAll : offset + j};
      Decay<T> decay{kind, &w.gates, &key_gates, w.factor, j};
      stripe_gradient(w, j, keys, lanes, decay, visible);
      if (wanted & for_queries)
        add_over_keys(w.dstripe, z.lanes, w.keys.k + j * z.d_ld, z.d_ld, keys, lanes, visible, z.d, dq);
      if (wanted & for_keys) {
        add_over_queries(w.dstripe, z.lanes, w.queries.rows, z.d_ld, keys, n, visible, round_up(z.d, kLanes<T>), w.dk + j * z.d_ld);
        add_over_queries(w.stripe, z.lanes, w.dn_rows, z.e_ld, keys, n, visible, round_up(z.e, kLanes<T>), w.dv + j * z.e_ld);
      }
    }
  }

  void store_dq(Scratch &w, const T *dq, int64_t b, int64_t h, int64_t start, int64_t n) const {
    transpose(dq, z.lanes, z.d, n, w.dq_rows, z.d_ld);
    unpack_rows(w.dq_rows, z.d_ld, n, z.d, w.queries.factor, rows_from(a.dq, b, start, h, 1));
  }
  void store_keys(Scratch &w, int64_t b, int64_t h, int64_t start, int64_t n) const {
    unpack_rows(w.dk, z.d_ld, n, z.d, (const T *)nullptr, rows_from(a.dk, b, start, h, 1));
    unpack_rows(w.dv, z.e_ld, n, z.e, (const T *)nullptr, rows_from(a.dv, b, start, h, 1));
  }
  void clear_keys(Scratch &w) const {
    memset(w.dk, 0, size_t(z.lanes * z.d_ld) * sizeof(T));
    memset(w.dv, 0, size_t(z.lanes * z.e_ld) * sizeof(T));
  }
  void clear(Partial &out) const {
    if (!a.dlog_g.data) return;
    memset(out.suffix, 0, size_t(shape.t) * sizeof(double));
    memset(out.prefix, 0, size_t(shape.t) * sizeof(double));
    memset(out.span, 0, size_t(z.blocks(shape.t) + 1) * sizeof(double));
  }

  // dlog_g of one head from the sums of its `count` partials.
  void store_dlog_g(const Partial *parts, int64_t count, int64_t b, int64_t h) const {
    T *out = pointer<T>(a.dlog_g, b, 0, h);
    if (!out) return;
    for (int64_t start = 0, block = 0; start < shape.t; start += z.block, ++block) {
      int64_t end = min64(start + z.block, shape.t);
      double sum = 0;
      for (int64_t i = end - 1; i >= start; --i) {
        for (int64_t g = 0; g < count; ++g) sum += parts[g].suffix[i];
        out[i * a.dlog_g.stride[1]] = T(sum);
      }
      sum = 0;
      for (int64_t g = 0; g < count; ++g) sum += parts[g].span[block];
      for (int64_t i = start; i < end; ++i) {
        out[i * a.dlog_g.stride[1]] += T(sum);
        for (int64_t g = 0; g < count; ++g) sum += parts[g].prefix[i];
      }
    }
  }

  // ---- The attention form: task = (batch, key-value head, group of key blocks) --------------------------------------

  // What the gates let a head's queries forget, before its tasks.
  void measure_reach(Scratch &w, int64_t head) const {
    reach.measure(z, a, head);
    int64_t b = head / shape.h_kv, h = head % shape.h_kv, blocks = z.blocks(shape.t);
    for (int64_t block = 0; block < blocks; ++block) {
      int64_t start = block * z.block, n = min64(z.block, shape.t - start);
      load_gates(w.gates, w.running, b, h, start, n);
      double &largest = need[head * blocks + block] = 0;
      for (int64_t q_head = h * z.group; q_head < (h + 1) * z.group; ++q_head) {
        w.queries.load(z, a, b, q_head, start, n);
        double found = largest_need(z, w.queries, w.gates, pointer<T>(a.norm, b, start, q_head), a.norm.stride[1], n);
        if (!(found <= largest)) largest = found;
      }
    }
  }

  void attention_task(Scratch &w, Partial &out, int64_t b, int64_t h, int64_t group) const {
    clear(out);
    memset(out.dq, 0, size_t(dq_size()) * sizeof(T));
    int64_t key_blocks = z.blocks(shape.t_kv), blocks = z.blocks(shape.t), first = (b * shape.h_kv + h) * key_blocks;
    for (int64_t key_block = group; key_block < key_blocks; key_block += groups) {
      int64_t key_start = key_block * z.block, n_keys = min64(z.block, shape.t_kv - key_start);
      w.keys.load(z, a, b, h, key_start, n_keys);
      load_gates(w.key_gates, w.running, b, h, key_start, n_keys);
      clear_keys(w);
      double between = 0;  // log gates from the end of the key block to the start of the query block
      for (int64_t block = shape.causal ? key_block : 0; block < blocks; ++block) {
        int64_t start = block * z.block, n = min64(z.block, shape.t - start), lanes = round_up(n, kTileM<T>);
        bool same = shape.causal && block == key_block;
        if (a.log_g.data && block > key_block + 1) between += reach.sum[first + block - 1];
        if (a.log_g.data && !same && reach.forgotten(first + key_block, between, need[first + block])) continue;
        load_gates(w.gates, w.running, b, h, start, n);
        auto kind = !w.gates.present ? Decay<T>::none : same ? Decay<T>::pairwise : Decay<T>::product;
        if (kind == Decay<T>::product) {
          T factor = exp_scalar(T(between));
          for (int64_t j = 0; j < n_keys; ++j) w.factor[j] = factor * w.key_gates.until_end[j];
        }
        double crossing = 0;
        for (int64_t r = 0; r < z.group; ++r) {
          load_queries(w, b, h * z.group + r, start, n);
          T *dq = out.dq + (r * blocks + block) * z.d_ld * z.lanes;
          attend_gradient(w, for_queries | for_keys, n_keys, n, lanes, kind, w.key_gates, same ? 0 : kSeeAll, dq);
          if (!a.dlog_g.data) continue;
          for (int64_t i = 0; i < n; ++i) out.suffix[start + i] += w.row_sum[i];
          for (int64_t j = 0; j < n_keys; ++j) {
            (same ? out.suffix : out.prefix)[key_start + j] += same ? -double(w.key_sum[j]) : double(w.key_sum[j]);
            crossing += w.key_sum[j];
          }
        }
        if (a.dlog_g.data && block > key_block + 1) out.span[key_block + 1] += crossing, out.span[block] -= crossing;
      }
      store_keys(w, b, h, key_start, n_keys);
    }
    if (a.dlog_g.data)
      for (int64_t block = 1; block <= blocks; ++block) out.span[block] += out.span[block - 1];
  }

  void attention_finish(Scratch &w, const Partial *parts, int64_t b, int64_t h) const {
    int64_t blocks = z.blocks(shape.t);
    for (int64_t r = 0; r < z.group; ++r)
      for (int64_t block = 0; block < blocks; ++block) {
        int64_t start = block * z.block, n = min64(z.block, shape.t - start), at = (r * blocks + block) * z.d_ld * z.lanes;
        w.queries.load(z, a, b, h * z.group + r, start, n);
        T *dq = parts[0].dq + at;
        for (int64_t g = 1; g < groups; ++g)
          for (int64_t i = 0; i < z.d * z.lanes; ++i) dq[i] += parts[g].dq[at + i];
        store_dq(w, dq, b, h * z.group + r, start, n);
      }
    store_dlog_g(parts, groups, b, h);
  }

  // ---- The chunked form: task = (batch, key-value head) -------------------------------------------------------------

  static double flow_between(const T *x, const T *y, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i += kLanes<T>) sum += double(horizontal_sum<T>(load(x + i) * load(y + i)));
    return sum;
  }

  // <x_i, dx_i>/p for every token: the sum of A over what the state stands for.
  void euler(const T *x, const T *dx, int64_t lanes, T *out) const {
    for (int64_t i = 0; i < lanes; i += kLanes<T>) {
      Vec<T> sum = Vec<T>{};
      for (int64_t c = 0; c < z.d; ++c) sum += load(x + c * z.lanes + i) * load(dx + c * z.lanes + i);
      store(out + i, sum * (T(1) / T(z.deg)));
    }
  }

  void scale_columns(const T *in, const T *factor, int64_t columns, int64_t lanes, T *out) const {
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t i = 0; i < lanes; i += kLanes<T>)
        store(out + c * z.lanes + i, factor ? load(in + c * z.lanes + i) * load(factor + i) : load(in + c * z.lanes + i));
  }

  // Forward in time with the state: dq, the A of queries, and R_c = Σ_i A_i,before of every chunk in w.crossing.
  // Tokens [from, to); w.state holds the state before them, and at the end that after them (if there are gates).
  template <int P> void query_pass(Scratch &w, Partial &out, int64_t b, int64_t h, int64_t from, int64_t to, bool empty) const {
    bool gated = a.dlog_g.data;
    int64_t size = z.state_size();
    T *state = w.state;
    for (int64_t start = from, chunk = from / z.block; start < to; start += z.block, ++chunk) {
      int64_t n = min64(z.block, to - start), lanes = round_up(n, kTileM<T>);
      w.keys.load(z, a, b, h, start, n);
      load_gates(w.gates, w.running, b, h, start, n);
      auto kind = w.gates.present ? Decay<T>::pairwise : Decay<T>::none;
      w.crossing[chunk] = 0;
      for (int64_t r = 0; r < z.group; ++r) {
        int64_t head = h * z.group + r;
        load_queries(w, b, head, start, n);
        memset(w.dq, 0, size_t(z.d * z.lanes) * sizeof(T));
        if (!empty) {
          scale_columns(w.dn, w.gates.present ? w.gates.since_start : nullptr, z.E, lanes, w.dn_decayed);
          query_gradient<P>(z, true, w.dn_decayed, w.queries.columns, lanes, state, w.features, w.dq);
          if (gated) {
            euler(w.queries.columns, w.dq, lanes, w.row_sum);
            for (int64_t i = 0; i < n; ++i) {
              out.suffix[start + i] += w.row_sum[i];
              w.crossing[chunk] += w.row_sum[i];
            }
          }
        }
        attend_gradient(w, for_queries, n, n, lanes, kind, w.gates, 0, w.dq);
        for (int64_t i = 0; gated && i < n; ++i) out.suffix[start + i] += w.row_sum[i];
        store_dq(w, w.dq, b, head, start, n);
      }
      if (start + n == to && !gated) break;
      pack_tiles(w.keys.v, z.e_ld, n, z.E, w.gates.present ? w.gates.until_end : nullptr, w.u);
      update_state<P>(z, false, w.gates.decay, w.keys.k, n, w.u, w.features, state);
      empty = false;
      if (gated && chunk % kCheckpoint == kCheckpoint - 1)
        memcpy(w.checkpoints + chunk / kCheckpoint * size, state, size_t(size) * sizeof(T));
    }
  }

  // dstate = decay·dstate + what the queries loaded last give it.
  template <int P> void add_queries(Scratch &w, int64_t n, T decay, T *dstate) const {
    pack_tiles(w.dn_rows, z.e_ld, n, z.E, w.gates.present ? w.gates.since_start : nullptr, w.u);
    update_state<P>(z, true, decay, w.queries.rows, n, w.u, w.features, dstate);
  }

  // Backward in time with dS: dk, dv, ds0, the A of keys, and X of every chunk. Tokens [from, to); w.state holds the state after
  // them and, behind it, its gradient.
  template <int P> void key_pass(Scratch &w, Partial &out, int64_t b, int64_t h, int64_t from, int64_t to, bool empty) const {
    bool gated = a.dlog_g.data;
    int64_t last = (to + z.block - 1) / z.block - 1, size = z.state_size();
    T *state = w.state, *dstate = w.state + size;
    double flow = gated && !empty ? flow_between(dstate, state, size) : 0;  // Σ A across the boundary after the chunk
    for (int64_t chunk = last; chunk * z.block >= from && chunk >= 0; --chunk) {
      int64_t start = chunk * z.block, n = min64(z.block, to - start), lanes = round_up(n, kTileM<T>);
      w.keys.load(z, a, b, h, start, n);
      load_gates(w.gates, w.running, b, h, start, n);
      auto kind = w.gates.present ? Decay<T>::pairwise : Decay<T>::none;
      clear_keys(w);
      if (gated && chunk != last && chunk % kCheckpoint == kCheckpoint - 1)
        flow = flow_between(dstate, w.checkpoints + chunk / kCheckpoint * size, size);
      if (!empty) {
        const T *decay = w.gates.present ? w.gates.until_end : nullptr;
        transpose(w.keys.k, z.d_ld, z.lanes, z.d, w.k_columns, z.lanes);
        transpose(w.keys.v, z.e_ld, z.lanes, z.E, w.v_columns, z.lanes);
        scale_columns(w.v_columns, decay, z.E, lanes, w.v_columns);
        memset(w.dq, 0, size_t(z.d * z.lanes) * sizeof(T));
        query_gradient<P>(z, false, w.v_columns, w.k_columns, lanes, dstate, w.features, w.dq);
        transpose(w.dq, z.lanes, z.d, lanes, w.dk, z.d_ld);
        query_state<P>(z, false, w.k_columns, lanes, dstate, z.e, w.features, w.dn);
        scale_columns(w.dn, decay, z.e, lanes, w.dn);
        transpose(w.dn, z.lanes, z.e, lanes, w.dv, z.e_ld);
        if (gated) {
          euler(w.k_columns, w.dq, lanes, w.key_sum);
          for (int64_t j = 0; j < n; ++j) {
            out.prefix[start + j] += w.key_sum[j];
            flow -= w.key_sum[j];
          }
        }
      }
      if (gated) {
        out.span[chunk] = w.gates.decay == 0 ? 0 : flow;
        flow = out.span[chunk] + w.crossing[chunk];
      }
      for (int64_t r = 0; r < z.group; ++r) {
        load_queries(w, b, h * z.group + r, start, n);
        attend_gradient(w, for_keys, n, n, lanes, kind, w.gates, 0, nullptr);
        for (int64_t j = 0; gated && j < n; ++j) out.suffix[start + j] -= w.key_sum[j];
        if (start > from || (from == 0 && (a.ds0.data || a.dz0.data)))
          add_queries<P>(w, n, r == 0 ? w.gates.decay : T(1), dstate);
      }
      empty = false;
      store_keys(w, b, h, start, n);
    }
    if (from == 0) store_state(z, dstate, a.ds0, a.dz0, b, h);
  }

  template <int P> void head(Scratch &w, Partial &out, int64_t b, int64_t h) const {
    clear(out);
    load_state(z, a.s0, a.z0, b, h, w.state);
    query_pass<P>(w, out, b, h, 0, shape.t, !a.s0.data && !a.z0.data);
    load_state(z, a.ds, a.dz, b, h, w.state + z.state_size());
    key_pass<P>(w, out, b, h, 0, shape.t, !a.ds.data && !a.dz.data);
    store_dlog_g(&out, 1, b, h);
  }

  // ---- The chunked form in segments: task = (batch, key-value head, segment) ------------------------------------------

  // What a segment adds to the state, and to the gradient of the state before it.
  template <int P> void segment_sums(Scratch &w, int64_t b, int64_t h, int64_t from, int64_t to, T *state, T *dstate) const {
    memset(state, 0, size_t(z.state_size()) * sizeof(T));
    memset(dstate, 0, size_t(z.state_size()) * sizeof(T));
    for (int64_t start = from; start < to; start += z.block) {
      int64_t n = min64(z.block, to - start);
      w.keys.load(z, a, b, h, start, n);
      load_gates(w.gates, w.running, b, h, start, n);
      pack_tiles(w.keys.v, z.e_ld, n, z.E, w.gates.present ? w.gates.until_end : nullptr, w.u);
      update_state<P>(z, false, w.gates.decay, w.keys.k, n, w.u, w.features, state);
    }
    for (int64_t start = (to - 1) / z.block * z.block; start >= from; start -= z.block) {
      int64_t n = min64(z.block, to - start);
      load_gates(w.gates, w.running, b, h, start, n);
      for (int64_t r = 0; r < z.group; ++r) {
        load_queries(w, b, h * z.group + r, start, n);
        add_queries<P>(w, n, r == 0 ? w.gates.decay : T(1), dstate);
      }
    }
  }

  // `states` and `dstates` [segments, state]: what each segment adds becomes what each starts from (its first state, and the
  // gradient of its last).
  void chain_segments(int64_t b, int64_t h, T *states, T *dstates, T *carry) const {
    int64_t size = z.state_size();
    auto chain = [&](int64_t segment, T *sums) {  // carry ← decay·carry + sums, sums ← the carry before
      T decay = decay_between<T>(a.log_g, b, h, segments.start(segment), segments.end(segment));
      for (int64_t i = 0; i < size; ++i) {
        T before = carry[i];
        carry[i] = decay * before + sums[i];
        sums[i] = before;
      }
    };
    load_state(z, a.s0, a.z0, b, h, carry);
    for (int64_t segment = 0; segment < segments.count; ++segment) chain(segment, states + segment * size);
    load_state(z, a.ds, a.dz, b, h, carry);
    for (int64_t segment = segments.count - 1; segment >= 0; --segment) chain(segment, dstates + segment * size);
  }

  template <int P> void in_segments(const PowerExecutor *executor, Scratch *scratch, Partial *parts, T *boundaries) const {
    int64_t heads = shape.b * shape.h_kv, count = segments.count, size = z.state_size();
    T *states = boundaries, *dstates = boundaries + heads * count * size;
    parallel(executor, heads * count, [&](int64_t task, int slot) {
      int64_t head = task / count, segment = task % count;
      if (segment == 0) clear(parts[head]);
      segment_sums<P>(scratch[slot], head / shape.h_kv, head % shape.h_kv, segments.start(segment), segments.end(segment),
                      states + task * size, dstates + task * size);
    });
    parallel(executor, heads, [&](int64_t head, int slot) {
      T *first = states + head * count * size, *last = dstates + head * count * size;
      chain_segments(head / shape.h_kv, head % shape.h_kv, first, last, scratch[slot].state);
    });
    parallel(executor, heads * count, [&](int64_t task, int slot) {
      int64_t head = task / count, segment = task % count, b = head / shape.h_kv, h = head % shape.h_kv;
      int64_t from = segments.start(segment), to = segments.end(segment);
      Scratch &w = scratch[slot];
      memcpy(w.state, states + task * size, size_t(size) * sizeof(T));
      query_pass<P>(w, parts[head], b, h, from, to, false);
      memcpy(w.state + size, dstates + task * size, size_t(size) * sizeof(T));
      key_pass<P>(w, parts[head], b, h, from, to, false);
    });
    parallel(executor, heads, [&](int64_t head, int) { store_dlog_g(&parts[head], 1, head / shape.h_kv, head % shape.h_kv); });
  }

  // causal = 0: one state; its gradient is what all queries give it, plus the one that came in.
  template <int P> void whole(Scratch &w, int64_t b, int64_t h) const {
    int64_t size = z.state_size();
    T *state = w.state, *dstate = w.state + size;
    memset(state, 0, size_t(size) * sizeof(T));
    load_state(z, a.ds, a.dz, b, h, dstate);
    for (int64_t start = 0; start < shape.t_kv; start += z.block) {
      int64_t n = min64(z.block, shape.t_kv - start);
      w.keys.load(z, a, b, h, start, n);
      pack_tiles(w.keys.v, z.e_ld, n, z.E, (const T *)nullptr, w.u);
      update_state<P>(z, false, T(1), w.keys.k, n, w.u, w.features, state);
    }
    for (int64_t start = 0; start < shape.t; start += z.block)
      for (int64_t r = 0; r < z.group; ++r) {
        int64_t n = min64(z.block, shape.t - start), lanes = round_up(n, kTileM<T>);
        load_queries(w, b, h * z.group + r, start, n);
        memset(w.dq, 0, size_t(z.d * z.lanes) * sizeof(T));
        query_gradient<P>(z, true, w.dn, w.queries.columns, lanes, state, w.features, w.dq);
        store_dq(w, w.dq, b, h * z.group + r, start, n);
        pack_tiles(w.dn_rows, z.e_ld, n, z.E, (const T *)nullptr, w.u);
        update_state<P>(z, true, T(1), w.queries.rows, n, w.u, w.features, dstate);
      }
    for (int64_t start = 0; start < shape.t_kv; start += z.block) {
      int64_t n = min64(z.block, shape.t_kv - start), lanes = round_up(n, kTileM<T>);
      w.keys.load(z, a, b, h, start, n);
      transpose(w.keys.k, z.d_ld, z.lanes, z.d, w.k_columns, z.lanes);
      transpose(w.keys.v, z.e_ld, z.lanes, z.E, w.v_columns, z.lanes);
      memset(w.dq, 0, size_t(z.d * z.lanes) * sizeof(T));
      query_gradient<P>(z, false, w.v_columns, w.k_columns, lanes, dstate, w.features, w.dq);
      transpose(w.dq, z.lanes, z.d, lanes, w.dk, z.d_ld);
      query_state<P>(z, false, w.k_columns, lanes, dstate, z.e, w.features, w.dn);
      transpose(w.dn, z.lanes, z.e, lanes, w.dv, z.e_ld);
      store_keys(w, b, h, start, n);
    }
  }

  T *reserve(Arena &arena, int threads, Scratch *scratch, Partial *parts) {
    reach.reserve(arena, z);
    need = arena.take<double>(shape.b * shape.h_kv * z.blocks(shape.t));
    for (int i = 0; i < threads; ++i) {
      Scratch unused;
      (scratch ? scratch[i] : unused).reserve(arena, z, kept(), z.blocks(shape.t));
    }
    for (int64_t i = 0; i < partials(threads); ++i) {
      Partial unused;
      (parts ? parts[i] : unused).reserve(arena, *this);
    }
    return arena.take<T>(boundary_states() * z.state_size());
  }

  static int64_t workspace(const PowerAttentionShape &shape, int threads) {
    PowerAttentionArrays arrays = {};
    char something;
    if (shape.causal) arrays.dlog_g.data = &something;  // the shape does not say whether there are gates
    PowerBackward backward(shape, arrays, threads);
    Arena arena{0, 0};
    arena.take<Scratch>(threads);
    arena.take<Partial>(backward.partials(threads));
    backward.reserve(arena, threads, nullptr, nullptr);
    return arena.used;
  }

  static void run(const PowerAttentionShape &shape, const PowerAttentionArrays &arrays, void *workspace, const PowerExecutor *executor) {
    int threads = thread_count(executor);
    PowerBackward backward(shape, arrays, threads);
    Arena arena{reinterpret_cast<uintptr_t>(workspace), 0};
    Scratch *scratch = arena.take<Scratch>(threads);
    Partial *parts = arena.take<Partial>(backward.partials(threads));
    T *boundaries = backward.reserve(arena, threads, scratch, parts);
    int64_t heads = shape.b * shape.h_kv, groups = backward.groups;
    if (shape.form != POWER_ATTENTION) {
      dispatch_degree(shape.deg, [&](auto p) {
        constexpr int P = decltype(p)::value;
        if (backward.segments.count > 1) return backward.template in_segments<P>(executor, scratch, parts, boundaries);
        parallel(executor, heads, [&](int64_t task, int slot) {
          int64_t b = task / shape.h_kv, h = task % shape.h_kv;
          if (!shape.causal) return backward.template whole<P>(scratch[slot], b, h);
          backward.template head<P>(scratch[slot], parts[slot], b, h);
        });
      });
      return;
    }
    if (arrays.log_g.data) parallel(executor, heads, [&](int64_t head, int slot) { backward.measure_reach(scratch[slot], head); });
    parallel(executor, heads * groups, [&](int64_t task, int slot) {
      int64_t head = task / groups, b = head / shape.h_kv, h = head % shape.h_kv;
      Partial &out = parts[groups > 1 ? task : slot];
      backward.attention_task(scratch[slot], out, b, h, task % groups);
      if (groups == 1) backward.attention_finish(scratch[slot], &out, b, h);
    });
    if (groups > 1)
      parallel(executor, heads, [&](int64_t head, int slot) {
        backward.attention_finish(scratch[slot], parts + head * groups, head / shape.h_kv, head % shape.h_kv);
      });
  }
};

template <class T> int64_t power_backward_workspace(const PowerAttentionShape &shape, int threads) {
  return largest_workspace(shape, threads, PowerBackward<T>::workspace);
}

template <class T>
void power_backward(const PowerAttentionShape &shape, const PowerAttentionArrays &a, void *workspace, const PowerExecutor *executor) {
  PowerBackward<T>::run(with_form_chosen<T>(shape, a), a, workspace, executor);
}

}  // namespace POWER_ISA
}  // namespace power_cpu
