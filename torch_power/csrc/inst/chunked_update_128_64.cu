/* update_state_kernel for head sizes padded to d = 128, e = 64. */
#include "../power/chunked_launch.cuh"

template struct power::UpdateLaunch<128, 64>;
