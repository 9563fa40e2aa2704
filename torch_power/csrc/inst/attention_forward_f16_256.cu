#include "../power/attention_launch.cuh"

template int32_t power::attention::launch_forward<__half, 256>(const power::attention::Call &);
