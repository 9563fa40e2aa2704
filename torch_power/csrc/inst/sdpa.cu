/* Entry points of scaled dot-product attention on sm_90a: checks, then the instance for the dtype and the padded head size. */
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../sdpa/call.h"

namespace power::sdpa {
namespace {

int32_t check(const PowerSdpaShape &s) {
  if (s.dtype != POWER_BFLOAT16 && s.dtype != POWER_FLOAT16)
    return power_fail(POWER_UNSUPPORTED, "dtype: sdpa on sm_90a takes bfloat16 and float16");
  if (s.d < 8 || s.d > 256 || s.d % 8 || s.e < 8 || s.e > 256 || s.e % 8)
    return power_fail(POWER_UNSUPPORTED, "d=%lld, e=%lld: sdpa on sm_90a takes multiples of 8 up to 256", static_cast<long long>(s.d),
                      static_cast<long long>(s.e));
  if (s.h_kv < 1 || s.h_q % s.h_kv) return power_fail(POWER_INVALID, "h_q is not a multiple of h_kv");
  if (s.causal < POWER_FULL || s.causal > POWER_CAUSAL_BOTTOM_RIGHT) return power_fail(POWER_INVALID, "causal is not a PowerCausal");
  if (!(s.dropout_p >= 0 && s.dropout_p <= 1)) return power_fail(POWER_INVALID, "dropout_p is not in [0, 1]");
  const int64_t limit = int64_t(1) << 30;
  if (s.t_q >= limit || s.t_kv >= limit || s.b * s.h_q * (s.t_q / 64 + 1) >= limit || s.b * s.h_q * (s.t_kv / 64 + 1) >= limit)
    return power_fail(POWER_UNSUPPORTED, "b, h_q and t: more than 2^30 tiles");
  return POWER_OK;
}

/* The copy engine's terms: contiguous last axis, other strides multiples of 16 bytes (an axis of one element may have any, and an
 * array without elements is never looked at). */
bool tileable(const PowerArray &a, int64_t b, int64_t h, int64_t t) {
  const int64_t size[3] = {b, h, t};
  if (b * h * t == 0) return true;
  bool ok = a.data && reinterpret_cast<uintptr_t>(a.data) % 16 == 0 && a.stride[3] == 1;
  for (int i = 0; i < 3; ++i) ok = ok && (size[i] == 1 || a.stride[i] % 8 == 0);
  return ok;
}

int32_t check_masks(const PowerSdpaShape &s, const PowerSdpaArrays &x, bool backward) {
  const auto floating = [](const PowerArray &a) { return a.dtype == POWER_FLOAT32 || a.dtype == POWER_BFLOAT16 || a.dtype == POWER_FLOAT16; };
  if (x.bias.data && !floating(x.bias)) return power_fail(POWER_UNSUPPORTED, "bias: sdpa on sm_90a takes float32, bfloat16 and float16");
  if (x.mask.data && x.mask.dtype != POWER_BOOL) return power_fail(POWER_INVALID, "mask is not of bools");
  if (s.dropout_p > 0 && !x.seed.data) return power_fail(POWER_INVALID, "seed is absent");
  if (backward && x.dbias.data && (!x.bias.data || !floating(x.dbias)))
    return power_fail(POWER_INVALID, "dbias is wanted, but bias is absent, or dbias is not floating");
  return POWER_OK;
}

template <typename T>
int32_t launch(const Call &call, bool backward) {
  const int64_t size = call.shape.d > call.shape.e ? call.shape.d : call.shape.e;
  if (size <= 64) return backward ? launch_backward<T, 64>(call) : launch_forward<T, 64>(call);
  if (size <= 128) return backward ? launch_backward<T, 128>(call) : launch_forward<T, 128>(call);
  return backward ? launch_backward<T, 256>(call) : launch_forward<T, 256>(call);
}

int32_t run(const PowerSdpaShape *shape, const PowerSdpaArrays *arrays, void *workspace, int64_t bytes, void *stream, bool backward) {
  const PowerSdpaShape &s = *shape;
  const PowerSdpaArrays &x = *arrays;
  if (const int32_t status = check(s)) return status;
  if (const int32_t status = check_masks(s, x, backward)) return status;
  if (s.b == 0 || s.h_q == 0 || (s.t_q == 0 && (s.t_kv == 0 || !backward))) return POWER_OK;
  if (bytes < workspace_bytes(s, backward) || reinterpret_cast<uintptr_t>(workspace) % 256)
    return power_fail(POWER_WORKSPACE, "workspace: %lld bytes, aligned to 256, are needed",
                      static_cast<long long>(workspace_bytes(s, backward)));
  bool ok = tileable(x.q, s.b, s.h_q, s.t_q) && tileable(x.k, s.b, s.h_kv, s.t_kv) && tileable(x.v, s.b, s.h_kv, s.t_kv) &&
            tileable(x.out, s.b, s.h_q, s.t_q) && (!x.residual.data || tileable(x.residual, s.b, s.h_q, s.t_q));
  if (backward)
    ok = ok && tileable(x.dout, s.b, s.h_q, s.t_q) && tileable(x.dq, s.b, s.h_q, s.t_q) && tileable(x.dk, s.b, s.h_kv, s.t_kv) &&
         tileable(x.dv, s.b, s.h_kv, s.t_kv);
  if (!ok)
    return power_fail(POWER_INVALID, "arrays: the last axis must be contiguous, other strides multiples of 8 elements, addresses "
                                     "multiples of 16 bytes");
  // A thread that autograd has just started has no context yet, and cuTensorMapEncodeTiled makes none: cudaSetDevice does.
  int device = 0, multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaSetDevice(device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return power_fail(POWER_DEVICE, "no CUDA device");
  const Call call = {s, x, static_cast<char *>(workspace), static_cast<cudaStream_t>(stream), multiprocessors};
  return s.dtype == POWER_FLOAT16 ? launch<__half>(call, backward) : launch<__nv_bfloat16>(call, backward);
}

}  // namespace
}  // namespace power::sdpa

using namespace power::sdpa;

int64_t power_sdpa_forward_workspace_sm90(const PowerSdpaShape *shape, const void *) {
  return check(*shape) ? -1 : workspace_bytes(*shape, false);
}
int64_t power_sdpa_backward_workspace_sm90(const PowerSdpaShape *shape, const void *) {
  return check(*shape) ? -1 : workspace_bytes(*shape, true);
}
int32_t power_sdpa_forward_sm90(const PowerSdpaShape *shape, const PowerSdpaArrays *arrays, void *workspace, int64_t bytes, void *stream) {
  return run(shape, arrays, workspace, bytes, stream, false);
}
int32_t power_sdpa_backward_sm90(const PowerSdpaShape *shape, const PowerSdpaArrays *arrays, void *workspace, int64_t bytes, void *stream) {
  return run(shape, arrays, workspace, bytes, stream, true);
}
