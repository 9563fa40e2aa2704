/* gradient_q_kernel and gradient_kv_kernel for bf16 and head sizes padded to d = 128, e = 64. */
#include "../power/chunked_launch.cuh"

template struct power::GradientLaunch<__nv_bfloat16, 128, 64>;
