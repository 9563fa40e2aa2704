#include "../power/attention_launch.cuh"

template int32_t power::attention::launch_backward<__nv_bfloat16, 128>(const power::attention::Call &);
