// The CPU kernels for one instruction set and one arithmetic. The build compiles this file once for each pair, with the
// instruction set's flags and
//   POWER_ISA           generic, avx2 or avx512: the namespace
//   POWER_VECTOR_BYTES  16, 32 or 64
//   POWER_REAL          float (which also serves bfloat16 and float16, converting at the edges) or double
//   POWER_VARIANT       in_float32 or in_float64: the name of the table
#include "power_backward.h"
#include "power_step.h"
#include "sdpa_backward.h"
#include "variants.h"

namespace power_cpu {
namespace POWER_ISA {

extern const Variant POWER_VARIANT;
const Variant POWER_VARIANT = {
    {power_forward_workspace<POWER_REAL>, power_forward<POWER_REAL>, power_backward_workspace<POWER_REAL>, power_backward<POWER_REAL>},
    {SdpaForward<POWER_REAL>::workspace, SdpaForward<POWER_REAL>::run, SdpaBackward<POWER_REAL>::workspace,
     SdpaBackward<POWER_REAL>::run},
};

}  // namespace POWER_ISA
}  // namespace power_cpu
