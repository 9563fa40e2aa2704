// Power attention for one token, as in decoding: the state is read once and written once, which is all the time it takes.
//     y = (exp(log_g)·ψ(q')ᵀ[S z] + <q', k>^p [v 1]), divided;   S += …, z += … as ever.
// The token's own weight is a power of a score and not a product of features, so that a query all but orthogonal to its key
// keeps its digits.
#pragma once

#include "power_forward.h"

namespace power_cpu {
namespace POWER_ISA {

template <class T> struct PowerStep {
  const PowerAttentionShape &shape;
  const PowerAttentionArrays &a;
  Sizes<T> z;

  struct Scratch {
    T *k, *v, *q, *factor;  // the token: [d], [e], [group, d_ld]
    T *phi, *psi;           // one panel: [64], [group, 64]
    T *old, *sums;          // a decayed row of the state [e]; [group, E]
    void reserve(Arena &arena, const Sizes<T> &z) {
      k = arena.take<T>(z.d);
      v = arena.take<T>(z.e);
      q = arena.take<T>(z.group * z.d_ld);
      factor = arena.take<T>(z.group);
      phi = arena.take<T>(kPanelRows);
      psi = arena.take<T>(z.group * kPanelRows);
      old = arena.take<T>(z.e);
      sums = arena.take<T>(z.group * z.E);
    }
  };

  void load_token(Scratch &w, int64_t b, int64_t h) const {
    const T *one = nullptr;
    pack_rows(rows_from(a.k, b, 0, h, 1), 1, z.d, one, w.k, z.d, 1);
    pack_rows(rows_from(a.v, b, 0, h, 1), 1, z.e, one, w.v, z.e, 1);
    pack_rows(rows_from(a.q, b, 0, h * z.group, 2), z.group, z.d, one, w.q, z.d_ld, z.group);
    for (int64_t r = 0; r < z.group; ++r) {
      T *q = w.q + r * z.d_ld, factor = query_factor(shape, q, z.d_ld), score = 0;
      for (int64_t c = 0; c < z.d; ++c) {
        q[c] *= factor;
        score += q[c] * w.k[c];
      }
      T weight = integer_power<T>(broadcast(score), z.deg)[0], *sums = w.sums + r * z.E;
      for (int64_t c = 0; c < z.e; ++c) sums[c] = weight * w.v[c];
      sums[z.e] = weight;
    }
  }

  void step_row(Scratch &w, int64_t row, int64_t in_panel, int64_t b, int64_t h, T decay) const {
    const T *s_in = pointer<T>(a.s0, b, h, row), *z_in = pointer<T>(a.z0, b, h, row);
    T *s_out = pointer<T>(a.s, b, h, row), *z_out = pointer<T>(a.z, b, h, row);
    T norm = z_in ? decay * *z_in : T(0), phi = w.phi[in_panel];
    int64_t in = a.s0.stride[3], out = a.s.stride[3];
    if (s_in && in == 1)
      for (int64_t c = 0; c < z.e; ++c) w.old[c] = decay * s_in[c];
    else
      for (int64_t c = 0; c < z.e; ++c) w.old[c] = s_in ? decay * s_in[c * in] : T(0);
    for (int64_t r = 0; r < z.group; ++r) {
      T psi = w.psi[r * kPanelRows + in_panel], *sums = w.sums + r * z.E;
      for (int64_t c = 0; c < z.e; ++c) sums[c] += psi * w.old[c];
      sums[z.e] += psi * norm;
    }
    if (s_out && out == 1)
      for (int64_t c = 0; c < z.e; ++c) s_out[c] = w.old[c] + phi * w.v[c];
    else if (s_out)
      for (int64_t c = 0; c < z.e; ++c) s_out[c * out] = w.old[c] + phi * w.v[c];
    if (z_out) *z_out = norm + phi;
  }

  template <int P> void head(Scratch &w, int64_t b, int64_t h) const {
    const T *log_g = pointer<T>(a.log_g, b, 0, h);
    T decay = log_g ? exp_scalar(*log_g) : T(1);
    load_token(w, b, h);
    Panel<P> panel;
    for (PanelWalk<P> walk(z.d); walk.next(panel);) {
      features_by_token<P>(panel, false, w.k, z.d, 1, w.phi);
      features_by_token<P>(panel, true, w.q, z.d_ld, z.group, w.psi);
      for (int64_t row = 0; row < panel.rows(); ++row) step_row(w, panel.index * kPanelRows + row, row, b, h, decay);
    }
    for (int64_t r = 0; r < z.group; ++r) {
      const T *sums = w.sums + r * z.E;
      T divisor = sums[z.e], *y = pointer<T>(a.y, b, 0, h * z.group + r);
      *pointer<T>(a.norm, b, 0, h * z.group + r) = divisor;
      for (int64_t c = 0; c < z.e; ++c) y[c * a.y.stride[3]] = !shape.normalize ? sums[c] : divisor == 0 ? T(0) : sums[c] / divisor;
    }
  }

  static bool serves(const PowerAttentionShape &s) { return s.form == POWER_RECURRENT && s.causal && s.t == 1; }

  static int64_t workspace(const PowerAttentionShape &shape, int threads) {
    Arena arena{0, 0};
    arena.take<Scratch>(threads);
    for (int i = 0; i < threads; ++i) Scratch().reserve(arena, Sizes<T>(shape));
    return arena.used;
  }

  static void run(const PowerAttentionShape &shape, const PowerAttentionArrays &arrays, void *workspace, const PowerExecutor *executor) {
    PowerStep step{shape, arrays, Sizes<T>(shape)};
    int threads = thread_count(executor);
    Arena arena{reinterpret_cast<uintptr_t>(workspace), 0};
    Scratch *scratch = arena.take<Scratch>(threads);
    for (int i = 0; i < threads; ++i) scratch[i].reserve(arena, step.z);
    dispatch_degree(shape.deg, [&](auto p) {
      parallel(executor, shape.b * shape.h_kv, [&](int64_t task, int slot) {
        step.template head<decltype(p)::value>(scratch[slot], task / shape.h_kv, task % shape.h_kv);
      });
    });
  }
};

template <class T> int64_t power_forward_workspace(const PowerAttentionShape &shape, int threads) {
  if (PowerStep<T>::serves(shape)) return PowerStep<T>::workspace(shape, threads);
  return largest_workspace(shape, threads, PowerForward<T>::workspace);
}

template <class T>
void power_forward(const PowerAttentionShape &shape, const PowerAttentionArrays &a, void *workspace, const PowerExecutor *executor) {
  if (PowerStep<T>::serves(shape)) return PowerStep<T>::run(shape, a, workspace, executor);
  PowerForward<T>::run(with_form_chosen<T>(shape, a), a, workspace, executor);
}

}  // namespace POWER_ISA
}  // namespace power_cpu
