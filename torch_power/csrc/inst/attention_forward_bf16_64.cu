#include "../power/attention_launch.cuh"

int64_t power::attention::workspace_bytes(const PowerAttentionShape &shape, bool backward) {
  return power::attention::Workspace(shape, backward).bytes;
}

template int32_t power::attention::launch_forward<__nv_bfloat16, 64>(const power::attention::Call &);
