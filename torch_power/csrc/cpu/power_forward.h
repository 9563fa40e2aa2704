// Power attention forward: the attention form (one task a block of queries, which walks back over blocks of keys until the gates have
// made the rest forgotten) and the chunked form (one task a key-value head, or a segment of one when there are more threads than heads).
#pragma once

#include "power_reach.h"

namespace power_cpu {
namespace POWER_ISA {

template <class T> struct PowerForward {
  const PowerAttentionShape &shape;
  const PowerAttentionArrays &a;
  Sizes<T> z;
  Segments segments;
  Reach<T> reach;  // attention form with gates

  struct Scratch {
    KeyBlock<T> keys;
    QueryBlock<T> queries;
    Gates<T> gates, key_gates;
    double *running;
    T *u;        // [v 1] with decays, packed for the update
    T *factor;   // of the keys of an earlier block
    T *features;
    T *stripe;   // scores, then weights
    T *sums;     // [E, lanes]: numerators and normaliser
    T *y_rows;   // [lanes, e_ld]: the same, a query's side by side
    void reserve(Arena &arena, const Sizes<T> &z) {
      keys.reserve(arena, z);
      queries.reserve(arena, z);
      gates.reserve(arena, z.lanes);
      key_gates.reserve(arena, z.lanes);
      running = arena.take<double>(z.lanes);
      u = arena.take<T>(packed_size(z.lanes, z.E));
      factor = arena.take<T>(z.lanes);
      features = arena.take<T>(z.lanes * kPanelRows);
      stripe = arena.take<T>(kScoreRows * z.lanes);
      sums = arena.take<T>(z.E * z.lanes);
      y_rows = arena.take<T>(z.lanes * z.e_ld);
    }
  };

  PowerForward(const PowerAttentionShape &s, const PowerAttentionArrays &arrays, int threads)
      : shape(s), a(arrays), z(s), segments(z, threads), reach() {}

  // Workspace: one state a segment (one a thread when there is one segment a head), then scratch for each thread.
  int64_t states() const { return z.panels == 0 ? 0 : segments.count > 1 ? shape.b * shape.h_kv * segments.count : -1; }
  void reserve(Arena &arena, int threads, Scratch *scratch, T **state) {
    reach.reserve(arena, z);
    int64_t count = states() < 0 ? threads : states();
    *state = arena.template take<T>(count * z.state_size());
    for (int i = 0; i < threads; ++i) {
      Scratch unused;
      (scratch ? scratch[i] : unused).reserve(arena, z);
    }
  }

  void load_gates(Gates<T> &gates, double *running, int64_t b, int64_t h, int64_t start, int64_t n) const {
    const T *log_g = pointer<T>(a.log_g, b, start, h);
    gates.load(log_g, a.log_g.stride[1], n, z.lanes, running);
  }

  // y = numerators / normaliser (0 where the normaliser is 0), and the normaliser.
  void finish(Scratch &w, int64_t b, int64_t h, int64_t start, int64_t n) const {
    T *norm = pointer<T>(a.norm, b, start, h), *y = pointer<T>(a.y, b, start, h);
    transpose(w.sums, z.lanes, z.E, n, w.y_rows, z.e_ld);
    for (int64_t i = 0; i < n; ++i) {
      T *row = w.y_rows + i * z.e_ld, divisor = row[z.e];
      norm[i * a.norm.stride[1]] = divisor;
      for (int64_t c = 0; shape.normalize && c < z.e; ++c) row[c] = divisor == 0 ? T(0) : row[c] / divisor;
      T *out = y + i * a.y.stride[1];
      if (a.y.stride[3] == 1)
        memcpy(out, row, size_t(z.e) * sizeof(T));
      else
        for (int64_t c = 0; c < z.e; ++c) out[c * a.y.stride[3]] = row[c];
    }
  }

  void attend(Scratch &w, int64_t n_keys, int64_t lanes, typename Decay<T>::Kind kind, const Gates<T> &key_gates, int64_t offset) const {
    for (int64_t j = 0; j < n_keys; j += kScoreRows) {
      int64_t n = min64(kScoreRows, n_keys - j);
      Visible visible{offset == kSeeAll ? kSeeAll : offset + j};
      Decay<T> decay{kind, &w.gates, &key_gates, w.factor, j};
      const T *k = w.keys.k + j * z.d_ld, *v = w.keys.v + j * z.e_ld;
      stripe_products(w.queries.columns, z.lanes, k, z.d_ld, z.d, n, lanes, visible, w.stripe);
      weigh(z.deg, decay, visible, n, lanes, z.lanes, w.stripe);
      add_over_keys(w.stripe, z.lanes, v, z.e_ld, n, lanes, visible, z.E, w.sums);
    }
  }

  // ---- The attention form: task = (batch, query head, block of queries) ---------------------------------------------

  void attention_task(Scratch &w, int64_t task) const {
    int64_t blocks = z.blocks(shape.t), block = blocks - 1 - task % blocks;  // the longest first
    int64_t h = task / blocks % shape.h_q, b = task / blocks / shape.h_q, h_kv = h / z.group;
    int64_t start = block * z.block, n = min64(z.block, shape.t - start), lanes = round_up(n, kTileM<T>);
    w.queries.load(z, a, b, h, start, n);
    memset(w.sums, 0, size_t(z.E * z.lanes) * sizeof(T));
    load_gates(w.gates, w.running, b, h_kv, start, n);
    double between = 0;  // log gates from the end of the key block to the start of the query block
    int64_t last = shape.causal ? block : z.blocks(shape.t_kv) - 1;
    for (int64_t key_block = last; key_block >= 0; --key_block) {
      int64_t key_start = key_block * z.block, n_keys = min64(z.block, shape.t_kv - key_start);
      bool same = shape.causal && key_block == block;
      if (w.gates.present && !same) {
        int64_t entry = (b * shape.h_kv + h_kv) * z.blocks(shape.t_kv) + key_block;
        if (reach.forgotten(entry, between, largest_need(z, w.queries, w.gates, w.sums + z.e * z.lanes, 1, n))) break;
      }
      w.keys.load(z, a, b, h_kv, key_start, n_keys);
      if (!w.gates.present || same) {
        attend(w, n_keys, lanes, w.gates.present ? Decay<T>::pairwise : Decay<T>::none, w.gates, same ? 0 : kSeeAll);
        continue;
      }
      load_gates(w.key_gates, w.running, b, h_kv, key_start, n_keys);
      T factor = exp_scalar(T(between));
      for (int64_t j = 0; j < n_keys; ++j) w.factor[j] = factor * w.key_gates.until_end[j];
      attend(w, n_keys, lanes, Decay<T>::product, w.key_gates, kSeeAll);
      between += w.key_gates.sum;
    }
    finish(w, b, h, start, n);
  }

  // ---- The chunked form ----------------------------------------------------------------------------------------------

  template <int P> void add_chunk(Scratch &w, int64_t b, int64_t h, int64_t start, int64_t n, T *state) const {
    w.keys.load(z, a, b, h, start, n);
    load_gates(w.gates, w.running, b, h, start, n);
    pack_tiles(w.keys.v, z.e_ld, n, z.E, w.gates.present ? w.gates.until_end : nullptr, w.u);
    update_state<P>(z, false, w.gates.decay, w.keys.k, n, w.u, w.features, state);
  }

  // Tokens [from, to) of one key-value head: every query, and the state moved from `from` to `to`.
  template <int P> void run_chunks(Scratch &w, int64_t b, int64_t h, int64_t from, int64_t to, bool empty, bool keep, T *state) const {
    for (int64_t start = from; start < to; start += z.block) {
      int64_t n = min64(z.block, to - start), lanes = round_up(n, kTileM<T>);
      w.keys.load(z, a, b, h, start, n);
      load_gates(w.gates, w.running, b, h, start, n);
      for (int64_t r = 0; r < z.group; ++r) {
        int64_t head = h * z.group + r;
        w.queries.load(z, a, b, head, start, n);
        if (empty) {
          memset(w.sums, 0, size_t(z.E * z.lanes) * sizeof(T));
        } else {
          query_state<P>(z, true, w.queries.columns, lanes, state, z.E, w.features, w.sums);
          if (w.gates.present)
            for (int64_t c = 0; c < z.E; ++c)
              for (int64_t i = 0; i < lanes; ++i) w.sums[c * z.lanes + i] *= w.gates.since_start[i];
        }
        attend(w, n, lanes, w.gates.present ? Decay<T>::pairwise : Decay<T>::none, w.gates, 0);
        finish(w, b, head, start, n);
      }
      if (start + n < to || keep) {
        pack_tiles(w.keys.v, z.e_ld, n, z.E, w.gates.present ? w.gates.until_end : nullptr, w.u);
        update_state<P>(z, false, empty ? T(0) : w.gates.decay, w.keys.k, n, w.u, w.features, state);
        empty = false;
      }
    }
  }

  // causal = 0: one state of all keys, read by every query.
  template <int P> void run_whole(Scratch &w, int64_t b, int64_t h, T *state) const {
    memset(state, 0, size_t(z.state_size()) * sizeof(T));
    for (int64_t start = 0; start < shape.t_kv; start += z.block)
      add_chunk<P>(w, b, h, start, min64(z.block, shape.t_kv - start), state);
    for (int64_t start = 0; start < shape.t; start += z.block) {
      int64_t n = min64(z.block, shape.t - start), lanes = round_up(n, kTileM<T>);
      for (int64_t r = 0; r < z.group; ++r) {
        w.queries.load(z, a, b, h * z.group + r, start, n);
        query_state<P>(z, true, w.queries.columns, lanes, state, z.E, w.features, w.sums);
        finish(w, b, h * z.group + r, start, n);
      }
    }
    store_state(z, state, a.s, a.z, b, h);
  }

  template <int P> void chunked(const PowerExecutor *executor, Scratch *scratch, T *states) const {
    bool keep = a.s.data || a.z.data, given = a.s0.data || a.z0.data;
    int64_t heads = shape.b * shape.h_kv, size = z.state_size(), pieces = segments.count;
    if (pieces == 1) {
      parallel(executor, heads, [&](int64_t task, int slot) {
        int64_t b = task / shape.h_kv, h = task % shape.h_kv;
        T *state = states + slot * size;
        if (!shape.causal) return run_whole<P>(scratch[slot], b, h, state);
        if (given || keep) load_state(z, a.s0, a.z0, b, h, state);
        run_chunks<P>(scratch[slot], b, h, 0, shape.t, !given, keep, state);
        if (keep) store_state(z, state, a.s, a.z, b, h);
      });
      return;
    }
    // Segments: what each adds to the state, on its own; then the states they start from; then every segment from its state.
    parallel(executor, heads * pieces, [&](int64_t task, int slot) {
      int64_t head = task / pieces, segment = task % pieces, b = head / shape.h_kv, h = head % shape.h_kv;
      if (segment == 0) return load_state(z, a.s0, a.z0, b, h, states + task * size);
      T *state = states + task * size;
      memset(state, 0, size_t(size) * sizeof(T));
      int64_t end = segments.end(segment - 1);
      for (int64_t start = segments.start(segment - 1); start < end; start += z.block)
        add_chunk<P>(scratch[slot], b, h, start, min64(z.block, end - start), state);
    });
    parallel(executor, heads, [&](int64_t head, int) {
      for (int64_t segment = 1; segment < pieces; ++segment) {
        T *state = states + (head * pieces + segment) * size;
        T decay = decay_between<T>(a.log_g, head / shape.h_kv, head % shape.h_kv, segments.start(segment - 1), segments.end(segment - 1));
        for (int64_t i = 0; i < size; ++i) state[i] += decay * state[i - size];
      }
    });
    parallel(executor, heads * pieces, [&](int64_t task, int slot) {
      int64_t head = task / pieces, segment = task % pieces, b = head / shape.h_kv, h = head % shape.h_kv;
      T *state = states + task * size;
      bool last = segment + 1 == pieces;
      run_chunks<P>(scratch[slot], b, h, segments.start(segment), segments.end(segment), segment == 0 && !given, keep && last, state);
      if (keep && last) store_state(z, state, a.s, a.z, b, h);
    });
  }

  static int64_t workspace(const PowerAttentionShape &shape, int threads) {
    PowerAttentionArrays none = {};
    Arena arena{0, 0};
    arena.take<Scratch>(threads);
    T *state;
    PowerForward(shape, none, threads).reserve(arena, threads, nullptr, &state);
    return arena.used;
  }

  static void run(const PowerAttentionShape &shape, const PowerAttentionArrays &arrays, void *workspace, const PowerExecutor *executor) {
    int threads = thread_count(executor);
    PowerForward forward(shape, arrays, threads);
    Arena arena{reinterpret_cast<uintptr_t>(workspace), 0};
    Scratch *scratch = arena.take<Scratch>(threads);
    T *states;
    forward.reserve(arena, threads, scratch, &states);
    if (shape.form == POWER_ATTENTION) {
      if (arrays.log_g.data)
        parallel(executor, shape.b * shape.h_kv, [&](int64_t head, int) { forward.reach.measure(forward.z, arrays, head); });
      parallel(executor, shape.b * shape.h_q * forward.z.blocks(shape.t),
               [&](int64_t task, int slot) { forward.attention_task(scratch[slot], task); });
    } else {
      dispatch_degree(shape.deg, [&](auto p) { forward.template chunked<decltype(p)::value>(executor, scratch, states); });
    }
  }
};

}  // namespace POWER_ISA
}  // namespace power_cpu
