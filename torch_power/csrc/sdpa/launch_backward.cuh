/* Host side of the backward pass for one (dtype, head size). */
#pragma once

#include "backward_prepare.cuh"
#include "general_backward_kv.cuh"
#include "general_bias_gradient.cuh"
#include "launch.cuh"

namespace power::sdpa {

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

/* The problem of either backward pass; zeroes the counters and makes the records. */
template <typename T, int kD>
BackwardProblem prepare(const Call &call, const Workspace &at, const RowArrays &rows) {
  const PowerSdpaShape &s = call.shape;
  cudaMemsetAsync(call.workspace, 0, at.records, call.stream);
  BackwardProblem p = {};
  static_cast<Problem &>(p) = make_problem(call);
  p.scale = float(s.scale);
  p.records = reinterpret_cast<QueryRecord *>(call.workspace + at.records);
  p.sums = reinterpret_cast<float *>(call.workspace + at.sums);
  p.added = reinterpret_cast<int *>(call.workspace + at.added);
  if (s.t_q > 0) prepare_kernel<T, kD><<<unsigned(s.b * s.h_q * ((s.t_q + kRows - 1) / kRows)), 256, 0, call.stream>>>(p, rows);
  return p;
}

inline RowArrays row_arrays(const Call &call) {
  const PowerSdpaArrays &x = call.arrays;
  RowArrays rows = {x.out.data, x.dout.data, x.dq.data, {}, {}, {}, int(call.shape.d)};
  std::copy_n(x.out.stride, 3, rows.y_stride);
  std::copy_n(x.dout.stride, 3, rows.dy_stride);
  std::copy_n(x.dq.stride, 3, rows.dq_stride);
  return rows;
}

/* Maps of the arrays in tiles of 64 rows. Of no queries or no keys, nothing is read or written. */
struct BackwardMaps {
  CUtensorMap q, dy, dq, k, v, dk, dv;
  bool make(const Call &call) {
    const PowerSdpaShape &s = call.shape;
    const PowerSdpaArrays &x = call.arrays;
    const bool half = s.dtype == POWER_FLOAT16;
    bool ok = true;
    if (s.t_q > 0)
      ok = make_map(&q, x.q, s.b, s.h_q, s.t_q, s.d, kRows, half) && make_map(&dy, x.dout, s.b, s.h_q, s.t_q, s.e, kRows, half) &&
           make_map(&dq, x.dq, s.b, s.h_q, s.t_q, s.d, kRows, half);
    if (s.t_kv > 0)
      ok = ok && make_map(&k, x.k, s.b, s.h_kv, s.t_kv, s.d, kRows, half) && make_map(&v, x.v, s.b, s.h_kv, s.t_kv, s.e, kRows, half) &&
           make_map(&dk, x.dk, s.b, s.h_kv, s.t_kv, s.d, kRows, half) && make_map(&dv, x.dv, s.b, s.h_kv, s.t_kv, s.e, kRows, half);
    if (s.t_q == 0) q = dy = dq = k;
    if (s.t_kv == 0) k = v = dk = dv = q;
    return ok;
  }
};
constexpr const char *kNoMap = "sdpa: an array's address or strides cannot be described to the copy engine";

template <typename T, int kD>
int32_t launch_backward_plain(const Call &call) {
  const PowerSdpaShape &s = call.shape;
  const RowArrays rows = row_arrays(call);
  BackwardMaps maps;
  if (!maps.make(call)) return power_fail(POWER_INVALID, kNoMap);
  BackwardProblem p = prepare<T, kD>(call, Workspace(s, true), rows);
  p.deck = make_deck(call, reinterpret_cast<int *>(call.workspace), s.t_kv, kBackwardKeys, s.h_kv, false);
  const int32_t status = launch_persistent<BackwardSmem<T, kD>>(call, "sdpa: backward", backward_kernel<T, kD>, p.deck.items,
                                                                (kBackwardGroups + 1) * kWarpgroup, maps.q, maps.k, maps.v, maps.dy, maps.dk,
                                                                maps.dv, p);
  if (status) return status;
  finish_kernel<T, kD><<<unsigned(s.b * s.h_q * ((s.t_q + kRows - 1) / kRows)), kWarpgroup, 0, call.stream>>>(p, rows);
  return after_launch("sdpa: backward, rounding of dq");
}

template <typename T, int kD>
int32_t launch_backward_general(const Call &call) {
  const PowerSdpaShape &s = call.shape;
  using QTiles = BackwardQTiles<kD>;
  using KvTiles = BackwardKvTiles<kD>;
  BackwardMaps maps;
  if (!maps.make(call)) return power_fail(POWER_INVALID, kNoMap);
  int *dealt = reinterpret_cast<int *>(call.workspace);
  BackwardProblem p = prepare<T, kD>(call, Workspace(s, true), row_arrays(call)), kv = p;
  p.deck = make_deck(call, dealt, s.t_q, QTiles::kGroups * kRows, s.h_q, s.causal);
  const General general = make_general(call);
  const int32_t status = launch_persistent<BackwardQSmem<T, kD>>(call, "sdpa: backward, queries", backward_q_kernel<T, kD>, p.deck.items,
                                                                 (QTiles::kGroups + 1) * kWarpgroup, maps.q, maps.k, maps.v, maps.dy, maps.dq,
                                                                 p, general);
  if (status) return status;
  const auto keys = [&](auto part, int counter) {
    kv.deck = make_deck(call, dealt + counter, s.t_kv, KvTiles::kGroups * kRows, s.h_kv, false);
    return launch_persistent<BackwardKvSmem<T, kD>>(call, "sdpa: backward, keys", backward_kv_kernel<T, kD, decltype(part)::value>,
                                                    kv.deck.items, (KvTiles::kGroups + 1) * kWarpgroup, maps.q, maps.k, maps.v, maps.dy,
                                                    maps.dk, maps.dv, kv, general);
  };
  int32_t keys_status;
  if constexpr (kD == 256) {
    keys_status = keys(std::integral_constant<Part, ONLY_DV>(), 1);
    if (!keys_status) keys_status = keys(std::integral_constant<Part, ONLY_DK>(), 2);
  } else {
    keys_status = keys(std::integral_constant<Part, BOTH>(), 1);
  }
  if (keys_status || !call.arrays.dbias.data) return keys_status;
  return launch_bias_gradient<T, kD>(call, maps.q, maps.k, maps.v, maps.dy, p, general);
}

template <typename T, int kD>
int32_t launch_backward(const Call &call) {
  if constexpr (kD <= 128)  // the sums that the one-pass kernel adds to start with the first tile of keys
    if (!is_general(call) && call.shape.t_q > 0 && call.shape.t_kv > 0) return launch_backward_plain<T, kD>(call);
  return launch_backward_general<T, kD>(call);
}

}  // namespace power::sdpa
