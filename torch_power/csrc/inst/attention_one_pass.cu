/* Backward in one pass: bfloat16, p = 2, heads of up to 64 or 128 by padding. */
#include "../power/attention_launch.cuh"
#include "../power/attention_one_pass_narrow.cuh"
#include "../power/attention_one_pass_wide.cuh"

namespace power::attention {

namespace {

using T = __nv_bfloat16;
constexpr int kDeg = 2;
constexpr const char *kNoMap = "power attention: an array's address or strides cannot be described to the copy engine";

template <typename Element>
Rows<Element> rows(const PowerArray &a, int64_t size) {
  return {static_cast<Element *>(a.data), {a.stride[0], a.stride[1], a.stride[2]}, int(size)};
}

template <int kD>
int32_t launch(const Call &call) {
  const PowerAttentionShape &s = call.shape;
  const PowerAttentionArrays &x = call.arrays;
  const Workspace at(s, true);
  const Problem problem = make_problem(call, at, false);
  OnePassProblem p = {};
  p.t_q = int(s.t), p.t_kv = int(s.t_kv), p.h_q = int(s.h_q), p.h_kv = int(s.h_kv), p.d = int(s.d), p.e = int(s.e);
  p.table = sdpa::make_timetable(s.b * s.h_kv, s.h_q / s.h_kv, s.t, s.t_kv, s.causal, call.multiprocessors);
  p.records = reinterpret_cast<sdpa::QueryRecord *>(call.workspace + at.records);
  p.sums = reinterpret_cast<float *>(call.workspace + at.sums);
  p.turns = reinterpret_cast<int *>(call.workspace + at.turns);
  p.normalize = s.normalize, p.plain = s.normalize ? 1.f : problem.scale_p;

  CUtensorMap q, dy, dq, k, v, dk, dv;
  if (!(make_map(&q, x.q, s.b, s.t, s.h_q, s.d, kRows, false) && make_map(&dy, x.dy, s.b, s.t, s.h_q, s.e, kRows, false) &&
        make_map(&k, x.k, s.b, s.t_kv, s.h_kv, s.d, kRows, false) && make_map(&v, x.v, s.b, s.t_kv, s.h_kv, s.e, kRows, false) &&
        make_map(&dk, x.dk, s.b, s.t_kv, s.h_kv, s.d, kRows, false) && make_map(&dv, x.dv, s.b, s.t_kv, s.h_kv, s.e, kRows, false)))
    return power_fail(POWER_INVALID, kNoMap);

  prepare_queries_kernel<T, kD, kDeg><<<unsigned(s.b * s.h_q * p.table.tiles), 256, 0, call.stream>>>(
      rows<const T>(x.q, s.d), rows<const T>(x.y, s.e), rows<const T>(x.dy, s.e), problem,
      reinterpret_cast<QueryRecord *>(p.records), p.turns);
  const int blocks = p.table.lanes * p.table.teams;
  if constexpr (kD == 64) {
    const auto heads_first = [](const PowerArray &a, void *&data, int64_t(&stride)[3]) {
      data = a.data, stride[0] = a.stride[0], stride[1] = a.stride[2], stride[2] = a.stride[1];
    };
    heads_first(x.dk, p.dk, p.dk_stride);
    heads_first(x.dv, p.dv, p.dv_stride);
    p.scale = kDeg * p.plain;
    if (!make_map(&dq, x.dq, s.b, s.t, s.h_q, s.d, kRows, false)) return power_fail(POWER_INVALID, kNoMap);
    return launch_together<sdpa::BackwardSmem<T, kD>>(call, "power attention: backward", sdpa::backward_kernel<T, kD, Narrow<kDeg>>, blocks,
                                                      sdpa::kBackwardThreads, q, k, v, dy, dq, p);
  } else {
    const Rounding<T, kD> rounding = {rows<T>(x.dq, s.d), p.sums, p.turns, int(s.t), int(s.h_q), kDeg * p.plain};
    return launch_together<WideSmem<T, kD>>(call, "power attention: backward", backward_wide_kernel<T, kD, kDeg>, blocks,
                                            (kBackwardGroups + 1) * kWarpgroup, q, k, v, dy, dk, dv, p, rounding);
  }
}

}  // namespace

int32_t launch_one_pass(const Call &call) {
  return std::max(call.shape.d, call.shape.e) <= 64 ? launch<64>(call) : launch<128>(call);
}

}  // namespace power::attention
