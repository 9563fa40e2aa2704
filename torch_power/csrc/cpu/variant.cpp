// The CPU kernels for one instruction set and one storage dtype. The build compiles this file once for each pair, with the
// instruction set's flags and
//   POWER_ISA           generic, avx2 or avx512: the namespace
//   POWER_VECTOR_BYTES  16, 32 or 64
//   POWER_STORAGE       float, double, BFloat16 or Float16
//   POWER_DTYPE         float32, float64, bfloat16 or float16: the name of the variant
#include "power_backward.h"
#include "power_step.h"
#include "sdpa_backward.h"
#include "variants.h"

namespace power_cpu {
namespace POWER_ISA {

extern const Variant POWER_DTYPE;
const Variant POWER_DTYPE = {
    {power_forward_workspace<POWER_STORAGE>, power_forward<POWER_STORAGE>, PowerBackward<POWER_STORAGE>::workspace,
     PowerBackward<POWER_STORAGE>::run},
    {SdpaForward<POWER_STORAGE>::workspace, SdpaForward<POWER_STORAGE>::run, SdpaBackward<POWER_STORAGE>::workspace,
     SdpaBackward<POWER_STORAGE>::run},
};

}  // namespace POWER_ISA
}  // namespace power_cpu
