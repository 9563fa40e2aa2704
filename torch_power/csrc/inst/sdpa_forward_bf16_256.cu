#include "../sdpa/launch_forward.cuh"

template int32_t power::sdpa::launch_forward<__nv_bfloat16, 256>(const power::sdpa::Call &);
