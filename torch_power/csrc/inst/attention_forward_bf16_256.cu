#include "../power/attention_launch.cuh"

template int32_t power::attention::launch_forward<__nv_bfloat16, 256>(const power::attention::Call &);
