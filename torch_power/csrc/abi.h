/* The C interface of the kernels: what `libpower_kernels.so` exports and everybody binds (PyTorch here, XLA through jax.ffi).
 *
 * Conventions, the same for every entry point:
 *   - No framework type crosses this header. Nothing behind it allocates, keeps a pointer, or changes global state.
 *   - Every operation OP on a device DEV (`cpu`, `sm90`) is a pair
 *         int64_t power_OP_workspace_DEV(const Shape *, const void *stream);
 *         int32_t power_OP_DEV(const Shape *, const Arrays *, void *workspace, int64_t workspace_bytes, void *stream);
 *     The first says how many bytes of scratch the second needs for that shape (0 is possible), or -1 when it cannot serve
 *     the shape; `power_last_error()` then says why. The second returns a PowerStatus.
 *   - A workspace is aligned to 256 bytes, is uninitialised on entry and may be freed when the call (on a GPU: the work it put
 *     on the stream) has ended. GPU workspaces are device memory.
 *   - `stream` is a cudaStream_t on a GPU, where the call returns before the work is done, and a `const PowerExecutor *` on
 *     the CPU (null: one thread), where it returns after.
 *   - Arrays are PowerArray: a pointer, a dtype, and strides counted in ELEMENTS along the axes named where the array is
 *     listed. An absent array has data == NULL. Sizes are in the shape. Inputs may have any strides, 0 (a broadcast)
 *     included; outputs must not overlap themselves or anything else.
 *   - Empty axes are legal and make the call a no-op on the arrays that are empty.
 *   - Results do not depend on what the workspace held, and two equal calls give equal bits.
 */
#ifndef POWER_ABI_H
#define POWER_ABI_H

#include <stdint.h>

#if defined(__GNUC__)
#define POWER_API __attribute__((visibility("default")))
#else
#define POWER_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define POWER_ABI_VERSION 1

typedef enum PowerStatus {
  POWER_OK = 0,
  POWER_UNSUPPORTED = 1, /* this implementation lacks something the shape asks for */
  POWER_INVALID = 2,     /* sizes, dtypes or pointers that contradict each other */
  POWER_WORKSPACE = 3,   /* the workspace is too small or badly aligned */
  POWER_DEVICE = 4       /* a launch failed */
} PowerStatus;

typedef enum PowerDtype {
  POWER_FLOAT32 = 0,
  POWER_FLOAT64 = 1,
  POWER_BFLOAT16 = 2,
  POWER_FLOAT16 = 3,
  POWER_BOOL = 4
} PowerDtype;

/* POWER_AUTO (CPU): the attention or the chunked form, whichever the gates of this call make cheaper. */
typedef enum PowerForm { POWER_ATTENTION = 0, POWER_CHUNKED = 1, POWER_RECURRENT = 2, POWER_AUTO = 3 } PowerForm;

typedef struct PowerArray {
  void *data;
  int64_t stride[4];
  int32_t dtype; /* PowerDtype */
} PowerArray;

/* How CPU entry points run in parallel: on the caller's threads, so that a framework's thread count and pool are obeyed.
 * `run(pool, n, body, context)` calls body(context, i) for i = 0 … n−1, on at most `threads` threads, and returns when all
 * have ended. `threads` ≥ 1 bounds how many bodies are live at once and sizes the workspace. */
typedef struct PowerExecutor {
  int32_t threads;
  void *pool;
  void (*run)(void *pool, int64_t n, void (*body)(void *context, int64_t i), void *context);
} PowerExecutor;

/* ---- Power attention (the contract: README, "What it computes") ------------------------------------------------------ */

typedef struct PowerAttentionShape {
  int64_t b, t, t_kv, h_q, h_kv, d, e;
  int64_t chunk_size; /* chunk length, ≥ 1; read by the chunked form */
  double scale;
  int32_t deg;
  int32_t form;      /* PowerForm */
  int32_t dtype;     /* of q, k, v, y and their gradients */
  int32_t causal;    /* 0 or 1 */
  int32_t normalize; /* 0 or 1 */
  int32_t saved;     /* 0 or 1: the arrays come with `saved` */
  int32_t gates;     /* 0 or 1: the arrays come with `log_g`; read where a workspace depends on it */
} PowerAttentionShape;

/* Axes: q, y, dq, dy [b, t, h_q, d or e];  k, v, dk, dv [b, t_kv, h_kv, d or e];  log_g, dlog_g [b, t, h_kv];
 * s, s0, ds, ds0 [b, h_kv, D, e];  z, z0, dz, dz0 [b, h_kv, D];  norm [b, t, h_q]. D = state rows for (d, deg).
 * log_g, states, norm and their gradients are float32, or float64 when `dtype` is.
 * y and dy are float32 (float64) as well where an implementation leaves the rounding to its caller, as the CPU's does.
 * norm: the row normaliser of the row q' the kernel worked with (q times a power of two with normalize = 1); opaque to the
 * caller, handed from forward to backward of the same implementation.
 * saved: where an operation has `power_OP_saved_DEV`, that many bytes, aligned to 128, of what its forward pass found out and its backward pass
 * would otherwise work out again; opaque. Its strides and dtype are not read. Forward and backward get the same shape; the same bits come out
 * with and without it. */
