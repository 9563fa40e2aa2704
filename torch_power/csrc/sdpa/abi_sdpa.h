/* Scaled dot-product attention on sm_90a. Conventions, shapes and arrays: csrc/abi.h.
 *
 * Served: bfloat16 and float16; d and e multiples of 8 up to 256; any t_q and t_kv; h_q any multiple of h_kv; causal of either kind,
 * windows, masks and biases (float32, bfloat16 or float16) of any strides, dropout. The last axis of q, k, v, out, dout, dq, dk and dv
 * must be contiguous, their other strides multiples of 8 elements and their addresses of 16 bytes, as the copy engine asks; residual
 * is contiguous along its last axis and has addresses and strides like these. lse is float32. out and dout are of the shape's dtype.
 * Deterministic: no float atomics, every sum in one order.
 */
#ifndef POWER_ABI_SDPA_H
#define POWER_ABI_SDPA_H

#include "../abi.h"

#ifdef __cplusplus
extern "C" {
#endif

POWER_API int64_t power_sdpa_forward_workspace_sm90(const PowerSdpaShape *, const void *stream);
POWER_API int32_t power_sdpa_forward_sm90(const PowerSdpaShape *, const PowerSdpaArrays *, void *workspace, int64_t workspace_bytes,
                                          void *stream);
POWER_API int64_t power_sdpa_backward_workspace_sm90(const PowerSdpaShape *, const void *stream);
POWER_API int32_t power_sdpa_backward_sm90(const PowerSdpaShape *, const PowerSdpaArrays *, void *workspace, int64_t workspace_bytes,
                                           void *stream);

#ifdef __cplusplus
}
#endif

#endif /* POWER_ABI_SDPA_H */
