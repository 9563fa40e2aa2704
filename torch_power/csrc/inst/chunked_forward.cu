/* Entry points of the chunked forward pass: measure, stage k and v, update the states, query. */
#include "../power/abi_chunked.h"
#include "../power/chunked_host.cuh"

using namespace power;

namespace {

struct ForwardWorkspace {
  Arena arena, saved_arena;
  Saved saved;
  __half *k, *v, *moment_weights;
  ForwardWorkspace(void *base, void *saved_base, bool has_saved, const Sizes &z)
      : arena(base), saved_arena(saved_base), saved(has_saved ? saved_arena : arena, z) {
    const int64_t heads = int64_t(z.b) * z.h_kv;
    k = arena.take<__half>(staged_count(z, heads, z.padded_d)), v = arena.take<__half>(staged_count(z, heads, z.padded_e));
    moment_weights = arena.take<__half>(heads * z.tokens);
  }
};

template <typename In>
cudaError_t run(const PowerAttentionShape &shape, const PowerAttentionArrays &a, const Sizes &z, const ForwardWorkspace &w, cudaStream_t stream) {
  const int64_t heads = int64_t(z.b) * z.h_kv;
  const Saved &x = w.saved;
  const Maxima maxima = x.forward_maxima(heads);
  const float *s0 = static_cast<const float *>(a.s0.data), *z0 = static_cast<const float *>(a.z0.data);
  if (cudaError_t error = measure<In>(shape, a, z, x, stream)) return error;
  const StageArray k{make_view(a.k), z.h_kv, z.d, z.padded_d, maxima.k, K_RANGE, w.k, nullptr, x.gates.chunk_decay, w.moment_weights};
  const StageArray v{make_view(a.v), z.h_kv, z.e, z.padded_e, maxima.v, V_RANGE, w.v, nullptr, nullptr, nullptr};
  if (cudaError_t error = stage<In>(z, {k, v}, stream)) return error;
  float *s = static_cast<float *>(a.s.data), *zs = static_cast<float *>(a.z.data);
  if (z.chunks > 1 || s0 != nullptr || s != nullptr)
    if (cudaError_t error = update_state(forward_update(z, x, w.k, w.v, w.moment_weights, s0, z0, s, zs), stream)) return error;
  const QueryParams query{z, make_view(a.q), make_view(a.y), static_cast<float *>(a.norm.data), w.k, w.v, x.states, x.moments, x.state_units,
                          x.moment_units, x.gates, maxima, s0 != nullptr, shape.normalize, float(shape.scale * shape.scale)};
  return dispatch_sizes(z, [&](auto d, auto e) { return QueryLaunch<In, d.value, e.value>::query(query, stream); });
}

}  // namespace

int64_t power_chunked_saved_sm90(const PowerAttentionShape *shape, const void *) {
  if (const char *why = unsupported(*shape)) return power_fail(POWER_UNSUPPORTED, "%s", why), -1;
  Arena arena(nullptr);
  Saved(arena, make_sizes(*shape));
  return arena.used();
}

int64_t power_chunked_forward_workspace_sm90(const PowerAttentionShape *shape, const void *) {
  if (const char *why = unsupported(*shape)) return power_fail(POWER_UNSUPPORTED, "%s", why), -1;
  return ForwardWorkspace(nullptr, nullptr, shape->saved, make_sizes(*shape)).arena.used();
}

int32_t power_chunked_forward_sm90(const PowerAttentionShape *shape, const PowerAttentionArrays *arrays, void *workspace, int64_t workspace_bytes,
                                   void *stream) {
  if (const char *why = unsupported(*shape)) return power_fail(POWER_UNSUPPORTED, "%s", why);
  const Sizes z = make_sizes(*shape);
  if (const char *why = invalid(*shape, *arrays)) return power_fail(POWER_INVALID, "%s", why);
  const ForwardWorkspace w(workspace, arrays->saved.data, shape->saved, z);
  if (workspace_bytes < w.arena.used() || (reinterpret_cast<uintptr_t>(workspace) & 255))
    return power_fail(POWER_WORKSPACE, "workspace: %lld bytes, %lld needed, aligned to 256", (long long)workspace_bytes, (long long)w.arena.used());
  const cudaError_t error = dispatch_dtype(shape->dtype, [&](auto in) { return run<decltype(in)>(*shape, *arrays, z, w, static_cast<cudaStream_t>(stream)); });
  return error == cudaSuccess ? POWER_OK : power_fail(POWER_DEVICE, "chunked forward: %s", cudaGetErrorString(error));
}
