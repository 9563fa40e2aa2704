// What each instruction-set variant of the CPU kernels offers to dispatch.cpp, for one arithmetic.
#pragma once

#include "../abi.h"

namespace power_cpu {

struct Variant {
  struct Power {
    int64_t (*forward_workspace)(const PowerAttentionShape &, int threads);
    void (*forward)(const PowerAttentionShape &, const PowerAttentionArrays &, void *workspace, const PowerExecutor *);
    int64_t (*backward_workspace)(const PowerAttentionShape &, int threads);
    void (*backward)(const PowerAttentionShape &, const PowerAttentionArrays &, void *workspace, const PowerExecutor *);
  } power;
  struct Sdpa {
    int64_t (*forward_workspace)(const PowerSdpaShape &, int threads);
    void (*forward)(const PowerSdpaShape &, const PowerSdpaArrays &, void *workspace, const PowerExecutor *);
    int64_t (*backward_workspace)(const PowerSdpaShape &, int threads);
    void (*backward)(const PowerSdpaShape &, const PowerSdpaArrays &, void *workspace, const PowerExecutor *);
  } sdpa;
};

#define POWER_DECLARE_VARIANTS(ISA) \
  namespace ISA {                   \
  extern const Variant in_float32;  \
  extern const Variant in_float64;  \
  }
POWER_DECLARE_VARIANTS(generic)
#if defined(__x86_64__)
POWER_DECLARE_VARIANTS(avx2)
POWER_DECLARE_VARIANTS(avx512)
#endif
#undef POWER_DECLARE_VARIANTS

}  // namespace power_cpu
