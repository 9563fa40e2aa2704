/* Host side of the backward pass for one (dtype, head size). */
#pragma once

#include "backward_kv.cuh"
#include "backward_prepare.cuh"
#include "backward_q.cuh"
#include "bias_gradient.cuh"
#include "launch.cuh"

namespace power::sdpa {

constexpr const char *kNoMap = "sdpa: an array's address or strides cannot be described to the copy engine";

template <typename T, int kD>
int32_t launch_bias_gradient(const Call &call, const CUtensorMap &q, const CUtensorMap &k, const CUtensorMap &v, const CUtensorMap &dy,
                             const BackwardProblem &p, const General &general) {
  const PowerSdpaShape &s = call.shape;
  const BiasGradient gradient = {operand(call.arrays.dbias), int(s.b)};
  const auto owned = [&](int axis, int64_t size) { return unsigned(gradient.sums(axis) ? 1 : size); };
  const dim3 grid(owned(3, (s.t_kv + kRows - 1) / kRows), owned(2, (s.t_q + kRows - 1) / kRows), owned(0, s.b) * owned(1, s.h_q));
  if (s.t_q == 0 || s.t_kv == 0) return POWER_OK;
  if (grid.y > 65535 || grid.z > 65535)
    return power_fail(POWER_UNSUPPORTED, "bias: its gradient takes at most 65535 heads in all, and 65535 tiles of 64 queries");
  constexpr int kBytes = sizeof(BiasGradientSmem<T, kD>);
  if (cudaFuncSetAttribute(bias_gradient_kernel<T, kD>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes) == cudaSuccess)
    bias_gradient_kernel<T, kD><<<grid, kWarpgroup, kBytes, call.stream>>>(q, k, v, dy, p, general, gradient);
  return after_launch("sdpa: gradient of the bias");
}

template <typename T, int kD, bool kGeneral>
int32_t launch_backward_tiles(const Call &call) {
  const PowerSdpaShape &s = call.shape;
  const PowerSdpaArrays &x = call.arrays;
  const Workspace at(s, true);
  constexpr bool kHalf = is_half<T>;
  using QTiles = BackwardQTiles<kD>;
  using KvTiles = BackwardKvTiles<kD>;
  int *dealt = reinterpret_cast<int *>(call.workspace + at.counters);
  cudaMemsetAsync(dealt, 0, kCounters * sizeof(int), call.stream);
  BackwardProblem p = {};
  static_cast<Problem &>(p) = make_problem(call);
  p.scale = float(s.scale);
  p.y = x.out.data;
  std::copy_n(x.out.stride, 3, p.y_stride);
  p.records = reinterpret_cast<QueryRecord *>(call.workspace + at.records);
  BackwardProblem kv = p;
  p.deck = make_deck(call, dealt, s.t_q, QTiles::kGroups * kRows, s.h_q, s.causal);
  const General general = make_general(call);

  CUtensorMap q, dy, dq, k, v, k64, v64, dk, dv;
  bool ok = true;
  if (s.t_q > 0)
    ok = make_map(&q, x.q, s.b, s.h_q, s.t_q, s.d, kRows, kHalf) && make_map(&dy, x.dout, s.b, s.h_q, s.t_q, s.e, kRows, kHalf) &&
         make_map(&dq, x.dq, s.b, s.h_q, s.t_q, s.d, kRows, kHalf);
  if (s.t_kv > 0)
    ok = ok && make_map(&k, x.k, s.b, s.h_kv, s.t_kv, s.d, QTiles::kKeys, kHalf) &&
         make_map(&v, x.v, s.b, s.h_kv, s.t_kv, s.e, QTiles::kKeys, kHalf) &&
         make_map(&k64, x.k, s.b, s.h_kv, s.t_kv, s.d, kRows, kHalf) && make_map(&v64, x.v, s.b, s.h_kv, s.t_kv, s.e, kRows, kHalf) &&
         make_map(&dk, x.dk, s.b, s.h_kv, s.t_kv, s.d, kRows, kHalf) && make_map(&dv, x.dv, s.b, s.h_kv, s.t_kv, s.e, kRows, kHalf);
  if (!ok) return power_fail(POWER_INVALID, kNoMap);
  if (s.t_q == 0) q = dy = dq = k64;  // of no queries or no keys, nothing is read
  if (s.t_kv == 0) k = v = k64 = v64 = dk = dv = q;

  const int32_t status = launch_persistent<BackwardQSmem<T, kD, kGeneral>>(
      call, "sdpa: backward, queries", backward_q_kernel<T, kD, kGeneral>, p.deck.items, (QTiles::kGroups + 1) * kWarpgroup, q, k, v, dy, dq, p,
      general);
  if (status) return status;
  const auto keys = [&](auto part, int counter) {
    kv.deck = make_deck(call, dealt + counter, s.t_kv, KvTiles::kGroups * kRows, s.h_kv, false);
    return launch_persistent<BackwardKvSmem<T, kD, kGeneral>>(
        call, "sdpa: backward, keys", backward_kv_kernel<T, kD, kGeneral, decltype(part)::value>, kv.deck.items,
        (KvTiles::kGroups + 1) * kWarpgroup, q, k64, v64, dy, dk, dv, kv, general);
  };
  int32_t keys_status;
  if constexpr (kD == 256) {
    keys_status = keys(std::integral_constant<Part, ONLY_DV>(), 1);
    if (!keys_status) keys_status = keys(std::integral_constant<Part, ONLY_DK>(), 2);
  } else {
    keys_status = keys(std::integral_constant<Part, BOTH>(), 1);
  }
  if constexpr (kGeneral) {
    if (!keys_status && x.dbias.data) return launch_bias_gradient<T, kD>(call, q, k64, v64, dy, p, general);
  }
  return keys_status;
}

/* The timetable of the one-pass kernel that takes the fewest steps. A visit is a step; a key block costs kItem more (its keys to come, its
 * gradients to leave). Of equals the one with most lanes, as a round reads all queries once, but no more than kLanes: t = 16384, d = 64 full
 * 10.7 ms with 16, 10.9 with 32, 11.0 with 64, 11.7 with 8. */
inline Timetable make_timetable(const Call &call) {
  const PowerSdpaShape &s = call.shape;
  Timetable best = {};
  best.heads = int(s.b * s.h_kv), best.sharing = int(s.h_q / s.h_kv), best.causal = s.causal != POWER_FULL;
  best.key_blocks = int((s.t_kv + kKeyBlock - 1) / kKeyBlock), best.tiles = int((s.t_q + kRows - 1) / kRows);
  constexpr int kItem = 2, kLanes = 32;
  int64_t least = INT64_MAX;
  for (int lanes = 1; lanes <= std::min(best.key_blocks, call.multiprocessors); ++lanes) {
    Timetable t = best;
    t.lanes = lanes, t.teams = std::min(call.multiprocessors / lanes, t.heads), t.rounds = (t.key_blocks + lanes - 1) / lanes;
    const int64_t heads = (t.heads + t.teams - 1) / t.teams;  // of a team
    int64_t steps = 0;
    for (int round = 0; round < t.rounds; ++round) {
      const int first = round * lanes, last = std::min(t.key_blocks, first + lanes) - 1;
      const int seen = t.causal ? std::max(t.tiles - (first + last) * kSpacing / 2, 0) : t.tiles;
      steps += int64_t(seen) * t.sharing + kItem;
    }
    steps *= heads;
    if (t.causal && heads % 2) steps += int64_t(lanes - 1) * t.sharing * ((t.rounds + 1) / 2);
    t.spacing = std::min<int64_t>(kSpacing, int64_t(t.tiles) * t.sharing / lanes);
    if (steps < least || (steps == least && lanes <= kLanes)) least = steps, best = t;
  }
  return best;
}

/* Whether the one-pass kernel serves the call. Every query has to see a key, so that every sum is written. */
template <int kD>
bool takes_one_pass(const Call &call) {
  return kD <= 128 && !is_general(call) && call.shape.t_q > 0 && call.shape.t_kv > 0;
}

template <typename T, int kD>
int32_t launch_one_pass(const Call &call) {
  const PowerSdpaShape &s = call.shape;
  const PowerSdpaArrays &x = call.arrays;
  const Workspace at(s, true);
  constexpr bool kHalf = is_half<T>;
  OnePassProblem p = {};
  static_cast<Problem &>(p) = make_problem(call);
  p.table = make_timetable(call);
  p.scale = float(s.scale), p.d = int(s.d);
  p.records = reinterpret_cast<QueryRecord *>(call.workspace + at.records);
  p.sums = reinterpret_cast<float *>(call.workspace + at.sums);
  p.turns = reinterpret_cast<int *>(call.workspace + at.turns);
  p.dk = x.dk.data, p.dv = x.dv.data;
  std::copy_n(x.dk.stride, 3, p.dk_stride);
  std::copy_n(x.dv.stride, 3, p.dv_stride);
  RowArrays rows = {x.out.data, x.dout.data, {}, {}};
  std::copy_n(x.out.stride, 3, rows.y_stride);
  std::copy_n(x.dout.stride, 3, rows.dy_stride);
  CUtensorMap q, k, v, dy, dq;
  if (!make_map(&q, x.q, s.b, s.h_q, s.t_q, s.d, kRows, kHalf) || !make_map(&dy, x.dout, s.b, s.h_q, s.t_q, s.e, kRows, kHalf) ||
      !make_map(&k, x.k, s.b, s.h_kv, s.t_kv, s.d, kRows, kHalf) || !make_map(&v, x.v, s.b, s.h_kv, s.t_kv, s.e, kRows, kHalf) ||
      !make_map(&dq, x.dq, s.b, s.h_q, s.t_q, s.d, kRows, kHalf))
    return power_fail(POWER_INVALID, kNoMap);
  prepare_kernel<T, kD><<<unsigned(s.b * s.h_q * p.table.tiles), 256, 0, call.stream>>>(p, rows);
  return launch_together<BackwardSmem<T, kD>>(call, "sdpa: backward", backward_kernel<T, kD>, p.table.lanes * p.table.teams, kBackwardThreads,
                                              q, k, v, dy, dq, p);
}

template <typename T, int kD>
int32_t launch_backward(const Call &call) {
  if constexpr (kD <= 128) return takes_one_pass<kD>(call) ? launch_one_pass<T, kD>(call) : launch_backward_tiles<T, kD, true>(call);
  return is_general(call) ? launch_backward_tiles<T, kD, true>(call) : launch_backward_tiles<T, kD, false>(call);
}

}  // namespace power::sdpa
