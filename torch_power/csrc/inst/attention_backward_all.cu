/* Backward in one pass: bfloat16, heads of up to 128 by padding, p = 2. */
#include "../power/attention_launch.cuh"

namespace power::attention {

int32_t launch_backward_all(const Call &call) {
  using T = __nv_bfloat16;
  constexpr int kD = 128, kDeg = 2;
  const PowerAttentionShape &s = call.shape;
  const PowerAttentionArrays &x = call.arrays;
  const Workspace at(s, true);
  BackwardAllProblem p = {};
  static_cast<Problem &>(p) = make_problem(call, at, false);
  if (const int32_t status = prepare(call, at, p, false, true)) return status;
  auto *records = reinterpret_cast<QueryRecord *>(call.workspace + at.records);
  p.records = records;
  p.turns = reinterpret_cast<int *>(call.workspace + at.turns);
  p.sums = reinterpret_cast<float *>(call.workspace + at.sums);
  // As many heads at a time as stay in the L2 cache with their sums: at t = 16384 two, four take 6.5 ms instead of 5.3; at t = 4096 four
  // are 3 % faster. Of late heads enough for the blocks that are left when early ones run out: at t = 16384 two, four 5.35 ms against 5.16.
  const int tiles = int((s.t_kv + kAllKeys - 1) / kAllKeys), heads = int(s.b * s.h_kv), together = tiles < 64 ? 4 : 2;
  p.deal = BackwardDeal(tiles, int(s.h_kv), int(s.b), together, std::min(tiles < 64 ? 8 : 2, heads),
                        reinterpret_cast<int *>(call.workspace + at.counters));

  CUtensorMap q, dy, k, v, dk, dv;
  if (!(make_map(&q, x.q, s.b, s.t, s.h_q, s.d, kRows, false) && make_map(&dy, x.dy, s.b, s.t, s.h_q, s.e, kRows, false) &&
        make_map(&k, x.k, s.b, s.t_kv, s.h_kv, s.d, kRows, false) && make_map(&v, x.v, s.b, s.t_kv, s.h_kv, s.e, kRows, false) &&
        make_map(&dk, x.dk, s.b, s.t_kv, s.h_kv, s.d, kRows, false) && make_map(&dv, x.dv, s.b, s.t_kv, s.h_kv, s.e, kRows, false)))
    return power_fail(POWER_INVALID, "power attention: an array's address or strides cannot be described to the copy engine");

  const auto rows = [](const PowerArray &a, auto type, int64_t size) {
    using Element = std::remove_pointer_t<decltype(type)>;
    return Rows<Element>{static_cast<Element *>(a.data), {a.stride[0], a.stride[1], a.stride[2]}, int(size)};
  };
  const unsigned row_tiles = unsigned(s.b * s.h_q * ((s.t + kRows - 1) / kRows));
  const T *read = nullptr;
  T *write = nullptr;
  prepare_queries_kernel<T, kDeg><<<row_tiles, 256, 0, call.stream>>>(rows(x.q, read, s.d), rows(x.y, read, s.e), rows(x.dy, read, s.e), p, records);
  const int32_t status = launch_persistent<BackwardAllSmem<T, kD>>(call, "power attention: backward", backward_all_kernel<T, kD, kDeg>,
                                                                   heads * tiles, (kBackwardGroups + 1) * kWarpgroup, q, k, v, dy, dk, dv, p);
  if (status) return status;
  round_sums_kernel<T><<<row_tiles, 256, 0, call.stream>>>(rows(x.dq, write, s.d), p.sums, int(s.t), int(s.h_q),
                                                          kDeg * (p.normalize ? 1.f : p.scale_p));
  return after_launch("power attention: rounding of dq");
}

}  // namespace power::attention
