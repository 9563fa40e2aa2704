#include "../sdpa/launch_backward.cuh"

template int32_t power::sdpa::launch_backward<__half, 128>(const power::sdpa::Call &);
