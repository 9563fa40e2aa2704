/* One checked call of the attention form, and the launchers that serve it: the line between the entry points, which know no
 * kernel, and the instances, one file each for a dtype, a padded head size and a direction. */
#pragma once

#include <cuda_runtime.h>

#include "abi_attention.h"

namespace power::attention {

struct Call {
  const PowerAttentionShape &shape;
  const PowerAttentionArrays &arrays;
  char *workspace;
  cudaStream_t stream;
  int multiprocessors;
  bool gates() const { return arrays.log_g.data != nullptr; }
};

int64_t workspace_bytes(const PowerAttentionShape &shape, bool backward);

/* T is __nv_bfloat16 or __half, kD the size of 64, 128 or 256 that d and e are filled up to. */
template <typename T, int kD>
int32_t launch_forward(const Call &call);
template <typename T, int kD>
int32_t launch_backward(const Call &call);

/* Backward in one pass, for calls that `one_pass` names. */
bool one_pass(const PowerAttentionShape &shape);
int32_t launch_one_pass(const Call &call);

}  // namespace power::attention
