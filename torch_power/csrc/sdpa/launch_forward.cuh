/* Host side of the forward pass for one (dtype, head size). */
#pragma once

#include "forward.cuh"
#include "launch.cuh"

namespace power::sdpa {

template <typename T, int kD, bool kGeneral, typename Tiles = ForwardTiles<kD, kGeneral>>
int32_t launch_forward_tiles(const Call &call) {
  const PowerSdpaShape &s = call.shape;
  const PowerSdpaArrays &x = call.arrays;
  int *dealt = reinterpret_cast<int *>(call.workspace);
  cudaMemsetAsync(dealt, 0, sizeof(int), call.stream);
  Problem p = make_problem(call);
  // Heads one by one spread the reads of new keys over a short launch: t = 512, d = 128 full 0.146 -> 0.136 ms, d = 64 causal 0.141 -> 0.138;
  // from t = 1024 on they break the order longest first (causal 0.156 -> 0.163).
  const bool spread = !kGeneral && s.t_q <= 512;
  p.deck = make_deck(call, dealt, s.t_q, Tiles::kGroups * kRows, s.h_q, s.causal, spread);
  CUtensorMap q_map, k_map, v_map, y_map;
  bool ok = make_map(&q_map, x.q, s.b, s.h_q, s.t_q, s.d, kRows, is_half<T>) &&
            make_map(&y_map, x.out, s.b, s.h_q, s.t_q, s.e, kRows, is_half<T>);
  k_map = v_map = q_map;  // of no keys, nothing is read
  if (s.t_kv > 0)
    ok = ok && make_map(&k_map, x.k, s.b, s.h_kv, s.t_kv, s.d, Tiles::kKeys, is_half<T>) &&
         make_map(&v_map, x.v, s.b, s.h_kv, s.t_kv, s.e, Tiles::kKeys, is_half<T>);
  if (!ok) return power_fail(POWER_INVALID, "sdpa: an array's address or strides cannot be described to the copy engine");
  return launch_persistent<ForwardSmem<T, kD, Tiles>>(call, "sdpa: forward", forward_kernel<T, kD, Tiles, kGeneral>, p.deck.items,
                                                      (Tiles::kGroups + 1) * kWarpgroup, q_map, k_map, v_map, y_map, p, make_general(call));
}

template <typename T, int kD>
int32_t launch_forward(const Call &call) {
  if constexpr (kD <= 128)
    if (!is_general(call)) return launch_forward_tiles<T, kD, false>(call);
  return launch_forward_tiles<T, kD, true>(call);
}

}  // namespace power::sdpa
