/* gradient_q_kernel and gradient_kv_kernel for f16 and head sizes padded to d = 64, e = 128. */
#include "../power/chunked_launch.cuh"

template struct power::GradientLaunch<__half, 64, 128>;
