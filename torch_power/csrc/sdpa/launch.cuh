/* Host side that all kernels of scaled dot-product attention share: tensor maps, decks of items, persistent launches. */
#pragma once

#include <algorithm>
#include <cmath>

#include "../launch.cuh"
#include "call.h"
#include "general.cuh"

namespace power::sdpa {

/* `make_tile_map` of an array [b, h, t, x]. */
inline bool make_map(CUtensorMap *map, const PowerArray &a, int64_t b, int64_t h, int64_t t, int64_t x, int rows, bool half) {
  return make_tile_map(map, a.data, {x, h, t, b}, {a.stride[1], a.stride[2], a.stride[0]}, rows, half);
}

/* The deck of a kernel whose blocks hold `rows` rows of a head. Heads are dealt in equal groups, as in power attention: small
 * enough that what streams past a group is read from memory once, large enough that its ragged end costs little; or, `spread`, one by one. */
inline Deck make_deck(const Call &call, int *dealt, int64_t t, int rows, int64_t heads, bool longest_last, bool spread = false) {
  const int64_t tiles = (t + rows - 1) / rows, all = call.shape.b * heads, busy = std::clamp<int64_t>(tiles / 4, 2, 6);
  const int64_t groups = spread ? all : (all - 1) / (busy * call.multiprocessors / std::max<int64_t>(tiles, 1) + 1) + 1;
  return Deck(int(tiles), int(heads), int(call.shape.b), int((all + groups - 1) / groups), longest_last, dealt);
}

inline Problem make_problem(const Call &call) {
  const PowerSdpaShape &s = call.shape;
  Problem p = {};
  p.t_q = int(s.t_q), p.t_kv = int(s.t_kv), p.h_q = int(s.h_q), p.h_kv = int(s.h_kv);
  p.e = int(s.e);
  const int64_t shift = s.causal == POWER_CAUSAL_BOTTOM_RIGHT ? s.t_kv - s.t_q : 0, none = kUnbounded;
  const auto end = [none](int64_t x) { return int(std::clamp<int64_t>(x, -none, none)); };
  p.left = end(s.window ? s.window_left - shift : none);
  p.right = end(std::min(s.causal ? shift : none, s.window ? s.window_right + shift : none));
  p.scale_log2 = std::max(float(std::abs(s.scale) * double(kLog2E)), 0x1p-126f);
  p.negative = s.scale < 0;
  p.residual = static_cast<uint8_t *>(call.arrays.residual.data);
  std::copy_n(call.arrays.residual.stride, 3, p.residual_stride);
  p.lse = static_cast<float *>(call.arrays.lse.data);
  std::copy_n(call.arrays.lse.stride, 3, p.lse_stride);
  return p;
}

inline Operand operand(const PowerArray &a) {
  Operand x = {a.data, {}, a.dtype};
  std::copy_n(a.stride, 4, x.stride);
  return x;
}

inline General make_general(const Call &call) {
  const PowerSdpaShape &s = call.shape;
  General g = {operand(call.arrays.bias), operand(call.arrays.mask)};
  const uint64_t threshold = uint64_t(s.dropout_p * 4294967296.0 + 0.5);
  if (threshold > 0) {
    g.seed = static_cast<const int64_t *>(call.arrays.seed.data), g.seed_stride = call.arrays.seed.stride[0];
    g.last_dropped = uint32_t(threshold - 1);
  }
  g.gain = s.dropout_p < 1 ? float(1 / (1 - s.dropout_p)) : 0.f;
  return g;
}

/* Whether the call needs the general kernels. */
inline bool is_general(const Call &call) {
  const PowerSdpaShape &s = call.shape;
  return call.arrays.bias.data || call.arrays.mask.data || s.dropout_p > 0 || s.window || s.causal == POWER_CAUSAL_BOTTOM_RIGHT;
}

}  // namespace power::sdpa
