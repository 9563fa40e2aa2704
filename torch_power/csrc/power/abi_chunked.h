/* Entry points of the chunked form of power attention, degree 2, on sm_90a. Conventions, shapes and arrays: ../abi.h.
 * dtype bfloat16 or float16; causal; d and e multiples of 8 up to 128. `chunk_size` is not read: any chunk length gives the same sums to
 * rounding, and the kernels take theirs from tiles.h. norm, dk, dv, states and their gradients are contiguous, dk and dv aligned to 16: before they are
 * written, the backward pass keeps state gradients in them. */
#ifndef POWER_ABI_CHUNKED_H
#define POWER_ABI_CHUNKED_H
#include "../abi.h"
#ifdef __cplusplus
extern "C" {
#endif
/* Bytes of `saved`: the states before each chunk, gate sums and ranges. */
POWER_API int64_t power_chunked_saved_sm90(const PowerAttentionShape *, const void *stream);
POWER_API int64_t power_chunked_forward_workspace_sm90(const PowerAttentionShape *, const void *stream);
POWER_API int32_t power_chunked_forward_sm90(const PowerAttentionShape *, const PowerAttentionArrays *, void *workspace, int64_t workspace_bytes,
                                             void *stream);
POWER_API int64_t power_chunked_backward_workspace_sm90(const PowerAttentionShape *, const void *stream);
POWER_API int32_t power_chunked_backward_sm90(const PowerAttentionShape *, const PowerAttentionArrays *, void *workspace, int64_t workspace_bytes,
                                              void *stream);
#ifdef __cplusplus
}
#endif
#endif