typedef struct PowerAttentionArrays {
  PowerArray q, k, v, log_g, s0, z0;       /* inputs; log_g, s0, z0 may be absent */
  PowerArray y, norm, s, z;                /* written by forward (s, z unless absent); y and norm are read by backward */
  PowerArray dy, ds, dz;                   /* read by backward; ds, dz may be absent, meaning zero */
  PowerArray dq, dk, dv, dlog_g, ds0, dz0; /* written by backward; dlog_g, ds0, dz0 unless absent */
  PowerArray saved;                        /* written by forward, read by backward; may be absent in either */
} PowerAttentionArrays;

POWER_API int64_t power_attention_forward_workspace_cpu(const PowerAttentionShape *, const void *stream);
POWER_API int32_t power_attention_forward_cpu(const PowerAttentionShape *, const PowerAttentionArrays *, void *workspace,
                                              int64_t workspace_bytes, void *stream);
POWER_API int64_t power_attention_backward_workspace_cpu(const PowerAttentionShape *, const void *stream);
POWER_API int32_t power_attention_backward_cpu(const PowerAttentionShape *, const PowerAttentionArrays *, void *workspace,
                                               int64_t workspace_bytes, void *stream);

/* ---- Scaled dot-product attention --------------------------------------------------------------------------------- */

typedef enum PowerCausal {
  POWER_FULL = 0,
  POWER_CAUSAL = 1,             /* upper-left: key j is seen by query i when j ≤ i */
  POWER_CAUSAL_BOTTOM_RIGHT = 2 /* when j ≤ i + t_kv − t_q; the window is shifted by as much */
} PowerCausal;

typedef struct PowerSdpaShape {
  int64_t b, h_q, h_kv, t_q, t_kv, d, e;
  double scale;
  double dropout_p; /* in [0, 1]; 0: the seeds are not read */
  int32_t dtype;    /* of q, k, v, out and their gradients */
  int32_t causal;   /* PowerCausal */
  int32_t window;   /* 1: key j is seen by query i only when i − window_left ≤ j ≤ i + window_right; else the two are not read */
  int32_t reserved; /* 0 */
  int64_t window_left, window_right;
} PowerSdpaShape;

/* Axes: q, out, dq, dout [b, h_q, t_q, d or e];  k, v, dk, dv [b, h_kv, t_kv, d or e];  bias, mask, dbias [b, h_q, t_q, t_kv]
 * (stride 0 where one is broadcast);  lse [b, h_q, t_q];  seed [b], int64 (dtype is not read).
 * bias, dbias and lse are float32, or float64 when `dtype` is; so may out and dout be, to leave the rounding to the caller. mask is a bool one, true = keep; bias is added to the scores.
 * lse: log Σ_j exp(score_ij), −inf for a row that sees no key (its output is 0).
 * residual: [b, h_q, t_q, e], a byte a number (dtype is not read): the eight binary digits of out that its dtype has no room for, for
 * dout·out in the backward pass. Where softmax is concentrated, dq and dk need them. Written by forward and read by backward if present; of
 * sm90 only.
 * dbias has the bias's own strides: axes of stride 0 are summed over.
 * Dropout: Philox 4×32-7, counter (key / 4, query, head, 0), key the two halves of the batch element's seed; a weight is kept,
 * times 1/(1 − p), when word `key % 4` is at least round(p·2³²). */
typedef struct PowerSdpaArrays {
  PowerArray q, k, v, bias, mask, seed; /* bias, mask, seed may be absent */
  PowerArray out, lse;                  /* written by forward, read by backward */
  PowerArray dout;
  PowerArray dq, dk, dv, dbias; /* written by backward; dbias unless absent */
  PowerArray residual;          /* may be absent */
} PowerSdpaArrays;

POWER_API int64_t power_sdpa_forward_workspace_cpu(const PowerSdpaShape *, const void *stream);
POWER_API int32_t power_sdpa_forward_cpu(const PowerSdpaShape *, const PowerSdpaArrays *, void *workspace,
                                         int64_t workspace_bytes, void *stream);
POWER_API int64_t power_sdpa_backward_workspace_cpu(const PowerSdpaShape *, const void *stream);
POWER_API int32_t power_sdpa_backward_cpu(const PowerSdpaShape *, const PowerSdpaArrays *, void *workspace,
                                          int64_t workspace_bytes, void *stream);

/* ---- The library itself ------------------------------------------------------------------------------------------- */

/* POWER_ABI_VERSION of the library that was loaded. */
POWER_API int32_t power_abi_version(void);
/* What went wrong in the last call on this thread that returned an error; never null. */
POWER_API const char *power_last_error(void);
/* Sets it; for the entry points of this library. Returns `status`, so that a check reads `return power_fail(...)`. */
POWER_API int32_t power_fail(int32_t status, const char *format, ...);
/* The instruction set the CPU kernels use here: "avx512", "avx2" or "generic". The environment variable POWER_CPU_ISA
 * (one of these names, read once) asks for a lesser one. */
POWER_API const char *power_cpu_isa(void);
/* 1 when CUDA kernels for sm_90a were linked in, else 0. */
POWER_API int32_t power_has_sm90(void);

#ifdef __cplusplus
}
#endif

#endif /* POWER_ABI_H */
