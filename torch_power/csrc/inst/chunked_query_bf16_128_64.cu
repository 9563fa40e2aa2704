/* query_kernel for bf16 and head sizes padded to d = 128, e = 64. */
#include "../power/chunked_launch.cuh"

template struct power::QueryLaunch<__nv_bfloat16, 128, 64>;
