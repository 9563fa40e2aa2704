/* One checked call of scaled dot-product attention, and the launchers that serve it: the line between the entry points, which
 * know no kernel, and the instances, one file each for a dtype, a padded head size and a direction. */
#pragma once

#include <cuda_runtime.h>

#include "abi_sdpa.h"

namespace power::sdpa {

struct Call {
  const PowerSdpaShape &shape;
  const PowerSdpaArrays &arrays;
  char *workspace;
  cudaStream_t stream;
  int multiprocessors;
};

/* Scratch of one call, carved from the caller's workspace: byte offsets, each a multiple of 256. */
constexpr int kCounters = 3;  // of items dealt, one a kernel
constexpr int64_t kRecordBytes = 64 * 8;  // lse and delta of 64 queries
struct Workspace {
  int64_t counters = 0, records = 256, sums, turns, bytes;  // sums and turns of the one-pass backward kernel
  Workspace(const PowerSdpaShape &s, bool backward) {
    const int64_t size = s.d > s.e ? s.d : s.e, tiles = backward ? s.b * s.h_q * ((s.t_q + 63) / 64) : 0;
    const bool one_pass = size <= 128 && !s.window && s.causal != POWER_CAUSAL_BOTTOM_RIGHT && s.dropout_p == 0;
    sums = round_up(records + tiles * kRecordBytes);
    turns = sums + (one_pass ? tiles * 64 * (size > 64 ? 128 : 64) * int64_t(sizeof(float)) : 0);
    bytes = round_up(turns + (one_pass ? tiles * int64_t(sizeof(int32_t)) : 0));
  }
  static int64_t round_up(int64_t x) { return (x + 255) / 256 * 256; }
};
inline int64_t workspace_bytes(const PowerSdpaShape &shape, bool backward) { return Workspace(shape, backward).bytes; }

/* T is __nv_bfloat16 or __half, kD the size of 64, 128 or 256 that d and e are filled up to. */
template <typename T, int kD>
int32_t launch_forward(const Call &call);
template <typename T, int kD>
int32_t launch_backward(const Call &call);

}  // namespace power::sdpa
