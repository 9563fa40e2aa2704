/* Entry points of the attention form on sm_90a: checks, then the instance for the dtype and the padded head size. */
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "../power/attention_call.h"

namespace power::attention {

/* Where one pass is faster than the two kernels. b·t = 16384, both passes: d = 128, t = 2048 1.43 ms against 1.04, 4096 level, 8192 3.62 against
 * 3.87; d = 64, 4096 level, 8192 3.86 against 4.22, 16384 7.25 against 8.39. */
bool one_pass(const PowerAttentionShape &s) {
  const int64_t size = std::max(s.d, s.e), least = size <= 64 ? 8192 : 4096;
  return s.dtype == POWER_BFLOAT16 && s.deg == 2 && s.causal && !s.gates && size <= 128 && s.t >= least;
}

namespace {

int32_t check(const PowerAttentionShape &s) {
  if (s.dtype != POWER_BFLOAT16 && s.dtype != POWER_FLOAT16)
    return power_fail(POWER_UNSUPPORTED, "dtype: the sm_90a attention form takes bfloat16 and float16");
  if (s.deg < 1 || s.deg > 4) return power_fail(POWER_UNSUPPORTED, "deg=%d: the sm_90a attention form takes 1 to 4", s.deg);
  if (s.normalize && s.deg % 2) return power_fail(POWER_INVALID, "deg=%d: normalize needs an even degree", s.deg);
  if (s.d < 8 || s.d > 256 || s.d % 8 || s.e < 8 || s.e > 256 || s.e % 8)
    return power_fail(POWER_UNSUPPORTED, "d=%lld, e=%lld: the sm_90a attention form takes multiples of 8 up to 256",
                      static_cast<long long>(s.d), static_cast<long long>(s.e));
  if (s.deg == 4 && s.dtype == POWER_FLOAT16 && (s.d > 128 || s.e > 128)) /* s^4 leaves float16's range for rows with few keys */
    return power_fail(POWER_UNSUPPORTED, "deg=4 in float16: the sm_90a attention form takes head sizes up to 128");
  if (s.h_kv < 1 || s.h_q % s.h_kv) return power_fail(POWER_INVALID, "h_q is not a multiple of h_kv");
  if (s.causal && s.t != s.t_kv) return power_fail(POWER_INVALID, "t and t_kv differ, and causal is set");
  const int64_t limit = int64_t(1) << 30;
  if (s.b * s.h_q * (s.t / 64 + 1) >= limit || s.b * s.h_q * (s.t_kv / 64 + 1) >= limit || s.b * s.h_q >= 65536 * int64_t(1024))
    return power_fail(POWER_UNSUPPORTED, "b, h_q and t: more than 2^30 tiles");
  return POWER_OK;
}

/* The copy engine's terms: contiguous last axis, other strides multiples of 16 bytes (an axis of one element may have any, and an
 * array without elements is never looked at). */
bool tileable(const PowerArray &a, int64_t b, int64_t t, int64_t h, int64_t x) {
  const int64_t size[3] = {b, t, h};
  if (b * t * h == 0) return true;
  bool ok = reinterpret_cast<uintptr_t>(a.data) % 16 == 0 && (x == 1 || a.stride[3] == 1);
  for (int i = 0; i < 3; ++i) ok = ok && (size[i] == 1 || a.stride[i] % 8 == 0);
  return ok;
}

int32_t run(const PowerAttentionShape *shape, const PowerAttentionArrays *arrays, void *workspace, int64_t bytes, void *stream,
            bool backward) {
  const PowerAttentionShape &s = *shape;
  const PowerAttentionArrays &x = *arrays;
  if (const int32_t status = check(s)) return status;
  if (s.b == 0 || s.h_q == 0 || (s.t == 0 && (s.t_kv == 0 || !backward))) return POWER_OK;
  if (x.s0.data || x.z0.data || x.s.data || x.z.data || x.ds.data || x.dz.data || x.ds0.data || x.dz0.data)
    return power_fail(POWER_UNSUPPORTED, "states: the attention form has none; use the chunked form");
  if (s.gates != (x.log_g.data != nullptr)) return power_fail(POWER_INVALID, "gates: the shape says %d, log_g otherwise", s.gates);
  if (x.log_g.data && !s.causal) return power_fail(POWER_INVALID, "log_g: gates need causal");
  if (bytes < workspace_bytes(s, backward) || reinterpret_cast<uintptr_t>(workspace) % 256)
    return power_fail(POWER_WORKSPACE, "workspace: %lld bytes, aligned to 256, are needed",
                      static_cast<long long>(workspace_bytes(s, backward)));
  bool ok = tileable(x.q, s.b, s.t, s.h_q, s.d) && tileable(x.k, s.b, s.t_kv, s.h_kv, s.d) && tileable(x.v, s.b, s.t_kv, s.h_kv, s.e) &&
            tileable(x.y, s.b, s.t, s.h_q, s.e);
  if (backward)
    ok = ok && tileable(x.dy, s.b, s.t, s.h_q, s.e) && tileable(x.dq, s.b, s.t, s.h_q, s.d) &&
         tileable(x.dk, s.b, s.t_kv, s.h_kv, s.d) && tileable(x.dv, s.b, s.t_kv, s.h_kv, s.e);
  if (!ok)
    return power_fail(POWER_INVALID, "arrays: the last axis must be contiguous, other strides multiples of 8 elements, addresses "
                                     "multiples of 16 bytes");

  // A thread that autograd has just started has no context yet, and cuTensorMapEncodeTiled makes none: cudaSetDevice does.
  int device = 0, multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaSetDevice(device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return power_fail(POWER_DEVICE, "no CUDA device");
  const Call call = {s, x, static_cast<char *>(workspace), static_cast<cudaStream_t>(stream), multiprocessors};
  const int64_t size = std::max(s.d, s.e);
  const auto launch = [&](auto padded) {
    constexpr int kD = decltype(padded)::value;
    if (s.dtype == POWER_FLOAT16) return backward ? launch_backward<__half, kD>(call) : launch_forward<__half, kD>(call);
    return backward ? launch_backward<__nv_bfloat16, kD>(call) : launch_forward<__nv_bfloat16, kD>(call);
  };
  if (size <= 64) return launch(std::integral_constant<int, 64>());
  if (size <= 128) return launch(std::integral_constant<int, 128>());
  return launch(std::integral_constant<int, 256>());
}

}  // namespace
}  // namespace power::attention

using namespace power::attention;

int64_t power_attention_quadratic_forward_workspace_sm90(const PowerAttentionShape *shape, const void *) {
  return check(*shape) ? -1 : workspace_bytes(*shape, false);
}
int64_t power_attention_quadratic_backward_workspace_sm90(const PowerAttentionShape *shape, const void *) {
  return check(*shape) ? -1 : workspace_bytes(*shape, true);
}
int32_t power_attention_quadratic_forward_sm90(const PowerAttentionShape *shape, const PowerAttentionArrays *arrays, void *workspace,
                                               int64_t bytes, void *stream) {
  return run(shape, arrays, workspace, bytes, stream, false);
}
int32_t power_attention_quadratic_backward_sm90(const PowerAttentionShape *shape, const PowerAttentionArrays *arrays, void *workspace,
                                                int64_t bytes, void *stream) {
  return run(shape, arrays, workspace, bytes, stream, true);
}
