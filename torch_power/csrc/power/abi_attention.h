/* The attention form of power attention on sm_90a. Conventions: csrc/abi.h.
 *
 * Served: bfloat16 and float16; deg 1 to 4; d and e multiples of 8 up to 256; any t, and with causal = 0 any t_kv; gates with
 * causal = 1; h_q any multiple of h_kv. `form` and `chunk_size` are not read; states (s0, z0, s, z and their gradients) must be
 * absent. The last axis of q, k, v, y, dy, dq, dk and dv must be contiguous, their other strides multiples of 8 elements and
 * their addresses of 16 bytes, as the copy engine asks. norm [b, t, h_q] is float32.
 * deg even for normalize = 1. Deterministic: no float atomics, every sum in one order.
 */
#ifndef POWER_ABI_ATTENTION_H
#define POWER_ABI_ATTENTION_H

#include "../abi.h"

#ifdef __cplusplus
extern "C" {
#endif

POWER_API int64_t power_attention_quadratic_forward_workspace_sm90(const PowerAttentionShape *, const void *stream);
POWER_API int32_t power_attention_quadratic_forward_sm90(const PowerAttentionShape *, const PowerAttentionArrays *, void *workspace,
                                                         int64_t workspace_bytes, void *stream);
POWER_API int64_t power_attention_quadratic_backward_workspace_sm90(const PowerAttentionShape *, const void *stream);
POWER_API int32_t power_attention_quadratic_backward_sm90(const PowerAttentionShape *, const PowerAttentionArrays *, void *workspace,
                                                          int64_t workspace_bytes, void *stream);

#ifdef __cplusplus
}
#endif

#endif /* POWER_ABI_ATTENTION_H */
