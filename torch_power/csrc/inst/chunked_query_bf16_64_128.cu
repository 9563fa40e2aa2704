/* query_kernel for bf16 and head sizes padded to d = 64, e = 128. */
#include "../power/chunked_launch.cuh"

template struct power::QueryLaunch<__nv_bfloat16, 64, 128>;
