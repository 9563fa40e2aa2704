#include "../sdpa/launch_forward.cuh"

template int32_t power::sdpa::launch_forward<__half, 64>(const power::sdpa::Call &);
