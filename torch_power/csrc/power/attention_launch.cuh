/* Host side of the attention form: tensor maps, workspace, and the launches of one (dtype, head size). */
#pragma once

#include <algorithm>
#include <cmath>

#include "../launch.cuh"
#include "attention_backward_kv.cuh"
#include "attention_call.h"
#include "attention_forward.cuh"
#include "attention_prepare.cuh"

namespace power::attention {

/* Heads of more than 128 are served by the kernels with gates alone, which spares half of the instances; without log_g all gates are 1,
 * for queries as for keys. */
constexpr bool always_gated(int d) { return d > 128; }

/* Gate records of a head: two for every block of 128 tokens. */
inline int64_t gate_records(const PowerAttentionShape &s) {
  const int64_t tokens = always_gated(int(std::max(s.d, s.e))) ? std::max(s.t, s.t_kv) : s.t_kv;
  return (tokens + kGateBlock - 1) / kGateBlock * 2;
}

/* Scratch of one call, carved from the caller's workspace: byte offsets, each a multiple of 256. */
struct Workspace {
  int64_t counters, gates, maxima, records, row_sum, column_sum, turns, sums, bytes;
  Workspace(const PowerAttentionShape &s, bool backward) {
    int64_t at = 0;
    const auto take = [&at](int64_t size) {
      const int64_t offset = at;
      at += (size + 255) / 256 * 256;
      return offset;
    };
    const int64_t size = std::max(s.d, s.e), row_tiles = (s.t + kRows - 1) / kRows;
    const bool gated = s.gates || always_gated(int(size)), half = s.dtype == POWER_FLOAT16;
    const int64_t record = gated ? sizeof(GatedQueryRecord) : sizeof(QueryRecord);
    counters = take(kCounters * sizeof(int));
    gates = take(gated ? s.b * s.h_kv * gate_records(s) * int64_t(sizeof(GateRecord)) : 0);
    maxima = take(half ? 2 * s.b * (s.h_q + s.h_kv) * int64_t(sizeof(float)) : 0);
    records = take(backward ? s.b * s.h_q * row_tiles * record : 0);
    row_sum = take(backward && gated ? s.b * s.h_q * s.t * int64_t(sizeof(float)) : 0);
    column_sum = take(backward && gated ? s.b * s.h_kv * s.t_kv * int64_t(sizeof(float)) : 0);
    const bool all = backward && one_pass(s);
    turns = take(all ? s.b * s.h_q * row_tiles * int64_t(sizeof(int)) : 0);
    sums = take(all ? s.b * s.h_q * row_tiles * int64_t(kRows * (size <= 64 ? 64 : 128) * sizeof(float)) : 0);
    bytes = at;
  }
};

/* `make_tile_map` of an array [b, t, h, x]. */
inline bool make_map(CUtensorMap *map, const PowerArray &a, int64_t b, int64_t t, int64_t h, int64_t x, int rows, bool half) {
  return make_tile_map(map, a.data, {x, h, t, b}, {a.stride[2], a.stride[1], a.stride[0]}, rows, half);
}

/* The deck of a kernel whose blocks hold `rows` rows of a head. Heads are dealt in equal groups. With few tiles a head, groups keep
 * all blocks busy twice over: what streams past them is then read from memory once (groups three times as large cost 20 % at
 * t = 512). With many, up to six times, as the group that is dealt last ends raggedly (groups of two cost 4 % at t = 4096).
 * spread: heads one by one, so that a group's long items, which read new keys, do not all come at once (forward, t = 512: d = 64 0.1135 →
 * 0.1097 ms, d = 128 0.1155 → 0.1096; at t = 1024 it costs 4 %). */
inline Deck make_deck(const Call &call, const Workspace &at, int kernel, int64_t t, int rows, int64_t heads, bool last_first,
                      bool spread = false) {
  const int64_t tiles = (t + rows - 1) / rows, all = call.shape.b * heads, busy = std::clamp<int64_t>(tiles / 4, 2, 6);
  const int64_t groups = spread ? all : (all - 1) / (busy * call.multiprocessors / std::max<int64_t>(tiles, 1) + 1) + 1;
  int *dealt = reinterpret_cast<int *>(call.workspace + at.counters) + kernel;
  return Deck(int(tiles), int(heads), int(call.shape.b), int((all + groups - 1) / groups), last_first, dealt);
}

inline Problem make_problem(const Call &call, const Workspace &at, bool half) {
  const PowerAttentionShape &s = call.shape;
  Problem p = {};
  p.b = int(s.b), p.t_q = int(s.t), p.t_kv = int(s.t_kv), p.h_q = int(s.h_q), p.h_kv = int(s.h_kv);
  p.causal = s.causal, p.normalize = s.normalize;
  p.zero = s.scale == 0.0;
  p.scale_p = float(std::pow(s.scale, s.deg));
  p.gates = reinterpret_cast<const GateRecord *>(call.workspace + at.gates);
  p.gate_records = int(gate_records(s));
  if (half) {
    const float *maxima = reinterpret_cast<const float *>(call.workspace + at.maxima);
    p.k_max = maxima, p.v_max = p.k_max + s.b * s.h_kv, p.q_max = p.v_max + s.b * s.h_kv, p.dy_max = p.q_max + s.b * s.h_q;
  }
  p.norm = static_cast<float *>(call.arrays.norm.data);
  std::copy_n(call.arrays.norm.stride, 3, p.norm_stride);
  return p;
}

/* Counters at 0, gate records, and for float16 the largest row norms, in the workspace. */
inline int32_t prepare(const Call &call, const Workspace &at, const Problem &p, bool half, bool backward) {
  const PowerAttentionShape &s = call.shape;
  cudaMemsetAsync(call.workspace + at.counters, 0, kCounters * sizeof(int), call.stream);
  if (p.gate_records && (call.gates() || always_gated(int(std::max(s.d, s.e))))) {
    const PowerArray &g = call.arrays.log_g;
    sum_gates_kernel<<<unsigned(s.b * s.h_kv), 256, 0, call.stream>>>(static_cast<const float *>(g.data), g.stride[0], g.stride[1],
                                                                     g.stride[2], int(s.t_kv), p.gate_records / 2, int(s.h_kv), s.deg,
                                                                     reinterpret_cast<GateRecord *>(call.workspace + at.gates));
  }
  if (half) {
    cudaMemsetAsync(call.workspace + at.maxima, 0, 2 * s.b * (s.h_q + s.h_kv) * sizeof(float), call.stream);
    const auto largest = [&](const PowerArray &x, int64_t t, int64_t heads, int64_t size, const float *out) {
      if (t == 0) return;
      const dim3 grid(unsigned(std::min<int64_t>((t + 63) / 64, 64)), unsigned(s.b * heads));
      max_norm_kernel<<<grid, 256, 0, call.stream>>>(static_cast<const __half *>(x.data), x.stride[0], x.stride[1], x.stride[2], int(t),
                                                     int(heads), int(size), const_cast<float *>(out));
    };
    largest(call.arrays.k, s.t_kv, s.h_kv, s.d, p.k_max);
    if (backward) {
      largest(call.arrays.v, s.t_kv, s.h_kv, s.e, p.v_max);
      largest(call.arrays.q, s.t, s.h_q, s.d, p.q_max);
      largest(call.arrays.dy, s.t, s.h_q, s.e, p.dy_max);
    }
  }
  return after_launch("power attention: preparation");
}

/* Calls f(deg, gates) for the call's degree and gates. */
template <int kD, typename F>
int32_t with_degree_and_gates(const Call &call, F f) {
  const auto degree = [&](auto deg) {
    if constexpr (always_gated(kD)) return f(deg, std::true_type());
    else return call.gates() ? f(deg, std::true_type()) : f(deg, std::false_type());
  };
  switch (call.shape.deg) {
    case 1: return degree(std::integral_constant<int, 1>());
    case 2: return degree(std::integral_constant<int, 2>());
    case 3: return degree(std::integral_constant<int, 3>());
    default: return degree(std::integral_constant<int, 4>());
  }
}

template <typename T, int kD>
int32_t launch_forward(const Call &call) {
  const PowerAttentionShape &s = call.shape;
  const PowerAttentionArrays &x = call.arrays;
  const Workspace at(s, false);
  Problem p = make_problem(call, at, is_half<T>);
  if (const int32_t status = prepare(call, at, p, is_half<T>, false)) return status;
  CUtensorMap q_map, k_map, v_map, y_map;
  bool ok = make_map(&q_map, x.q, s.b, s.t, s.h_q, s.d, kRows, is_half<T>) && make_map(&y_map, x.y, s.b, s.t, s.h_q, s.e, kRows, is_half<T>);
  k_map = v_map = q_map;  // of no keys, nothing is read
  if (s.t_kv > 0)
    ok = ok && make_map(&k_map, x.k, s.b, s.t_kv, s.h_kv, s.d, kForwardKeys, is_half<T>) &&
         make_map(&v_map, x.v, s.b, s.t_kv, s.h_kv, s.e, kForwardKeys, is_half<T>);
  if (!ok) return power_fail(POWER_INVALID, "power attention: an array's address or strides cannot be described to the copy engine");
  return with_degree_and_gates<kD>(call, [&](auto deg, auto gates) {
    constexpr int kGroups = ForwardTiles<T, kD, deg, gates>::kGroups;
    p.deck = make_deck(call, at, 0, s.t, kGroups * kRows, s.h_q, s.causal, s.t <= 512);
    return launch_persistent<ForwardSmem<T, kD, deg, gates>>(call, "power attention: forward", forward_kernel<T, kD, deg, gates>,
                                                             p.deck.items, (kGroups + 1) * kWarpgroup, q_map, k_map, v_map, y_map, p);
  });
}

template <typename T, int kD>
int32_t launch_backward(const Call &call) {
  if constexpr (!is_half<T> && kD <= 128)
    if (one_pass(call.shape)) return launch_one_pass(call);
  const PowerAttentionShape &s = call.shape;
  const PowerAttentionArrays &x = call.arrays;
  const Workspace at(s, true);
  BackwardQProblem p = {};
  static_cast<Problem &>(p) = make_problem(call, at, is_half<T>);
  if (const int32_t status = prepare(call, at, p, is_half<T>, true)) return status;
  p.y = x.y.data, p.e = int(s.e);
  std::copy_n(x.y.stride, 3, p.y_stride);
  p.records = call.workspace + at.records;
  p.row_sum = reinterpret_cast<float *>(call.workspace + at.row_sum);
  BackwardKvProblem kv = {};
  static_cast<Problem &>(kv) = p;
  constexpr int kRowsOfBlock = kBackwardGroups * kRows;
  p.deck = make_deck(call, at, 0, s.t, kRowsOfBlock, s.h_q, s.causal);
  kv.deck = make_deck(call, at, 1, s.t_kv, KvTiles<kD>::kKeys, s.h_kv, false);
  kv.records = p.records;
  kv.column_sum = reinterpret_cast<float *>(call.workspace + at.column_sum);

  constexpr int kThreads = (kBackwardGroups + 1) * kWarpgroup;
  constexpr bool kHalf = is_half<T>;
  const int keys = call.gates() ? BackwardQTiles<kD, true>::kKeys : BackwardQTiles<kD, false>::kKeys;
  CUtensorMap q, dy, dq, k, v, k64, v64, dk, dv;
  bool ok = true;
  if (s.t > 0)
    ok = make_map(&q, x.q, s.b, s.t, s.h_q, s.d, kRows, kHalf) && make_map(&dy, x.dy, s.b, s.t, s.h_q, s.e, kRows, kHalf) &&
         make_map(&dq, x.dq, s.b, s.t, s.h_q, s.d, kRows, kHalf);
  if (s.t_kv > 0)
    ok = ok && make_map(&k, x.k, s.b, s.t_kv, s.h_kv, s.d, keys, kHalf) &&
         make_map(&v, x.v, s.b, s.t_kv, s.h_kv, s.e, keys, kHalf) &&
         make_map(&k64, x.k, s.b, s.t_kv, s.h_kv, s.d, kRows, kHalf) && make_map(&v64, x.v, s.b, s.t_kv, s.h_kv, s.e, kRows, kHalf) &&
         make_map(&dk, x.dk, s.b, s.t_kv, s.h_kv, s.d, kRows, kHalf) && make_map(&dv, x.dv, s.b, s.t_kv, s.h_kv, s.e, kRows, kHalf);
  if (!ok) return power_fail(POWER_INVALID, "power attention: an array's address or strides cannot be described to the copy engine");
  if (s.t == 0) q = dy = k64;  // of no queries or no keys, nothing is read
  if (s.t_kv == 0) k = v = q;

  const int32_t status = with_degree_and_gates<kD>(call, [&](auto deg, auto gates) {
    const int32_t first = launch_persistent<BackwardQSmem<T, kD, gates>>(
        call, "power attention: backward, queries", backward_q_kernel<T, kD, deg, gates>, p.deck.items, kThreads, q, k, v, dy, dq, p);
    if (first) return first;
    return launch_persistent<BackwardKvSmem<T, kD, gates>>(
        call, "power attention: backward, keys", backward_kv_kernel<T, kD, deg, gates>, kv.deck.items, kThreads, q, k64, v64, dy, dk, dv, kv);
  });
  if (status || !call.gates() || s.t == 0 || x.dlog_g.data == nullptr) return status;
  const PowerArray &g = x.dlog_g;
  sum_gate_gradient_kernel<<<unsigned(s.b * s.h_kv), 256, 0, call.stream>>>(p.row_sum, kv.column_sum, static_cast<float *>(g.data),
                                                                           g.stride[0], g.stride[1], g.stride[2], int(s.t),
                                                                           int(s.h_kv), int(s.h_q / s.h_kv));
  return after_launch("power attention: gradient of the gates");
}

}  // namespace power::attention
