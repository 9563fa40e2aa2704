/* query_kernel for f16 and head sizes padded to d = 128, e = 64. */
#include "../power/chunked_launch.cuh"

template struct power::QueryLaunch<__half, 128, 64>;
