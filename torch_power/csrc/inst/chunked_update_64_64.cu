/* update_state_kernel for head sizes padded to d = 64, e = 64. */
#include "../power/chunked_launch.cuh"

template struct power::UpdateLaunch<64, 64>;
