/* Entry points of the chunked forward pass: measure, stage k and v, update the states, query. */
#include "../power/abi_chunked.h"
#include "../power/chunked_host.cuh"

using namespace power;

namespace {

struct ForwardWorkspace {
  unsigned *maxima;
  Gates gates;
  __half *k, *k_transposed, *v, *states, *moments;
  int *state_units, *moment_units;
  int64_t bytes;
  ForwardWorkspace(void *base, const Sizes &z) {
    Arena arena(base);
    const int64_t heads = int64_t(z.b) * z.h_kv;
    maxima = arena.take<unsigned>(MAXIMA * heads);
    gates = take_gates(arena, z);
    k = arena.take<__half>(staged_count(z, heads, z.padded_d)), k_transposed = arena.take<__half>(staged_count(z, heads, z.padded_d));
    v = arena.take<__half>(staged_count(z, heads, z.padded_e));
    states = arena.take<__half>(states_count(z)), moments = arena.take<__half>(moments_count(z));
    state_units = arena.take<int>(z.chunks * heads), moment_units = arena.take<int>(z.chunks * heads);
    bytes = arena.used();
  }
};

template <typename In>
cudaError_t run(const PowerAttentionShape &shape, const PowerAttentionArrays &a, const Sizes &z, const ForwardWorkspace &w, cudaStream_t stream) {
  const int64_t heads = int64_t(z.b) * z.h_kv;
  const Maxima maxima = take_maxima(w.maxima, heads);
  if (cudaError_t error = cudaMemsetAsync(w.maxima, 0, MAXIMA * heads * sizeof(unsigned), stream)) return error;
  const float *s0 = static_cast<const float *>(a.s0.data), *z0 = static_cast<const float *>(a.z0.data);
  const MeasureParams measure{z, make_view(a.k), make_view(a.v), make_view(a.log_g), s0, z0, w.gates, maxima};
  measure_kernel<In><<<dim3(z.chunks, unsigned(heads)), MEASURE_THREADS, 0, stream>>>(measure);
  if (cudaError_t error = cudaGetLastError()) return error;
  const StageParams stage_k{z, make_view(a.k), z.h_kv, z.d, maxima.k, K_RANGE, w.k, w.k_transposed, w.gates.chunk_decay, nullptr, nullptr, nullptr, nullptr};
  const StageParams stage_v{z, make_view(a.v), z.h_kv, z.e, maxima.v, V_RANGE, w.v, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  if (cudaError_t error = stage<In>(stage_k, z.padded_d, Scaling::HEAD, stream)) return error;
  if (cudaError_t error = stage<In>(stage_v, z.padded_e, Scaling::HEAD, stream)) return error;
  float *s = static_cast<float *>(a.s.data), *zs = static_cast<float *>(a.z.data);
  if (z.chunks > 1 || s0 != nullptr || s != nullptr) {
    const UpdateParams update{z, w.k, w.k_transposed, w.v, nullptr, 1, 0, w.gates.chunk_sum, w.gates.chunk_weight, 1, w.states, w.moments,
                              w.state_units, w.moment_units, s0, z0, s, zs, maxima, 2 * K_RANGE + V_RANGE + 1, 2 * K_RANGE, 0};
    if (cudaError_t error = dispatch_sizes(z, [&](auto d, auto e) { return UpdateLaunch<d.value, e.value>::update(update, stream); })) return error;
  }
  const QueryParams query{z, make_view(a.q), make_view(a.y), static_cast<float *>(a.norm.data), w.k, w.v, w.states, w.moments, w.state_units,
                          w.moment_units, w.gates, maxima, s0 != nullptr, shape.normalize, float(shape.scale * shape.scale)};
  return dispatch_sizes(z, [&](auto d, auto e) { return QueryLaunch<In, d.value, e.value>::query(query, stream); });
}

}  // namespace

int64_t power_chunked_forward_workspace_sm90(const PowerAttentionShape *shape, const void *) {
  if (const char *why = unsupported(*shape)) return power_fail(POWER_UNSUPPORTED, "%s", why), -1;
  return ForwardWorkspace(nullptr, make_sizes(*shape)).bytes;
}

int32_t power_chunked_forward_sm90(const PowerAttentionShape *shape, const PowerAttentionArrays *arrays, void *workspace, int64_t workspace_bytes,
                                   void *stream) {
  if (const char *why = unsupported(*shape)) return power_fail(POWER_UNSUPPORTED, "%s", why);
  const Sizes z = make_sizes(*shape);
  if (z.b == 0 || z.t == 0 || z.h_q == 0) return power_fail(POWER_INVALID, "b, t, h_q: an empty call has nothing to launch");
  const ForwardWorkspace w(workspace, z);
  if (workspace_bytes < w.bytes || (reinterpret_cast<uintptr_t>(workspace) & 255))
    return power_fail(POWER_WORKSPACE, "workspace: %lld bytes, %lld needed, aligned to 256", (long long)workspace_bytes, (long long)w.bytes);
  const cudaError_t error = dispatch_dtype(shape->dtype, [&](auto in) { return run<decltype(in)>(*shape, *arrays, z, w, static_cast<cudaStream_t>(stream)); });
  return error == cudaSuccess ? POWER_OK : power_fail(POWER_DEVICE, "chunked forward: %s", cudaGetErrorString(error));
}
